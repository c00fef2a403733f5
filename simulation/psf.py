"""The point-spread function of one exposure: it varies over the detector, between bands and between exposures.

GalSim builds the function at the nodes of a coarse grid, each node once per exposure. The renderer gets its Fourier
transform on the grid of a stamp. A source takes the nearest node.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Final

import galsim
import numpy as np
import numpy.typing as npt
import scipy.fft

from sgclassify.simulation.filters import FILTERS, SHIFTED_PSF_FAMILY
from sgclassify.stages.arrays import F32, F64, I64
from sgclassify.stages.bands import PIXEL_SCALE

MOFFAT_BETAS: Final = (2.5, 3.5)
"""Exponents of the Moffat function, either side of the 3 that stands in for this telescope. Their transforms have
closed forms; with others GalSim takes ten to fifty times as long."""

MIRROR_DIAMETER_M: Final = 2.0
REFERENCE_WAVELENGTH_NM: Final = 632.8
"""Wavelength at which wavefront errors are given."""

OVERSAMPLING: Final = 2
"""Samples per pixel in the renderer: after jitter and pixel, less than 1 % of the light is beyond 1 cycle per pixel."""

BASE_SIZE: Final = 64
"""Stamp size, pixels, for which GalSim computes the transform; the transforms of its divisors are taken from it."""

STRAINED_WIDTH: Final = 0.4
"""Exponent by which the Moffat part widens where aberrations grow: about as much as the diffraction pattern does."""

MAX_TRAIL: Final = 0.5
"""Largest reduced shear of the jitter: an axis ratio of 1 to 3."""

WINDOW_SIGMA_PX: Final = 1.5
"""Width of the window under which the centroid of a PSF is measured, pixels."""

GSPARAMS: Final = galsim.GSParams(folding_threshold=5e-3, maxk_threshold=2e-3)


@dataclass(frozen=True, slots=True)
class PsfModel:
    """PSF of one exposure.

    Attributes
    ----------
    family : str
        One of ``ALL_PSF_FAMILIES``.
    band : str
        Sets the wavelength.
    jitter_arcsec : float
        Standard deviation of the pointing jitter and charge diffusion, arcsec.
    moffat_fwhm_arcsec, moffat_beta : float
        Moffat part, where the family has one.
    aberrations : ndarray, float64, shape (12, 3)
        Zernike coefficients 0..11 (Noll), waves at ``REFERENCE_WAVELENGTH_NM``: mean over the detector, and
        slopes along x and y from its centre to its edge.
    shear : ndarray, float64, shape (2, 3)
        Reduced shear (g1, g2) of the Moffat part: mean and slopes.
    nodes : int
        Nodes along each axis of the detector.
    trail : float
        Reduced shear of the jitter in units of `shear`: how much a drift of the pointing elongates every source.
    """

    family: str
    band: str
    jitter_arcsec: float
    moffat_fwhm_arcsec: float
    moffat_beta: float
    aberrations: F64
    shear: F64
    nodes: int
    trail: float = 0.0

    def strained(self, factor: float) -> PsfModel:
        """The PSF of the same exposure, if the telescope were out of adjustment.

        `factor`, at least 1, multiplies aberrations, shears and their changes over the detector. The Moffat part widens
        and the jitter is elongated with it.
        """
        return replace(
            self,
            moffat_fwhm_arcsec=self.moffat_fwhm_arcsec * factor**STRAINED_WIDTH,
            aberrations=factor * self.aberrations,
            shear=factor * self.shear,
            trail=2.0 * (factor - 1.0),
        )


def draw_psf(band: str, families: tuple[str, ...], quality: float, nodes: int, rng: np.random.Generator) -> PsfModel:
    """Draw the PSF of one exposure, of one of the families, with `nodes` along each axis of the detector.

    `quality` goes from 0 for the sharpest to 1 for the widest PSF of the simulation. The exposures of a field share it,
    and scatter about it.
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
    jitter = 0.047 + 0.022 * quality + rng.normal(0.0, 0.002)
    if family == "moffat":
        width, jitter = 0.105 + 0.075 * quality, 0.02
    else:
        width = 0.035 + 0.025 * quality
        jitter -= 0.006 * (family == "optical_moffat")
    return PsfModel(family, band, max(jitter, 0.02), width, float(rng.choice(MOFFAT_BETAS)), aberrations, shear, nodes)


class PsfField:
    """A :class:`PsfModel` spread over one detector of `shape` (ny, nx), pixels."""

    def __init__(self, model: PsfModel, shape: tuple[int, int]) -> None:
        self.model = model
        self.shape = shape
        self._profiles: dict[int, Any] = {}
        self._centroids: dict[int, tuple[float, float]] = {}
        self._fourier: dict[tuple[int, int], npt.NDArray[np.complex64]] = {}

    def node_at(self, x: F64, y: F64) -> I64:
        """Number of the nearest node to each position (0-based pixels; positions outside take a node at the border)."""
        n = self.model.nodes
        column = np.clip(np.nan_to_num((x + 0.5) * n / self.shape[1]), 0, n - 1).astype(np.int64)
        row = np.clip(np.nan_to_num((y + 0.5) * n / self.shape[0]), 0, n - 1).astype(np.int64)
        return row * n + column

    def profile(self, node: int) -> Any:
        """GalSim profile of a node: with the pixel response, centred on its centroid, flux 1, lengths in arcsec."""
        x, y = self._centroid(node)
        return self._built(node).shift(-x * PIXEL_SCALE, -y * PIXEL_SCALE)

    def _built(self, node: int) -> Any:
        if node not in self._profiles:
            self._profiles[node] = self._build(node)
        return self._profiles[node]

    def _build(self, node: int) -> Any:
        model, n = self.model, self.model.nodes
        v, u = ((np.array(divmod(node, n)) + 0.5) / n) * 2 - 1
        position = np.array([1.0, u, v])
        parts = [galsim.Pixel(PIXEL_SCALE, gsparams=GSPARAMS)]
        if model.family == SHIFTED_PSF_FAMILY:
            g1, g2 = model.shear @ position
            core = galsim.Gaussian(sigma=model.jitter_arcsec, flux=0.8, gsparams=GSPARAMS)
            # a wide elongated part, as from charge diffusion and scattering
            halo = galsim.Gaussian(sigma=2.6 * model.jitter_arcsec, flux=0.2, gsparams=GSPARAMS)
            both = core.shear(g1=2 * g1, g2=2 * g2) + halo.shear(g1=0.15, g2=-0.1)
            return galsim.Convolve([*parts, both], gsparams=GSPARAMS)
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
        jitter = galsim.Gaussian(sigma=model.jitter_arcsec, gsparams=GSPARAMS)
        if model.trail:
            g1, g2 = model.trail * (model.shear @ position)
            shrink = min(1.0, MAX_TRAIL / float(np.hypot(g1, g2)))
            jitter = jitter.shear(g1=shrink * g1, g2=shrink * g2)
        return galsim.Convolve([*parts, jitter], gsparams=GSPARAMS)

    def fourier(self, node: int, size: int) -> npt.NDArray[np.complex64]:
        """Fourier transform of a node's PSF on the half plane of ``scipy.fft.rfft2``.

        The stamp has `size` pixels a side, and the transform ``OVERSAMPLING`` samples per pixel.

        Returns
        -------
        ndarray, complex64, shape (m, m // 2 + 1) with m = OVERSAMPLING * size
            1 at zero frequency.
        """
        key = (node, size)
        if key not in self._fourier:
            if size < BASE_SIZE and BASE_SIZE % size == 0:
                # A smaller stamp has the same frequencies, further apart.
                step = BASE_SIZE // size
                self._fourier[key] = np.ascontiguousarray(self.fourier(node, BASE_SIZE)[::step, ::step])
            else:
                x, y = self._centroid(node)
                rows, columns = waves(size)
                shift = np.exp(1j * np.float32(y) * rows) * np.exp(1j * np.float32(x) * columns)
                self._fourier[key] = _half_plane(self._built(node), size) * shift
        return self._fourier[key]

    def _centroid(self, node: int) -> tuple[float, float]:
        # Coma moves the light off the nominal position. Astrometry is calibrated on the light, so the shift is undone.
        if node not in self._centroids:
            rows, columns = waves(BASE_SIZE)
            middle = BASE_SIZE / 2
            centred = np.exp(-1j * middle * rows) * np.exp(-1j * middle * columns)
            side = OVERSAMPLING * BASE_SIZE
            image = scipy.fft.irfft2(_half_plane(self._built(node), BASE_SIZE) * centred, (side, side))
            self._centroids[node] = _windowed_centroid(image)
        return self._centroids[node]

    def fwhm_px(self) -> float:
        """Full width at half maximum at the middle of the detector, pixels, pixel response included."""
        return fwhm_px(self.profile(self.model.nodes * (self.model.nodes // 2) + self.model.nodes // 2))


def fwhm_px(profile: Any) -> float:
    """Full width at half maximum, pixels: the diameter of the circle that has the area above half of the peak.

    The profile, a galsim.GSObject in arcsec, includes the pixel response.
    """
    fine = 10
    image = profile.drawImage(nx=128, ny=128, scale=PIXEL_SCALE / fine, method="no_pixel").array
    area = np.count_nonzero(image > image.max() / 2)
    return float(2 * np.sqrt(area / np.pi) / fine)


@functools.lru_cache(maxsize=16)
def waves(size: int) -> tuple[F32, F32]:
    """Angular frequencies of the half plane of a stamp, radians per pixel.

    Parameters
    ----------
    size : int
        Side of the stamp, pixels, sampled ``OVERSAMPLING`` times per pixel.

    Returns
    -------
    rows : ndarray, float32, shape (m, 1)
        Along y, with m = OVERSAMPLING * size.
    columns : ndarray, float32, shape (1, m // 2 + 1)
        Along x.
    """
    side, step = OVERSAMPLING * size, 1.0 / OVERSAMPLING
    rows = 2 * np.pi * scipy.fft.fftfreq(side, step)
    columns = 2 * np.pi * scipy.fft.rfftfreq(side, step)
    return rows.astype(np.float32)[:, None], columns.astype(np.float32)[None, :]


def _half_plane(profile: Any, size: int) -> npt.NDArray[np.complex64]:
    m = OVERSAMPLING * size
    image = profile.drawKImage(nx=m, ny=m, scale=2 * np.pi / (size * PIXEL_SCALE)).array
    half = np.zeros((m, m // 2 + 1), dtype=np.complex64)
    half[:, : m // 2] = np.fft.ifftshift(image, axes=0)[:, m // 2 :]
    return half


def _windowed_centroid(image: F32) -> tuple[float, float]:
    # Offset of the light from the middle, pixels, under a Gaussian window that follows it.
    side = image.shape[0]
    axis = (np.arange(side) - side / 2) / OVERSAMPLING
    x = y = 0.0
    for _ in range(8):
        across, along = (np.exp(-0.5 * ((axis - centre) / WINDOW_SIGMA_PX) ** 2) for centre in (y, x))
        weighted = image * across[:, None] * along[None, :]
        total = weighted.sum()
        x += 2 * float(weighted.sum(0) @ (axis - x) / total)
        y += 2 * float(weighted.sum(1) @ (axis - y) / total)
    return x, y
