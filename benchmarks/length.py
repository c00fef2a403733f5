"""Time and memory of a run against the length of its list: ``python benchmarks/length.py [--fields 8] [--workers 2]``.

Simulates fields side by side on the sky, runs one of them and then all, each into a new folder, and prints one table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def run(listed: Path, output: Path, workers: int) -> tuple[float, dict[str, Any]]:
    """Seconds of one run, and its record."""
    command = [sys.executable, "-m", "sgclassify.pipeline", "run", "--exposure-list", str(listed)]
    command += ["--output", str(output), "--workers", str(workers), "--device", "cpu", "--log-format", "json"]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return time.monotonic() - start, json.loads((output / "run.json").read_text(encoding="utf-8"))


def main() -> None:
    """Simulate, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fields", type=int, default=8)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="Where to simulate. [default: temporary]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        size = str(arguments.size)
        command = [sys.executable, "-m", "sgclassify.pipeline", "simulate", "--output", str(folder / "sky")]
        command += ["--seed", "7", "--size", size, size, "--fields", str(arguments.fields)]
        subprocess.run(command, check=True, capture_output=True)
        whole = folder / "sky" / "exposures.txt"
        first = folder / "sky" / "first.txt"
        lines = [line for line in whole.read_text().splitlines() if line and not line.startswith("#")]
        first.write_text("\n".join(lines[: len(lines) // arguments.fields]) + "\n")
        print(f"{'exposures':>10}{'tiles':>7}{'objects':>9}{'seconds':>9}{'driver MiB':>12}{'worker MiB':>12}")
        for listed, label in ((first, "one"), (whole, "all")):
            seconds, record = run(listed, folder / label, arguments.workers)
            peak = max(item["peak_mib"] for item in [*record["inputs"], *record["tiles"]])
            counts = record["counts"]
            print(
                f"{counts['exposures_done']:>10}{counts['tiles_done']:>7}{counts['objects']:>9}{seconds:>9.1f}"
                f"{record['peak_mib']['driver']:>12.0f}{peak:>12.0f}"
            )


if __name__ == "__main__":
    main()
