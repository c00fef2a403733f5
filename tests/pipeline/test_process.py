from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

ARRAYS = """
import resource
import sys
import threading

import numpy as np

from sgclassify.pipeline.process import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        np.ones(250_000, np.float64)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


# as in a worker of Dask, which does its tasks in a thread
found = []
thread = threading.Thread(target=lambda: found.extend([faults(), faults()]))
thread.start()
thread.join()
print(found[1])
"""


def faults(how: str) -> int:
    """Page faults for 100 arrays of 2 MB each, one after the other, in a process that Dask's settings hold for."""
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", ARRAYS, how], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a C library without mallopt")
def test_freed_memory_is_used_again() -> None:
    pages = 100 * 2_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert faults("kept") < 0.01 * pages
    # what it is for
    assert faults("as Dask has it") > 0.5 * pages
