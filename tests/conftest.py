"""Factories of tiny legal Level-1 exposures, which tests damage or vary one property at a time."""

from __future__ import annotations

import fcntl
import gzip
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import settings

from sgclassify.stages.bands import DETECTOR_FILTER
from sgclassify.stages.read.names import ExposureFiles, find_siblings

# Under nohup, SIGHUP is ignored, here and in what the tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Time limits of examples say how busy the machine is.
settings.register_profile("sgclassify", deadline=None)
settings.load_profile("sgclassify")

OBSID = "10160000001"
SKY = 0.3
RMS = 0.05


def wcs_header(ny: int, nx: int, ra: float = 150.0, dec: float = 2.0) -> fits.Header:
    """TAN WCS of 0.074" pixels, its tangent point at the centre of the image."""
    header = fits.Header()
    header["CTYPE1"], header["CTYPE2"] = "RA---TAN", "DEC--TAN"
    header["CUNIT1"] = header["CUNIT2"] = "deg"
    header["CRVAL1"], header["CRVAL2"] = ra, dec
    header["CRPIX1"], header["CRPIX2"] = (nx + 1) / 2, (ny + 1) / 2
    scale = 0.074 / 3600
    header["CD1_1"], header["CD1_2"] = -scale, 0.0
    header["CD2_1"], header["CD2_2"] = 0.0, scale
    header["RADESYS"] = "ICRS"
    return header


def catalog_columns(header: fits.Header, ny: int, nx: int, n: int, seed: int = 1) -> dict[str, Any]:
    """Official CAT columns of `n` rows that agree with the WCS."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(1, nx, n), rng.uniform(1, ny, n)
    ra, dec = WCS(header).wcs_pix2world(x, y, 1)
    mag = rng.uniform(19, 25, n).astype(np.float32)
    return {
        "objID": np.arange(1, n + 1, dtype=np.int32),
        "X": x.astype(np.float64),
        "Y": y.astype(np.float64),
        "RA": ra,
        "DEC": dec,
        "Flag": np.zeros(n, dtype=np.int16),
        "Mag_Kron": mag,
        "Flux_Kron": (10 ** (0.4 * (22.5 - mag))).astype(np.float32),
        "Type": np.full(n, 0.5, dtype=np.float32),
    }


def write_exposure(
    folder: Path,
    *,
    chip: int = 8,
    obsid: str = OBSID,
    shape: tuple[int, int] = (40, 50),
    name: str | None = None,
    primary: dict[str, Any] | None = None,
    cards: dict[str, Any] | None = None,
    image: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    flag: np.ndarray | None = None,
    columns: dict[str, Any] | None = None,
    n_rows: int = 12,
    kinds: str = "IMG WHT FLG CAT",
    in_primary: bool = False,
    checksum: bool = True,
    compress: str | None = None,
    gz: str = "",
) -> ExposureFiles:
    """Write the files of one exposure.

    Parameters
    ----------
    folder : Path
        Where to; made if it is missing.
    chip, obsid, shape : int, str, (ny, nx)
        Detector (its filter follows), observation, and size of the image.
    name : str, optional
        File name with ``{KIND}`` or ``{kind}`` for the kind; default is the standard name.
    primary, cards : dict, optional
        Cards of HDU0 and of the image HDU to add or change; None as value removes a card.
    image, weight, flag : arrays, optional
        Pixels; default is sky with noise, its inverse variance, no flags.
    columns : dict, optional
        CAT columns instead of the default ones.
    n_rows : int
        Rows of the default CAT.
    kinds : str
        Which files to write.
    in_primary : bool
        Put the images into HDU0.
    checksum : bool
        Write CHECKSUM and DATASUM.
    compress : str, optional
        Tile compression of the three images, such as ``RICE_1``: files are then ``.fits.fz``.
    gz : str
        Kinds whose files are compressed with gzip.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ny, nx = shape
    if name is None:
        name = f"CSST_MSC_MS_WIDE_20280610030351_20280610030621_{obsid}_{chip:02d}_L1_V01_{{KIND}}.fits"
    rng = np.random.default_rng(chip)
    pixels: dict[str, Any] = {
        "IMG": (SKY + RMS * rng.standard_normal(shape)).astype(np.float32) if image is None else image,
        "WHT": np.full(shape, RMS**-2, dtype=np.float32) if weight is None else weight,
        "FLG": np.zeros(shape, dtype=np.uint16) if flag is None else flag,
    }
    wcs = wcs_header(ny, nx)
    rows = catalog_columns(wcs, ny, nx, n_rows) if columns is None else columns
    head = {
        "OBSID": obsid,
        "DATE-OBS": "2028-06-10T03:03:51",
        "EXPTIME": 150.0,
        "DETECTOR": f"CHIP{chip:02d}",
    }
    body = {
        **dict(wcs),
        "FILTER": DETECTOR_FILTER[chip],
        "GAIN1": 1.1,
        "RDNOISE1": 5.0,
        "ZP": 26.0,
        "SATURATE": 460.0,
        "SKY_BKG": SKY,
        "SKY_RMS": RMS,
        "FWHM": 2.1,
    }
    head = {key: value for key, value in {**head, **(primary or {})}.items() if value is not None}
    body = {key: value for key, value in {**body, **(cards or {})}.items() if value is not None}
    image_path = None
    for kind in kinds.split():
        path = folder / name.format(KIND=kind, kind=kind.lower())
        hdus = _hdus(kind, pixels, rows, head, body, in_primary, compress)
        if compress and kind != "CAT":
            path = path.with_name(path.name + ".fz")
        hdus.writeto(path, checksum=checksum, overwrite=True)
        if kind in gz.split():
            packed = path.with_name(path.name + ".gz")
            with path.open("rb") as plain, gzip.open(packed, "wb", compresslevel=1) as stream:
                shutil.copyfileobj(plain, stream)
            path.unlink()
            path = packed
        image_path = path if kind == "IMG" else image_path
    if image_path is None:
        return ExposureFiles(folder / name.format(KIND="IMG", kind="img"))
    return find_siblings(image_path)


def _hdus(
    kind: str,
    pixels: dict[str, Any],
    rows: dict[str, Any],
    head: dict[str, Any],
    body: dict[str, Any],
    in_primary: bool,
    compress: str | None,
) -> fits.HDUList:
    primary = fits.PrimaryHDU()
    if kind == "CAT":
        primary.header.update(head)
        return fits.HDUList([primary, table_hdu(rows)])
    data = pixels[kind]
    if in_primary:
        primary = fits.PrimaryHDU(data)
        primary.header.update({**head, **body})
        return fits.HDUList([primary])
    primary.header.update(head)
    extension: Any
    if compress:
        lossless = {"quantize_level": 0.0} if compress.startswith("GZIP") else {"quantize_level": 32.0}
        extension = fits.CompImageHDU(data, compression_type=compress, name=kind, **lossless)
    else:
        extension = fits.ImageHDU(data, name=kind)
    extension.header.update(body)
    return fits.HDUList([primary, extension])


def table_hdu(columns: dict[str, Any]) -> fits.BinTableHDU:
    """Binary table of NumPy columns."""
    letters = {"i2": "I", "i4": "J", "i8": "K", "f4": "E", "f8": "D", "u1": "B", "b1": "L"}
    made = []
    for name, values in columns.items():
        values = np.asarray(values)
        size = "" if values.ndim == 1 else str(values.shape[1])
        kind = f"{values.dtype.itemsize}A" if values.dtype.kind == "S" else size + letters[values.dtype.str[1:]]
        made.append(fits.Column(name, kind, array=values))
    return fits.BinTableHDU.from_columns(made, name="CAT")


@pytest.fixture(scope="session", autouse=True)
def fast_headers() -> Iterator[None]:
    """Settings of astropy as constants: it looks them up, and checks them, several times for every card."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "enable_record_valued_keyword_cards",
            "strip_header_whitespace",
            "extension_name_case_sensitive",
        ):
            patch.setattr(type(fits.conf), name, getattr(fits.conf, name))
        yield


@pytest.fixture
def make_exposure(tmp_path: Path) -> Callable[..., ExposureFiles]:
    """`write_exposure` into ``tmp_path`` (or the folder given as the first argument)."""

    def make(folder: Path | None = None, **options: Any) -> ExposureFiles:
        return write_exposure(tmp_path if folder is None else folder, **options)

    return make


@pytest.fixture
def make_columns() -> Callable[..., dict[str, Any]]:
    """Official CAT columns that agree with the default WCS: ``make_columns(n, shape=(40, 50), seed=1)``."""

    def make(n: int = 12, shape: tuple[int, int] = (40, 50), seed: int = 1) -> dict[str, Any]:
        return catalog_columns(wcs_header(*shape), *shape, n, seed)

    return make


@pytest.fixture
def make_table() -> Callable[[dict[str, Any]], fits.BinTableHDU]:
    """`table_hdu`."""
    return table_hdu


@pytest.fixture(scope="session")
def write_level1() -> Callable[..., ExposureFiles]:
    """`write_exposure` itself, for fixtures of a wider scope: the first argument is the folder."""
    return write_exposure


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], Any]], Any]:
    """``shared(name, make)`` is what ``make(folder)`` returns, made once for all processes of a run of pytest-xdist.

    It must be something that can be pickled. Tests only read it and its folder.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, make: Callable[[Path], Any]) -> Any:
        made = root / f"{name}.pickle"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                made.write_bytes(pickle.dumps(make(tmp_path_factory.mktemp(name))))
            return pickle.loads(made.read_bytes())

    return get
