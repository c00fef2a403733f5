"""Whether the figures hold on another simulator's fields: ``python benchmarks/foreign.py OUTPUT [--fields 24]``.

The model was trained on one simulator. This one shares only the facts of the camera with it. It differs in what the
model could have learnt by heart: galaxies (knots, spiral arms, rings, irregulars, mergers), PSFs, spectra, effects of
the detector, and catalogues, which SExtractor makes with other settings. The command simulates the fields, classifies
each, and prints the errors by PSF family and the tables of ``sgclassify evaluate``. Run again, it goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from astropy.io import fits
from foreign_exposures import simulate_field
from foreign_files import PROGRAMS
from foreign_photographs import read_photographs
from foreign_psf import PSF_FAMILIES

from sgclassify.model.data.match import match_truth
from sgclassify.model.judge.evaluate import Judged, evaluate
from sgclassify.model.judge.results import as_text
from sgclassify.model.judge.scores import read_objects

EDGES = (18.0, 20.0, 22.0, 24.0, 25.0, 26.0)


def family_of(number: int) -> str:
    """PSF family of a field."""
    return PSF_FAMILIES[number % len(PSF_FAMILIES)]


def claim_fwhm(field: Path, fwhm_px: float) -> None:
    """Write another FWHM into the headers of a field's exposures."""
    for path in sorted(field.glob("*/*_IMG.fits*")):
        with fits.open(path, mode="update", disable_image_compression=True) as hdus:
            for hdu in hdus:
                if "FWHM" in hdu.header:
                    hdu.header["FWHM"] = fwhm_px


def classify(listed: Path, output: Path, model: Path | None) -> None:
    """Run the product on the exposures of a field, unless it has done so with this model."""
    record = output / "run.json"
    if record.is_file():
        done = json.loads(record.read_text(encoding="utf-8"))
        if done["exit_code"] == 0 and done["model"]["path"] == str(model or "default"):
            return
    command = [sys.executable, "-m", "sgclassify.pipeline", "run", "--exposure-list", str(listed)]
    command += ["--output", str(output), "--workers", "1", "--device", "cpu"]
    if model:
        command += ["--model", str(model)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"{listed}: exit status {finished.returncode}\n{finished.stderr[-2000:]}")


def class_star(run: Path) -> dict[int, float]:
    """SExtractor's CLASS_STAR of the objects of a run, the mean over the bands."""
    values: dict[int, list[float]] = {}
    for path in sorted((run / "detections").glob("*.parquet")):
        table = pq.read_table(path)
        for name in table.column_names:
            if name.lower() == "class_star":
                for key, value in zip(table["object_id"].to_pylist(), table[name].to_pylist(), strict=True):
                    if key is not None and value is not None:
                        values.setdefault(key, []).append(value)
    return {key: float(np.mean(found)) for key, found in values.items()}


def scores_of_field(number: int, field: Path, run: Path) -> pa.Table:
    """Objects of a field that are in its truth, one per row, with the scores of the model and CLASS_STAR."""
    objects, truth = read_objects(run), pq.read_table(field / "truth.parquet")
    match = match_truth(objects["ra"].to_numpy(), objects["dec"].to_numpy(), truth)
    found = np.flatnonzero(match >= 0)
    objects, truth = objects.take(found), truth.take(match[found])
    stars = class_star(run)
    columns = {"field": [number] * len(found), "psf_family": [family_of(number)] * len(found)}
    columns |= {name: truth[name] for name in ("true_class", "mag_i", "r50_arcsec", "redshift", "kind")}
    columns["p_star"] = objects["p_star"]
    values = [stars.get(key) for key in objects["object_id"].to_pylist()]
    columns["p_class_star"] = pa.array(values, pa.float64())
    return pa.table(columns | {name: objects[name] for name in ("sg_flags", "n_bands")})


def print_figures(scores: pa.Table) -> None:
    """Print errors by PSF family, then the tables of all fields, all from the same objects."""
    judged = Judged(scores)
    counted = judged.scored & (judged.magnitude >= EDGES[0]) & (judged.magnitude < EDGES[-1])
    wrong = (scores["p_star"].to_numpy() >= 0.5) != judged.star
    families = np.array(scores["psf_family"].to_pylist())
    print(f"{'PSF family':<14}{'objects':>9}{'errors':>8}{'share':>9}")
    for family in PSF_FAMILIES:
        here = counted & (families == family)
        if here.any():
            n, errors = int(here.sum()), int(wrong[here].sum())
            print(f"{family:<14}{n:>9}{errors:>8}{100 * errors / n:>7.2f} %")
    print()
    print(as_text(evaluate(scores, "i", EDGES)))


def main() -> None:
    """Simulate, classify, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--fields", type=int, default=24)
    parser.add_argument("--model", type=Path, default=None, help="Model archive. [default: the shipped one]")
    parser.add_argument(
        "--fwhm",
        type=float,
        default=None,
        help="FWHM in the headers of new fields instead of the true one, pixels.",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        default=None,
        help="Colour picture; galaxies of new fields get the shapes of its galaxies.",
    )
    arguments = parser.parse_args()
    photographs = read_photographs(arguments.picture) if arguments.picture else []
    if arguments.picture and not photographs:
        sys.exit(f"{arguments.picture}: no galaxy that is large and bright enough")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        sys.exit(f"{' and '.join(missing)} not found: install Debian's packages source-extractor and psfex")
    tables = []
    for number in range(arguments.fields):
        field = arguments.output / "fields" / f"{number:02d}"
        run = arguments.output / "runs" / f"{number:02d}"
        if not (field / "truth.parquet").is_file():
            simulate_field(number, family_of(number), field, photographs)
            if arguments.fwhm:
                claim_fwhm(field, arguments.fwhm)
        classify(field / "exposures.txt", run, arguments.model)
        tables.append(scores_of_field(number, field, run))
        print(f"field {number:02d}: {tables[-1].num_rows} objects", file=sys.stderr)
    scores = pa.concat_tables(tables, promote_options="permissive")
    pq.write_table(scores, arguments.output / "scores.parquet")
    print_figures(scores)


if __name__ == "__main__":
    main()
