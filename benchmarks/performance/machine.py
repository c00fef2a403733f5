"""What a benchmark was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dask.system import cpu_count

PACKAGES = ("numpy", "scipy", "astropy", "photutils", "pyarrow", "distributed", "hats", "torch")


def describe() -> dict[str, Any]:
    """Processor, memory, GPU and software of this machine."""
    import torch

    software = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            software[name] = version(name)
        except PackageNotFoundError:
            software[name] = "not installed"
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return {
        "cpu": processor(),
        "cores": cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu,
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 1),
        "software": software,
    }


def processor() -> str:
    """Name of the processor."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
