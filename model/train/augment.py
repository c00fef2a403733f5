"""Augment training data: turn and move stamps, add noise, hide bands and features that a night may lack."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from sgclassify.model.data.rows import cropped
from sgclassify.model.train.network import N_BANDS, present_bands
from sgclassify.model.train.recipe import Recipe
from sgclassify.stages.features import FEATURES

CORE_PX: Final = 5.0
"""Half-width (pixels) of the middle of a stamp in which no pixel is masked for training."""

FEATURE_GROUPS: Final = tuple(
    [k for k, name in enumerate(FEATURES) if name.startswith(prefixes)]
    for prefixes in (
        ("psf_", "excess_", "significance_", "extended_"),
        ("header_fwhm",),
        ("excess_", "significance_"),
        ("extended_",),
        ("ratio_", "peak"),
        ("size", "ellipticity"),
        ("annulus",),
        ("depth",),
    )
)
"""Features that are hidden together: first those that need the PSF, then the header's FWHM, then the rest."""


def augment(batch: list[Tensor], recipe: Recipe, generator: torch.Generator, size: int) -> list[Tensor]:
    """Vary stamps, and hide bands and features; without augmentation in the recipe, only hide bands.

    Stamps are turned, mirrored and moved by whole pixels, and cut to `size`. Noise and an offset of the sky are added.
    Columns and blobs away from the source are masked. Bands, the PSF and groups of features are hidden.

    Stamps are not moved by fractions of a pixel: to interpolate an undersampled image would smooth its noise and change
    its PSF. Features do not depend on the position and orientation of the stamp, so only the stamps move.

    Parameters
    ----------
    batch : list of Tensor
        Inputs of the network, not changed.
    generator : torch.Generator
        On the device of the batch.
    size : int
        Side of the stamps that are returned.
    """
    image, valid, sigma, features, psf = batch if recipe.augmentation else cropped(batch, size)
    if recipe.augmentation:
        image, valid, sigma, psf = _varied(image, valid, sigma, psf, recipe, generator, size)
    keep, no_psf, features = hide(present_bands(valid), features, recipe, generator)
    valid = valid & keep[:, :, None, None]
    psf = psf.masked_fill((no_psf | ~keep)[:, :, None, None], 0.0)
    return [image, valid, sigma, features, psf]


def _varied(
    image: Tensor, valid: Tensor, sigma: Tensor, psf: Tensor, recipe: Recipe, generator: torch.Generator, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stamps, masks, noise and PSFs after all changes of pixels."""
    n, device = len(image), image.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    image, valid, psf = _moved([image, valid, psf], size, draw(4, n), draw(2, n), recipe.shift_rate)
    # half of the objects get noise, of another size in each band
    extra = recipe.noise * sigma * draw(n, N_BANDS) * (draw(n, 1) < 0.5)
    offset = recipe.background * sigma * (2.0 * draw(n, N_BANDS) - 1.0)
    normal = torch.randn(image.shape, generator=generator, device=device)
    image = image + valid * (extra[:, :, None, None] * normal + offset[:, :, None, None])
    sigma = torch.hypot(sigma, extra)
    return image, valid & ~_masked(draw(5, n, N_BANDS), size, recipe.mask_rate), sigma, psf


def hide(
    present: Tensor, features: Tensor, recipe: Recipe, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose bands to keep and PSFs to hide, both of shape (n, 7), hide their features, and other groups."""
    n, device = len(features), features.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    # each object has its own rate, so that few and many missing bands are equally common
    keep = (draw(n, N_BANDS) > draw(n, 1)) | (draw(n, 1) >= recipe.band_dropout)
    keep |= ~(keep & present).any(dim=1, keepdim=True)
    no_psf = torch.zeros_like(keep)
    hidden = torch.zeros(features.shape, dtype=torch.bool, device=device) | ~keep[:, :, None]
    if recipe.augmentation:
        no_psf = (draw(n, 1) < recipe.psf_dropout) | (draw(n, N_BANDS) < recipe.psf_dropout)
        for k, group in enumerate(FEATURE_GROUPS):
            rate = recipe.header_dropout if k == 1 else recipe.feature_dropout
            hidden[:, :, group] |= (no_psf if k == 0 else draw(n, 1) < rate)[:, :, None]
    stars = FEATURES.index("psf_stars")
    counted = torch.isfinite(features[:, :, stars])
    features = features.masked_fill(hidden, torch.nan)
    # an exposure without point sources counts 0 of them
    features[:, :, stars] = torch.where(no_psf & keep & counted, 0.0, features[:, :, stars])
    return keep, no_psf, features


def _moved(stacks: list[Tensor], size: int, turn: Tensor, move: Tensor, shift_rate: float) -> list[Tensor]:
    """One of the eight symmetries and a shift of each object's stamps, cut to `size`; 0 from beyond the edge."""
    n, bands, outer = stacks[0].shape[:3]
    device = stacks[0].device
    axis = torch.arange(size, device=device) + (outer - size) // 2
    shifted = turn[3] < shift_rate
    index, inside = [], []
    for k in range(2):
        place = torch.where(turn[k][:, None] < 0.5, outer - 1 - axis, axis)
        place = place + (shifted * ((3 * move[k]).long() - 1))[:, None]
        inside.append((place >= 0) & (place < outer))
        index.append(place.clamp(0, outer - 1))
    first = torch.arange(n, device=device)[:, None, None, None]
    second = torch.arange(bands, device=device)[None, :, None, None]
    there = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    transposed = (turn[2] < 0.5)[:, None, None, None]
    result = []
    for stack in stacks:
        cut = stack[first, second, index[0][:, None, :, None], index[1][:, None, None, :]]
        cut = torch.where(there, cut, torch.zeros_like(cut))
        result.append(torch.where(transposed, cut.transpose(2, 3), cut))
    return result


def _masked(random: Tensor, size: int, rate: float) -> Tensor:
    """A column, or a blob 3 to 7 pixels wide, off the core, in a share of the bands; random has shape (5, n, 7)."""
    axis = torch.arange(size, device=random.device) - (size - 1) / 2
    x = torch.sign(random[0] - 0.5) * (CORE_PX + max(0.0, size / 2 - CORE_PX) * random[1])
    y = size * (random[2] - 0.5)
    half = 1.0 + 2.5 * random[3]
    chosen, column = random[4] < rate, random[4] < 0.5 * rate
    in_x = (axis - x[..., None]).abs() <= torch.where(column, 0.5, half)[..., None]
    in_y = ((axis - y[..., None]).abs() <= half[..., None]) | column[..., None]
    # masks stop at the edge of the core
    in_x &= (axis.abs() > CORE_PX) & chosen[..., None]
    return in_y[..., :, None] & in_x[..., None, :]
