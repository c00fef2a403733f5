"""Prepare exposures and extract tiles: three bands of one scene of Gaussian sources, shifted and rolled."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from astropy.nddata import Cutout2D
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages import collect
from sgclassify.stages import tile as tile_module
from sgclassify.stages.associate import SkyPositions
from sgclassify.stages.bands import BAND_INDEX, nanomaggies_per_count
from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import LongChainError
from sgclassify.stages.features import FEATURES
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.healpix import tile_of
from sgclassify.stages.measure import measure_stamps
from sgclassify.stages.prepare import prepare_exposure
from sgclassify.stages.read.header import read_header
from sgclassify.stages.read.pixels import ExposurePixels
from sgclassify.stages.read.prepared import PreparedExposure
from sgclassify.stages.tile import _blended, _Objects, _Pool, extract_tile
from sgclassify.stages.tiling import Part, Tile

SHAPE = (160, 192)
SIZE = 20
CHIPS = {"g": 8, "i": 7, "y": 6}
RMS = 0.05
CONFIG = StageConfig(sky_box_px=64)


def sources(n=25, seed=4):
    """Sky positions (degrees) and fluxes (nanomaggies), none nearer than 1.5" to another."""
    rng = np.random.default_rng(seed)
    places = []
    while len(places) < n:
        place = rng.uniform(-5.0, 5.0, 2)
        if all(np.hypot(*(place - other)) > 1.5 for other in places):
            places.append(place)
    dx, dy = np.array(places).T / 3600
    return 150.0 + dx / np.cos(np.radians(2.0)), 2.0 + dy, rng.uniform(0.5, 20.0, n)


def scene(make_exposure, band, *, shift=(0.0, 0.0), roll_deg=0.0, flag=None, seen=None, **more):
    ny, nx = SHAPE
    angle = np.radians(roll_deg)
    scale = 0.074 / 3600
    cards = {
        "CRPIX1": (nx + 1) / 2 + shift[0],
        "CRPIX2": (ny + 1) / 2 + shift[1],
        "CD1_1": -scale * np.cos(angle),
        "CD1_2": scale * np.sin(angle),
        "CD2_1": scale * np.sin(angle),
        "CD2_2": scale * np.cos(angle),
        "ZP": 25.5,
    }
    header = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.0, "CRVAL2": 2.0, **cards}
    ra, dec, flux = sources()
    x, y = WCS(header).wcs_world2pix(ra, dec, 0)
    rng = np.random.default_rng(CHIPS[band])
    image = 0.3 + rng.normal(0, RMS, SHAPE)
    yy, xx = np.mgrid[:ny, :nx]
    for x0, y0, f in zip(x, y, flux * 10 ** (0.4 * 3.0), strict=True):
        image += f * np.exp(-0.5 * ((xx - x0) ** 2 + (yy - y0) ** 2) / 0.95**2) / (2 * np.pi * 0.95**2)
    keep = (x > -0.5) & (x < nx - 0.5) & (y > -0.5) & (y < ny - 0.5)
    if seen is not None:
        keep &= seen
    columns = {
        "objID": np.arange(1, keep.sum() + 1, dtype=np.int32),
        "X": x[keep] + 1,
        "Y": y[keep] + 1,
        "RA": ra[keep],
        "DEC": dec[keep],
    }
    return make_exposure(
        chip=CHIPS[band],
        shape=SHAPE,
        image=image.astype(np.float32),
        flag=flag,
        cards=cards,
        columns=columns,
        obsid=f"1016000000{CHIPS[band]}",
        **more,
    )


@pytest.fixture
def three(make_exposure, tmp_path):
    """Three bands: shifted, rolled by half a turn, and with every second source missing in its catalogue."""
    flag = np.zeros(SHAPE, np.uint16)
    flag[::12, :] = 1
    seen = np.arange(25) % 2 == 0
    work = tmp_path / "work"
    work.mkdir()
    files = [
        scene(make_exposure, "g", shift=(3.3, -2.6)),
        scene(make_exposure, "i", roll_deg=180.0, flag=flag),
        scene(make_exposure, "y", shift=(-4.2, 1.7), roll_deg=30.0, seen=seen, kinds="IMG CAT"),
    ]
    return [prepare_exposure(read_header(f), work, CONFIG) for f in files]


def tiles_of(prepared, order):
    ra, dec, _ = sources()
    return sorted({int(p) for p in tile_of(ra, dec, order)} | {int(p) for p in tile_of([150.0], [2.0], order)})


def test_all_bands_of_a_source_become_one_object(three):
    ra, dec, _ = sources()
    (pixel,) = tiles_of(three, 8)
    tile = extract_tile(8, pixel, three, SIZE, CONFIG)
    assert len(tile) == len(ra)
    nearest = np.argmin(np.hypot(tile.ra[:, None] - ra, tile.dec[:, None] - dec), axis=1)
    assert sorted(nearest) == list(range(len(ra)))
    np.testing.assert_allclose(tile.dec, dec[nearest], atol=1e-7)
    detected = tile.features[:, :, FEATURES.index("detected")]
    y = BAND_INDEX["y"]
    # a source that the y catalogue lacks is still measured in y, at its place by the WCS
    lacking = tile.used[:, y] & (nearest % 2 == 1)
    assert lacking.sum() > 5
    assert (detected[lacking, y] == 0).all()
    snr = np.sinh(tile.features[lacking, y, FEATURES.index("snr")])
    assert (snr > 5).all()
    assert set(tile.bands) <= {"g,i,y", "g,i", "g,y", "i,y", "g", "i", "y"}
    assert np.isnan(tile.features[:, BAND_INDEX["u"]]).all()
    assert not tile.valid[:, BAND_INDEX["u"]].any()


def test_stamps_are_the_cutouts_of_the_exposure(three):
    (pixel,) = tiles_of(three, 8)
    tile = extract_tile(8, pixel, three, SIZE, CONFIG)
    for prepared in three:
        band = BAND_INDEX[prepared.header.band]
        with ExposurePixels(prepared.header) as pixels:
            window = pixels.window(0, SHAPE[0], 0, SHAPE[1])
        level, _ = prepared.sky().at(0, SHAPE[0], 0, SHAPE[1])
        data = (window.image - level) * np.float32(nanomaggies_per_count(prepared.header.zero_point))
        x, y = prepared.header.wcs().wcs_world2pix(tile.ra, tile.dec, 0)
        for k in np.flatnonzero(tile.used[:, band]):
            image = Cutout2D(data, (x[k], y[k]), SIZE, mode="partial", fill_value=0).data
            valid = Cutout2D(window.valid.astype(int), (x[k], y[k]), SIZE, mode="partial", fill_value=0).data > 0
            np.testing.assert_array_equal(tile.valid[k, band], valid)
            np.testing.assert_array_equal(tile.image[k, band], np.where(valid, image, 0))


def test_the_psf_of_a_stamp_is_that_of_its_exposure(three):
    (pixel,) = tiles_of(three, 8)
    tile = extract_tile(8, pixel, three, SIZE, CONFIG)
    for prepared in three:
        band = BAND_INDEX[prepared.header.band]
        used = np.flatnonzero(tile.used[:, band])
        x, y = prepared.header.wcs().wcs_world2pix(tile.ra[used], tile.dec[used], 0)
        first_x, first_y = np.ceil(x - SIZE / 2), np.ceil(y - SIZE / 2)
        measured = measure_stamps(
            tile.image[used, band],
            tile.valid[used, band],
            np.zeros((used.size, SIZE, SIZE), bool),
            tile.sigma[used, band],
            x - first_x,
            y - first_y,
            CONFIG.core_radius_px,
        )
        place = first_x + measured.x, first_y + measured.y
        expected = prepared.psf_model.stamps(measured.x, measured.y, *place, SIZE)
        # a position by the WCS and that of the catalogue differ by rounding
        np.testing.assert_allclose(tile.psf[used, band], expected, atol=1e-5 * expected.max())


def test_pixels_of_a_sky_without_noise_are_not_data(three, monkeypatch):
    (pixel,) = tiles_of(three, 8)
    before = extract_tile(8, pixel, three, SIZE, CONFIG)
    whole = three[0].sky()
    blind = dataclasses.replace(whole, sigma=np.where(np.arange(whole.sigma.shape[1]) < 2, 0, whole.sigma))
    monkeypatch.setattr(PreparedExposure, "sky", lambda self: blind)
    tile = extract_tile(8, pixel, three[:1], SIZE, CONFIG)
    _, noise = blind.at(0, SHAPE[0], 0, SHAPE[1])
    assert 0 < (noise > 0).sum() < noise.size
    band = BAND_INDEX[three[0].header.band]
    x, y = three[0].header.wcs().wcs_world2pix(tile.ra, tile.dec, 0)
    seen = 0
    for k in np.flatnonzero(tile.used[:, band]):
        noisy = Cutout2D((noise > 0).astype(int), (x[k], y[k]), SIZE, mode="partial", fill_value=0).data > 0
        same = np.flatnonzero(before.object_id == tile.object_id[k])
        np.testing.assert_array_equal(tile.valid[k, band], before.valid[same[0], band] & noisy)
        seen += int((~noisy).any())
    assert seen


def test_flags_say_what_is_wrong_with_the_bands(three):
    (pixel,) = tiles_of(three, 8)
    tile = extract_tile(8, pixel, three, SIZE, CONFIG)
    flagged = lambda flag: (tile.sg_flags & int(flag)) != 0  # noqa: E731
    np.testing.assert_array_equal(flagged(SgFlag.NO_WEIGHT), tile.used[:, BAND_INDEX["y"]])
    np.testing.assert_array_equal(flagged(SgFlag.FEW_BANDS), tile.n_bands < 3)
    np.testing.assert_array_equal(flagged(SgFlag.EDGE), ~inside(tile, three))
    assert flagged(SgFlag.MASKED).any()
    assert not flagged(SgFlag.BLENDED).any()
    assert not flagged(SgFlag.STAGE_CATALOG).any()


def inside(tile, prepared):
    whole = np.ones(len(tile), bool)
    for exposure in prepared:
        band = BAND_INDEX[exposure.header.band]
        x, y = exposure.header.wcs().wcs_world2pix(tile.ra, tile.dec, 0)
        fx, fy = np.ceil(x - SIZE / 2), np.ceil(y - SIZE / 2)
        fits = (fx >= 0) & (fy >= 0) & (fx + SIZE <= SHAPE[1]) & (fy + SIZE <= SHAPE[0])
        whole &= fits | ~tile.used[:, band]
    return whole


@pytest.mark.parametrize("order", [12, 14])
def test_an_object_is_the_same_whatever_the_tiles(three, order):
    (pixel,) = tiles_of(three, 8)
    whole = extract_tile(8, pixel, three, SIZE, CONFIG)
    parts = [extract_tile(order, p, three[::-1], SIZE, CONFIG) for p in tiles_of(three, order)]
    ids = np.concatenate([p.object_id for p in parts])
    assert len(set(ids)) == len(ids)
    rank = np.argsort(ids)
    np.testing.assert_array_equal(ids[rank], whole.object_id)
    for name in ("ra", "dec", "sg_flags", "used", "image", "valid", "sigma", "features"):
        np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts])[rank], getattr(whole, name))
    rows = sorted(tuple(m.values()) for p in parts for m in p.members.to_pylist())
    assert rows == sorted(tuple(m.values()) for m in whole.members.to_pylist())


def test_an_object_comes_out_the_same_alone(three):
    (pixel,) = tiles_of(three, 8)
    whole = extract_tile(8, pixel, three, SIZE, CONFIG)
    middle = np.median(whole.ra)
    half = extract_tile(8, pixel, three, SIZE, CONFIG, lambda ra, dec: ra < middle)
    kept = np.flatnonzero(whole.ra < middle)
    assert 0 < len(kept) < len(whole)
    for name in ("object_id", "ra", "dec", "sg_flags", "used", "image", "valid", "sigma", "features", "psf"):
        np.testing.assert_array_equal(getattr(half, name), getattr(whole, name)[kept])
    ids = set(half.object_id.tolist())
    assert half.members.to_pylist() == [m for m in whole.members.to_pylist() if m["object_id"] in ids]


FIELDS = ("object_id", "ra", "dec", "sg_flags", "used", "image", "valid", "sigma", "features", "psf")


def assert_same(tile, other):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(tile, name), getattr(other, name))
    assert tile.members.equals(other.members)


@pytest.mark.parametrize("order", [12, 13])
def test_a_part_of_a_tile_has_the_objects_that_lie_in_it(three, order):
    (pixel,) = tiles_of(three, 8)
    parts = [Part(Tile(8, pixel, ()), order, p) for p in tiles_of(three, order)]
    lengths = []
    for part in parts:
        alone = extract_tile(8, pixel, three, SIZE, CONFIG, part=part)
        assert_same(alone, extract_tile(8, pixel, three, SIZE, CONFIG, part.holds))
        lengths.append(len(alone))
    assert sum(lengths) == len(extract_tile(8, pixel, three, SIZE, CONFIG))
    assert len(lengths) > 1


def test_a_part_associates_the_whole_tile_where_a_chain_leads_out_of_it(three, monkeypatch):
    monkeypatch.setattr(tile_module, "CHAIN_ARCSEC", 6.0)
    # the chain of all detections ends in the tile, but leads far out of each small part of it
    config = dataclasses.replace(CONFIG, match_radius_arcsec=2.0)
    (pixel,) = tiles_of(three, 8)
    found = []
    for small in tiles_of(three, 16):
        part = Part(Tile(8, pixel, ()), 16, small)
        alone = extract_tile(8, pixel, three, SIZE, config, part=part)
        assert_same(alone, extract_tile(8, pixel, three, SIZE, config, part.holds))
        try:
            extract_tile(16, small, three, SIZE, config)
        except LongChainError:
            found.append(len(alone))
    assert sum(found) > 1


@pytest.mark.parametrize("rows", [1, 16, 100])
def test_the_strips_that_stamps_are_cut_in_do_not_show(three, rows, monkeypatch):
    (pixel,) = tiles_of(three, 8)
    whole = extract_tile(8, pixel, three, SIZE, CONFIG)
    monkeypatch.setattr(collect, "STRIP_ROWS", rows)
    monkeypatch.setattr(collect, "CHUNK", 3)
    assert_same(extract_tile(8, pixel, three, SIZE, CONFIG), whole)


@given(seed=st.integers(0, 2**32), n=st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_blended_are_objects_near_a_detection_of_another_object(seed, n):
    rng = np.random.default_rng(seed)
    ra, dec = 150.0 + rng.uniform(0, 4, n) / 3600, 2.0 + rng.uniform(0, 4, n) / 3600
    # some detections belong to no object of the tile
    owner = rng.integers(-1, max(1, n // 2), n)
    _, owner[owner >= 0] = np.unique(owner[owner >= 0], return_inverse=True)
    count = owner.max() + 1
    anchor = np.array([np.flatnonzero(owner == k)[0] for k in range(count)], dtype=np.int64)
    member = np.flatnonzero(owner >= 0)
    zero = np.zeros(n, np.int64)
    pool = _Pool(SkyPositions(ra, dec, zero, zero), ra, dec, zero.astype(np.int32))
    objects = _Objects(np.arange(count), anchor, member, owner[member])
    apart = 3600 * np.hypot((ra[anchor][:, None] - ra) * np.cos(np.radians(2.0)), dec[anchor][:, None] - dec)
    expected = [k for k in range(count) if any((apart[k] < 1.0) & (owner != k))]
    assert _blended(pool, objects, CONFIG).tolist() == expected


def test_every_detection_is_in_exactly_one_object(three):
    (pixel,) = tiles_of(three, 8)
    members = extract_tile(8, pixel, three, SIZE, CONFIG).members.to_pylist()
    keys = [(m["exposure_id"], m["row"]) for m in members]
    assert len(set(keys)) == len(keys)
    assert len(keys) == sum(p.n_usable for p in three)


def test_missing_catalogue_is_made(make_exposure, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    prepared = prepare_exposure(read_header(scene(make_exposure, "i", kinds="IMG WHT FLG")), work, CONFIG)
    assert any(note.startswith("CAT missing") for note in prepared.notes)
    (pixel,) = tiles_of([prepared], 8)
    tile = extract_tile(8, pixel, [prepared], SIZE, CONFIG)
    assert len(tile) >= 20
    assert ((tile.sg_flags & int(SgFlag.STAGE_CATALOG)) != 0).all()


def test_an_object_without_valid_pixels_is_not_used(make_exposure, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    flag = np.zeros(SHAPE, np.uint16)
    flag[:, :96] = 1
    prepared = prepare_exposure(read_header(scene(make_exposure, "i", flag=flag)), work, CONFIG)
    (pixel,) = tiles_of([prepared], 8)
    tile = extract_tile(8, pixel, [prepared], SIZE, CONFIG)
    blind = ~tile.used.any(axis=1)
    assert blind.any()
    assert not blind.all()
    assert not tile.valid[blind].any()
    np.testing.assert_array_equal((tile.sg_flags & int(SgFlag.NOT_SCORED)) != 0, blind)


def test_the_deeper_of_two_exposures_is_used(make_exposure, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    good = scene(make_exposure, "i", name="CSST_good_{KIND}.fits")
    rng = np.random.default_rng(0)
    noisy = (0.3 + rng.normal(0, 5 * RMS, SHAPE)).astype(np.float32)
    bad = scene(make_exposure, "i", name="CSST_bad_{KIND}.fits")
    from astropy.io import fits

    with fits.open(bad.image, mode="update") as hdus:
        hdus[1].data = noisy
        del hdus[1].header["DATASUM"], hdus[1].header["CHECKSUM"]
    prepared = [prepare_exposure(read_header(f), work, CONFIG) for f in (bad, good)]
    (pixel,) = tiles_of(prepared, 8)
    both = extract_tile(8, pixel, prepared, SIZE, CONFIG)
    alone = extract_tile(8, pixel, prepared[1:], SIZE, CONFIG)
    order = np.lexsort((both.ra,)), np.lexsort((alone.ra,))
    np.testing.assert_array_equal(both.image[order[0]], alone.image[order[1]])
