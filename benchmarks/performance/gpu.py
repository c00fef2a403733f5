"""The network on a GPU: ``python -m performance.gpu REPEAT``. Prints JSON: stamps per second of each variant."""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from performance.forward import frozen, rate, reference_inputs
from performance.network import eager_network, stored_network

BATCHES = (64, 256, 1024, 4096)
STAMP = 32


def graphed(network: Any, inputs: list[torch.Tensor], around: Callable[[], Any]) -> Callable[[], Any]:
    """A forward pass recorded once as a CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad(), around():
        for _ in range(3):
            network(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad(), around():
        network(*inputs)
    return graph.replay


def compiled(network: Any, inputs: list[torch.Tensor], folder: Path) -> Callable[[], Any]:
    """A forward pass compiled ahead of time by AOTInductor."""
    with torch.no_grad():
        program = torch.export.export(network, tuple(inputs))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "network.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
    return lambda: loaded(*inputs)


def called(network: Any, inputs: list[torch.Tensor]) -> Callable[[], Any]:
    """A plain forward pass."""
    return lambda: network(*inputs)


def precision(kind: torch.dtype | None) -> Callable[[], Any]:
    """Context in which a network works with a kind of number; None for float32."""
    if kind is None:
        return contextlib.nullcontext
    # the graph of a forward pass must hold the casts of the weights
    return lambda: torch.autocast("cuda", kind, cache_enabled=False)


def variants(batch: int, folder: Path) -> Iterator[tuple[str, Callable[[], Callable[[], Any]], Callable[[], Any]]]:
    """Name, maker of the call, and context of each variant."""
    inputs = [tensor.cuda() for tensor in reference_inputs(batch)]
    stored = frozen(stored_network().cuda())
    network = eager_network(STAMP)[0].cuda()
    last = eager_network(STAMP)[0].cuda().to(memory_format=torch.channels_last)
    part = functools.partial
    for name, kind in (("float32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        around = precision(kind)
        yield f"TorchScript, {name}", part(called, stored, inputs), around
        yield f"eager, {name}", part(called, network, inputs), around
        yield f"eager, channels_last, {name}", part(called, last, inputs), around
        yield f"CUDA graph, {name}", part(graphed, last, inputs, around), contextlib.nullcontext
    yield "AOTInductor, float32", part(compiled, network, inputs, folder), contextlib.nullcontext


def main() -> None:
    """Measure every variant at every batch size; one that fails says why."""
    if not torch.cuda.is_available():
        print(json.dumps({"missing": "no GPU that torch can use"}))
        return
    repeat = int(sys.argv[1])
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Any] = {}
    for batch in BATCHES:
        with TemporaryDirectory() as name:
            for title, make, around in variants(batch, Path(name)):
                case = f"{title}, batch {batch}"
                try:
                    with warnings.catch_warnings(), around():
                        warnings.simplefilter("ignore")
                        found[case] = rate(make(), batch, repeat, torch.cuda.synchronize)
                except (RuntimeError, NotImplementedError, TypeError) as error:
                    found[case] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    best = max((statistics.median(v), k) for k, v in found.items() if not isinstance(v, str))
    print(json.dumps({"rates": found, "best": best[1]}))


if __name__ == "__main__":
    main()
