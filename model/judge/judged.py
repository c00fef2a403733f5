"""A table of scored objects as arrays: classes, probabilities, and the quantities that figures are binned by."""

from __future__ import annotations

from collections import Counter
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.spatial import cKDTree

from sgclassify.model.data.shards import REAL, SPURIOUS, true_classes
from sgclassify.model.judge.results import MODEL, Selection
from sgclassify.stages.arrays import F64, Bool
from sgclassify.stages.bands import BAND_INDEX, BANDS
from sgclassify.stages.errors import UsageError
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.healpix import unit_vectors

PAPER_SNR: Final = 10.0
"""Smallest signal-to-noise ratio in i in the sample of arXiv:2604.10086."""

BRIGHT_STAR: Final = 18.0
"""Magnitude of a star that outshines its surroundings and saturates in an exposure."""

BINNINGS: Final[dict[str, tuple[float, ...]]] = {
    "snr": (-np.inf, 5, 7, 10, 15, 20, 40, np.inf),
    "snr_i": (-np.inf, 5, 10, 20, 50, 200, np.inf),
    "r50_arcsec": (0, 0.05, 0.1, 0.2, 0.4, np.inf),
    "redshift": (1e-9, 0.5, 1, 1.5, 2, np.inf),
    "blended": (0, 0.5, np.inf),
    "n_bands": (0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5),
    "star_density": (0, 3, 10, 30, np.inf),
    "roll_deg": (0, 90, 180, 270, 360),
    "bright_star_arcsec": (0, 2, 5, 10, 20, np.inf),
}
"""Edges of the bins besides those of magnitude. ``r50_arcsec`` and ``redshift`` are of galaxies only.
``bright_star_arcsec`` is the distance from the nearest star brighter than `BRIGHT_STAR`; these stars have none.

``snr`` is the largest over the bands. Calibration is judged by it, not by the true magnitude, which no classifier
knows. Among objects measured as equally bright, the galaxies have the brighter total magnitude. So the faint bins of
true magnitude hold more stars than exact probabilities say.
"""


def numbers(table: pa.Table, name: str) -> F64:
    """A column as numbers, NaN where it has no value or is not there."""
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    try:
        column = table[name].cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UsageError(f"the column {name} must hold numbers; rename it if it is something else") from error
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)


class Judged:
    """A table of scored objects, as arrays.

    Parameters
    ----------
    table : pyarrow.Table
        ``true_class``, ``p_star``, any ``p_<method>``, and what there is of the other columns of a shard or a truth
        table.
    band : str
        Band of the magnitudes.

    Attributes
    ----------
    p : dict of str to ndarray of float64, shape (n,)
        Probability of being a star by each method, the model first.
    star, quasar, scored : ndarray of bool, shape (n,)
        `scored` are the stars and galaxies to which the model gave a probability.
    values : dict of str to ndarray of float64, shape (n,)
        The quantities of `BINNINGS`; NaN where unknown.
    """

    def __init__(self, table: pa.Table, band: str = "i") -> None:
        self.table, self.band = table, band
        kind = true_classes(table)
        if len(kind) and not np.isin(kind, REAL).any():
            known = ", ".join(sorted({str(name) for name in kind})[:5])
            raise UsageError(f"true_class is none of {', '.join(REAL)} anywhere; it holds {known}")
        self.star, self.quasar = kind == "star", kind == "qso"
        self.p = _probabilities(table)
        own = self.p[MODEL]
        if (np.isfinite(own) & ((own < 0) | (own > 1))).any():
            raise UsageError("p_star is not between 0 and 1 everywhere: is it in per cent?")
        self.scored = np.isfinite(own) & (self.star | (kind == "galaxy"))
        self.magnitude = numbers(table, f"mag_{band}")
        self.field = np.nan_to_num(numbers(table, "field"), nan=-1).astype(np.int64)
        self.blended = _blended(table)
        self.values = {name: np.full(table.num_rows, np.nan) for name in BINNINGS}
        for name in ("r50_arcsec", "redshift"):
            self.values[name] = np.where(self.star, np.nan, numbers(table, name))
        self.values |= {name: numbers(table, name) for name in ("n_bands", "star_density", "roll_deg")}
        self.values["bright_star_arcsec"] = self._from_bright_stars(numbers(table, "ra"), numbers(table, "dec"))
        self.values["blended"] = self.blended.astype(np.float64)
        # CSV cannot hold seven numbers per object
        if "snr" in table.column_names and pa.types.is_fixed_size_list(table.schema.field("snr").type):
            flat = table["snr"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            snr = flat.reshape(table.num_rows, len(BANDS)).astype(np.float64)
            self.values["snr_i"] = snr[:, BAND_INDEX["i"]]
            self.values["snr"] = np.nan_to_num(snr, nan=0.0).max(axis=1)

    def _from_bright_stars(self, ra: F64, dec: F64) -> F64:
        """Distance of each object from the nearest bright star, arcsec; NaN for these stars, and if there are none."""
        bright = self.star & (self.magnitude < BRIGHT_STAR)
        fainter = np.isfinite(self.magnitude) & ~bright & np.isfinite(ra + dec)
        bright &= np.isfinite(ra + dec)
        distance = np.full(len(ra), np.nan)
        if bright.any() and fainter.any():
            chords, _ = cKDTree(unit_vectors(ra[bright], dec[bright])).query(unit_vectors(ra[fainter], dec[fainter]))
            distance[fainter] = np.degrees(2.0 * np.arcsin(np.minimum(chords / 2.0, 1.0))) * 3600.0
        return distance

    def kept(self, selection: Selection) -> Bool:
        """Objects that are selected, whether or not they are scored."""
        keep = np.ones(len(self.star), dtype=bool)
        if np.isfinite(self.magnitude).any():
            keep &= (self.magnitude >= selection.edges[0]) & (self.magnitude < selection.edges[-1])
        if selection.unblended:
            keep &= ~self.blended
        if selection.paper_like:
            keep &= self.values["snr_i"] >= PAPER_SNR
        if selection.min_snr is not None:
            keep &= self.values["snr"] >= selection.min_snr
        return keep

    def left_out(self) -> list[str]:
        """Figures that this table does not allow, and objects that are in no figure, in words."""
        lacks = []
        names, mag = {*self.table.column_names}, f"mag_{self.band}"
        without = int((self.scored & ~np.isfinite(self.magnitude)).sum())
        if not np.isfinite(self.magnitude).any():
            others = [band for band in BANDS if f"mag_{band}" in names - {mag}]
            hint = f" (there are magnitudes of {', '.join(others)}: --band)" if others else ""
            lacks.append(f"no {mag} in the truth: no bins by magnitude, nor by the distance from bright stars{hint}")
        elif without:
            lacks.append(f"{without} objects have no {mag}: they are in no figure")
        for name in ("redshift", "r50_arcsec"):
            if not np.isfinite(self.values[name]).any():
                lacks.append(f"no {name} of galaxies in the truth: no bins by {name}")
        if "blended" not in names:
            what = "sg_flags tell what is blended" if "sg_flags" in names else "no bins by blending"
            lacks.append(f"no blended in the truth: {what}")
        classes = Counter(self.table["true_class"].to_pylist())
        for kind, n in sorted((str(kind), n) for kind, n in classes.items() if kind not in (*REAL, SPURIOUS)):
            lacks.append(f"{n} objects of true_class {kind} are in no figure")
        return lacks


def _probabilities(table: pa.Table) -> dict[str, F64]:
    """Probability of being a star by each method, the model first."""
    if f"p_{MODEL}" in table.column_names:
        raise UsageError(f"the column p_{MODEL} has the name of the model, which is p_star; rename it")
    others = [n for n in table.column_names if n.startswith("p_") and n not in ("p_star", "p_galaxy")]
    return {MODEL: numbers(table, "p_star")} | {n.removeprefix("p_"): numbers(table, n) for n in others}


def _blended(table: pa.Table) -> Bool:
    """Which rows are blended, by the truth where it says so, else by ``sg_flags``, else none."""
    if "blended" in table.column_names:
        column = pc.fill_null(table["blended"].cast(pa.bool_()), False)
        return np.asarray(column.to_numpy(zero_copy_only=False), dtype=bool)
    flags = np.nan_to_num(numbers(table, "sg_flags")).astype(np.int64)
    return np.asarray((flags & int(SgFlag.BLENDED)) != 0)
