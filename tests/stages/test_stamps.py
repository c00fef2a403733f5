from __future__ import annotations

import numpy as np
import pytest
from astropy.nddata import Cutout2D, NoOverlapError
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages.stamps import Boxes, cut_stamps, stamp_origin

IMAGE = np.arange(17 * 23, dtype=np.float32).reshape(17, 23) + 1

# Half and whole pixels are where rounding rules differ, so they are drawn as often as any other position.
POSITION = st.one_of(
    st.floats(-40, 60, allow_nan=False),
    st.integers(-80, 120).map(lambda k: k / 2),
)


@settings(max_examples=300, deadline=None)
@given(x=POSITION, y=POSITION, size=st.integers(1, 30))
def test_equals_astropy_cutout(x: float, y: float, size: int) -> None:
    stamps, inside = cut_stamps(IMAGE, [x], [y], size, fill=-1)
    try:
        expected = Cutout2D(IMAGE, (x, y), size, mode="partial", fill_value=-1).data
    except NoOverlapError:
        assert not inside.any()
        expected = np.full((size, size), -1, dtype=np.float32)
    assert np.array_equal(stamps[0], expected)
    assert np.array_equal(inside[0], expected != -1)


@pytest.mark.parametrize("dtype", [np.float32, np.bool_, np.uint16, ">f4", ">i2", np.float64])
def test_keeps_the_dtype_in_native_byte_order(dtype: str) -> None:
    image = (np.arange(81).reshape(9, 9) % 2).astype(dtype)
    stamps, inside = cut_stamps(image, [0.0, 4.0], [4.0, 8.5], 4, fill=1)
    assert stamps.dtype == np.dtype(dtype).newbyteorder("=")
    assert stamps.dtype.isnative
    assert (stamps[~inside] == 1).all()
    assert np.array_equal(stamps[0, :, 2:], image[2:6, 0:2])


def test_pixel_of_the_origin() -> None:
    x, y = np.array([5.3, 6.5, 7.0]), np.array([5.0, 4.5, 9.9])
    for size in (4, 5):
        stamps, inside = cut_stamps(IMAGE, x, y, size)
        assert inside.all()
        assert np.array_equal(stamps[:, 0, 0], IMAGE[stamp_origin(y, size), stamp_origin(x, size)])


def test_positions_that_are_not_positions_lie_outside() -> None:
    bad = [np.nan, np.inf, -np.inf, 1e300, -1e18]
    stamps, inside = cut_stamps(IMAGE, bad, [3.0] * 5, 5, fill=7)
    assert not inside.any()
    assert (stamps == 7).all()


def test_no_objects_and_no_pixels() -> None:
    stamps, inside = cut_stamps(IMAGE, [], [], 5)
    assert stamps.shape == inside.shape == (0, 5, 5)
    stamps, inside = cut_stamps(np.empty((0, 4), np.float32), [1.0], [1.0], 3, fill=2)
    assert (stamps == 2).all()
    assert not inside.any()


def test_the_array_is_left_alone() -> None:
    before = IMAGE.copy()
    stamps, _ = cut_stamps(IMAGE, [0.0], [0.0], 9, fill=-5)
    stamps[:] = 0
    assert np.array_equal(IMAGE, before)


@pytest.mark.parametrize(
    ("array", "x", "y", "size"),
    [
        (np.zeros(4), [1.0], [1.0], 3),
        (np.zeros((4, 4)), [1.0], [1.0], 0),
        (np.zeros((4, 4)), [1.0, 2.0], [1.0], 3),
        (np.zeros((4, 4)), [[1.0]], [[1.0]], 3),
    ],
)
def test_refuses_wrong_shapes(array: np.ndarray, x: list, y: list, size: int) -> None:
    with pytest.raises(ValueError, match=r"stamp|vectors"):
        cut_stamps(array, x, y, size)


@settings(max_examples=100, deadline=None)
@given(places=st.lists(st.tuples(POSITION, POSITION), min_size=1, max_size=8), size=st.integers(1, 20))
def test_a_stamp_does_not_depend_on_the_others(places: list, size: int) -> None:
    x, y = np.array(places).T
    stamps, inside = cut_stamps(IMAGE, x, y, size, fill=-1)
    for k, (one_x, one_y) in enumerate(places):
        alone, alone_inside = cut_stamps(IMAGE, [one_x], [one_y], size, fill=-1)
        assert np.array_equal(stamps[k], alone[0])
        assert np.array_equal(inside[k], alone_inside[0])


@settings(max_examples=200, deadline=None)
@given(
    places=st.lists(st.tuples(POSITION, POSITION), min_size=1, max_size=5),
    reach=st.one_of(st.floats(0, 20), st.integers(0, 40).map(lambda k: k / 2)),
    size=st.integers(1, 20),
)
def test_a_box_has_all_pixels_of_its_stamp_within_reach(places: list, reach: float, size: int) -> None:
    x, y = np.array(places).T
    box = Boxes(x, y, reach, size)
    numbers = np.arange(len(places) * size**2).reshape(-1, size, size)
    cut = box.cut(numbers)
    assert cut.shape == box.r2.shape == (len(places), box.side, box.side)
    axis = np.arange(size)
    for k in range(len(places)):
        r2 = (axis[None, :] - x[k]) ** 2 + (axis[:, None] - y[k]) ** 2
        assert set(numbers[k][r2 <= reach**2]) <= set(cut[k].ravel())
        rows, columns = box.rows[k], box.columns[k]
        assert np.array_equal(cut[k], numbers[k][np.ix_(rows, columns)])
        np.testing.assert_allclose(box.r2[k], r2[np.ix_(rows, columns)], rtol=1e-9, atol=1e-9)
