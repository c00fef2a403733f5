"""The plan: no tile that a detector touches is missed, and nothing depends on the order of the list."""

from __future__ import annotations

import math
import time
from pathlib import Path

import cdshealpix.nested
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages import healpix
from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.read.header import ExposureHeader
from sgclassify.stages.read.names import ExposureFiles
from sgclassify.stages.tiling import MAX_PART_ROWS, Part, Tile, footprint_tiles, parts_of, tiles_of, tiles_of_headers

SCALE = 0.074 / 3600.0
FULL = (9232, 9216)


def card(key: str, value: str | float) -> str:
    text = f"'{value:8}'" if isinstance(value, str) else str(value) if isinstance(value, int) else f"{value:.13E}"
    return f"{key:8}= {text}".ljust(80)


def header(
    ra: float,
    dec: float,
    turn: float = 0.0,
    shape: tuple[int, int] = FULL,
    crpix: tuple[float, float] | None = None,
    distortion: dict[str, float] | None = None,
    name: str = "exposure",
    kind: str | None = None,
) -> ExposureHeader:
    """A header with a projection of some kind."""
    kind = kind or ("TPV" if distortion else "TAN")
    c, s = SCALE * math.cos(turn), SCALE * math.sin(turn)
    x, y = crpix or ((shape[1] + 1) / 2, (shape[0] + 1) / 2)
    values: dict[str, str | float] = {
        **{"CD1_1": -c, "CD1_2": s, "CD2_1": s, "CD2_2": c, "CRPIX1": x, "CRPIX2": y},
        **{"CRVAL1": ra, "CRVAL2": dec, "CTYPE1": f"RA---{kind}", "CTYPE2": f"DEC--{kind}"},
        **{"CUNIT1": "deg", "CUNIT2": "deg", **(distortion or {})},
    }
    return ExposureHeader(
        exposure_id=name,
        catalog_stem=f"{name}_CAT",
        files=ExposureFiles(Path(f"{name}_IMG.fits"), None, None, None),
        obsid="1",
        chip=7,
        band="i",
        shape=shape,
        wcs_cards="".join(card(key, value) for key, value in values.items()),
        pixel_scale=0.074,
        zero_point=25.96,
        **dict.fromkeys(
            (
                "exposure_time",
                "gain",
                "read_noise",
                "saturate",
                "sky_background",
                "sky_rms",
                "fwhm_px",
            ),
            math.nan,
        ),
        date_obs="",
        notes=(),
    )


def positions(of: ExposureHeader, n: int, rng: np.random.Generator, pad_px: float) -> np.ndarray:
    """Tile indices of random points of the padded detector, half of them on its border."""
    ny, nx = of.shape
    x = rng.uniform(-0.5 - pad_px, nx - 0.5 + pad_px, n)
    y = rng.uniform(-0.5 - pad_px, ny - 0.5 + pad_px, n)
    side = rng.integers(0, 8, n)
    x[side == 0], x[side == 1] = -0.5 - pad_px, nx - 0.5 + pad_px
    y[side == 2], y[side == 3] = -0.5 - pad_px, ny - 0.5 + pad_px
    ra, dec = of.pixel_to_sky(x, y)
    return healpix.index29(ra, dec)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**32 - 1), st.integers(6, 13), st.sampled_from(["sky", "pole", "zero"]))
def test_no_tile_is_missed(seed: int, order: int, where: str) -> None:
    rng = np.random.default_rng(seed)
    ra, dec = {
        "sky": (rng.uniform(0, 360), math.degrees(math.asin(rng.uniform(-1, 1)))),
        "pole": (rng.uniform(0, 360), float(rng.choice([-1, 1])) * rng.uniform(89.8, 90.0)),
        "zero": (rng.uniform(-0.1, 0.1) % 360.0, rng.uniform(-85, 85)),
    }[where]
    shape = FULL if order < 12 else (1024, 1200)
    distortion = None
    if rng.random() < 0.7:
        # The focal plane's tangent point lies up to 1.1 deg from the detector; terms of 2nd and 3rd degree.
        distortion = {"PV1_1": 1.0, "PV2_1": 1.0}
        distortion |= {f"PV{axis}_{k}": rng.normal(0, 3e-3) for axis in (1, 2) for k in (4, 5, 6, 7, 8, 9, 10)}
    crpix = (rng.uniform(-29000, 29000), rng.uniform(-25000, 25000)) if where != "pole" else rng.uniform(0, 9000, 2)
    exposure = header(ra, dec, rng.uniform(0, 2 * np.pi), shape, tuple(crpix), distortion)
    pad = rng.uniform(0.0, 20.0)
    tiles = [plan.pixel for plan in tiles_of_headers([exposure], order, pad)]
    # Local scales differ from the nominal one by no more than some per cent here.
    inside = healpix.tile_of_index(positions(exposure, 3000, rng, pad / 0.074), order)
    assert np.isin(inside, tiles).all()
    # No waste: the tiles lie within the detector's own extent and one tile.
    half = math.hypot(*shape) / 2 * 0.074 * 1.2 + 2 * pad + 60
    middle = healpix.unit_vectors(*exposure.pixel_to_sky([shape[1] / 2], [shape[0] / 2]))[0]
    for tile in tiles[:: max(1, len(tiles) // 10)]:
        centre, radius = healpix.tile_cone(order, tile)
        assert healpix.angle_of_chord(np.linalg.norm(centre - middle, keepdims=True))[0] < half + radius


def test_tiles_list_their_exposures_sorted() -> None:
    headers = [header(150.0, 2.0, name=name) for name in ("c", "a", "b")] + [header(150.15, 2.0, name="d")]
    plan = tiles_of_headers(headers, 10, 5.0)
    assert [tile.pixel for tile in plan] == sorted({tile.pixel for tile in plan})
    assert {tile.exposures for tile in plan} == {("a", "b", "c"), ("a", "b", "c", "d"), ("d",)}
    assert tiles_of_headers(headers[::-1], 10, 5.0) == plan
    assert all(tile.order == 10 for tile in plan)


def test_separate_pointings_give_only_touched_tiles() -> None:
    spots = [(10.0, -60.0), (200.0, 45.0), (0.0, 0.0)]
    plan = tiles_of_headers([header(*spot, shape=(64, 64), name=str(spot)) for spot in spots], 10, 1.0)
    expected = {int(healpix.tile_of([ra], [dec], 10)[0]) for ra, dec in spots}
    assert expected <= {tile.pixel for tile in plan}
    assert len(plan) <= 6


def test_the_same_exposure_twice_is_a_defect() -> None:
    with pytest.raises(ValueError, match="twice"):
        tiles_of_headers([header(1.0, 1.0), header(1.0, 1.0)], 10, 1.0)


def test_no_exposures() -> None:
    assert tiles_of_headers([], 10, 1.0) == []
    assert tiles_of([("a", np.array([5, 3])), ("b", np.array([3]))], 9) == [
        Tile(9, 3, ("a", "b")),
        Tile(9, 5, ("a",)),
    ]


def test_a_border_off_the_sky_is_refused() -> None:
    # An orthographic projection ends 57.3 degrees from its centre.
    beyond = header(10.0, 10.0, crpix=(3.0e6, 0.0), kind="SIN")
    with pytest.raises(UnusableInputError, match="no position on the sky") as caught:
        footprint_tiles(beyond, 10, 1.0)
    assert caught.value.path == "exposure_IMG.fits"


def test_a_projection_without_scale_is_refused() -> None:
    with pytest.raises(UnusableInputError, match="scale"):
        footprint_tiles(header(10.0, 10.0, kind="TPV"), 10, 1.0)  # TPV needs its PV terms


def test_sip_distortion_is_followed() -> None:
    sip: dict[str, float] = {"A_ORDER": 2, "B_ORDER": 2, "A_2_0": 2e-6, "B_0_2": 2e-6}
    exposure = header(10.0, 10.0, distortion=sip, kind="TAN-SIP")
    inside = positions(exposure, 2000, np.random.default_rng(5), 0.0)
    tiles = footprint_tiles(exposure, 12, 0.0)
    assert np.isin(healpix.tile_of_index(inside, 12), tiles).all()
    # 42 pixels of distortion at the corners: more than the tiles' own slack can hide.
    plain = header(10.0, 10.0, crpix=(4608.5, 4616.5))
    assert not np.array_equal(footprint_tiles(plain, 14, 0.0), footprint_tiles(exposure, 14, 0.0))


def test_hundreds_of_headers_take_no_time() -> None:
    rng = np.random.default_rng(0)
    distortion = {f"PV{axis}_{k}": float(k == 1) + 1e-6 for axis in (1, 2) for k in range(11) if k != 3}
    headers = [
        header(rng.uniform(100, 110), rng.uniform(20, 30), distortion=distortion, name=str(k)) for k in range(300)
    ]
    start = time.process_time()
    assert len(tiles_of_headers(headers, 10, 10.0)) > 1000
    assert time.process_time() - start < 5.0


@given(seed=st.integers(0, 2**32 - 1), order=st.integers(0, 14), rows=st.integers(0, 200_000))
@settings(max_examples=40)
def test_the_parts_of_a_tile_hold_each_of_its_positions_once(seed: int, order: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    pixel = int(rng.integers(0, 12 * 4**order))
    tile = Tile(order, pixel, ("e1",))
    parts = parts_of(tile, rows)
    assert len(parts) * MAX_PART_ROWS >= min(rows, 64 * MAX_PART_ROWS)
    assert len(parts) == 1 or rows > MAX_PART_ROWS * len(parts) / 4
    # positions in the tile, and some elsewhere
    index = (pixel << 2 * (29 - order)) + rng.integers(0, 4 ** (29 - order), 50)
    lon, lat = cdshealpix.nested.healpix_to_lonlat(index, 29)
    ra, dec = np.append(lon.deg, 0.3), np.append(lat.deg, -0.4)
    inside = healpix.tile_of(ra, dec, order) == pixel
    np.testing.assert_array_equal(sum(part.holds(ra, dec).astype(int) for part in parts), inside.astype(int))


def test_small_tiles_are_not_divided() -> None:
    tile = Tile(10, 5, ("e1",))
    assert parts_of(tile, 0) == parts_of(tile, MAX_PART_ROWS) == [Part(tile, 10, 5)]
    assert [part.pixel for part in parts_of(tile, MAX_PART_ROWS + 1)] == [20, 21, 22, 23]
    assert {str(part) for part in parts_of(tile, 10**6)} == {"tile 10/5"}
