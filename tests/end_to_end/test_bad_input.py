"""One list with good exposures and every kind of bad one: each is named, and none leaves a trace in the products.

A bad exposure is a copy of a good one with one fault, under another observation number: were anything of it
used, the objects would change.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

pytestmark = pytest.mark.slow

Level1 = dict[str, fits.HDUList]
GARBAGE_ROWS: Final = 100_000


@dataclass(frozen=True)
class Fault:
    """A way to spoil an exposure.

    Attributes
    ----------
    kind : str
        File at fault.
    says : str
        Pattern that the fault in the report matches.
    edit : callable or None
        Spoils the exposure in memory.
    damage : callable or None
        Spoils the file at fault on disk.
    outcome : str
    """

    kind: str
    says: str
    edit: Callable[[Level1], None] | None = None
    damage: Callable[[Path], None] | None = None
    outcome: str = "set_aside"


def cards(**values: Any) -> Callable[[Level1], None]:
    """Change cards of the image; None removes one."""

    def edit(files: Level1) -> None:
        for key, value in values.items():
            files["IMG"][1].header.remove(key, ignore_missing=True)
            if value is not None:
                files["IMG"][1].header[key] = value

    return edit


def pixels(kind: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Level1], None]:
    """Change the pixels of a file."""

    def edit(files: Level1) -> None:
        files[kind][1].data = change(files[kind][1].data)

    return edit


def scale_wcs(factor: float, singular: bool = False) -> Callable[[Level1], None]:
    """Stretch the WCS, or make both of its axes the same."""

    def edit(files: Level1) -> None:
        header = files["IMG"][1].header
        for axis in (1, 2):
            for along in (1, 2):
                header[f"CD{axis}_{along}"] = header[f"CD{1 if singular else axis}_{along}"] * factor

    return edit


def no_wcs(files: Level1) -> None:
    header = files["IMG"][1].header
    for key in list(header):
        if re.match(r"CTYPE|CRVAL|CRPIX|CUNIT|CD\d|PV\d|RADESYS", key):
            del header[key]


def rows(change: Callable[[fits.FITS_rec], fits.FITS_rec]) -> Callable[[Level1], None]:
    """Replace the table of the CAT."""

    def edit(files: Level1) -> None:
        files["CAT"][1] = fits.BinTableHDU(change(files["CAT"][1].data), name="CAT")

    return edit


def without_columns(files: Level1) -> None:
    kept = [column for column in files["CAT"][1].columns if column.name not in ("RA", "DEC")]
    files["CAT"][1] = fits.BinTableHDU.from_columns(fits.ColDefs(kept), name="CAT")


def garbage(n: int, in_range: bool) -> Callable[[Level1], None]:
    """A CAT of random rows; in range, they lie on the detector where its WCS says."""

    def edit(files: Level1) -> None:
        rng = np.random.default_rng(5)
        header = files["IMG"][1].header
        table = np.resize(np.array(files["CAT"][1].data), n)
        table["objID"] = np.arange(n)
        for name in ("X", "Y", "RA", "DEC"):
            table[name] = rng.uniform(-1e6, 1e6, n)
        if in_range:
            table["X"] = rng.uniform(1, header["NAXIS1"], n)
            table["Y"] = rng.uniform(1, header["NAXIS2"], n)
            table["RA"], table["DEC"] = WCS(header).all_pix2world(table["X"], table["Y"], 1)
        files["CAT"][1] = fits.BinTableHDU(table, name="CAT")

    return edit


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])


def flip_a_byte(path: Path) -> None:
    """Change the last byte of a value in the data, as a bad disk does."""
    with fits.open(path) as hdus:
        place = hdus[1].fileinfo()["datLoc"] + 403
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def claim_absurd_size(path: Path) -> None:
    content = path.read_bytes()
    card = re.search(rb"NAXIS1  = +\d+", content[content.index(b"XTENSION") :])
    assert card is not None
    path.write_bytes(content.replace(card[0], b"NAXIS1  =" + b"2000000000".rjust(len(card[0]) - 9)))


FAULTS: Final[dict[str, Fault]] = {
    "truncated image": Fault("IMG", "truncated", damage=truncate),
    "truncated weights": Fault("WHT", "truncated", damage=truncate),
    "truncated catalogue": Fault("CAT", "truncated", damage=truncate),
    "empty image": Fault("IMG", "empty", damage=lambda path: path.write_bytes(b"")),
    "empty flags": Fault("FLG", "empty", damage=lambda path: path.write_bytes(b"")),
    "image that is text": Fault("IMG", "FITS", damage=lambda path: path.write_text("not an image\n" * 1000)),
    "catalogue that is text": Fault("CAT", "FITS", damage=lambda path: path.write_text("1 2 3\n" * 1000)),
    "cube": Fault("IMG", "not two-dimensional", edit=pixels("IMG", lambda a: np.stack([a, a]))),
    "weights of another shape": Fault("WHT", "x .* pixels, its IMG", edit=pixels("WHT", lambda a: a[:-1])),
    "flags of another shape": Fault("FLG", "x .* pixels, its IMG", edit=pixels("FLG", lambda a: a[:, 1:])),
    "no filter": Fault("IMG", "no FILTER", edit=cards(FILTER=None)),
    "unknown filter": Fault("IMG", "unknown FILTER 'Ks'", edit=cards(FILTER="Ks")),
    "no WCS": Fault("IMG", "WCS", edit=no_wcs),
    "singular WCS": Fault("IMG", "WCS", edit=scale_wcs(1.0, singular=True)),
    "WCS of zeros": Fault("IMG", "WCS", edit=scale_wcs(0.0)),
    "WCS of an absurd scale": Fault("IMG", "WCS", edit=scale_wcs(3600.0)),
    "WCS of an absurd place": Fault("IMG", "WCS", edit=cards(CRVAL2=123.4)),
    "image of nan": Fault("IMG", "nan", edit=pixels("IMG", lambda a: np.full_like(a, np.nan))),
    "weights of zero": Fault("WHT", "every weight is zero", edit=pixels("WHT", np.zeros_like)),
    "absurd size": Fault("IMG", "size|truncated|2000000000", damage=claim_absurd_size),
    "catalogue without rows": Fault("CAT", "no rows", edit=rows(lambda table: table[:0])),
    "catalogue without positions": Fault("CAT", "missing column RA", edit=without_columns),
    "random rows": Fault("CAT", f"{GARBAGE_ROWS}.* rows", edit=garbage(GARBAGE_ROWS, in_range=False)),
    "random rows in range": Fault("CAT", f"{GARBAGE_ROWS} rows", edit=garbage(GARBAGE_ROWS, in_range=True)),
    "some random rows": Fault("CAT", "no usable position", edit=garbage(50, in_range=False)),
    "damaged image": Fault("IMG", "DATASUM|CHECKSUM", damage=flip_a_byte),
    "damaged weights": Fault("WHT", "DATASUM|CHECKSUM", damage=flip_a_byte),
    "damaged flags": Fault("FLG", "DATASUM|CHECKSUM", damage=flip_a_byte),
    "damaged catalogue": Fault("CAT", "DATASUM|CHECKSUM", damage=flip_a_byte),
    "missing file": Fault("IMG", "does not exist", damage=Path.unlink),
    "slitless": Fault("IMG", "slitless", edit=cards(FILTER="GV"), outcome="skipped"),
}


@dataclass(frozen=True)
class Spoilt:
    """A run over good and bad exposures: what came of it, and the file at fault for each `Fault`."""

    run: Any
    files: dict[str, Path]


@pytest.fixture(scope="module")
def spoilt(
    sgclassify: Callable[..., Any],
    warm: tuple[str, ...],
    clone: Callable[..., Path],
    field: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Spoilt:
    """The one run over everything, bad exposures first."""
    folder = tmp_path_factory.mktemp("bad")
    images, files = [], {}
    for number, (name, fault) in enumerate(FAULTS.items()):
        image = clone(folder / name.replace(" ", "_"), 10_700_000_000 + number, fault.edit)
        files[name] = image.with_name(image.name.replace("_IMG", f"_{fault.kind}"))
        if fault.damage is not None:
            fault.damage(files[name])
        images.append(image)
    listed = folder / "exposures.txt"
    listed.write_text("".join(f"{image}\n" for image in [*images, *field.images]))
    return Spoilt(sgclassify(listed, folder / "output", *warm), files)


def test_the_rest_of_the_list_is_done(spoilt: Spoilt, reference: Any) -> None:
    assert spoilt.run.code == 3, spoilt.run.stderr
    assert spoilt.run.digests() == reference.digests()
    assert spoilt.run.leftovers() == []
    counts = spoilt.run.record["counts"]
    assert counts["exposures_done"] == 7
    assert counts["exposures_skipped"] == 1
    assert counts["exposures_set_aside"] == len(FAULTS) - 1
    assert counts["tiles_set_aside"] == 0


@pytest.mark.parametrize("name", FAULTS)
def test_file_and_fault_are_named_once(spoilt: Spoilt, name: str) -> None:
    fault, file = FAULTS[name], spoilt.files[name]
    (entry,) = [one for one in spoilt.run.record["inputs"] if one.get("file") == str(file)]
    assert entry["outcome"] == fault.outcome
    assert re.search(fault.says, entry["fault"]), entry["fault"]
    assert entry["advice"]
    assert "traceback" not in entry
    (line,) = [line for line in spoilt.run.stderr.splitlines() if str(file) in line]
    assert line.count(entry["fault"]) == 1
    assert entry["advice"] in line


def test_an_undamaged_copy_would_change_the_objects(
    sgclassify: Callable[..., Any],
    warm: tuple[str, ...],
    clone: Callable[..., Path],
    field: Any,
    reference: Any,
    tmp_path: Path,
) -> None:
    image = clone(tmp_path, 10_700_000_000)
    listed = tmp_path / "exposures.txt"
    listed.write_text("".join(f"{path}\n" for path in [image, *field.images]))
    done = sgclassify(listed, tmp_path / "output", *warm)
    assert done.code == 0, done.stderr
    changed = {name for name, value in reference.digests().items() if done.digests()[name] != value}
    assert {name.split("/")[0] for name in changed} == {"objects", "detections"}


def test_nothing_usable(
    sgclassify: Callable[..., Any], warm: tuple[str, ...], clone: Callable[..., Path], tmp_path: Path
) -> None:
    names = ["damaged image", "catalogue without rows", "no filter"]
    images = []
    for number, name in enumerate(names):
        fault = FAULTS[name]
        image = clone(tmp_path / str(number), 10_700_000_000 + number, fault.edit)
        if fault.damage is not None:
            fault.damage(image.with_name(image.name.replace("_IMG", f"_{fault.kind}")))
        images.append(image)
    listed = tmp_path / "exposures.txt"
    listed.write_text("".join(f"{image}\n" for image in images))
    done = sgclassify(listed, tmp_path / "output", *warm)
    assert done.code == 4, done.stderr
    assert "no exposure of the list can be used" in done.stderr
    assert done.record["exit_code"] == 4
    assert done.record["counts"]["exposures_set_aside"] == 3
    assert not (tmp_path / "output" / "objects").exists()
    assert done.leftovers() == []
