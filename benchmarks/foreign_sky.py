"""Sources of the foreign fields.

Spectra are analytic; galaxies are sums of discs, bulges, knots, arms, rings and clumps; stars scatter about a locus.
The order of the random draws is part of the fields: keep it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple

import galsim
import numpy as np
import numpy.typing as npt

from sgclassify.simulation.filters import FILTERS
from sgclassify.simulation.sky import LOCUS
from sgclassify.stages.bands import BAND_INDEX, PIXEL_SCALE

Array = npt.NDArray[Any]
Rng = np.random.Generator

I_BAND: Final = BAND_INDEX["i"]

# rest wavelength, equivalent width and width (sigma), A, of emission lines
GALAXY_LINES: Final = (
    (1216, 25, 45), (3727, 45, 45), (4861, 18, 45), (5007, 50, 45), (6563, 90, 45), (6725, 15, 45),
)  # fmt: skip
QUASAR_LINES: Final = (
    (1216, 110, 30), (1549, 45, 30), (1909, 25, 35), (2798, 45, 40), (4861, 60, 60), (6563, 250, 80),
)  # fmt: skip
ROOT_2PI: Final = 2.507

# stars per square degree brighter than a magnitude in i, at a galactic latitude of 60 degrees
STAR_MAGNITUDES: Final = np.array([14.5, 16, 18, 20, 21, 22, 23, 24, 25, 26, 27])
STAR_COUNTS: Final = np.array([70, 230, 810, 2080, 3150, 4610, 6530, 9010, 12200, 16000, 20300.0])

# galaxies per arcmin^2 brighter than a magnitude in i: 46 x 10^(0.31 (i - 25)), between two limits
COUNT_SLOPE: Final = 0.31
BRIGHTEST, FAINTEST = 17.0, 27

EXTINCTION: Final = np.array([7.4, 4.9, 3.7, 2.55, 1.9, 1.45, 1.3])
"""Extinction in the seven bands over E(B-V)."""

KINDS: Final = ("sersic", "bulge_disk", "knots", "spiral", "irregular", "ring", "merger")
KIND_SHARES: Final = {
    "elliptical": (0.55, 0.45, 0, 0, 0, 0, 0), "spiral": (0.15, 0.32, 0.18, 0.25, 0, 0.05, 0.05),
    "irregular": (0.25, 0.05, 0.28, 0.04, 0.28, 0.02, 0.08),
}  # fmt: skip
STRUCTURE_LIMIT: Final = 25.8  # i; fainter galaxies show nothing but a Sersic profile
ARMS_LIMIT: Final = 24.8  # i; fainter galaxies have knots instead of arms and rings
PHOTONS: Final = 5000  # from which the size of a galaxy is measured


class Population(NamedTuple):
    """Stars and dust of one component of a galaxy."""

    old_share: float  # of the light at 5500 A
    dust_mag: float  # extinction at 5500 A
    line_strength: float  # over the equivalent widths of GALAXY_LINES
    temperature_k: float = 4900.0  # of the black body that stands for old stars
    slope: float = -1.9  # of the spectrum of young stars


class Component(NamedTuple):
    """A part of a galaxy."""

    profile: galsim.GSObject  # in any unit of length
    stars: Population
    share: float  # of the light in i


class Outline(NamedTuple):
    """A galaxy before it gets its parts."""

    morphology: str  # one of KIND_SHARES
    r50: float  # half-light radius, arcsec
    q: float  # axis ratio
    angle: float  # position angle, radians
    old: Population  # of its bulge
    main: Population  # of most of it
    hot: Population  # of its knots


@dataclass
class Source:
    """A source: a galaxy has `components`, a star or a quasar has `points`."""

    true_class: str
    kind: str
    redshift: float
    magnitudes: Array  # total, AB, in the seven bands
    # profiles (arcsec) and magnitudes; offsets (arcsec) and magnitudes
    components: list[tuple[galsim.GSObject, Array]] = field(default_factory=list)
    points: list[tuple[float, float, Array]] = field(default_factory=list)
    r50_arcsec: float | None = None
    sersic_n: float | None = None
    pair_sep: float | None = None  # arcsec; 0 for a single star
    pair_dmag: float | None = None
    ra: float = 0.0  # degrees
    dec: float = 0.0
    bands: set[str] = field(default_factory=set)  # of the exposures that it lies on


class Sky:
    """Properties of a field; `ra` and `dec` (degrees) are its middle."""

    def __init__(self, rng: Rng) -> None:
        self.ra = rng.uniform(0, 360)
        self.dec = np.degrees(np.arcsin(rng.uniform(-0.85, 0.85)))
        self.star_density = np.exp(rng.uniform(np.log(0.5), np.log(6.0)))  # over STAR_COUNTS
        self.brightness = rng.uniform(0.8, 2.5)  # of the sky over the usual one
        self.reddening = rng.uniform(0, 0.1)  # E(B-V)
        self.locus_scatter_mag = rng.uniform(0.02, 0.05)
        self.size_scatter_dex = rng.uniform(0.17, 0.23)


def transmission(observed: Array, redshift: float, escaping: float) -> Array:
    """Transmission of intergalactic hydrogen at observed wavelengths (A); below 912 A at rest also times `escaping`."""
    depth = np.where(observed < 1216 * (1 + redshift), 0.0036 * (observed / 1216.0) ** 3.46 * 1.25, 0.0)
    ionising = observed < 912 * (1 + redshift)
    depth = np.where(ionising, depth + 0.35 * (1 + redshift) ** 1.2, depth)
    return np.exp(-depth) * np.where(ionising, escaping, 1.0)


def with_lines(flux: Array, rest: Array, lines: Any, pivot: float, slope: float, strength: float) -> Array:
    """A spectrum with emission lines over a power law that is 1 at a pivot (A)."""
    for line, width, sigma in lines:
        profile = np.exp(-0.5 * ((rest - line) / sigma) ** 2)
        flux = flux + (line / pivot) ** slope * strength * width * profile / (sigma * ROOT_2PI)
    return flux


def old_spectrum(rest: Array, temperature_k: float) -> Array:
    """Flux per wavelength of old stars at rest wavelengths (A), 1 at 5500 A: a black body with a break at 4000 A."""
    hc_k = 1.4388e8  # second radiation constant, A K
    peak = np.exp(hc_k / (5500.0 * temperature_k)) - 1
    flux = (5500.0 / rest) ** 5 * peak / (np.exp(np.minimum(hc_k / (rest * temperature_k), 300)) - 1)
    flux = flux * (1 - 0.48 / (1 + np.exp((rest - 3950) / 60.0)))
    upturn = 0.012 * (rest / 2000.0) ** -1.5 * (rest > 912)
    return flux * np.where(rest < 2700, np.exp(-(2700 - rest) / 600.0), 1.0) + upturn


def young_spectrum(rest: Array, strength: float, slope: float) -> Array:
    """Flux per wavelength of young stars at rest wavelengths (A), 1 at 5500 A: a power law with emission lines."""
    flux = (rest / 5500.0) ** slope * (1 - 0.28 / (1 + np.exp((rest - 3700) / 50.0)))
    return with_lines(flux, rest, GALAXY_LINES, 5500.0, slope, strength) * (rest > 700)


def magnitudes_of(stars: Population | None, redshift: float) -> Array:
    """AB magnitudes in the seven bands, with a common offset, of a population; of a quasar if it is None."""
    magnitudes = []
    for spec in FILTERS.values():
        # here a band is a top hat
        observed = np.linspace(*spec.half_peak_a, 30)
        rest = observed / (1 + redshift)
        if stars is None:
            flux = with_lines((rest / 3000.0) ** -1.55, rest, QUASAR_LINES, 3000.0, -1.55, 1.0)
            flux = flux * transmission(observed, redshift, 0.5)
        else:
            old = stars.old_share * old_spectrum(rest, stars.temperature_k)
            flux = old + (1 - stars.old_share) * young_spectrum(rest, stars.line_strength, stars.slope)
            dust = 10 ** (-0.4 * stars.dust_mag * (5500.0 / rest) ** 0.95)
            flux = flux * dust * transmission(observed, redshift, 0.04)
        magnitudes.append(-2.5 * np.log10(max((flux * observed).mean(), 1e-30) / (1 / observed).mean()))
    return np.array(magnitudes)


def total_magnitudes(parts: list[Array]) -> Array:
    """AB magnitudes of all parts together."""
    return -2.5 * np.log10(sum(10 ** (-0.4 * part) for part in parts))


def star_colours(spectral_type: float, scatter_mag: float, halo: bool, rng: Rng) -> Array:
    """AB magnitudes in the seven bands less that in i, at a row of `LOCUS`; stars of the halo are bluer in u.

    The first column of `LOCUS` counts as NUV-g here.
    """
    index = np.array([np.interp(spectral_type, np.arange(10), column) for column in LOCUS.T])
    index = index + rng.normal(0, scatter_mag, 6)
    if halo:
        bluer = rng.uniform(0.2, 0.4)
        index[1] -= bluer
        index[0] -= bluer * 1.3
    nuv_g, u_g, g_r, r_i, i_z, z_y = index
    g = g_r + r_i
    return np.array([g + nuv_g, g + u_g, g, r_i, 0.0, -i_z, -i_z - z_y])


def make_star(i: float, scatter_mag: float, rng: Rng) -> Source:
    """A star of a magnitude: a white dwarf, of the halo or of the disc; one in twenty is a close binary."""
    faint = np.clip((i - 19) / 6, 0, 1)
    halo = False
    if rng.random() < 0.012:
        spectral_type = rng.uniform(0.0, 0.5)
    elif rng.random() < 0.5 - 0.1 * faint:
        spectral_type, halo = np.clip(rng.normal(2.9, 0.7), 0.8, 5), True
    else:
        spectral_type = np.clip(rng.normal(4.2 + 2.3 * faint, 1.6), 0.8, 9)
    magnitudes = i + star_colours(spectral_type, scatter_mag, halo, rng)
    points = [(0.0, 0.0, magnitudes)]
    star = Source("star", "single", 0.0, magnitudes, points=points, pair_sep=0.0, pair_dmag=0.0)
    if rng.random() < 0.05:
        star.kind = "binary"
        star.pair_sep, star.pair_dmag = rng.uniform(0.05, 0.3), abs(rng.normal(0, 1.5))
        angle = rng.uniform(0, 6.3)
        colours = star_colours(np.clip(spectral_type + star.pair_dmag * 0.7, 0, 9), scatter_mag, halo, rng)
        companion = magnitudes[I_BAND] + star.pair_dmag + colours
        star.points.append((star.pair_sep * np.cos(angle), star.pair_sep * np.sin(angle), companion))
        star.magnitudes = total_magnitudes([magnitudes, companion])
    return star


def make_quasar(i: float, rng: Rng) -> Source:
    """A quasar of a magnitude."""
    redshift = rng.uniform(0.3, 3.6)
    magnitudes = magnitudes_of(None, redshift)
    magnitudes = i + magnitudes - magnitudes[I_BAND] + rng.normal(0, 0.05, 7)
    return Source("qso", "qso", redshift, magnitudes, points=[(0.0, 0.0, magnitudes)])


def light_radii(
    profile: galsim.GSObject, seed: int, axis_ratio: float = 1.0, angle: float = 0.0
) -> tuple[float, float, float, float]:
    """Half-light radius in circularised ellipses, r80 / r20, and median x and y of the photons of a profile."""
    photons = profile.withFlux(1.0).makePhot(n_photons=PHOTONS, rng=galsim.BaseDeviate(seed))
    positive = photons.flux > 0
    x, y = photons.x[positive], photons.y[positive]
    x0, y0 = np.median(x), np.median(y)
    along = (x - x0) * np.cos(angle) + (y - y0) * np.sin(angle)
    across = -(x - x0) * np.sin(angle) + (y - y0) * np.cos(angle)
    radius = np.hypot(along * np.sqrt(axis_ratio), across / np.sqrt(axis_ratio))
    r20, r50, r80 = np.percentile(radius, (20, 50, 80))
    return r50, r80 / max(r20, 1e-4), x0, y0


def sersic(index: float, radius: float) -> galsim.GSObject:
    """A truncated Sersic profile of a half-light radius."""
    return galsim.Sersic(n=index, half_light_radius=radius, trunc=(7.0 if index > 2 else 5.5) * radius)


def rounded(index: float) -> float:
    """A Sersic index in steps of 0.25, because GalSim is slow to prepare each new index."""
    return float(np.clip(round(index / 0.25) * 0.25, 0.5, 5))


# r80 / r20 of the photons of Sersic profiles: gives the index of a galaxy of several parts
SERSIC_INDICES: Final = np.array([0.5, 0.7, 1, 1.5, 2, 3, 4, 5])
CONCENTRATIONS: Final = np.array([light_radii(sersic(index, 1.0), 5)[1] for index in SERSIC_INDICES])


def inclined(profile: galsim.GSObject, axis_ratio: float, angle: float) -> galsim.GSObject:
    """The profile seen at an axis ratio and a position angle (radians)."""
    return profile.shear(q=max(axis_ratio, 0.12), beta=angle * galsim.radians)


def scattered_points(count: int, spread: float, rng: Rng) -> galsim.GSObject:
    """Points of equal brightness, spread over a profile of a half-light radius."""
    envelope = galsim.Sersic(n=0.7, half_light_radius=spread)
    seed = galsim.BaseDeviate(int(rng.integers(1 << 30)))
    return galsim.RandomKnots(npoints=count, profile=envelope, rng=seed)


def arms_or_ring(ring: bool, rng: Rng) -> galsim.GSObject:
    """A face-on disc of scale length 1 with spiral arms, at times a bar and HII regions; or a ring."""
    size, edge = 96, 4.5
    axis = (np.arange(size) - size / 2 + 0.5) / (size / 2) * edge
    x, y = np.meshgrid(axis, axis)
    radius, angle = np.hypot(x, y) + 1e-3, np.arctan2(y, x)
    if ring:
        ring_radius, width = rng.uniform(1, 2), rng.uniform(0.15, 0.5)
        uneven = 1 + 0.4 * np.cos(angle * rng.integers(1, 4) + rng.uniform(0, 6))
        image = np.exp(-0.5 * ((radius - ring_radius) / width) ** 2) * uneven + 0.15 * np.exp(-radius)
    else:
        arms = rng.choice([2, 2, 2, 3, 4])
        pitch = np.tan(np.radians(rng.uniform(10, 30)))
        contrast = rng.uniform(0.4, 0.95)
        phase = arms * (angle - np.log(radius) / pitch) + rng.uniform(0, 6.3)
        wave = 1 + contrast * np.cos(phase) * np.clip(radius / 0.6, 0, 1)
        image = np.exp(-radius) * wave ** rng.uniform(1, 2)
        if rng.random() < 0.4:  # a bar
            image += np.exp(-0.5 * (x / 0.7) ** 2 - 0.5 * (y / 0.18) ** 2)
        for _ in range(rng.integers(0, 14)):  # HII regions on the arms
            r = rng.uniform(0.5, 3)
            at = np.log(r) / pitch + 2 * np.pi * rng.integers(arms) / arms + rng.normal(0, 0.15)
            distance2 = (x - r * np.cos(at)) ** 2 + (y - r * np.sin(at)) ** 2
            image += rng.uniform(0.3, 1.5) * np.exp(-r * 0.8) * np.exp(-0.5 * distance2 / 0.12**2)
    image *= radius < 4.4
    image = galsim.Image(image, scale=edge * 2 / size)
    return galsim.InterpolatedImage(image, x_interpolant="cubic", pad_factor=2.0, flux=1.0)


def draw_outline(i: float, size_scatter_dex: float, rng: Rng) -> tuple[Outline, bool]:
    """Outline of a galaxy of a magnitude, and whether it is compact; log10 r50["] = -0.53 - 0.125 (i - 23)."""
    morphology = "irregular"
    if rng.random() < np.interp(i, [18, 21, 23, 25, 27], [0.42, 0.34, 0.2, 0.08, 0.04]):
        morphology = "elliptical"
    elif rng.random() < np.interp(i, [20, 24, 27], [0.8, 0.55, 0.35]):
        morphology = "spiral"
    r50 = 10 ** (-0.53 - 0.125 * (i - 23) + rng.normal(0, size_scatter_dex))
    r50 *= 0.8 if morphology == "elliptical" else 1.0
    compact = rng.random() < 0.02
    r50 = float(np.clip(rng.uniform(0.025, 0.08) if compact else r50, 0.025, 3.0))
    q, angle = float(np.clip(0.14 + 0.82 * rng.beta(1.9, 1.7), 0.12, 0.97)), rng.uniform(0, np.pi)
    old = Population(rng.uniform(0.93, 0.995), rng.uniform(0, 0.25), 0.2, rng.normal(4800, 200))
    if morphology == "elliptical":
        main = Population(rng.uniform(0.9, 0.995), rng.uniform(0, 0.15), 0.2, rng.normal(4750, 200))
    elif morphology == "spiral":
        share, dust, lines = rng.uniform(0.35, 0.85), rng.uniform(0, 1.2), rng.uniform(0.2, 1)
        main = Population(share, dust, lines, rng.normal(5100, 200), rng.uniform(-2.1, -1.5))
    else:
        share, dust, lines = rng.uniform(0, 0.45), rng.exponential(0.35), rng.uniform(0.5, 3)
        main = Population(share, dust, lines, rng.normal(5300, 200), rng.uniform(-2.4, -1.7))
    hot = Population(0, main.dust_mag * 0.7, rng.uniform(1, 5), 5000.0, rng.uniform(-2.5, -1.9))
    return Outline(morphology, r50, q, angle, old, main, hot), compact


def bulge_and_disc(galaxy: Outline, rng: Rng) -> list[Component]:
    """An exponential disc with a Sersic bulge."""
    share = rng.uniform(0.4, 0.9) if galaxy.morphology == "elliptical" else rng.beta(1.2, 3.0)
    bulge = sersic(rng.choice([2.0, 3.0, 4.0]), rng.uniform(0.15, 0.6))
    bulge = inclined(bulge, rng.uniform(0.6, 1), galaxy.angle + rng.normal(0, 0.3))
    disc = inclined(galsim.Exponential(half_light_radius=1.0), galaxy.q, galaxy.angle)
    return [Component(disc, galaxy.main, 1 - share), Component(bulge, galaxy.old, share)]


def knots_on_disc(galaxy: Outline, rng: Rng) -> list[Component]:
    """An exponential disc with knots of at most 0.1 arcsec, at times with a bulge."""
    share = rng.uniform(0.1, 0.5)
    points = scattered_points(int(rng.integers(6, 50)), 0.9, rng)
    knot = galsim.Gaussian(half_light_radius=min(rng.uniform(0.06, 0.2), 0.1 / galaxy.r50))
    knots = galsim.Convolve(points, knot)
    bulge, found = 0.0, []
    if galaxy.morphology == "spiral" and rng.random() < 0.6:
        bulge = rng.uniform(0.05, 0.35)
        found = [Component(inclined(sersic(2.0, 0.25), 0.85, galaxy.angle), galaxy.old, bulge)]
    disc = inclined(galsim.Exponential(half_light_radius=1.0), galaxy.q, galaxy.angle)
    disc = Component(disc, galaxy.main, (1 - share) * (1 - bulge))
    return [disc, Component(inclined(knots, galaxy.q, galaxy.angle), galaxy.hot, share * (1 - bulge)), *found]


def arms_and_bulge(galaxy: Outline, rng: Rng, ring: bool = False) -> list[Component]:
    """Spiral arms or a ring about a bulge, with some knots."""
    bulge = rng.uniform(0, 0.5) if ring else rng.beta(1.3, 4)
    share = rng.uniform(0, 0.2)
    points = scattered_points(int(rng.integers(4, 16)), 1.3, rng)
    knots = galsim.Convolve(points, galsim.Gaussian(half_light_radius=min(0.1, 0.1 / galaxy.r50)))
    disc = inclined(arms_or_ring(ring, rng), galaxy.q, galaxy.angle)
    middle = inclined(sersic(rng.choice([1.0, 2.0, 3.0]), 0.4), rng.uniform(0.6, 1), galaxy.angle)
    disc = Component(disc, galaxy.main, (1 - bulge) * (1 - share))
    knots = Component(inclined(knots, galaxy.q, galaxy.angle), galaxy.hot, (1 - bulge) * share)
    return [disc, Component(middle, galaxy.old, bulge), knots]


def clumps(galaxy: Outline, rng: Rng) -> list[Component]:
    """An irregular galaxy: two to five clumps."""
    cosine, sine = np.cos(galaxy.angle), np.sin(galaxy.angle)
    count = int(rng.integers(2, 6))
    found = []
    for k, share in enumerate(rng.dirichlet(np.ones(count) * 1.5)):
        clump = sersic(rounded(rng.uniform(0.5, 1.5)), rng.uniform(0.25, 0.9))
        clump = inclined(clump, rng.uniform(0.35, 1), rng.uniform(0, 3.14))
        dx, dy = rng.normal(0, 0.55, 2)
        clump = clump.shift(dx * cosine - dy * galaxy.q * sine, dx * sine + dy * galaxy.q * cosine)
        found.append(Component(clump, galaxy.hot if k % 2 else galaxy.main, share))
    return found


def merging_pair(galaxy: Outline, rng: Rng) -> list[Component]:
    """Two galaxies and a tidal bridge."""
    share, distance, angle = rng.uniform(0.15, 0.5), rng.uniform(1.2, 3.5), rng.uniform(0, 6.3)
    x, y = distance * np.cos(angle), distance * np.sin(angle)
    first = inclined(sersic(rounded(rng.uniform(0.8, 3)), 1.0), galaxy.q, galaxy.angle)
    second = sersic(rounded(rng.uniform(0.8, 3)), rng.uniform(0.4, 1.0))
    second = inclined(second, rng.uniform(0.3, 1), rng.uniform(0, 3)).shift(x, y)
    second_stars = galaxy.hot if rng.random() < 0.5 else galaxy.old
    bridge = inclined(sersic(0.5, distance * 0.6), 0.2, angle).shift(x / 2, y / 2)
    first = Component(first, galaxy.main, (1 - share) * 0.92)
    return [first, Component(second, second_stars, share * 0.92), Component(bridge, galaxy.main, 0.08)]


BUILDERS: Final = {
    "bulge_disk": bulge_and_disc, "knots": knots_on_disc, "spiral": arms_and_bulge,
    "ring": partial(arms_and_bulge, ring=True), "irregular": clumps, "merger": merging_pair,
}  # fmt: skip


def make_galaxy(i: float, size_scatter_dex: float, rng: Rng) -> Source:
    """A galaxy of a magnitude."""
    redshift = max(min(rng.gamma(3.0, max(0.0417 * i - 0.744, 0.05)), 4.5), 0.02)
    galaxy, compact = draw_outline(i, size_scatter_dex, rng)
    r50 = galaxy.r50
    kind = "compact" if compact else "sersic"
    if not compact and i < STRUCTURE_LIMIT:
        kind = str(rng.choice(KINDS, p=KIND_SHARES[galaxy.morphology]))
        if kind in ("spiral", "ring") and i > ARMS_LIMIT:
            kind = "knots"
    if kind in BUILDERS:
        components = BUILDERS[kind](galaxy, rng)
        # a galaxy without a common inclination is measured in circles
        ellipse = (1.0, 0.0) if kind in ("irregular", "merger") else (max(galaxy.q, 0.12), galaxy.angle)
        whole = galsim.Sum([part.profile.withFlux(max(part.share, 1e-6)) for part in components])
        measured, concentration, x, y = light_radii(whole, int(rng.integers(1 << 30)), *ellipse)
        index = float(np.interp(concentration, CONCENTRATIONS, SERSIC_INDICES))
        r50 = min(r50, 0.6) if kind == "merger" else r50
        if kind == "irregular":  # clumps have no common centre: their middle is put at the galaxy's place
            components = [part._replace(profile=part.profile.shift(-x, -y)) for part in components]
    else:
        # all three are drawn, whatever the morphology: the draws that follow depend on it
        indices = (rng.normal(3.9, 0.8), rng.lognormal(0.25, 0.35), rng.lognormal(-0.05, 0.35))
        index = 1.0 if i > 26.5 else rounded(indices[list(KIND_SHARES).index(galaxy.morphology)])
        profile, measured = inclined(sersic(index, 1.0), galaxy.q, galaxy.angle), 1.0
        components = [Component(profile, galaxy.main, 1.0)]
    shares = np.array([part.share for part in components])
    shares /= shares.sum()
    spectra = {part.stars: magnitudes_of(part.stars, redshift) for part in components}
    parts = []
    for part, share in zip(components, shares, strict=True):
        colours = spectra[part.stars] - spectra[part.stars][I_BAND]
        parts.append((part.profile.dilate(r50 / measured), i - 2.5 * np.log10(max(share, 1e-9)) + colours))
    total = total_magnitudes([magnitudes for _, magnitudes in parts])
    return Source("galaxy", kind, redshift, total, components=parts, r50_arcsec=r50, sersic_n=index)


def draw_sources(sky: Sky, shape: tuple[int, int], rng: Rng) -> list[Source]:
    """Galaxies, stars and quasars over `shape` (ny, nx) pixels about the middle of a field."""
    height, width = shape
    area = height * width * (PIXEL_SCALE / 60) ** 2
    galaxies = rng.poisson(46 * 10 ** (COUNT_SLOPE * (FAINTEST - 25)) * area)
    ranks = rng.uniform(10 ** (COUNT_SLOPE * (BRIGHTEST - FAINTEST)), 1, galaxies)
    galaxy_i = FAINTEST + np.log10(ranks) / COUNT_SLOPE
    stars = rng.poisson(STAR_COUNTS[-1] / 3600.0 * area * sky.star_density)
    sources = [make_galaxy(i, sky.size_scatter_dex, rng) for i in galaxy_i]
    star_i = np.interp(rng.uniform(STAR_COUNTS[0], STAR_COUNTS[-1], stars), STAR_COUNTS, STAR_MAGNITUDES)
    sources += [make_star(i, sky.locus_scatter_mag, rng) for i in star_i]
    quasars = rng.poisson(0.007 * ((galaxy_i < 26).sum() + stars))
    sources += [make_quasar(i, rng) for i in np.clip(rng.normal(22.5, 1.6, quasars), 18, 26)]
    # magnitudes in i stay: they were drawn from counts of what is seen
    red = sky.reddening * (EXTINCTION - EXTINCTION[I_BAND])
    for source in sources:
        source.magnitudes = source.magnitudes + red
        source.components = [(profile, magnitudes + red) for profile, magnitudes in source.components]
        source.points = [(dx, dy, magnitudes + red) for dx, dy, magnitudes in source.points]
        dx, dy = (rng.uniform(-0.5, 0.5, 2) * (width, height)) * PIXEL_SCALE / 3600
        source.dec = sky.dec + dy
        source.ra = (sky.ra + dx / np.cos(np.radians(source.dec))) % 360
    return sources
