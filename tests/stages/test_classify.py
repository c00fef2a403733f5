"""From stamps to the rows of the object catalogue, against a computation object by object and pixel by pixel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sgclassify.stages import classify
from sgclassify.stages.arrays import F32
from sgclassify.stages.bands import BAND_INDEX
from sgclassify.stages.columns import OBJECT_COLUMNS
from sgclassify.stages.features import FEATURES, FLUX_SOFTENING
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.prior import Prior
from sgclassify.stages.tile import TileStamps

SIZE, BANDS = 6, 7
OWN = 0.3
NO_BAND, NO_NUMBER = 2, 4
WEIGHT = np.random.default_rng(9).normal(size=(SIZE, SIZE))
MAGNITUDE = (19.0, 20.0, 21.0, 22.0, 23.0, 24.0, 25.0)
"""In the i band, one per object; the last object has no i band."""

PRIOR = Prior((0.8, 0.2), (20.0, 24.0))
ASSUMED = (0.8, 0.8, 0.65, 0.5, 0.35, 0.2, 0.2)
"""What `PRIOR` says of these magnitudes, by hand; without a magnitude, the share of its faint end."""


def tile() -> TileStamps:
    """Seven objects: one without a band, one that the model has no number for, one without the i band."""
    n = len(MAGNITUDE)
    rng = np.random.default_rng(3)
    used = np.ones((n, BANDS), dtype=bool)
    used[NO_BAND] = False
    used[-1] = False
    used[-1, BAND_INDEX["g"]] = True
    features = np.full((n, BANDS, len(FEATURES)), np.nan, dtype=np.float32)
    flux = 10.0 ** (0.4 * (22.5 - np.array(MAGNITUDE)))
    features[:, BAND_INDEX["i"], FEATURES.index("flux")] = np.arcsinh(flux / FLUX_SOFTENING)
    features[~used] = np.nan
    flags = np.zeros(n, dtype=np.int32)
    flags[NO_BAND] = int(SgFlag.NOT_SCORED | SgFlag.FEW_BANDS)
    flags[0] = int(SgFlag.EDGE)
    valid = used[:, :, None, None] & (rng.random((n, BANDS, SIZE, SIZE)) < 0.8)
    valid[NO_NUMBER, 0, 0, 0] = True
    image = np.where(valid, rng.normal(0.0, 0.3, valid.shape), 0.0).astype(np.float32)
    image[NO_NUMBER, 0, 0, 0] = np.nan
    return TileStamps(
        image=image,
        valid=valid,
        sigma=np.ones((n, BANDS), dtype=np.float32),
        features=features,
        psf=np.where(used[:, :, None, None], rng.normal(0.0, 0.1, valid.shape), 0.0).astype(np.float32),
        used=used,
        object_id=np.arange(n) + 50,
        ra=np.linspace(10.0, 10.1, n),
        dec=np.full(n, -3.0),
        sg_flags=flags,
        members=pa.table({}),
    )


class Model:
    """A model whose answer depends on the orientation of the stamp and of the PSF."""

    def __init__(self) -> None:
        self.asked: list[tuple[F32, F32]] = []

    def __call__(self, image: F32, valid: Any, sigma: F32, features: F32, psf: F32) -> F32:
        self.asked.append((image, psf))
        logit = (WEIGHT * (image + psf) * (1.0 + valid)).sum(axis=(1, 2, 3)) / sigma[:, 0]
        p = 1.0 / (1.0 + np.exp(-logit))
        return np.stack([p, 1.0 - p], axis=1).astype(np.float32)


def as_seen(k: int, stamp: Any) -> list[list[float]]:
    """A stamp in one of the eight symmetries: rows and columns exchanged or not, each forwards or backwards."""
    last = SIZE - 1
    rows = []
    for y in range(SIZE):
        places = [(last - y if k & 1 else y, last - x if k & 2 else x) for x in range(SIZE)]
        rows.append([float(stamp[x, y] if k & 4 else stamp[y, x]) for y, x in places])
    return rows


def expected(stamps: TileStamps, symmetries: int, prior: Prior | None) -> list[tuple[float, float] | None]:
    """p_star and logit of each object; None for one that is not scored."""
    found: list[tuple[float, float] | None] = []
    for n in range(len(stamps)):
        if n in (NO_BAND, NO_NUMBER):
            found.append(None)
            continue
        total = 0.0
        for k in range(symmetries):
            logit = 0.0
            for band in range(BANDS):
                stack = (stamps.image[n, band] + stamps.psf[n, band]) * (1.0 + stamps.valid[n, band])
                seen = as_seen(k, stack)
                logit += sum(WEIGHT[y, x] * seen[y][x] for y in range(SIZE) for x in range(SIZE))
            total += 1.0 / (1.0 + math.exp(-logit))
        p = total / symmetries
        odds = p / (1.0 - p)
        if prior is not None:
            odds *= ASSUMED[n] / (1.0 - ASSUMED[n]) * (1.0 - OWN) / OWN
        found.append((odds / (1.0 + odds), math.log(p / (1.0 - p))))
    return found


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("prior", [None, PRIOR], ids=["own", "table"])
def test_rows_of_the_catalogue(tta: bool, prior: Prior | None) -> None:
    stamps, model = tile(), Model()
    table = classify.classify(stamps, model, OWN, prior, tta)
    assert [field.name for field in table.schema] == [column.name for column in OBJECT_COLUMNS]
    rows = table.sort_by("object_id").to_pylist()
    assert [row["object_id"] for row in rows] == stamps.object_id.tolist()
    wanted = expected(stamps, 8 if tta else 1, prior)
    classes = set()
    for n, (row, one) in enumerate(zip(rows, wanted, strict=True)):
        if one is None:
            assert [row[name] for name in ("p_star", "p_galaxy", "sg_class", "logit")] == [None] * 4
            assert (row["n_bands"], row["bands"]) == (0, "")
            lost = SgFlag.NOT_SCORED | (SgFlag.NOT_FINITE if n == NO_NUMBER else SgFlag.FEW_BANDS)
            assert row["sg_flags"] == int(lost)
            continue
        p_star, logit = one
        assert row["p_star"] == pytest.approx(p_star, abs=2e-6)
        assert row["p_galaxy"] == pytest.approx(1.0 - p_star, abs=2e-6)
        assert row["logit"] == pytest.approx(logit, rel=1e-5, abs=1e-5)
        assert row["sg_class"] == ("star" if p_star >= 0.5 else "galaxy")
        assert row["sg_flags"] == (int(SgFlag.EDGE) if n == 0 else 0)
        assert row["n_bands"] == (1 if n == len(rows) - 1 else BANDS)
        classes.add(row["sg_class"])
    assert classes == {"star", "galaxy"}


def test_the_model_is_asked_once_in_each_symmetry() -> None:
    stamps, model = tile(), Model()
    classify.scores(stamps, model, OWN, tta=True)
    whole = [as_seen(k, stamps.image[0, 0]) for k in range(8)]
    asked = [image[0, 0].tolist() for image, _ in model.asked]
    assert asked[0] == whole[0]
    assert sorted(asked) == sorted(whole)
    # the PSF of each band turns with its stamp
    for image, psf in model.asked:
        k = whole.index(image[0, 0].tolist())
        assert psf[1, 3].tolist() == as_seen(k, stamps.psf[1, 3])


def test_a_tile_without_objects_asks_no_model() -> None:
    stamps = tile()
    nothing = TileStamps(**{name: value[:0] for name, value in vars(stamps).items()})

    def model(*_: Any) -> F32:
        raise AssertionError("there is nothing to score")

    for tta in (False, True):
        table = classify.classify(nothing, model, OWN, PRIOR, tta)
        assert table.num_rows == 0
        assert [field.name for field in table.schema] == [column.name for column in OBJECT_COLUMNS]
