"""Association: one-to-one, within the radius, the same for any order of the input and any cut into tiles."""

from __future__ import annotations

import time

import cdshealpix
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages import associate as module
from sgclassify.stages import healpix
from sgclassify.stages.associate import SkyPositions, associate, closed_components, objects_of_tile

RADIUS = 0.2
SEEDS = st.integers(0, 2**32 - 1)
FIELDS = [(150.0, 2.0), (0.0, -41.3), (359.99999, 41.81), (77.0, 89.99995), (12.0, -89.99997), (45.0, 0.0)]


def offset(ra: float, dec: float, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions at tangent-plane offsets (arcsec) from a point."""
    centre = healpix.unit_vectors([ra], [dec])[0]
    east = np.array([-np.sin(np.radians(ra)), np.cos(np.radians(ra)), 0.0])
    north = np.cross(centre, east)
    p = centre + healpix.ARCSEC * (x[:, None] * east + y[:, None] * north)
    return np.degrees(np.arctan2(p[:, 1], p[:, 0])) % 360.0, np.degrees(np.arctan2(p[:, 2], np.hypot(p[:, 0], p[:, 1])))


def sky(seed: int, n: int = 60, exposures: int = 5) -> SkyPositions:
    """A clumpy field: sources seen several times, chains with steps below the radius, coincidences."""
    rng = np.random.default_rng(seed)
    ra, dec = FIELDS[seed % len(FIELDS)]
    spread = float(rng.choice([0.5, 3.0, 20.0]))
    x, y = rng.uniform(-spread, spread, (2, n))
    for _ in range(3):
        start, length = rng.integers(0, n), int(rng.integers(2, n // 3))
        angle = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.3, length).cumsum()
        step = rng.uniform(0.05, 1.05 * RADIUS, length)
        part = (start + np.arange(length)) % n
        x[part] = x[start] + (step * np.cos(angle)).cumsum()
        y[part] = y[start] + (step * np.sin(angle)).cumsum()
    copies = rng.integers(0, n, n // 3)
    x[: len(copies)], y[: len(copies)] = x[copies], y[copies]
    grid = rng.integers(0, n, n // 6)
    x[grid], y[grid] = np.round(x[grid] / 0.1) * 0.1, np.round(y[grid] / 0.1) * 0.1
    rank = rng.integers(0, exposures, n).astype(np.int64)
    row = np.empty(n, dtype=np.int64)
    for exposure in range(exposures):
        row[rank == exposure] = rng.permutation(int((rank == exposure).sum()))
    return SkyPositions(*offset(ra, dec, x, y), rank, row)


def separations(at: SkyPositions) -> np.ndarray:
    vectors = healpix.unit_vectors(at.ra, at.dec)
    return healpix.angle_of_chord(np.linalg.norm(vectors[:, None] - vectors[None], axis=2))


def groups(at: SkyPositions, object_index: np.ndarray) -> set[frozenset[tuple[int, int]]]:
    """The partition as sets of (exposure, row)."""
    members: dict[int, set[tuple[int, int]]] = {}
    for number, rank, row in zip(object_index.tolist(), at.rank.tolist(), at.row.tolist(), strict=True):
        members.setdefault(number, set()).add((rank, row))
    return {frozenset(group) for group in members.values()}


def by_definition(at: SkyPositions, radius: float) -> np.ndarray:
    """Greedy association, pair by pair: what the module says in the fewest words."""
    key = np.rint(separations(at) * 1e6).astype(np.int64)
    order = module.canonical_order(at.ra, at.dec, at.rank, at.row)
    result = np.full(len(at), -1)
    anchors: list[int] = []
    for rank in sorted(set(at.rank.tolist())):
        exposure = [k for k in order.tolist() if at.rank[k] == rank]
        pairs = sorted(
            (key[anchor, k], number, place)
            for number, anchor in enumerate(anchors)
            for place, k in enumerate(exposure)
            if key[anchor, k] <= round(radius * 1e6)
        )
        taken: set[int] = set()
        for _, number, place in pairs:
            if number not in taken and result[exposure[place]] < 0:
                taken.add(number)
                result[exposure[place]] = number
        for k in exposure:
            if result[k] < 0:
                result[k] = len(anchors)
                anchors.append(k)
    return result


@settings(deadline=None, max_examples=80)
@given(SEEDS)
def test_greedy_one_to_one_within_the_radius(seed: int) -> None:
    at = sky(seed)
    found = associate(at.ra, at.dec, at.rank, RADIUS, at.row)
    assert found.object_index.min() >= 0
    assert np.array_equal(found.object_index[found.anchor], np.arange(len(found.anchor)))
    assert len(set(zip(found.object_index.tolist(), at.rank.tolist(), strict=True))) == len(at)
    to_anchor = separations(at)[np.arange(len(at)), found.anchor[found.object_index]]
    assert to_anchor.max() <= RADIUS + 1e-6
    assert (at.rank[found.anchor[found.object_index]] <= at.rank).all()


@settings(deadline=None, max_examples=80)
@given(SEEDS)
def test_as_defined(seed: int) -> None:
    at = sky(seed)
    places = np.unique(at.ra + 1j * at.dec, return_index=True)[1]
    at = at.take(places)  # coincident detections are matched together, which the plain definition does not say
    found = associate(at.ra, at.dec, at.rank, RADIUS, at.row)
    assert np.array_equal(found.object_index, by_definition(at, RADIUS))


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_order_of_the_input_does_not_matter(seed: int) -> None:
    at = sky(seed)
    found = associate(at.ra, at.dec, at.rank, RADIUS, at.row)
    order = np.random.default_rng(seed).permutation(len(at))
    other = at.take(order)
    again = associate(other.ra, other.dec, other.rank, RADIUS, other.row)
    assert np.array_equal(again.object_index, found.object_index[order])
    assert np.array_equal(order[again.anchor], found.anchor)


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_shells_of_separation_change_nothing(seed: int) -> None:
    at = sky(seed)
    whole = associate(at.ra, at.dec, at.rank, RADIUS, at.row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_PAIRS", 3)
        shells = associate(at.ra, at.dec, at.rank, RADIUS, at.row)
    assert np.array_equal(whole.object_index, shells.object_index)


@settings(deadline=None, max_examples=15)
@given(SEEDS, st.integers(8, 14), st.floats(0.0, 5.0))
def test_tiles_together_give_the_objects_of_the_sky(seed: int, order: int, margin: float) -> None:
    at = sky(seed)
    tile = healpix.tile_of(at.ra[:1], at.dec[:1], order)[0]
    whole = associate(at.ra, at.dec, at.rank, RADIUS, at.row)
    expected = groups(at, whole.object_index)
    shuffled = at.take(np.random.default_rng(seed + 1).permutation(len(at)))

    def load_for(pixel: int):  # type: ignore[no-untyped-def]
        def load(margin_arcsec: float) -> SkyPositions:
            return shuffled.take(healpix.near_tile(shuffled.ra, shuffled.dec, order, pixel, margin_arcsec))

        return load

    seen: list[tuple[int, int]] = []
    union: set[frozenset[tuple[int, int]]] = set()
    around = {*cdshealpix.nested.neighbours(np.array([tile]), order)[0].tolist()} - {-1}
    for pixel in sorted({*healpix.tile_of(at.ra, at.dec, order).tolist(), *around}):
        objects = objects_of_tile(order, pixel, load_for(pixel), RADIUS, margin)
        anchors = objects.positions.take(objects.anchor)
        assert (healpix.tile_of(anchors.ra, anchors.dec, order) == pixel).all()
        assert np.array_equal(objects.object_index[objects.anchor], np.arange(len(objects.anchor)))
        loaded = load_for(pixel)(objects.margin_arcsec)
        assert np.array_equal(loaded.row[objects.source], objects.positions.row)
        seen += zip(objects.positions.rank.tolist(), objects.positions.row.tolist(), strict=True)
        union |= groups(objects.positions, objects.object_index)
    assert len(seen) == len(set(seen)) == len(at)
    assert union == expected


def corner(order: int) -> tuple[float, float]:
    """A point where four tiles meet."""
    lon, lat = cdshealpix.nested.vertices(np.array([5 << (2 * order - 2)]), order)
    return float(lon.deg[0, 0]), float(lat.deg[0, 0])


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(12, 14))
def test_a_crowded_strip_across_a_corner_of_tiles(seed: int, order: int) -> None:
    """Chains lead far out of every tile, and what is done at one end decides what happens at the other."""
    rng = np.random.default_rng(seed)
    n = 150
    along, across = rng.uniform(-6.0, 6.0, n), rng.uniform(-0.1, 0.1, n)
    turn = rng.uniform(0.0, np.pi)
    ra, dec = offset(
        *corner(order),
        along * np.cos(turn) - across * np.sin(turn),
        along * np.sin(turn) + across * np.cos(turn),
    )
    at = SkyPositions(ra, dec, rng.integers(0, 30, n), np.arange(n))
    union: list[frozenset[tuple[int, int]]] = []
    for pixel in np.unique(healpix.tile_of(ra, dec, order)).tolist():

        def load(margin_arcsec: float, pixel: int = pixel) -> SkyPositions:
            return at.take(healpix.near_tile(at.ra, at.dec, order, pixel, margin_arcsec))

        objects = objects_of_tile(order, pixel, load, RADIUS, 0.0)
        union += groups(objects.positions, objects.object_index)
    whole = associate(at.ra, at.dec, at.rank, RADIUS, at.row)
    assert len(union) == len(whole.anchor)
    assert set(union) == groups(at, whole.object_index)


@pytest.mark.parametrize("length", range(260, 268))
def test_the_far_end_of_a_chain_decides(length: int) -> None:
    """A chain of 39 arcsec is paired off from its far end: one detection more there changes all pairs."""
    order = 12
    x = 0.15 * np.arange(length)[::-1] - 2.0
    at = SkyPositions(*offset(*corner(order), x, np.zeros(length)), np.arange(length), np.zeros(length, int))
    union: list[frozenset[tuple[int, int]]] = []
    margins = []
    for pixel in np.unique(healpix.tile_of(at.ra, at.dec, order)).tolist():

        def load(margin_arcsec: float, pixel: int = pixel) -> SkyPositions:
            return at.take(healpix.near_tile(at.ra, at.dec, order, pixel, margin_arcsec))

        objects = objects_of_tile(order, pixel, load, RADIUS)
        margins.append(objects.margin_arcsec)
        union += groups(objects.positions, objects.object_index)
        _, closed = closed_components(at, order, pixel, 1e6, RADIUS)
        assert closed
    whole = associate(at.ra, at.dec, at.rank, RADIUS, at.row)
    assert len(whole.anchor) == -(-length // 2)
    assert len(union) == len(whole.anchor)
    assert set(union) == groups(at, whole.object_index)
    assert max(margins) > 2.0


def test_the_deepest_exposure_gives_the_anchor() -> None:
    ra, dec = offset(10.0, 10.0, np.array([0.0, 0.15, 0.30]), np.zeros(3))
    found = associate(ra, dec, [2, 0, 1], RADIUS, [0, 0, 0])
    assert found.anchor.tolist() == [1]
    assert found.object_index.tolist() == [0, 0, 0]
    # Seen from an end, the chain is too long for one object.
    found = associate(ra, dec, [0, 1, 2], RADIUS, [0, 0, 0])
    assert found.object_index.tolist() == [0, 0, 1]


def test_the_nearer_detection_wins() -> None:
    ra, dec = offset(0.0, 0.0, np.array([0.0, 0.12, -0.05]), np.zeros(3))
    found = associate(ra, dec, [0, 1, 1], RADIUS, [0, 0, 1])
    assert found.object_index.tolist() == [0, 1, 0]


def test_across_right_ascension_zero_and_at_the_pole() -> None:
    found = associate([359.99999, 0.00001, 0.0, 120.0], [0.0, 0.0, 90.0, 90.0], [0, 1, 0, 1], RADIUS)
    assert found.object_index.tolist() == [0, 0, 1, 1] or found.object_index.tolist() == [1, 1, 0, 0]


def test_nothing_and_refusals() -> None:
    assert len(associate([], [], [], RADIUS).anchor) == 0
    with pytest.raises(ValueError, match="finite"):
        associate([np.nan], [0.0], [0], RADIUS)
    with pytest.raises(ValueError, match="one length"):
        associate([0.0, 1.0], [0.0, 1.0], [0], RADIUS)
    with pytest.raises(ValueError, match="radius"):
        associate([0.0], [0.0], [0], np.nan)
    empty = SkyPositions(np.empty(0), np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))
    assert len(objects_of_tile(10, 77, lambda _margin: empty, RADIUS).anchor) == 0


@pytest.mark.parametrize("kind", ["same", "two points", "clump", "real"])
def test_hard_inputs_stay_fast(kind: str) -> None:
    """All detections at one point would be 10^9 pairs."""
    n = {"clump": 10_000}.get(kind, 60_000)
    rng = np.random.default_rng(3)
    rank = np.arange(n) % 2
    x, y = {
        "same": (np.zeros(n), np.zeros(n)),
        "two points": (0.1 * rank, np.zeros(n)),
        "clump": tuple(rng.normal(0, 0.03, (2, n))),
        "real": tuple(np.repeat(rng.uniform(-500, 500, (2, n // 2)), 2, axis=1) + rng.normal(0, 0.02, (2, n))),
    }[kind]
    start = time.process_time()
    found = associate(*offset(10.0, -5.0, x, y), rank, RADIUS, np.arange(n) // 2)
    assert time.process_time() - start < 10.0
    assert len(found.anchor) == pytest.approx(n // 2, rel=0.01)
