"""``python -m sgclassify.pipeline`` is the command ``sgclassify``."""

from __future__ import annotations

if __name__ == "__main__":
    from sgclassify.pipeline.surroundings import drop_working_folder

    drop_working_folder()
    from sgclassify.pipeline.cli import main

    main(prog_name="sgclassify")
