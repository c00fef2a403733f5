"""Scoring on other processors, and where the memory of a GPU does not suffice."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sgclassify.model.serve.archive import default_model
from sgclassify.model.serve.runtime import Classifier, load
from sgclassify.stages.errors import ModelError

CPU = torch.device("cpu")


class Network:
    """Gives back the first noise of every object; has no memory for more than `most` of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.sizes: list[int] = []

    def __call__(self, image: Any, valid: Any, sigma: Any, features: Any, psf: Any) -> Any:
        self.sizes.append(len(sigma))
        if len(sigma) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return sigma[:, :2]


def arrays(n: int) -> tuple[Any, ...]:
    image = np.zeros((n, 7, 2, 2), dtype=np.float32)
    sigma = np.repeat(np.arange(n, dtype=np.float32)[:, None] / 100, 7, axis=1)
    return image, image > 0, sigma, np.zeros((n, 7, 3), dtype=np.float32), image


def classifier(network: Network, batch_size: int, on_cpu: Any = None) -> Classifier:
    return Classifier(network, None, "", CPU, batch_size, on_cpu)  # type: ignore[arg-type]


def test_batches_are_halved_and_stay_so(caplog: pytest.LogCaptureFixture) -> None:
    network = Network(10)
    model = classifier(network, 32)
    given = arrays(20)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(model.probabilities(*given), given[2][:, :2])
        np.testing.assert_array_equal(model.probabilities(*given), given[2][:, :2])
    assert network.sizes == [32, 16, 8, 8, 8, 8, 8, 8]
    assert model.batch_size == 8
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "batches of 32 objects; this worker goes on with 8" in caplog.text


def test_tile_goes_to_the_cpu_where_one_object_is_too_much(caplog: pytest.LogCaptureFixture) -> None:
    network, other = Network(0), Network(100)
    model = classifier(network, 4, lambda: classifier(other, 4))
    given = arrays(6)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(model.probabilities(*given), given[2][:, :2])
    assert "a tile goes to the CPU: CUDA out of memory." in caplog.text
    network.most = 4  # the memory is free again
    np.testing.assert_array_equal(model.probabilities(*given), given[2][:, :2])
    assert network.sizes == [4, 2, 1, 4, 4]
    assert other.sizes == [4, 4]


def test_no_memory_and_no_cpu() -> None:
    with pytest.raises(ModelError, match="does not suffice for one object: CUDA out of memory"):
        classifier(Network(0), 2).probabilities(*arrays(1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_model_runs_on_the_cpu_where_torch_sees_no_gpu(caplog: pytest.LogCaptureFixture) -> None:
    model = load(default_model(), device="cuda", batch_size=4)
    assert model.device == CPU
    assert "runs on the CPU" in caplog.text


SCORES = """
import io, sys, warnings
import numpy as np, torch
from sgclassify.model.serve import runtime
from sgclassify.model.serve.archive import default_model
from sgclassify.stages.classify import each_symmetry
from sgclassify.stages.tile import Inputs

warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
model = runtime.load(batch_size=16)  # as many as the reference has objects
extra = {runtime.REFERENCE_FILE: ""}
torch.jit.load(str(default_model()), _extra_files=extra)
with np.load(io.BytesIO(extra[runtime.REFERENCE_FILE])) as reference:
    image, valid, sigma, features, psf = (reference[name] for name in runtime.INPUTS)
# most bands and some features hidden, more noise: objects that are less sure than those of the reference
rng = np.random.default_rng(1)
hidden = rng.random(sigma.shape) < 0.6
valid = valid & ~hidden[:, :, None, None]
noise = 2 * rng.normal(size=image.shape) * sigma[:, :, None, None]
image = np.where(valid, image + noise, 0).astype(np.float32)
lost = hidden[:, :, None] | (rng.random(features.shape) < 0.5)
features = np.where(lost, np.float32(np.nan), features)
psf = np.where(hidden[:, :, None, None], np.float32(0), psf)
inputs = Inputs(image, valid, sigma, features, psf, valid.any(axis=(2, 3)))
np.save(sys.argv[1], each_symmetry(inputs, model.probabilities)[..., 0])
print(torch.backends.cpu.get_cpu_capability())
"""


WITHOUT_AVX512 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.mark.thorough
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the variables are those of x86")
def test_probabilities_do_not_depend_on_the_instruction_set(tmp_path: Path) -> None:
    native = {name: value for name, value in os.environ.items() if name not in WITHOUT_AVX512}
    found = []
    for variables in ({}, WITHOUT_AVX512):
        path = tmp_path / f"{len(found)}.npy"
        command = [sys.executable, "-c", SCORES, path]
        done = subprocess.run(command, env=native | variables, capture_output=True, text=True)
        # each has loaded the model, which reproduced its reference there
        assert done.returncode == 0, done.stderr
        assert not variables or done.stdout.strip() == "AVX2", "the instruction set was not held down"
        found.append(np.load(path))
    assert found[0].shape == (8, 16)
    assert ((found[0] > 0.01) & (found[0] < 0.99)).sum() > 20
    # the tolerance that docs/pipeline.md states
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5)
