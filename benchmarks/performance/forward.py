"""The network alone: ``python -m performance.forward THREADS REPEAT``. Prints JSON: objects per second of each part."""

from __future__ import annotations

import io
import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from performance.network import BATCH, eager_network, stored_network
from sgclassify.model.serve import runtime
from sgclassify.model.serve.archive import REFERENCE_FILE, verified
from sgclassify.model.serve.contract import INPUTS

WARM = 3
SIDE = 2048
PRODUCT = "matrix product"
"""What the network is measured against, in the same turns."""

LEAST_S = 2.0
"""Each measurement goes on for at least this time."""


def reference_inputs(n: int) -> list[torch.Tensor]:
    """Inputs of `n` objects: those of the model's own reference, again and again."""
    with np.load(io.BytesIO(verified(None).extra(REFERENCE_FILE)), allow_pickle=False) as reference:
        arrays = [reference[name] for name in INPUTS]
    return [torch.from_numpy(np.resize(a, (n, *a.shape[1:])).copy()) for a in arrays]


def rate(call: Callable[[], Any], n: int, repeat: int, synchronise: Callable[[], None] = lambda: None) -> list[float]:
    """Objects per second of a call that works on `n`, measured `repeat` times."""
    warm_up(call)
    return [once(call, n, LEAST_S / repeat, synchronise)[0] for _ in range(repeat)]


def warm_up(call: Callable[[], Any]) -> None:
    """Call until nothing is compiled any more."""
    with torch.inference_mode():
        for _ in range(WARM):
            call()


def once(
    call: Callable[[], Any], n: float, seconds: float, synchronise: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """Rates of a call that works on `n`, per second and per core second, over at least so many seconds."""
    with torch.inference_mode():
        synchronise()
        wall, cpu, calls = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - wall < seconds or not calls:
            call()
            calls += 1
            synchronise()
        return n * calls / (time.perf_counter() - wall), n * calls / max(time.process_time() - cpu, 1e-9)


def frozen(module: Any) -> Any:
    """A stored module as a run prepares it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.freeze(module.eval())


def gflop_per_object(stamp_size: int) -> float:
    """Floating-point operations of the whole model for one object, 10^9."""
    from torch.utils.flop_counter import FlopCounterMode

    network, _ = eager_network(stamp_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*reference_inputs(1))
    return float(counter.get_total_flops()) / 1e9


def parts(stored: Any, inputs: list[torch.Tensor]) -> dict[str, Callable[[], Any]]:
    """Calls of the parts of the stored model, by name, as far as it has the parts of today's layout."""
    image, valid, sigma, features, psf = inputs
    present = valid.flatten(2).any(dim=2)
    calls: dict[str, Callable[[], Any]] = {}
    for name, network in getattr(stored, "networks", torch.nn.Module()).named_children():
        kind = "ResNet-50" if hasattr(network.image_encoder, "backbone") else "bands"
        encoder, sequence = frozen(network.image_encoder), frozen(network.sequence_encoder)
        calls[f"{kind}: image encoder"] = lambda f=encoder: f(image, valid, sigma, psf)  # type: ignore[misc]
        if name == "0":
            calls["sequence encoder"] = lambda f=sequence: f(features, present)  # type: ignore[misc]
    return calls


def main() -> None:
    """Measure the whole and its parts in turns with a product of matrices."""
    threads, repeat = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    classifier = runtime.load(None, batch_size=BATCH)
    inputs = reference_inputs(BATCH)
    arrays: list[Any] = [tensor.numpy() for tensor in inputs]
    size = classifier.contract.stamp_size
    network, kind = eager_network(size)
    calls: dict[str, Callable[[], Any]] = {
        "whole": lambda: classifier.module(*inputs),
        "as a run asks it": lambda: classifier.probabilities(*arrays),
        f"whole, {kind}": lambda: network(*inputs),
        **parts(stored_network(), inputs),
    }
    first, second = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
    products = {PRODUCT: (lambda: torch.mm(first, second), 2.0 * SIDE**3 / 1e9)}
    todo = products | {name: (call, float(BATCH)) for name, call in calls.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in todo}
    for call, _ in todo.values():
        warm_up(call)
    for _ in range(repeat):
        for name, (call, n) in todo.items():
            found[name].append(once(call, n, LEAST_S / repeat))
    print(json.dumps({"rates": found, "gflop": gflop_per_object(size)}))


if __name__ == "__main__":
    main()
