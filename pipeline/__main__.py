"""``python -m sgclassify.pipeline`` is the command ``sgclassify``."""

from __future__ import annotations

from sgclassify.pipeline.cli import main

if __name__ == "__main__":
    main(prog_name="sgclassify")
