"""The simulated exposures that are measured on, made once and kept."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from performance.codes import python, this_code

SEED = 7


@dataclass(frozen=True)
class Field:
    """Exposures that ``sgclassify simulate`` makes; the name says all that decides about them."""

    name: str
    options: tuple[str, ...]
    title: str
    seed: int = SEED


def _square(side: int, *more: str) -> tuple[str, ...]:
    return ("--size", str(side), str(side), *more)


FIELDS = {
    field.name: field
    for field in (
        Field("f528", _square(528), "seven exposures of 528 x 528 pixels"),
        Field("f640x50", _square(640, "--fields", "50"), "50 fields of 640 x 640 pixels"),
        Field("f1024x8", _square(1024, "--fields", "8"), "eight fields of 1024 x 1024 pixels"),
        Field("f2560", _square(2560), "seven exposures of 2560 x 2560 pixels"),
        Field("f2560-rice", _square(2560, "--compressed-share", "1"), "the same, RICE-compressed"),
        Field("f9216", ("--size", "9216", "9232"), "seven detectors of 9216 x 9232 pixels, dense", seed=3),
    )
}
"""All fields, by name."""


def exposures(name: str, folder: Path, processes: int = 1) -> Path:
    """List of the exposures of a field below ``folder``, simulated if they are not there."""
    whole = folder / name
    if not (whole / "exposures.txt").is_file():
        part = folder / f"{name}.part"
        command = python("-m", "sgclassify.pipeline", "simulate", "--output", str(part), "--seed")
        command += [str(FIELDS[name].seed), *FIELDS[name].options, "--processes", str(processes)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=this_code().environment())
        if done.returncode:
            raise RuntimeError(f"simulate {name}: {done.stderr[-2000:]}")
        shutil.rmtree(whole, ignore_errors=True)
        part.rename(whole)
    return whole / "exposures.txt"


def lines_of(listed: Path) -> list[Path]:
    """The images of a list."""
    lines = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines()]
    return [listed.parent / line for line in lines if line and not line.startswith("#")]


def first_fields(listed: Path, count: int, output: Path) -> Path:
    """A list of the first fields of another one."""
    images = lines_of(listed)
    fields = list(dict.fromkeys(image.parent for image in images))[:count]
    output.write_text("".join(f"{image}\n" for image in images if image.parent in fields), encoding="utf-8")
    return output


def files_of(listed: Path) -> list[Path]:
    """All files of the exposures of a list: images, weights, flags, catalogues."""
    found: list[Path] = []
    for image in lines_of(listed):
        stem, _, extension = image.name.partition("_IMG")
        beside = [image.with_name(f"{stem}_{kind}{ext}") for kind in ("WHT", "FLG", "CAT")
                  for ext in dict.fromkeys((extension, ".fits"))]  # fmt: skip
        found += [image, *(path for path in beside if path.is_file())]
    return found
