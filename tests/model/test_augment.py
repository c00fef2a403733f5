"""What a training sees of a stamp."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.model.data.rows import cropped
from sgclassify.model.train.augment import CORE_PX, FEATURE_GROUPS, augment
from sgclassify.model.train.recipe import Recipe
from sgclassify.stages.features import FEATURES

SIZE = 16
STILL = Recipe(
    band_dropout=0, psf_dropout=0, header_dropout=0, feature_dropout=0, shift_rate=1, noise=0, background=0, mask_rate=0
)  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(seed=st.integers(0, 1000), dropout=st.floats(0, 1), psf=st.floats(0, 1), size=st.sampled_from([8, SIZE]))
@settings(max_examples=20, deadline=None)
def test_augmentation_hides_alike_and_keeps_a_band(inputs, seed, dropout, psf, size):
    batch = inputs(12, seed)
    before = copy.deepcopy(batch)
    recipe = Recipe(band_dropout=dropout, psf_dropout=psf, mask_rate=0.5)
    image, valid, sigma, features, planes = augment(batch, recipe, generator(seed), size)
    for old, new in zip(before, batch, strict=True):
        assert torch.equal(old, new), "the sample itself must not change"
    assert image.shape == valid.shape == planes.shape == (12, 7, size, size)
    assert (sigma >= before[2]).all()
    assert (sigma <= before[2] * np.hypot(1, recipe.noise) * 1.0001).all()
    present, was = valid.flatten(2).any(2), cropped(before, size)[1].flatten(2).any(2)
    assert (present.any(1) == was.any(1)).all()
    assert not (present & ~was).any()
    # what is hidden of the image is hidden of the PSF and of the sequence too
    assert torch.isnan(features[was & ~present]).all()
    assert not planes[was & ~present].any()
    without = ~planes.flatten(2).any(2)
    stars = FEATURES.index("psf_stars")
    assert torch.isnan(features[without][:, [k for k in FEATURE_GROUPS[0] if k != stars]]).all()
    # an exposure without point sources counts none
    counted = torch.isfinite(before[3][..., stars])
    assert (features[without & present & counted][:, stars] == 0).all()
    features[..., stars] = torch.where(without, torch.nan, features[..., stars])
    # a feature that is there is the one that was there
    assert (torch.isnan(features) | (features == before[3])).all()


def test_groups_hold_all_that_needs_the_psf():
    named = {FEATURES[k] for k in FEATURE_GROUPS[0]}
    assert named == {f for f in FEATURES if f.split("_")[0] in ("psf", "excess", "significance", "extended")}
    assert [FEATURES[k] for k in FEATURE_GROUPS[1]] == ["header_fwhm"]
    # the calibration reads it
    assert not any(FEATURES.index("snr") in group for group in FEATURE_GROUPS)
    assert all(FEATURE_GROUPS)


@pytest.mark.parametrize("size", [8, SIZE])
def test_stamps_are_turned_mirrored_and_moved_together(inputs, size):
    batch = inputs(200, 5)
    image, valid, _, features, psf = augment(batch, STILL, generator(), size)
    assert torch.equal(features, batch[3])
    seen = set()
    first = (SIZE - size) // 2 + 1
    for k in range(1, 200):
        padded = [np.pad(t[k].numpy(), ((0, 0), (1, 1), (1, 1))) for t in (batch[0], batch[1], batch[4])]
        for symmetry in range(8):
            for move in range(9):
                ys, xs = first + move // 3 - 1, first + move % 3 - 1
                cut = [
                    np.rot90(a[..., :: -1 if symmetry >= 4 else 1], symmetry, (1, 2))[:, ys : ys + size, xs : xs + size]
                    for a in padded
                ]
                if all(np.array_equal(a, b[k]) for a, b in zip(cut, (image, valid, psf), strict=True)):
                    seen.add((symmetry, move))
                    break
            else:
                continue
            break
        else:
            pytest.fail(f"object {k} is none of the variants")
    assert len(seen) > 60


def test_added_noise_is_in_sigma_too(inputs):
    batch = inputs(400, 6)
    batch[0], batch[1] = torch.zeros_like(batch[0]), torch.ones_like(batch[1])
    recipe = Recipe(**{**STILL.__dict__, "noise": 0.3, "shift_rate": 0.0})
    image, _, sigma, *_ = augment(batch, recipe, generator(), SIZE)
    added = torch.sqrt((sigma**2 - batch[2] ** 2).clamp(min=0))
    assert 0.3 < float((added > 0).float().mean()) < 0.7
    noisy = added > 0.05 * batch[2]
    # chi square of 256 pixels in each of hundreds of bands: its mean is known to a fraction of a per cent
    assert float((image.var((2, 3)) / added**2)[noisy].mean()) == pytest.approx(1.0, abs=0.02)
    assert not image[(added == 0).all(1)].any()


def test_sky_moves_by_a_fraction_of_the_noise(inputs):
    batch = inputs(50, 7)
    batch[1] = torch.ones_like(batch[1])
    recipe = Recipe(**{**STILL.__dict__, "background": 0.1, "shift_rate": 0.0})
    image, *_ = augment(batch, recipe, generator(), SIZE)
    moved = (image.mean((2, 3)) - batch[0].mean((2, 3))) / batch[2]
    assert float(moved.abs().max()) <= 0.1001
    assert float(moved.std()) == pytest.approx(0.2 / np.sqrt(12), rel=0.1)


def test_masked_pixels_lie_off_the_core(inputs):
    batch = inputs(100, 8)
    batch[1] = torch.ones_like(batch[1])
    recipe = Recipe(**{**STILL.__dict__, "mask_rate": 0.5, "shift_rate": 0.0})
    _, valid, *_ = augment(batch, recipe, generator(), SIZE)
    axis = np.abs(np.arange(SIZE) - (SIZE - 1) / 2)
    core = torch.from_numpy((axis[:, None] <= CORE_PX) & (axis[None, :] <= CORE_PX))
    assert valid[:, :, core].all()
    assert 0.4 < float((~valid).flatten(2).any(2).float().mean()) < 0.6


def test_without_augmentation_bands_alone_are_hidden(inputs):
    batch = inputs(60, 9)
    recipe = Recipe(augmentation=False, psf_dropout=1.0, header_dropout=1.0, band_dropout=1.0)
    image, valid, sigma, features, psf = augment(batch, recipe, generator(), 8)
    middle = cropped(batch, 8)
    assert torch.equal(image, middle[0])
    assert torch.equal(sigma, middle[2])
    kept = valid.flatten(2).any(2)
    for new, old in ((valid, middle[1]), (features, middle[3]), (psf, middle[4])):
        assert torch.equal(new[kept], old[kept])
    assert 0.2 < float(kept.float().mean()) < 0.7
