"""From logits to probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgclassify.model.train.calibrate import fit_calibration, fit_weights, prior_weights
from sgclassify.stages.errors import UsageError


def drawn(n, log_temperature, slope, share=0.5, seed=1):
    """Logits whose probabilities are too sure by a known temperature, and labels drawn from the true ones."""
    rng = torch.Generator().manual_seed(seed)
    brightness = torch.rand(n, generator=rng) * 6 - 3
    true = torch.randn(n, generator=rng) * 2
    star = torch.rand(n, generator=rng) < torch.sigmoid(true)
    logits = torch.stack([true * torch.exp(log_temperature + slope * brightness), torch.zeros(n)], 1)
    return logits, brightness, (~star).long(), torch.arange(n) % 20


@pytest.mark.parametrize(("log_temperature", "slope"), [(0.0, 0.0), (0.7, 0.0), (-0.5, 0.2)])
def test_temperature_is_recovered(log_temperature, slope):
    logits, brightness, label, field = drawn(40_000, log_temperature, slope)
    fitted = fit_calibration(logits, brightness, label, field, float((label == 0).double().mean()))
    assert float(fitted.log_temperature[0]) == pytest.approx(log_temperature, abs=0.06)
    assert float(fitted.log_temperature[1]) == pytest.approx(slope, abs=0.04)
    assert float(fitted.offset.abs().max()) < 0.06


def test_little_data_choose_the_simple_calibration():
    logits, brightness, label, _ = drawn(300, 0.3, 0.0)
    fitted = fit_calibration(logits, brightness, label, torch.zeros(300, dtype=torch.int64), 0.5)
    assert float(fitted.log_temperature[1]) == 0.0
    assert not fitted.offset.any()


def test_calibration_assumes_the_prior():
    logits, brightness, label, field = drawn(40_000, 0.0, 0.0)
    fitted = fit_calibration(logits, brightness, label, field, 0.2)
    share = float((label == 0).double().mean())
    p = torch.softmax(fitted(logits, brightness).double(), 1)[:, 0]
    weight = prior_weights(share, 0.2)[label].double()
    assert float((p * weight).sum() / weight.sum()) == pytest.approx(0.2, abs=0.02)


@given(share=st.floats(0.01, 0.99), prior=st.floats(0.01, 0.99))
def test_weights_make_the_prior(share, prior):
    star, galaxy = prior_weights(share, prior).tolist()
    assert share * star + (1 - share) * galaxy == pytest.approx(1.0, rel=1e-5)
    assert share * star == pytest.approx(prior, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_class_is_no_sample(share):
    with pytest.raises(UsageError):
        prior_weights(share, 0.5)


def test_heads_weigh_what_they_know():
    rng = np.random.default_rng(3)
    label = torch.from_numpy(rng.integers(0, 2, 20_000))
    truth = 1.0 - 2.0 * label.double()

    def head(signal, noise):
        d = signal * truth + torch.from_numpy(rng.normal(0.0, noise, len(label)))
        return torch.stack([d / 2, -d / 2], dim=1).float()

    # the log-likelihood ratio of +-1 under noise s is 2 d / s^2; one of noise alone says nothing
    logits = torch.stack([head(1.0, 1.0), head(1.0, 2.0), head(0.0, 1.0)])
    found = fit_weights(logits, label, torch.ones(2))
    assert found.tolist() == pytest.approx([2.0, 0.5, 0.0], abs=0.1)
