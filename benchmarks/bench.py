"""What a run costs, part by part: ``python benchmarks/bench.py run --help``; docs/performance.md has the figures."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # where PYTHONSAFEPATH is set, the folder of a script is not looked through
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from performance.cli import main

    sys.exit(main())
