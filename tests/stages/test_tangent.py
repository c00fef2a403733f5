"""Offsets on the sky are the same everywhere, at the poles and round RA 0 too."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages.read.catalog import separation_arcsec
from sgclassify.stages.tangent import moved_back, offsets

CENTRES = st.tuples(
    st.one_of(st.sampled_from([0.0, 180.0]), st.floats(0, 360, exclude_max=True)),
    st.one_of(st.sampled_from([90.0, -90.0, 89.99, 0.0]), st.floats(-90, 90)),
)
ARCSEC = st.floats(-2.0, 2.0)


def projection(centre: tuple[float, float]) -> WCS:
    """The gnomonic projection of astropy; pixels are degrees to the east and the north."""
    header = fits.Header()
    header["CTYPE1"], header["CTYPE2"] = "RA---TAN", "DEC--TAN"
    header["CRVAL1"], header["CRVAL2"] = centre
    header["CRPIX1"] = header["CRPIX2"] = header["CDELT1"] = header["CDELT2"] = 1.0
    header["LONPOLE"] = 180.0
    return WCS(header)


@settings(deadline=None)
@given(CENTRES, ARCSEC, ARCSEC, st.integers(0, 2**32 - 1))
def test_a_step_on_the_tangent_plane(centre, east, north, seed):
    plane = projection(centre)
    x, y = np.random.default_rng(seed).uniform(-0.1, 0.1, (2, 20))
    ra, dec = plane.wcs_pix2world(x, y, 0)
    to_ra, to_dec = plane.wcs_pix2world(x + east / 3600, y + north / 3600, 0)
    found = 3600.0 * np.array(offsets(to_ra, to_dec, ra, dec, centre))
    # to the order of the distance from the centre squared, 3e-6, and the rounding of unit vectors, 1e-11 arcsec
    np.testing.assert_allclose(found, np.broadcast_to([[east], [north]], (2, 20)), rtol=0, atol=2e-5)
    offset = float(np.median(found[0])) / 3600, float(np.median(found[1])) / 3600
    back_ra, back_dec = moved_back(to_ra, to_dec, offset, centre)
    assert separation_arcsec(back_ra, back_dec, ra, dec).max() < 4e-5
    assert (np.abs(back_dec) <= 90).all()


@settings(deadline=None)
@given(CENTRES, st.integers(0, 2**32 - 1))
def test_no_offset_changes_no_digit(centre, seed):
    ra, dec = projection(centre).wcs_pix2world(*np.random.default_rng(seed).uniform(-0.1, 0.1, (2, 20)), 0)
    east, north = offsets(ra, dec, ra, dec, centre)
    assert not east.any()
    assert not north.any()
    found = moved_back(ra, dec, (0.0, 0.0), centre)
    np.testing.assert_array_equal(found, (ra, dec))


@settings(deadline=None)
@given(st.floats(0, 360), st.floats(-60, 60), st.floats(-1e-9, 1e-9), st.floats(-1e-9, 1e-9))
def test_what_rounding_leaves_is_no_more_afterwards(ra, dec, east, north):
    """Offsets of rounding, such as those of a catalogue measured with the WCS itself, move by themselves only."""
    back_ra, back_dec = moved_back(np.array([ra]), np.array([dec]), (east, north), (ra, dec))
    assert back_ra[0] == pytest.approx(ra - east / np.cos(np.radians(dec)), abs=1.2e-13)
    assert back_dec[0] == pytest.approx(dec - north, abs=3e-14)


def test_no_positions():
    none = np.zeros(0)
    assert offsets(none, none, none, none, (150.0, 2.0))[0].shape == (0,)
    assert moved_back(none, none, (1e-4, 0.0), (150.0, 2.0))[0].shape == (0,)
