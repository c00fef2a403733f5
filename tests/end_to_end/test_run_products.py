"""The products of a run that goes well, over all that a list may hold."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits

from sgclassify.stages.columns import NO_OBJECT
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.healpix import index29
from sgclassify.stages.read.names import catalog_stem, exposure_stem, find_siblings

pytestmark = pytest.mark.slow

APPENDED = ["object_id", "p_star", "p_galaxy", "sg_class", "sg_flags", "n_bands", "bands"]
OBJECTS = ["object_id", "ra", "dec", *APPENDED[1:], "logit", "sg_stage", "_healpix_29"]


def detections_of(run: Any, image: Path) -> pa.Table:
    """The product of an exposure."""
    return pq.read_table(run.output / "detections" / f"{catalog_stem(find_siblings(image))}.parquet")


def objects_of(run: Any) -> pa.Table:
    """All objects, in the order of the partitions."""
    paths = sorted((run.output / "objects" / "dataset").rglob("Npix=*.parquet"))
    return pa.concat_tables([pq.read_table(path, partitioning=None) for path in paths])


def assert_has_catalogue(table: pa.Table, catalog: Path) -> None:
    """Every row and column of a CAT stands at the beginning of a product, unchanged and in order."""
    with fits.open(catalog) as hdus:
        data = hdus[1].data
        assert table.column_names == [*data.names, *APPENDED]
        assert table.num_rows == len(data)
        for name in data.names:
            found = np.array(table[name].to_pylist())
            np.testing.assert_array_equal(found, data[name], err_msg=name)


def assert_probabilities(table: pa.Table) -> None:
    """Probabilities sum to 1 or are null, and the class follows from them."""
    p_star, p_galaxy = (table[name].to_numpy(zero_copy_only=False) for name in ("p_star", "p_galaxy"))
    scored = ~np.isnan(p_star)
    np.testing.assert_array_equal(np.isnan(p_galaxy), ~scored)
    assert table["p_star"].null_count == table["p_galaxy"].null_count == int((~scored).sum())
    np.testing.assert_allclose(p_star[scored].astype(np.float64) + p_galaxy[scored], 1.0, rtol=0, atol=1e-7)
    classes = np.where(scored, np.where(p_star >= 0.5, "star", "galaxy"), None)
    assert table["sg_class"].to_pylist() == classes.tolist()


def test_catalogues_come_back(reference: Any, field: Any) -> None:
    objects = {row["object_id"]: row for row in objects_of(reference).to_pylist()}
    for image in field.images:
        files = find_siblings(image)
        assert files.catalog is not None
        table = detections_of(reference, image)
        assert_has_catalogue(table, files.catalog)
        assert_probabilities(table)
        for row in table.select(APPENDED).to_pylist():
            assert row["object_id"] is not None
            for name in ("p_star", "p_galaxy", "sg_class", "n_bands", "bands"):
                assert row[name] == objects[row["object_id"]][name]
    assert len(list((reference.output / "detections").iterdir())) == len(field.images)


def test_objects(reference: Any, field: Any) -> None:
    table = objects_of(reference)
    assert table.column_names == OBJECTS
    assert table["p_star"].null_count < table.num_rows
    assert_probabilities(table)
    assert len(set(table["object_id"].to_pylist())) == table.num_rows
    index = table["_healpix_29"].to_numpy()
    np.testing.assert_array_equal(index, index29(table["ra"].to_numpy(), table["dec"].to_numpy()))
    for path in (reference.output / "objects" / "dataset").rglob("Npix=*.parquet"):
        own = pq.read_table(path, columns=["_healpix_29"], partitioning=None)["_healpix_29"].to_numpy()
        assert (np.diff(own) >= 0).all()
        order = int(path.parent.parent.name.removeprefix("Norder="))
        assert set(own >> 2 * (29 - order)) == {int(path.stem.removeprefix("Npix="))}
    used = [row.split(",") if row else [] for row in table["bands"].to_pylist()]
    assert [len(bands) for bands in used] == table["n_bands"].to_pylist()
    members = [detections_of(reference, image)["object_id"].to_pylist() for image in field.images]
    assert {one for ids in members for one in ids} - {NO_OBJECT} == set(table["object_id"].to_pylist())
    for ids in members:
        ids = [one for one in ids if one != NO_OBJECT]
        assert len(set(ids)) == len(ids), "two detections of one exposure in one object"


def test_objects_open_as_hats_catalogue(reference: Any) -> None:
    import dask
    import hats
    from hats.io.validation import is_valid_catalog

    table, root = objects_of(reference), reference.output / "objects"
    assert is_valid_catalog(root, strict=True)
    assert hats.read_hats(root).catalog_info.total_rows == table.num_rows
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(lsdb|nested_pandas)\.")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(lsdb|nested_pandas)\.")
        warnings.filterwarnings("ignore", message=r".*(mode\.chained_assignment|NestedFrame)")
        import lsdb

        with dask.config.set(scheduler="synchronous"):
            frame = lsdb.open_catalog(root).compute(progress_bar=False)
    assert sorted(frame["object_id"]) == sorted(table["object_id"].to_pylist())


def test_record(reference: Any, field: Any) -> None:
    record, table = reference.record, objects_of(reference)
    assert record["exit_code"] == 0
    assert record["message"] == ""
    assert record["counts"]["objects"] == table.num_rows == sum(t["n_objects"] for t in record["tiles"])
    assert record["counts"]["stars"] + record["counts"]["galaxies"] == table.num_rows - table["p_star"].null_count
    assert record["counts"]["exposures"] == record["counts"]["exposures_done"] == len(field.images)
    assert sorted(one["band"] for one in record["inputs"]) == sorted(["NUV", "u", "g", "r", "i", "z", "y"])
    for one in record["inputs"]:
        assert one["outcome"] == "done"
        assert one["rows"] == one["usable"] == one["scored"] > 0
        assert set(one["sha256"]) == set(one["files"].values())
    assert record["model"]["id"]
    assert record["configuration"]["run"]["tile_order"] == 13
    assert record["software"]["sgclassify"]
    assert reference.leftovers() == []
    assert "<html" in (reference.output / "report.html").read_text(encoding="utf-8")
    assert f"objects     {table.num_rows}\n" in reference.stdout


ODD_ROWS = {"X": {0: np.nan, 1: 1e5}, "RA": {2: 150.01, 3: -9999.0}, "DEC": {6: np.inf}, "objID": {5: 5}}
"""What is wrong in a CAT: column, row (from 0), value. Row 4 has the objID 5, too."""


@pytest.fixture(scope="module")
def mixed(
    sgclassify: Callable[..., Any],
    warm: tuple[str, ...],
    field: Any,
    write_level1: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Any, dict[str, Path]]:
    """A run over a list of every legal kind of entry, and of exposures that lack files; two pointings."""
    folder = tmp_path_factory.mktemp("mixed")
    first = folder / "Feld Nº 1, größer – 星場"
    shutil.copytree(field.folder, first / "below")
    second = folder / "second pointing"
    yy, xx = np.mgrid[:160, :160]
    rng = np.random.default_rng(2)
    image = rng.normal(0.3, 0.05, (160, 160))
    for x, y in ((40, 40), (100, 50), (70, 120)):
        image += 5.0 * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / 2)
    made = {
        "no WHT": write_level1(second, chip=20, kinds="IMG FLG CAT", shape=(160, 160)),
        "no FLG": write_level1(second, chip=22, kinds="IMG WHT CAT", shape=(160, 160)),
        "no CAT": write_level1(second, chip=8, kinds="IMG WHT FLG", shape=(160, 160), image=image.astype(np.float32)),
    }
    odd = write_level1(second, chip=7, shape=(160, 160), checksum=False)
    with fits.open(odd.catalog, mode="update") as hdus:
        for name, values in ODD_ROWS.items():
            for row, value in values.items():
                hdus[1].data[name][row] = value
    images = {name: files.image for name, files in {**made, "odd rows": odd}.items()}
    again = next((first / "below").glob("*_IMG.fits*"))
    lines = [
        "# every kind of entry",
        first.name,
        "",
        *(f"  {second.name}/{image.name}  " for image in images.values()),
        f"{first.name}/below/../below/{again.name}",
    ]
    listed = folder / "list of exposures.txt"
    listed.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    done = sgclassify(listed, folder / "Ausgabe ä", *warm)
    assert done.code == 0, done.stderr
    return done, images


def test_entries_of_a_list(mixed: tuple[Any, dict[str, Path]], reference: Any, field: Any) -> None:
    run, images = mixed
    assert run.record["counts"]["exposures_done"] == len(field.images) + len(images)
    (note,) = run.record["notes"]
    assert "is the same exposure as" in note
    assert run.leftovers() == []
    here = objects_of(reference).to_pylist()
    ids = {row["object_id"] for row in here}
    assert [row for row in objects_of(run).to_pylist() if row["object_id"] in ids] == here
    for name, digest in reference.digests("detections").items():
        assert run.digests("detections")[name] == digest


@pytest.mark.parametrize(("missing", "flag"), [("no WHT", SgFlag.NO_WEIGHT), ("no FLG", SgFlag.NO_FLAG_IMAGE)])
def test_missing_weights_or_flags(mixed: tuple[Any, dict[str, Path]], missing: str, flag: SgFlag) -> None:
    run, images = mixed
    table = detections_of(run, images[missing])
    catalog = find_siblings(images[missing]).catalog
    assert catalog is not None
    assert_has_catalogue(table, catalog)
    assert_probabilities(table)
    entry = run.inputs[exposure_stem(images[missing])]
    assert any(missing in note for note in entry["notes"])
    assert all(value & flag for value in table["sg_flags"].to_pylist())


def test_missing_catalogue(mixed: tuple[Any, dict[str, Path]]) -> None:
    run, images = mixed
    table = detections_of(run, images["no CAT"])
    assert images["no CAT"].name.replace("_IMG.fits", "_CAT.parquet") in {
        path.name for path in (run.output / "detections").iterdir()
    }
    bright = table.sort_by([("Flux_Kron", "descending")])[:3]
    positions = sorted((round(row["X"]), round(row["Y"])) for row in bright.to_pylist())
    assert positions == [(41, 41), (71, 121), (101, 51)]
    assert all(value & SgFlag.STAGE_CATALOG for value in table["sg_flags"].to_pylist())
    assert_probabilities(table)
    entry = run.inputs[exposure_stem(images["no CAT"])]
    assert entry["rows"] == table.num_rows
    assert any("CAT missing" in note for note in entry["notes"])


def test_odd_rows_keep_their_place(mixed: tuple[Any, dict[str, Path]]) -> None:
    run, images = mixed
    table = detections_of(run, images["odd rows"])
    catalog = find_siblings(images["odd rows"]).catalog
    assert catalog is not None
    assert_has_catalogue(table, catalog)
    flags = table["sg_flags"].to_pylist()
    without = {0: SgFlag.NO_POSITION, 1: SgFlag.NO_POSITION, 2: SgFlag.POSITION_MISMATCH,
               3: SgFlag.NO_POSITION, 6: SgFlag.NO_POSITION}  # fmt: skip
    for number, row in enumerate(table.to_pylist()):
        empty = [name for name in ("p_star", "p_galaxy", "sg_class") if row[name] is None]
        assert empty == (["p_star", "p_galaxy", "sg_class"] if number in without else []), number
        assert (row["object_id"] == NO_OBJECT) == (row["n_bands"] == 0) == (number in without)
        assert bool(flags[number] & SgFlag.NO_POSITION) == (without.get(number) == SgFlag.NO_POSITION)
        assert bool(flags[number] & SgFlag.POSITION_MISMATCH) == (without.get(number) == SgFlag.POSITION_MISMATCH)
        assert bool(flags[number] & SgFlag.DUPLICATE_ID) == (number in (4, 5))
    entry = run.inputs[exposure_stem(images["odd rows"])]
    assert (entry["rows"], entry["usable"], entry["scored"]) == (12, 7, 7)
    assert {
        "4 rows without a usable position",
        "1 rows whose pixel and sky positions disagree",
        "2 rows whose objID occurs more than once",
    } <= set(entry["notes"])


def test_one_exposure_by_csv(
    sgclassify: Callable[..., Any],
    warm: tuple[str, ...],
    write_level1: Callable[..., Any],
    tmp_path: Path,
) -> None:
    files = write_level1(tmp_path / "images", chip=7)
    catalog = tmp_path / "measured, again.fits"
    files.catalog.rename(catalog)
    listed = tmp_path / "exposures.csv"
    listed.write_text(f'\ufeffimage,catalog\nimages/{files.image.name},"{catalog.name}"\n', encoding="utf-8")
    done = sgclassify(listed, tmp_path / "output", *warm)
    assert done.code == 0, done.stderr
    table = pq.read_table(tmp_path / "output" / "detections" / "measured, again.parquet")
    assert_has_catalogue(table, catalog)
    assert_probabilities(table)
    assert set(table["n_bands"].to_pylist()) <= {0, 1}
    assert all(value & SgFlag.FEW_BANDS for value in table["sg_flags"].to_pylist())
    assert objects_of(done).num_rows == table.num_rows
