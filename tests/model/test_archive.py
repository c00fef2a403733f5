"""Export, load and score: an untrained network with the shipped architecture is enough."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import numpy as np
import pyarrow as pa
import pytest
import torch

from sgclassify.model.data.shards import CATALOG_COLUMNS, Sample
from sgclassify.model.serve.contract import ModelContract
from sgclassify.model.serve.runtime import load
from sgclassify.model.train.network import HEADS, Calibration, FusionNetwork
from sgclassify.model.train.outcome import Trained, export
from sgclassify.stages import classify
from sgclassify.stages.errors import ModelError
from sgclassify.stages.features import FEATURES
from sgclassify.stages.tile import Inputs

SIZE = 32
WEIGHTS = {name: torch.eye(3)[k] for k, name in enumerate(HEADS)}


def sample(n, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 7, len(FEATURES))).astype(np.float32)
    features[rng.random(features.shape) < 0.1] = np.nan
    valid = rng.random((n, 7, SIZE, SIZE)) > 0.05
    valid[rng.random((n, 7)) < 0.3] = False
    return Sample(
        image=rng.normal(0, 0.02, (n, 7, SIZE, SIZE)).astype(np.float16),
        valid=valid,
        sigma=np.full((n, 7), 0.02, np.float32),
        features=features,
        psf=(rng.random((n, 7, SIZE, SIZE)) / SIZE**2).astype(np.float16),
        catalog=np.full((n, 7, len(CATALOG_COLUMNS)), np.nan, np.float32),
        table=pa.table({"object_id": np.arange(n)}),
    )


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.manual_seed(3)
    calibration = Calibration().requires_grad_(False)
    calibration.log_temperature.copy_(torch.tensor([1.5, 1.1]).log())
    trained = Trained(
        (FusionNetwork(SIZE),),
        dict.fromkeys(HEADS, calibration),
        WEIGHTS,
        0.25,
        SIZE,
        {},
        [],
        {"training": 0},
    )
    contract = export(trained, sample(20), "0" * 64, path)
    return path, contract


def test_contract_is_read_without_torch(archive):
    path, contract = archive
    code = (
        "import sys; from sgclassify.model.serve.archive import verified; "
        "print(verified(sys.argv[1]).contract().to_json(), end=''); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, contract.to_json()), done.stderr


def score(classifier, data):
    image, psf = data.image.astype(np.float32), data.psf.astype(np.float32)
    return classifier.probabilities(image, data.valid, data.sigma, data.features, psf)[:, 0]


def test_archive_carries_its_contract(archive):
    path, contract = archive
    classifier = load(path)
    assert classifier.contract == contract
    assert classifier.contract.temperature == pytest.approx(1.5)
    assert classifier.contract.inputs == ("image", "valid", "sigma", "features", "psf")
    assert classifier.contract.n_parameters == sum(p.numel() for p in FusionNetwork(SIZE).parameters())
    assert path.stat().st_size < 64e6
    assert ModelContract.from_json(contract.to_json()) == contract


def test_probability_does_not_depend_on_its_batch(archive):
    # 32: what is left over of two SIMD vectors is computed by other code, which differs in the last bit
    classifier = load(archive[0], batch_size=32)
    data = sample(37, seed=5)
    whole = score(classifier, data)
    assert ((whole >= 0) & (whole <= 1)).all()
    order = np.random.default_rng(1).permutation(37)
    np.testing.assert_array_equal(score(classifier, data.take(order)), whole[order])
    np.testing.assert_array_equal(score(classifier, data.take(order[:5])), whole[order[:5]])


def test_what_is_not_valid_is_never_looked_at(archive):
    classifier = load(archive[0], batch_size=8)
    data = sample(8, seed=6)
    image = data.image.astype(np.float32)
    image[~data.valid] = 1e4
    got = classifier.probabilities(image, data.valid, data.sigma, data.features, data.psf.astype(np.float32))
    np.testing.assert_array_equal(got[:, 0], score(classifier, data))


def test_not_finite_output_is_nan(archive):
    classifier = load(archive[0], batch_size=4)
    data = sample(3, seed=7)
    data.sigma[1, :] = np.nan
    got = score(classifier, data)
    assert np.isnan(got[1])
    assert np.isfinite(got[[0, 2]]).all()


def test_average_over_the_symmetries_does_not_depend_on_orientation(archive):
    classifier = load(archive[0], batch_size=4)
    data = sample(4, seed=8)
    image, psf = data.image.astype(np.float32), data.psf.astype(np.float32)

    def averaged(turned):
        image, valid, psf = turned
        inputs = Inputs(image, valid, data.sigma, data.features, psf, valid.any(axis=(2, 3)))
        both = classify.averaged(classify.each_symmetry(inputs, classifier.probabilities))
        np.testing.assert_allclose(both.sum(axis=1), 1.0, atol=2e-7)
        return both[:, 0]

    stacks = (image, data.valid, psf)
    expected = averaged(stacks)
    everything = []
    for k in range(4):
        for mirror in (1, -1):
            turned = [np.rot90(stack, k, axes=(2, 3))[..., ::mirror] for stack in stacks]
            np.testing.assert_allclose(averaged(turned), expected, atol=2e-7)
            both = classifier.probabilities(turned[0], turned[1], data.sigma, data.features, turned[2])
            everything.append(both[:, 0])
    # each of the eight counts once, by direct computation
    np.testing.assert_allclose(np.mean(everything, axis=0, dtype=np.float64), expected, atol=2e-7)
    assert np.ptp(everything, axis=0).max() > 0


@pytest.mark.parametrize("head", HEADS)
def test_each_head_can_be_served(archive, tmp_path, head):
    torch.manual_seed(3)
    network = FusionNetwork(SIZE).eval()
    plain = {name: Calibration().requires_grad_(False) for name in HEADS}
    data = sample(6, seed=9)
    export(Trained((network,), plain, WEIGHTS, 0.25, SIZE, {}, [], {}), data, "0" * 64, tmp_path / "m.pt", head)
    classifier = load(tmp_path / "m.pt", batch_size=8)
    assert classifier.contract.head == head
    image, psf = (torch.from_numpy(a.astype(np.float32)) for a in (data.image, data.psf))
    rest = [torch.from_numpy(a) for a in (data.valid, data.sigma, data.features)]
    with torch.inference_mode():
        logits = network.half().float()(image, *rest, psf)[HEADS.index(head)]
    expected = torch.softmax(logits, 1)[:, 0].numpy()
    np.testing.assert_allclose(score(classifier, data), expected, atol=1e-4)


def test_no_objects(archive):
    assert len(score(load(archive[0]), sample(0))) == 0


def copied(archive, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(archive[0].read_bytes())
    return path


def test_wrong_checksum_is_refused(archive, tmp_path):
    path = copied(archive, tmp_path)
    path.with_name("model.pt.sha256").write_text("0" * 64 + "  model.pt\n")
    with pytest.raises(ModelError, match="sha256"):
        load(path)


def test_missing_truncated_and_foreign_files_are_refused(archive, tmp_path):
    with pytest.raises(ModelError, match="no such model"):
        load(tmp_path / "absent.pt")
    path = copied(archive, tmp_path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ModelError, match="not a model archive"):
        load(path)
    path.write_text("no archive at all")
    with pytest.raises(ModelError, match="not a model archive"):
        load(path)


def rewritten(archive, tmp_path, name, change):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(archive[0]) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            new.writestr(item, change(data) if item.filename.endswith(name) else data)
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"contract_version": 3', b'"contract_version": 9', "version"),
        (b'"psf"', b'"PSF"', "inputs"),
        (b'"ellipticity"', b'"roundness00"', "features"),
        (b'"stamp_size": 32', b'"stamp_size":  2', "stamp size"),
        (b"{", b"[", "contract"),
    ],
)
def test_foreign_contract_is_refused(archive, tmp_path, old, new, message):
    path = rewritten(archive, tmp_path, "contract.json", lambda data: data.replace(old, new, 1))
    with pytest.raises(ModelError, match=message):
        load(path)


def test_other_reference_output_is_refused(archive, tmp_path):
    import io

    def change(data):
        with np.load(io.BytesIO(data)) as reference:
            arrays = dict(reference)
        arrays["p_star"] = arrays["p_star"] + 0.1
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    with pytest.raises(ModelError, match="reference output"):
        load(rewritten(archive, tmp_path, "reference.npz", change))


def test_workers_need_neither_torchvision_nor_training_code(archive):
    code = (
        "import sys; from sgclassify.model.serve.runtime import load; load(sys.argv[1]); "
        "bad = [m for m in sys.modules if m.split('.')[0] in ('torchvision', 'galsim', 'sklearn')"
        " or m.startswith(('sgclassify.simulation', *(f'sgclassify.model.{k}' for k in ('train', 'data', 'judge'))))]; "
        "sys.exit(', '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(archive[0])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
