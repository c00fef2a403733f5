"""Whole simulated fields: names, reproducibility, truth, resuming, and whether the stage can read them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.wcs import WCS

pytest.importorskip("galsim")
pytest.importorskip("skypy")

from sgclassify.simulation.simulate import SimulationConfig, simulate, simulate_field
from sgclassify.stages.bands import BANDS, DETECTOR_FILTER
from sgclassify.stages.read.header import read_header
from sgclassify.stages.read.names import find_siblings, parse_name

SMALL = SimulationConfig(
    seed=11,
    n_fields=1,
    detector_shape=(200, 240),
    bands=("g", "i"),
    density=(2.0, 2.0),
    astrometric_error=(0.0, 0.0),
)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sim")
    simulate(SMALL, out)
    return out


def test_files_have_the_names_of_the_contract(field: Path) -> None:
    lines = (field / "exposures.txt").read_text().splitlines()
    images = [field / line for line in lines if not line.startswith("#")]
    assert len(images) == 2
    for path, band in zip(images, ("g", "i"), strict=True):
        name = parse_name(path)
        assert name is not None
        assert len(name.obsid) == 11
        assert DETECTOR_FILTER[name.chip] == band
        files = find_siblings(path)
        assert None not in (files.weight, files.flag, files.catalog)
        for sibling in (files.image, files.weight, files.flag, files.catalog):
            assert sibling is not None
            with fits.open(sibling, checksum=True) as hdus:
                hdus.verify("exception")
                assert len(hdus) == 2
                assert hdus[0].data is None
                assert hdus[1].data is not None


def test_header_says_what_the_contract_asks(field: Path) -> None:
    for path in field.glob("*/*_IMG.fits"):
        header = read_header(find_siblings(path))
        assert header.shape == (200, 240)
        assert header.exposure_time == 150.0
        assert header.gain == 1.1
        assert 4.7 <= header.read_noise <= 5.5
        assert 1.6 < header.fwhm_px < 3.0
        assert header.sky_rms > 0
        assert header.saturate == pytest.approx(0.97 * (65_535 - 500) * 1.1 / 150)
        assert not header.notes
        flags = fits.getdata(find_siblings(path).flag, 1)
        assert flags.dtype == np.uint16


def test_same_seed_same_bytes_whatever_the_number_of_fields(field: Path, tmp_path: Path) -> None:
    again = simulate_field(SimulationConfig(**{**vars(SMALL), "n_fields": 7}), 0, tmp_path)
    assert digests(again.folder) == digests(field / "field_00000")


def test_another_field_is_another_sky(field: Path, tmp_path: Path) -> None:
    other = simulate_field(SMALL, 1, tmp_path)
    ours = pq.read_table(field / "field_00000" / "truth.parquet")
    theirs = pq.read_table(other.truth)
    assert not set(ours["object_id"].to_pylist()) & set(theirs["object_id"].to_pylist())
    assert abs(ours["dec"][0].as_py() - theirs["dec"][0].as_py()) > 0.01


def test_a_band_left_out_changes_no_other(field: Path, tmp_path: Path) -> None:
    alone = simulate_field(SimulationConfig(**{**vars(SMALL), "bands": ("i",)}), 0, tmp_path)
    ours = digests(field / "field_00000")
    theirs = digests(alone.folder)
    images = [name for name in theirs if name.endswith(".fits")]
    assert images
    assert all(theirs[name] == ours[name] for name in images)


def test_finished_fields_are_kept_and_broken_ones_made_again(field: Path, tmp_path: Path) -> None:
    config = SimulationConfig(seed=5, detector_shape=(32, 32), bands=("r",), catalogs=False)
    first = simulate(config, tmp_path)[0]
    assert first.made
    assert not simulate(config, tmp_path)[0].made
    before = digests(first.folder)
    first.images[0].unlink()
    assert simulate(config, tmp_path)[0].made
    assert digests(first.folder) == before
    with pytest.raises(ValueError, match="another configuration"):
        simulate(SimulationConfig(seed=6, detector_shape=(32, 32), bands=("r",)), tmp_path)


@pytest.mark.slow
def test_processes_make_no_difference(tmp_path: Path) -> None:
    config = SimulationConfig(seed=5, n_fields=2, detector_shape=(32, 32), bands=("r",), catalogs=False)
    one = simulate(config, tmp_path / "one")
    two = simulate(config, tmp_path / "two", processes=2)
    assert [r.index for r in two] == [0, 1]
    for a, b in zip(one, two, strict=True):
        assert digests(a.folder) == digests(b.folder)


def test_truth_has_the_columns_of_the_contract(field: Path) -> None:
    table = pq.read_table(field / "field_00000" / "truth.parquet")
    wanted = ["object_id", "ra", "dec", "true_class", "redshift", "r50_arcsec", "sersic_n"]
    wanted += [f"mag_{band}" for band in BANDS]
    assert table.column_names[: len(wanted)] == wanted
    assert set(table["true_class"].to_pylist()) <= {"star", "galaxy", "qso"}
    assert len(set(table["object_id"].to_pylist())) == table.num_rows
    record = json.loads((field / "field_00000" / "field.json").read_text())
    assert record["n_sources"] == table.num_rows


def test_detections_lie_on_the_truth(field: Path) -> None:
    truth = pq.read_table(field / "field_00000" / "truth.parquet")
    sky = np.stack([truth["ra"].to_numpy(), truth["dec"].to_numpy()], 1)
    mag = truth["mag_i"].to_numpy()
    path = next(p for p in field.glob("*/*_IMG.fits") if fits.getheader(p, 1)["FILTER"] == "i")
    header = fits.getheader(path, 1)
    x, y = WCS(header).all_world2pix(sky, 0).T
    catalog = fits.getdata(find_siblings(path).catalog, 1)
    inside = (mag < 24.5) & (x > 4) & (y > 4) & (x < 235) & (y < 195)
    flags = fits.getdata(find_siblings(path).flag, 1)
    inside[inside] = flags[np.rint(y[inside]).astype(int), np.rint(x[inside]).astype(int)] == 0
    assert inside.sum() >= 3
    near = np.hypot(catalog["X"][:, None] - 1 - x[inside], catalog["Y"][:, None] - 1 - y[inside]).min(axis=0)
    assert np.median(near) < 0.5
    assert (near < 2).mean() > 0.7


def test_older_names_and_compressed_files_are_read(tmp_path: Path) -> None:
    config = SimulationConfig(
        seed=3, detector_shape=(48, 64), bands=("g",), catalogs=False, compressed_share=1.0,
        variant_share=1.0, distortion_share=1.0,
    )  # fmt: skip
    result = simulate_field(config, 0, tmp_path)
    (image,) = result.images
    assert image.name.endswith("_img_L1.fits.fz")
    files = find_siblings(image)
    assert files.weight is not None
    assert files.flag is not None
    header = read_header(files)
    assert header.shape == (48, 64)
    assert header.gain == 1.1
    assert "RA---TPV" in header.wcs_cards
    weight, flags = fits.getdata(files.weight, 1), fits.getdata(files.flag, 1)
    np.testing.assert_array_equal(weight == 0, flags > 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bands": ("g", "V")}, {"bands": ()}, {"psf_families": ("gauss",)}, {"detector_shape": (8, 100)},
        {"detector_shape": (9233, 100)}, {"n_fields": 0}, {"seed": -1}, {"star_fraction": (0.2, 1.0)},
    ],
)  # fmt: skip
def test_wrong_configurations_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must|detector has"):
        SimulationConfig(**wrong)  # type: ignore[arg-type]
