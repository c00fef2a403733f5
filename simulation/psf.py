"""The point-spread function of one exposure: it varies over the detector, with band and with every exposure.

The function is built with GalSim at the nodes of a coarse grid, each node once an exposure, and handed to the
renderer as its Fourier transform on the grid of a stamp. A source takes the node next to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import galsim
import numpy as np
import numpy.typing as npt

from sgclassify.simulation.filters import FILTERS
from sgclassify.stages.bands import PIXEL_SCALE

Array = npt.NDArray[np.float64]

FAMILIES: Final = ("optical", "moffat", "optical_moffat")
"""Kinds of PSF: diffraction with aberrations and jitter; a Moffat function; diffraction and a Moffat function."""

MIRROR_DIAMETER_M: Final = 2.0
REFERENCE_WAVELENGTH_NM: Final = 632.8
"""Wavelength at which wavefront errors are given."""

OVERSAMPLING: Final = 2
"""Samples a pixel in the renderer: the light beyond 1 cycle a pixel is below a percent after jitter and pixel."""

GSPARAMS: Final = galsim.GSParams(folding_threshold=5e-3, maxk_threshold=2e-3)


@dataclass(frozen=True, slots=True)
class PsfModel:
    """PSF of one exposure.

    Attributes
    ----------
    family : str
        One of ``FAMILIES``.
    band : str
        Band; sets the wavelength.
    jitter_arcsec : float
        Standard deviation of the pointing jitter and charge diffusion, arcsec.
    moffat_fwhm_arcsec, moffat_beta : float
        Moffat part, where the family has one.
    aberrations : ndarray, float64, shape (12, 3)
        Zernike coefficients 0..11 (Noll), waves at ``REFERENCE_WAVELENGTH_NM``: mean over the detector, and slopes
        along x and y from its centre to its edge.
    shear : ndarray, float64, shape (2, 3)
        Reduced shear (g1, g2) of the Moffat part: mean and slopes.
    nodes : int
        Nodes along each axis of the detector.
    """

    family: str
    band: str
    jitter_arcsec: float
    moffat_fwhm_arcsec: float
    moffat_beta: float
    aberrations: Array
    shear: Array
    nodes: int


def draw_psf(
    band: str, families: tuple[str, ...], quality: float, nodes: int, rng: np.random.Generator
) -> PsfModel:
    """Draw the PSF of one exposure.

    Parameters
    ----------
    band : str
        Band.
    families : tuple of str
        Families to choose from.
    quality : float
        0 for the sharpest to 1 for the widest PSF that the simulation knows; shared by the exposures of a field,
        which scatter about it.
    nodes : int
        Nodes along each axis.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    PsfModel
    """
    quality = float(np.clip(quality + rng.normal(0.0, 0.12), 0.0, 1.0))
    aberrations = np.zeros((12, 3))
    # Defocus, astigmatism, coma, trefoil, spherical: 0.05-0.11 wave in all, the larger part static.
    rms = rng.uniform(0.03, 0.06) + 0.05 * quality
    draw = rng.normal(size=8) * np.array([1.0, 1.0, 1.0, 0.8, 0.8, 0.5, 0.5, 0.5])
    aberrations[4:, 0] = rms * draw / np.linalg.norm(draw)
    aberrations[4:7, 1:] = rng.normal(0.0, 0.015, (3, 2))
    aberrations[4, 0] += rng.normal(0.0, 0.015)  # focus drift of this exposure
    shear = np.concatenate([rng.normal(0.0, 0.02, (2, 1)), rng.normal(0.0, 0.01, (2, 2))], axis=1)
    family = str(rng.choice(families))
    jitter = 0.043 + 0.025 * quality + rng.normal(0.0, 0.002)
    if family == "moffat":
        width, jitter = 0.105 + 0.075 * quality, 0.02
    else:
        width = 0.035 + 0.025 * quality
        jitter -= 0.006 * (family == "optical_moffat")
    return PsfModel(family, band, max(jitter, 0.02), width, rng.uniform(2.5, 4.5), aberrations, shear, nodes)


class PsfField:
    """A :class:`PsfModel` spread over one detector.

    Parameters
    ----------
    model : PsfModel
        PSF of the exposure.
    shape : tuple of int
        (ny, nx) of the detector, pixels.
    """

    def __init__(self, model: PsfModel, shape: tuple[int, int]) -> None:
        self.model = model
        self.shape = shape
        self._profiles: dict[int, Any] = {}
        self._fourier: dict[tuple[int, int], npt.NDArray[np.complex64]] = {}

    def node_at(self, x: Array, y: Array) -> npt.NDArray[np.int64]:
        """Number of the node next to each position (0-based pixels; outside positions take the border's)."""
        n = self.model.nodes
        column = np.clip((np.asarray(x) + 0.5) * n / self.shape[1], 0, n - 1).astype(np.int64)
        row = np.clip((np.asarray(y) + 0.5) * n / self.shape[0], 0, n - 1).astype(np.int64)
        return row * n + column

    def profile(self, node: int) -> Any:
        """GalSim profile of a node, pixel response included, centred on its centroid, flux 1; lengths in arcsec."""
        if node not in self._profiles:
            self._profiles[node] = _centred(self._build(node))
        return self._profiles[node]

    def _build(self, node: int) -> Any:
        model, n = self.model, self.model.nodes
        v, u = ((np.array(divmod(node, n)) + 0.5) / n) * 2 - 1
        position = np.array([1.0, u, v])
        parts = [galsim.Pixel(PIXEL_SCALE, gsparams=GSPARAMS)]
        if model.family != "moffat":
            wavelength = FILTERS[model.band].pivot_a / 10.0
            zernike = (model.aberrations @ position) * (REFERENCE_WAVELENGTH_NM / wavelength)
            parts.append(
                galsim.OpticalPSF(
                    lam=wavelength, diam=MIRROR_DIAMETER_M, aberrations=zernike.tolist(), gsparams=GSPARAMS
                )
            )
        if model.family != "optical":
            g1, g2 = model.shear @ position
            moffat = galsim.Moffat(beta=model.moffat_beta, fwhm=model.moffat_fwhm_arcsec, gsparams=GSPARAMS)
            parts.append(moffat.shear(g1=g1, g2=g2))
        parts.append(galsim.Gaussian(sigma=model.jitter_arcsec, gsparams=GSPARAMS))
        return galsim.Convolve(parts, gsparams=GSPARAMS)

    def fourier(self, node: int, size: int) -> npt.NDArray[np.complex64]:
        """Fourier transform of a node's PSF on the half plane of ``scipy.fft.rfft2``.

        Parameters
        ----------
        node : int
            Number of the node.
        size : int
            Side of the stamp, pixels; the transform is that of ``OVERSAMPLING`` samples a pixel.

        Returns
        -------
        ndarray, complex64, shape (m, m // 2 + 1) with m = OVERSAMPLING * size
            1 at zero frequency.
        """
        key = (node, size)
        if key not in self._fourier:
            m = OVERSAMPLING * size
            step = 2 * np.pi / (size * PIXEL_SCALE)
            image = self.profile(node).drawKImage(nx=m, ny=m, scale=step).array
            half = np.zeros((m, m // 2 + 1), dtype=np.complex64)
            half[:, : m // 2] = np.fft.ifftshift(image, axes=0)[:, m // 2 :]
            self._fourier[key] = half
        return self._fourier[key]

    def fwhm_px(self) -> float:
        """Full width at half maximum at the middle of the detector, pixels, pixel response included."""
        return fwhm_px(self.profile(self.model.nodes * (self.model.nodes // 2) + self.model.nodes // 2))


def fwhm_px(profile: Any) -> float:
    """Full width at half maximum of a profile: of the circle with the area above half of the peak.

    Parameters
    ----------
    profile : galsim.GSObject
        Profile in arcsec with the pixel response in it.

    Returns
    -------
    float
        Pixels.
    """
    fine = 10
    image = profile.drawImage(nx=128, ny=128, scale=PIXEL_SCALE / fine, method="no_pixel").array
    area = np.count_nonzero(image > image.max() / 2)
    return float(2 * np.sqrt(area / np.pi) / fine)


def _centred(profile: Any) -> Any:
    # Coma moves the light off the nominal position; astrometry is calibrated on the light, so move it back.
    image = profile.drawImage(nx=64, ny=64, scale=PIXEL_SCALE / 2, method="no_pixel").array.astype(np.float64)
    axis = (np.arange(64) - 31.5) * PIXEL_SCALE / 2
    total = image.sum()
    return profile.shift(-float(image.sum(0) @ axis / total), -float(image.sum(1) @ axis / total))
