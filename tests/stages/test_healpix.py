"""HEALPix tiles: membership, cones and polygons never lose a position."""

from __future__ import annotations

import cdshealpix
import numpy as np
import pytest
from hats.pixel_math.spatial_index import compute_spatial_index
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sgclassify.stages import healpix

ORDERS = st.integers(0, 14)
SEEDS = st.integers(0, 2**32 - 1)


def sphere(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.uniform(0.0, 360.0, n), np.degrees(np.arcsin(rng.uniform(-1.0, 1.0, n)))


def in_tile(order: int, pixel: int, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions spread over a tile: centres of order-29 cells drawn from it, and the tile's own corners."""
    shift = 2 * (healpix.INDEX_ORDER - order)
    cells = (pixel << shift) + rng.integers(0, 1 << shift, n)
    cells[:4] = [pixel << shift, ((pixel + 1) << shift) - 1, (pixel << shift) + ((1 << shift) // 3), cells[0]]
    lon, lat = cdshealpix.nested.healpix_to_lonlat(cells, healpix.INDEX_ORDER)
    return lon.deg, lat.deg


def test_index_is_the_one_of_hats() -> None:
    ra, dec = sphere(np.random.default_rng(1), 1000)
    ra[:6], dec[:6] = [0.0, 360.0, 0.0, 90.0, 45.0, 359.9999999999999], [0.0, 0.0, 90.0, -90.0, 41.8, 0.0]
    assert np.array_equal(healpix.index29(ra, dec), compute_spatial_index(ra, dec))
    assert healpix.index29(ra, dec).dtype == np.int64


def test_no_positions() -> None:
    assert healpix.index29([], []).shape == (0,)
    assert healpix.unit_vectors([], []).shape == (0, 3)
    assert healpix.near_tile([], [], 10, 3, 1.0).shape == (0,)


@pytest.mark.parametrize(("ra", "dec"), [(np.nan, 0.0), (0.0, np.inf), (10.0, 90.001)])
def test_a_position_off_the_sky_is_refused(ra: float, dec: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        healpix.index29([ra], [dec])


def test_right_ascension_of_any_turn() -> None:
    assert healpix.index29([-10.0, 350.0, 710.0], [5.0] * 3).tolist() == [healpix.index29([350.0], [5.0])[0]] * 3


@settings(deadline=None, max_examples=60)
@given(ORDERS, SEEDS)
def test_the_cone_holds_the_tile(order: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixel = int(rng.integers(0, 12 << (2 * order)))
    ra, dec = in_tile(order, pixel, 200, rng)
    assert (healpix.tile_of(ra, dec, order) == pixel).all()
    assert healpix.near_tile(ra, dec, order, pixel, 0.0).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(4, 13), SEEDS, st.sampled_from(["any", "pole", "zero"]))
@example(10, 0, "pole")
def test_a_polygon_loses_no_tile(order: int, seed: int, where: str) -> None:
    rng = np.random.default_rng(seed)
    centre = {
        "any": healpix.unit_vectors(*sphere(rng, 1))[0],
        "pole": healpix.unit_vectors([30.0], [rng.choice([-1, 1]) * 89.97])[0],
        "zero": healpix.unit_vectors([rng.uniform(-0.05, 0.05)], [rng.uniform(-80, 80)])[0],
    }[where]
    east = np.cross([0.0, 0.6, 0.8] if abs(centre[2]) > 0.9 else [0.0, 0.0, 1.0], centre)
    east /= np.linalg.norm(east)
    north = np.cross(centre, east)
    turn = rng.uniform(0, 2 * np.pi)
    size = np.radians(rng.uniform(0.005, 0.15))

    def sky(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = size * (np.cos(turn) * u - np.sin(turn) * v)
        y = size * (np.sin(turn) * u + np.cos(turn) * v)
        p = centre + x[:, None] * east + y[:, None] * north
        return np.degrees(np.arctan2(p[:, 1], p[:, 0])), np.degrees(np.arcsin(p[:, 2] / np.linalg.norm(p, axis=1)))

    corners = sky(np.array([-1.0, 1.0, 1.0, -1.0]), np.array([-1.0, -1.0, 1.0, 1.0]))
    tiles = healpix.polygon_tiles(*corners, order)
    inside = healpix.tile_of(*sky(rng.uniform(-1, 1, 2000), rng.uniform(-1, 1, 2000)), order)
    assert np.isin(inside, tiles).all()
    # A superset, but not a wasteful one: nothing beyond a tile's diameter from the square.
    for tile in tiles[:: max(1, len(tiles) // 20)]:
        tile_centre, radius = healpix.tile_cone(order, int(tile))
        distance = healpix.angle_of_chord(np.linalg.norm(tile_centre - centre, keepdims=True))[0]
        assert distance <= 1.5 * size / healpix.ARCSEC + radius
