"""A model that answers in stages, against the plain computation of every stage for every object."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sgclassify.model.cli import cascade as cascade_command
from sgclassify.model.data.shards import CATALOG_COLUMNS, Sample
from sgclassify.model.judge import scores
from sgclassify.model.serve.contract import CascadeContract, ModelContract
from sgclassify.model.serve.runtime import load, torchscript
from sgclassify.model.train import cascade as module
from sgclassify.model.train.cascade import Cascade, Objects, fit_cascade
from sgclassify.model.train.network import (
    HEADS,
    Answer,
    CalibratedNetwork,
    Calibration,
    FusionNetwork,
    asinh,
    weighted,
)
from sgclassify.model.train.outcome import Trained, export
from sgclassify.stages import classify
from sgclassify.stages.cascade import Certainty, Stage
from sgclassify.stages.errors import ModelError
from sgclassify.stages.features import FEATURES
from sgclassify.stages.prior import Prior, prior_shift
from sgclassify.stages.tile import Inputs

SIZE, N = 16, 60
PRIOR = 0.3
WEIGHTS = torch.tensor([0.1, 0.2, 0.1, 0.4, 0.15, 0.05])
SNR = FEATURES.index("snr")


def sample(n, seed):
    """Objects from faint to bright; the first has no band at all."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 7, len(FEATURES))).astype(np.float32)
    features[rng.random(features.shape) < 0.1] = np.nan
    features[:, :, SNR] = np.arcsinh(rng.uniform(1.0, 60.0, (n, 1)))
    valid = rng.random((n, 7, SIZE, SIZE)) > 0.05
    valid[rng.random((n, 7)) < 0.3] = False
    valid[0] = False
    return Sample(
        image=np.where(valid, rng.normal(0, 0.05, valid.shape), 0).astype(np.float16),
        valid=valid,
        sigma=np.full((n, 7), 0.02, np.float32),
        features=features,
        psf=(rng.random((n, 7, SIZE, SIZE)) / SIZE**2).astype(np.float16),
        catalog=np.full((n, 7, len(CATALOG_COLUMNS)), np.nan, np.float32),
        table=pa.table({"object_id": np.arange(n)}),
    )


def calibrated(log_temperature, offset):
    calibration = Calibration().requires_grad_(False)
    calibration.log_temperature.copy_(torch.tensor(log_temperature))
    calibration.offset.copy_(torch.tensor(offset))
    return calibration


def tensors(inputs):
    return [torch.from_numpy(a) for a in (inputs.image, inputs.valid, inputs.sigma, inputs.features, inputs.psf)]


def plain(trained, inputs):
    """Logit of each stage for every object, from the networks in half precision."""
    networks = [copy.deepcopy(network).half().float() for network in trained.networks]
    with torch.inference_mode():
        heads = torch.stack([head for network in networks for head in network(*tensors(inputs))])
        features = torch.from_numpy(inputs.features)
        answers = {
            Stage.SEQUENCE: (heads[5:], trained.cascade.early[0]),
            Stage.PART: (heads[3:], trained.cascade.early[1]),
            Stage.WHOLE: (heads, Answer(WEIGHTS, trained.calibrations["fused"])),
        }
        found = {}
        for stage, (those, answer) in answers.items():
            logits = answer.calibration(weighted(those, answer.weights), Calibration.brightness(features)).double()
            found[stage] = (logits[:, 0] - logits[:, 1]).numpy()
    return found


@pytest.fixture(scope="module", autouse=True)
def few_layers():
    """One block where a ResNet-50 has 3, 4, 6 and 3."""
    resnet = torchvision.models.resnet
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "resnet50", lambda weights: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1]))
        yield


@pytest.fixture(scope="module")
def trained(few_layers):
    """Two untrained networks, a ResNet and a lighter one behind it, whose stages settle a third each."""
    torch.manual_seed(4)
    networks = FusionNetwork(SIZE).eval(), FusionNetwork(SIZE, architecture="bands").eval()
    for network in networks:
        for head in (network.head[-1], network.image_head[-1], network.sequence_head[-1]):
            head.weight.data *= 20
    early = (
        Answer(torch.ones(1), calibrated([0.1, 0.05], [0.2, -0.1])),
        Answer(torch.tensor([0.5, 0.3, 0.2]), calibrated([-0.1, 0.02], [-0.3, 0.1])),
    )
    whole = calibrated([0.05, -0.03], [-0.2, 0.05])
    made = Trained(
        networks, {"fused": whole}, {"fused": WEIGHTS}, PRIOR, SIZE, {}, [], {},
        Cascade(early, CascadeContract(1, {})),
    )  # fmt: skip
    logits = plain(made, scores.inputs_of(sample(400, 9)))
    certain = {
        stage.name: Certainty(float(np.log(np.quantile(abs(logits[stage]), share))), 0.1)
        for stage, share in ((Stage.SEQUENCE, 0.6), (Stage.PART, 0.5))
    }
    return replace(made, cascade=Cascade(early, CascadeContract(1, certain)))


@pytest.fixture(scope="module")
def archive(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("cascade") / "model.pt"
    return path, export(trained, sample(20, 1), "0" * 64, path)


@pytest.fixture(scope="module")
def classifier(archive):
    return load(archive[0], batch_size=64)


@pytest.mark.parametrize("prior", [None, Prior((0.6,))])
def test_each_object_gets_the_answer_of_the_first_stage_that_is_certain(trained, classifier, prior):
    inputs = scores.inputs_of(sample(N, 5))
    logits = plain(trained, inputs)
    shift = 0.0 if prior is None else float(prior_shift(PRIOR, 0.6))
    found = classify.scores(inputs, classifier.probabilities, PRIOR, prior, cascade=classifier.cascade)
    stages = []
    for n in range(1, N):
        bright = min(float(np.nanmax(inputs.features[n, :, SNR])), 7.0) - 3.0
        decided = Stage.WHOLE
        for stage in (Stage.PART, Stage.SEQUENCE):
            certain = trained.cascade.contract.certain[stage.name]
            least = np.exp(certain.level + certain.slope * bright)
            both = logits[stage][n], logits[stage][n] + shift
            # half precision of what is near the limit could decide either way
            assert abs(min(map(abs, both)) - least) > 1e-4
            if min(both) >= least or max(both) <= -least:
                decided = stage
        stages.append(decided)
        assert found.logit[n] == pytest.approx(logits[decided][n], abs=5e-3)
    assert found.stage[1:].tolist() == stages
    assert {*stages} == {Stage.SEQUENCE, Stage.PART, Stage.WHOLE}
    assert np.isnan(found.p_star[0])
    # what goes through to the end gets the whole model's answer
    exact = classify.scores(inputs, classifier.probabilities, PRIOR, prior)
    last = found.stage == Stage.WHOLE
    np.testing.assert_allclose(found.p_star[last], exact.p_star[last], atol=1e-6)
    assert (exact.stage == Stage.WHOLE).all()


def test_another_prior_asks_further_stages(classifier):
    inputs = scores.inputs_of(sample(N, 5))
    stages = [
        classify.scores(inputs, classifier.probabilities, PRIOR, prior, cascade=classifier.cascade).stage
        for prior in (None, Prior((0.999,)))
    ]
    assert (stages[1] >= stages[0]).all()
    assert (stages[1] > stages[0]).any()


@pytest.fixture(scope="module")
def crowd(classifier):
    """More objects than a batch of any stage holds, and what the stages answer."""
    inputs = scores.inputs_of(sample(300, 6))
    return inputs, classifier.cascade(inputs, np.zeros(300))


@given(seed=st.integers(0, 2**32), count=st.one_of(st.integers(1, 80), st.integers(260, 300)))
@settings(max_examples=15)
def test_an_answer_does_not_depend_on_the_other_objects(classifier, crowd, seed, count):
    rng = np.random.default_rng(seed)
    inputs, whole = crowd
    assert {*whole.stage.tolist()} == {1, 2, 3}
    some = rng.permutation(300)[:count]
    part = Inputs(**{name: values[some] for name, values in vars(inputs).items()})
    found = classifier.cascade(part, np.zeros(count))
    np.testing.assert_array_equal(found.both, whole.both[some])
    np.testing.assert_array_equal(found.stage, whole.stage[some])


def test_what_is_not_finite_is_nan(classifier, crowd):
    inputs, whole = crowd
    (k, *_) = np.flatnonzero(whole.stage == Stage.WHOLE)
    sigma = inputs.sigma.copy()
    sigma[k] = np.nan
    found = classifier.cascade(replace(inputs, sigma=sigma), np.zeros(300))
    assert found.stage[k] == Stage.WHOLE
    assert np.isnan(found.both[k]).all()
    rest = np.arange(300) != k
    np.testing.assert_array_equal(found.both[rest], whole.both[rest])


def test_an_average_over_symmetries_asks_the_whole_model(classifier):
    inputs = scores.inputs_of(sample(5, 8))

    def never(*_):
        raise AssertionError("asked in stages")

    found = classify.scores(inputs, classifier.probabilities, PRIOR, tta=True, cascade=never)
    assert found.stage.tolist() == [Stage.WHOLE] * 5


def test_stages_on_a_gpu_without_room(classifier, archive):
    """Batches of all stages are halved; where one object is too much, the tile goes to the CPU."""
    inputs = scores.inputs_of(sample(20, 6))
    expected = classifier.cascade(inputs, np.zeros(20))
    model = load(archive[0], batch_size=64)
    honest, sizes, most = model.stages.ask_part, [], 4

    def ask_part(arrays):
        sizes.append(len(arrays[0]))
        if len(arrays[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(arrays)

    model.stages.ask_part = ask_part
    found = model.cascade(inputs, np.zeros(20))
    assert (sizes[:4], {*sizes[4:]}) == ([32, 32, 16, 8], {4})
    np.testing.assert_allclose(found.both, expected.both, atol=1e-6)
    np.testing.assert_array_equal(found.stage, expected.stage)
    most = 0
    found = model.cascade(inputs, np.zeros(20))
    np.testing.assert_array_equal(found.both, model.on_cpu().cascade(inputs, np.zeros(20)).both)
    assert model.batch_size == 4


def test_the_contract_says_when_stages_are_certain(archive, trained, classifier):
    contract = archive[1]
    assert ModelContract.from_json(contract.to_json()) == contract == classifier.contract
    assert contract.cascade == trained.cascade.contract
    assert [stage for stage, _ in contract.cascade.stages] == [Stage.SEQUENCE, Stage.PART]
    raw = json.loads(contract.to_json())
    for change in ({"certain": {}}, {"certain": {"SEQUENCE": {"level": 1.0}}}, {"network": None}, 7):
        broken = raw | {"cascade": raw["cascade"] | change if isinstance(change, dict) else change}
        with pytest.raises(ModelError, match=r"cascade|contract"):
            ModelContract.from_json(json.dumps(broken))


@pytest.mark.parametrize("name", ["p_star_sequence", "p_star_part"])
def test_each_stage_must_reproduce_its_reference(archive, tmp_path, name):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(archive[0]) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith("reference.npz"):
                with np.load(io.BytesIO(content)) as reference:
                    arrays = dict(reference)
                arrays[name] = arrays[name] + 0.01
                buffer = io.BytesIO()
                np.savez_compressed(buffer, **arrays)
                content = buffer.getvalue()
            new.writestr(item, content)
    with pytest.raises(ModelError, match="reference output"):
        load(path)


class Version2(nn.Module):
    """The network of an archive of version 2, which could be asked as a whole only."""

    def __init__(self, networks, calibration, weights):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.calibration = calibration
        self.register_buffer("weights", weights)
        self.snr = SNR

    def forward(self, image: torch.Tensor, valid: torch.Tensor, sigma: torch.Tensor, features: torch.Tensor,
                psf: torch.Tensor) -> torch.Tensor:  # fmt: skip
        heads = []
        for network in self.networks:
            one, two, three = network(image, valid, sigma, features, psf)
            heads += [one, two, three]
        logits = (torch.stack(heads) * self.weights[:, None, None]).sum(dim=0)
        brightness = torch.nan_to_num(features[:, :, self.snr]).amax(dim=1).clamp(0.0, 7.0) - 3.0
        return torch.softmax(self.calibration(logits, brightness), dim=1)


@pytest.fixture(scope="module")
def version2(trained, archive, tmp_path_factory):
    path = tmp_path_factory.mktemp("old") / "model.pt"
    old = Version2(*copy.deepcopy((trained.networks, trained.calibrations["fused"], WEIGHTS))).half().eval()
    raw = json.loads(archive[1].to_json()) | {"contract_version": 2}
    del raw["cascade"]
    with zipfile.ZipFile(archive[0]) as file:
        reference = next(file.read(name) for name in file.namelist() if name.endswith("reference.npz"))
    with torchscript():
        extra = {"contract.json": json.dumps(raw), "reference.npz": reference}
        torch.jit.save(torch.jit.script(old), str(path), _extra_files=extra)
    path.with_name("model.pt.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_an_archive_of_version_2_answers_as_a_whole(version2, classifier):
    old = load(version2)
    assert old.cascade is None
    inputs = scores.inputs_of(sample(N, 5))
    got, new = (one.probabilities(*(a.numpy() for a in tensors(inputs))) for one in (old, classifier))
    # its convolutions are not joined with what follows them, which rounds otherwise
    np.testing.assert_allclose(got, new, rtol=0, atol=1e-5)


def tensors_in(path):
    with torchscript():
        return torch.jit.load(str(path)).state_dict()


@pytest.mark.thorough
def test_the_command_adds_stages_and_changes_nothing_else(version2, data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    out = tmp_path / "made.pt"
    done = CliRunner().invoke(cascade_command, ["--data", str(folder), "--model", str(version2), "--output", str(out)])
    assert done.exit_code == 0, done.output
    old, made = load(version2), load(out)
    inputs = scores.inputs_of(sample(N, 5))
    arrays = [a.numpy() for a in tensors(inputs)]
    np.testing.assert_allclose(old.probabilities(*arrays), made.probabilities(*arrays), rtol=0, atol=1e-5)
    before, after = tensors_in(version2), tensors_in(out)
    for name, value in before.items():
        assert torch.equal(value, after[name if name.startswith("networks.") else f"whole.{name}"]), name
    assert all(name in before or name.startswith(("early.", "whole.")) for name in after)
    assert made.contract.cascade.network == 1
    assert made.contract.cascade.figures["fields"] == 2
    assert (made.contract.training, made.contract.training_set_id) == (
        old.contract.training,
        old.contract.training_set_id,
    )
    # and once more, from an archive that has stages
    again = tmp_path / "again.pt"
    done = CliRunner().invoke(cascade_command, ["--data", str(folder), "--model", str(out), "--output", str(again)])
    assert done.exit_code == 0, done.output
    assert load(again).contract == made.contract


def test_a_modality_alone_has_no_stages(trained, data, tmp_path):
    weights = torch.eye(6)[1]
    alone = replace(trained, calibrations={"image": Calibration().requires_grad_(False)}, weights={"image": weights})
    export(alone, sample(5, 2), "0" * 64, tmp_path / "image.pt", "image")
    assert load(tmp_path / "image.pt").cascade is None
    done = CliRunner().invoke(
        cascade_command,
        ["--data", str(data), "--model", str(tmp_path / "image.pt"), "--output", str(tmp_path / "x.pt")],
    )
    assert done.exit_code == 1
    assert "image alone" in done.output


def objects(n, seed, scatter=0.5):
    """Heads of one network, of which the first one is the best, and what it was made of."""
    rng = torch.Generator().manual_seed(seed)
    true = 5.0 * torch.randn(n, generator=rng)
    label = (torch.rand(n, generator=rng) > torch.sigmoid(true)).long()
    bright = 6.0 * torch.rand(n, generator=rng)
    features = torch.zeros(n, 7, len(FEATURES))
    features[:, :, SNR] = bright[:, None]
    less = true + scatter * torch.exp(0.2 * bright) * torch.randn(n, generator=rng)
    heads = torch.stack([torch.stack([x, torch.zeros(n)], 1) for x in (true, true, less)])
    return Objects(heads, features, label, torch.arange(n) % 10)


def test_stages_lose_no_calibration_object():
    few = objects(20_000, 1)
    network = FusionNetwork(SIZE, architecture="bands")
    share = float((few.label == 0).double().mean())
    whole = Answer(torch.tensor([1.0, 0.0, 0.0]), Calibration().requires_grad_(False))
    made = fit_cascade([network], whole, share, few)
    # one network has no second stage
    assert [*made.contract.certain] == ["SEQUENCE"]
    certain = made.contract.certain["SEQUENCE"]
    # the scatter that was put in, and its growth with the brightness
    assert certain.slope == pytest.approx(0.2, abs=0.02)
    answer, bright = made.early[0], Calibration.brightness(few.features)
    assert answer.weights.tolist() == [1.0]
    logit = np.subtract(*answer.calibration(few.heads[2], bright).double().T.numpy())
    least = np.exp(certain.level + certain.slope * (few.features[:, 0, SNR].double().numpy() - 3.0))
    settled = abs(logit) >= least
    star, right = few.label.numpy() == 0, few.heads[0, :, 0].numpy() >= 0
    lost = (right == star) & ((logit >= 0) != star)
    assert lost.sum() > 100
    assert not (lost & settled).any()
    # and the worst of them lies a tenth below
    assert float((abs(logit) / least)[lost].max()) == pytest.approx(1.0 / module.MARGIN, rel=0.05)
    assert made.contract.figures["settled"]["SEQUENCE"] == pytest.approx(settled.mean(), abs=0.01)
    assert made.contract.figures["stars right"][1] >= made.contract.figures["stars right"][0]
    assert made.contract.figures["galaxies right"][1] >= made.contract.figures["galaxies right"][0]


def test_stages_that_spoil_the_calibration_settle_less(monkeypatch):
    few = objects(20_000, 2)
    network = FusionNetwork(SIZE, architecture="bands")
    whole = Answer(torch.tensor([1.0, 0.0, 0.0]), Calibration().requires_grad_(False))
    share = float((few.label == 0).double().mean())
    free = fit_cascade([network], whole, share, few).contract
    monkeypatch.setattr(module, "WORST_ECE", -1.0)
    strict = fit_cascade([network], whole, share, few).contract
    assert strict.certain["SEQUENCE"].level > free.certain["SEQUENCE"].level
    assert strict.figures["settled"]["SEQUENCE"] == 0.0


def test_an_answer_is_the_calibrated_sum_of_its_heads():
    few = objects(50, 3)
    calibration = calibrated([0.2, 0.1], [0.3, -0.1])
    weights = torch.tensor([0.5, 0.2, 0.3])
    total = sum(w * head for w, head in zip(weights, few.heads, strict=True))
    expected = torch.softmax(calibration(total, Calibration.brightness(few.features)), 1)
    torch.testing.assert_close(Answer(weights, calibration)(few.heads, few.features), expected)


def test_asinh_is_exact_enough():
    x = np.concatenate([-np.logspace(-8, 12, 2001), [0.0], np.logspace(-8, 12, 2001)]).astype(np.float32)
    got = asinh(torch.from_numpy(x)).double().numpy()
    np.testing.assert_allclose(got, np.arcsinh(x.astype(np.float64)), rtol=2e-7, atol=2e-7)
    assert torch.isfinite(asinh(torch.tensor([1e30, -1e30]))).all()


def test_the_graph_of_the_whole_is_the_sum_of_its_parts(trained):
    inputs = tensors(scores.inputs_of(sample(6, 4)))
    answer = Answer(WEIGHTS, trained.calibrations["fused"])
    with torch.inference_mode():
        heads = torch.stack([head for network in trained.networks for head in network(*inputs)])
        expected = answer(heads, inputs[3])
        torch.testing.assert_close(CalibratedNetwork(trained.networks, [answer])(*inputs), expected)
    assert len(heads) == len(HEADS) * len(trained.networks)
