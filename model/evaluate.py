"""Compare a run's probabilities with truth: recall of stars and galaxies, with intervals, by magnitude."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from scipy.stats import beta

from sgclassify.model.dataset import match_truth, read_shard
from sgclassify.model.runtime import load
from sgclassify.stages.errors import UsageError
from sgclassify.stages.flags import SgFlag

CLASSES = ("star", "galaxy")


@dataclass(frozen=True)
class Recall:
    """Share of a class that is classified right.

    Attributes
    ----------
    right, n : int
        Objects classified right, and objects of the class that were scored.
    low, high : float
        Clopper-Pearson interval of the share, confidence 95 %.
    """

    right: int
    n: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Objects classified right over all; nan of nothing."""
        return self.right / self.n if self.n else float("nan")


def recall(right: int, n: int, confidence: float = 0.95) -> Recall:
    """A recall with its exact binomial (Clopper-Pearson) interval."""
    tail = (1.0 - confidence) / 2.0
    low = float(beta.ppf(tail, right, n - right + 1)) if right else 0.0
    high = float(beta.ppf(1.0 - tail, right + 1, n - right)) if right < n else 1.0
    return Recall(right, n, low, high)


def read_objects(path: Path) -> pa.Table:
    """Objects of a run's ``objects`` folder, or of the run's folder."""
    root = path / "objects" / "dataset" if (path / "objects" / "dataset").is_dir() else path / "dataset"
    if not root.is_dir():
        raise UsageError(f"{path}: no object catalogue here; give the output folder of a run")
    files = sorted(str(file) for file in root.rglob("Npix=*.parquet"))
    return pads.dataset(files, format="parquet").to_table()


def labelled(objects: pa.Table, truth: pa.Table) -> pa.Table:
    """Objects with a match in truth: the truth's columns beside ``p_star``, ``p_galaxy``, ``sg_flags``, ``n_bands``."""
    match = match_truth(objects["ra"].to_numpy(), objects["dec"].to_numpy(), truth)
    found = np.flatnonzero(match >= 0)
    table = truth.take(match[found])
    for name in ("p_star", "p_galaxy", "sg_flags", "n_bands"):
        table = table.append_column(name, objects[name].take(found))
    return table


def recalls(table: pa.Table, keep: npt.NDArray[np.bool_]) -> dict[str, Recall]:
    """Recall of either class among the kept rows that were scored; quasars are in neither."""
    p_star = table["p_star"].to_numpy(zero_copy_only=False)
    kind = np.array(table["true_class"].to_pylist())
    scored = keep & np.isfinite(p_star)
    result = {}
    for name in CLASSES:
        here = scored & (kind == name)
        right = (p_star >= 0.5) == (name == "star")
        result[name] = recall(int((here & right).sum()), int(here.sum()))
    return result


def evaluate(
    run_dir: Path, truth_path: Path, band: str, edges: tuple[float, ...], unblended: bool
) -> list[dict[str, Any]]:
    """Recall of stars and galaxies in the products of a run, overall and by magnitude.

    Parameters
    ----------
    run_dir : Path
        Output folder of ``sgclassify run``.
    truth_path : Path
        Truth table of the field (FORMATS section 6).
    band : str
        Band of the magnitudes.
    edges : tuple of float
        Edges of the magnitude bins; the first row of the result spans all of them.
    unblended : bool
        Leave out objects that the truth (column ``blended``) or, without one, ``sg_flags`` calls blended.

    Returns
    -------
    list of dict
        One row for each interval of magnitude.
    """
    return by_magnitude(labelled(read_objects(run_dir), pq.read_table(truth_path)), band, edges, unblended)


def evaluate_part(
    data_dir: Path, part: str, model: Path | None, band: str, edges: tuple[float, ...], unblended: bool
) -> list[dict[str, Any]]:
    """The same for one part (validation, calibration, test) of a training set, scored here by a model.

    Raises
    ------
    UsageError
        If the folder has no shards of that part.
    """
    paths = sorted((data_dir / part).glob("*.parquet"))
    if not paths:
        raise UsageError(f"{data_dir / part}: no shards here; make them with `sgclassify dataset`")
    classifier = load(model)
    tables = []
    for path in paths:
        sample = read_shard(path)
        p_star = classifier.score_arrays(
            sample.image.astype(np.float32), sample.valid, sample.sigma, sample.features
        )
        blind = ~sample.valid.any(axis=(1, 2, 3)) | ~np.isfinite(p_star)
        tables.append(sample.table.append_column("p_star", pa.array(p_star, mask=blind)))
    return by_magnitude(pa.concat_tables(tables), band, edges, unblended)


def by_magnitude(
    table: pa.Table, band: str, edges: tuple[float, ...], unblended: bool
) -> list[dict[str, Any]]:
    """Recall in each interval of magnitude, the whole range first."""
    magnitude = table[f"mag_{band}"].cast(pa.float64()).to_numpy(zero_copy_only=False)
    clean = ~blended(table) if unblended else np.ones(len(magnitude), dtype=bool)
    rows = []
    for low, high in [(edges[0], edges[-1]), *itertools.pairwise(edges)]:
        keep = clean & (magnitude >= low) & (magnitude < high)
        found = recalls(table, keep)
        rows.append(
            {"band": band, "low": low, "high": high}
            | {name: asdict(value) | {"share": value.share} for name, value in found.items()}
        )
    return rows


def blended(table: pa.Table) -> npt.NDArray[np.bool_]:
    """Which rows are blended, by the truth where it says so, else by ``sg_flags``."""
    if "blended" in table.column_names:
        return np.asarray(table["blended"].fill_null(False).to_numpy(zero_copy_only=False), dtype=bool)
    return np.asarray((table["sg_flags"].to_numpy() & int(SgFlag.BLENDED)) != 0)


def as_text(rows: list[dict[str, Any]]) -> str:
    """The rows as a plain table."""
    lines = [f"{'magnitude':>13} {'star recall':>30} {'galaxy recall':>30}"]
    for row in rows:
        cells = [f"{row['band']} {row['low']:.1f}-{row['high']:.1f}".rjust(13)]
        for name in CLASSES:
            r = row[name]
            interval = f"[{100 * r['low']:.1f}, {100 * r['high']:.1f}]"
            text = f"{100 * r['share']:.2f} % {interval} of {r['n']}" if r["n"] else "-"
            cells.append(text.rjust(30))
        lines.append(" ".join(cells))
    return "\n".join(lines)
