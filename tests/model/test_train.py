"""Training on a few random objects: what it does, not how well."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.model.cli import train as train_command
from sgclassify.model.data.rows import read_rows
from sgclassify.model.data.shards import read_samples, write_shard
from sgclassify.model.serve.runtime import load
from sgclassify.model.train import loop as module
from sgclassify.model.train import outcome as outcome_module
from sgclassify.model.train import trainer as trainer_module
from sgclassify.model.train.checkpoint import FIRST_LAYER
from sgclassify.model.train.loop import Earlier, one_cycle, run_stage, train
from sgclassify.model.train.network import HEADS, Calibration, FusionNetwork
from sgclassify.model.train.outcome import draw_history, export
from sgclassify.model.train.processes import Place, computes_bf16
from sgclassify.model.train.recipe import Recipe
from sgclassify.model.train.trainer import Trainer
from sgclassify.model.train.validation import figures, fit_normalization, measure_batch_norm, predict
from sgclassify.stages.errors import UsageError

SIZE = 16
SHORT = Recipe(
    sequence_epochs=2,
    small_epochs=1,
    epochs=1,
    small_stamp=8,
    batch_size=8,
    sequence_batch_size=8,
    patience=99,
    architecture="resnet50",
)
BANDS = replace(SHORT, architecture="bands")
CPU = torch.device("cpu")


@pytest.fixture
def few_layers(monkeypatch):
    """One block where a ResNet-50 has 3, 4, 6 and 3: for what is tested of the training, not of the network."""
    resnet = torchvision.models.resnet

    def resnet14(weights):
        assert weights is None
        return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1])

    monkeypatch.setattr(torchvision.models, "resnet50", resnet14)


def test_normalization_is_that_of_the_sample(arrays_of):
    features = arrays_of(200, 3)["features"]
    features[:50] = np.nan
    network = FusionNetwork(SIZE)
    fit_normalization(network, torch.from_numpy(features))
    expected = features[50:].astype(np.float64)
    np.testing.assert_allclose(network.sequence_encoder.mean.numpy(), expected.mean(0), rtol=1e-4)
    np.testing.assert_allclose(network.sequence_encoder.std.numpy(), expected.std(0), rtol=1e-4)


def test_figures_of_known_logits():
    logits = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 0.0]])
    label = torch.tensor([0, 0, 1, 1])
    found = figures(logits, label, torch.ones(2))
    assert (found["star_recall"], found["galaxy_recall"], found["accuracy"]) == (1.0, 0.5, 0.75)
    assert found["auc"] == pytest.approx(0.75)
    assert found["loss"] == pytest.approx(9.0 / 4, rel=1e-3)


def test_learning_rate_rises_and_falls():
    rate = [one_cycle(x) for x in np.linspace(0, 1, 101)]
    assert rate[0] == pytest.approx(0.04)
    assert rate[20] == pytest.approx(1.0)
    assert rate[100] == pytest.approx(0.001)
    assert np.all(np.diff(rate[:21]) > 0)
    assert np.all(np.diff(rate[20:]) < 0)


def test_batch_norm_statistics_are_those_of_the_data(data):
    rows = read_rows(sorted((data / "training").glob("*.parquet")))
    network = FusionNetwork(SIZE)
    recipe = Recipe(augmentation=False, band_dropout=0.0, batch_size=len(rows))
    measure_batch_norm(network, rows, recipe, SIZE, len(rows))
    assert not any(m.training for m in network.modules())
    seen = []
    encoder = network.image_encoder
    encoder.backbone.conv1[0].register_forward_hook(lambda *a: seen.append(a[-1]))
    image, valid, sigma, _, psf = rows.batch(torch.arange(len(rows)), CPU)
    with torch.no_grad():
        encoder(image, valid, sigma, psf)
    norm = encoder.backbone.conv1[1]
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(norm.running_var, seen[0].var((0, 2, 3)), rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("few_layers")
def test_a_stopped_training_goes_on_like_an_undisturbed_one(data, tmp_path, monkeypatch):
    whole = train(data, tmp_path / "whole", SHORT)
    rows = json.loads((tmp_path / "whole" / "history.json").read_text())
    assert rows == json.loads(json.dumps(whole.history))
    assert [(row["stage"], row.get("stamp")) for row in rows] == [
        ("sequence", SIZE), ("sequence", SIZE), ("joint", 8), ("joint", SIZE), ("weighted", None),
    ]  # fmt: skip
    assert set(rows[-1]["fused"]) == {"loss", "star_recall", "galaxy_recall", "accuracy", "auc", "ece"}
    assert set(HEADS) <= set(rows[-2])
    true_loss = Trainer.loss
    calls = []

    def loss(self, *arguments):
        calls.append(1)
        # in the middle of an epoch of the first stage, then of the second
        if len(calls) in (2, 9):
            os.kill(os.getpid(), signal.SIGTERM)
        return true_loss(self, *arguments)

    monkeypatch.setattr(Trainer, "loss", loss)
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            train(data, tmp_path / "parts", SHORT, earlier=Earlier(resume=True))
        assert ended.value.code == 143
    # once to the end, and once more when nothing is left to do
    for _ in range(2):
        resumed = train(data, tmp_path / "parts", SHORT, earlier=Earlier(resume=True))
        assert len(calls) == sum(row["stage"] == "sequence" for row in rows) * 3 + 2 * 3
        assert [row["stage"] for row in resumed.history] == [row["stage"] for row in rows]
        for (name, a), b in zip(
            whole.networks[0].state_dict().items(), resumed.networks[0].state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name
    with pytest.raises(UsageError, match="another recipe"):
        train(data, tmp_path / "parts", Recipe(), earlier=Earlier(resume=True))


@pytest.mark.usefixtures("few_layers")
def test_a_limited_time_shortens_the_schedule(data, tmp_path, monkeypatch):
    now, rates, sides = [0.0], [], []
    true_loss = Trainer.loss

    def loss(self, model, batch, target, joint, side):
        now[0] += 10.0
        rates.append((joint, progress[-1]))
        sides.append(side)
        return true_loss(self, model, batch, target, joint, side)

    progress = []
    monkeypatch.setattr(module, "one_cycle", lambda x: progress.append(x) or one_cycle(x))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Trainer, "loss", loss)
    recipe = Recipe(**{**SHORT.__dict__, "sequence_epochs": 500, "small_epochs": 400, "epochs": 200})
    train(data, tmp_path, recipe, max_minutes=5.0)
    assert now[0] <= 300.0
    for joint in (False, True):
        seen = [x for stage, x in rates if stage == joint]
        assert seen[0] == 0.0
        # the last step of the schedule is one step from its end
        assert 1.0 - seen[-1] < 1.5 / len(seen)
    second = [side for (joint, _), side in zip(rates, sides, strict=True) if joint]
    # small and whole stamps take the same time: 400 half-price epochs, 200 others
    assert second == sorted(second)
    assert second.count(8) == pytest.approx(len(second) / 2, abs=2)


def test_no_progress_ends_a_stage(data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "figures", lambda *_: {"loss": 1.0, "accuracy": 0.5})
    recipe = Recipe(**{**SHORT.__dict__, "sequence_epochs": 50, "epochs": 0, "small_epochs": 0, "patience": 2})
    trained = train(data, tmp_path, Recipe(**{**recipe.__dict__, "modality": "sequence"}))
    assert len([row for row in trained.history if row["epoch"] == int(row["epoch"])]) == 3


@pytest.mark.parametrize(("modality", "precision"), [("image", "fp32"), ("sequence", "bf16")])
def test_one_modality_alone(data, tmp_path, modality, precision):
    recipe = Recipe(**{**SHORT.__dict__, "modality": modality, "class_balance": True, "precision": precision})
    trained = train(data, tmp_path, recipe)
    assert set(trained.calibrations) == {modality}
    assert trained.prior_star_fraction == recipe.prior_star_fraction
    assert {row["stage"] for row in trained.history} == {"joint" if modality == "image" else "sequence"}
    used = "bf16" if precision == "bf16" and computes_bf16() else "fp32"
    assert _recorded(tmp_path) == {used}
    assert trained.recipe["precision"] == used
    contract = export(trained, read_samples([data / "calibration" / "f0.parquet"]), "0", tmp_path / "m.pt", modality)
    assert (contract.head, contract.prior_star_fraction) == (modality, recipe.prior_star_fraction)
    draw_history(trained.history, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


SEQUENCE_BF16 = replace(SHORT, modality="sequence", precision="bf16")


def _recorded(folder):
    return {row["precision"] for row in json.loads((folder / "history.json").read_text())}


def test_a_processor_without_bf16_trains_in_fp32_and_says_so(data, tmp_path, monkeypatch, caplog):
    plain = train(data, tmp_path / "fp32", replace(SEQUENCE_BF16, precision="fp32"))
    assert plain.recipe["precision"] == "fp32"
    assert not caplog.records
    monkeypatch.setattr(trainer_module, "computes_bf16", lambda: False)
    fallen = train(data, tmp_path / "bf16", SEQUENCE_BF16)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot train in bf16" in caplog.text
    assert _recorded(tmp_path / "bf16") == {"fp32"}
    assert fallen.recipe["precision"] == "fp32"
    for name, value in plain.networks[0].state_dict().items():
        assert torch.equal(fallen.networks[0].state_dict()[name], value), name
    # the archive tells too
    few = read_samples([data / "calibration" / "f0.parquet"])
    assert export(fallen, few, "0", tmp_path / "m.pt", "sequence").training["recipe"]["precision"] == "fp32"


def test_a_training_that_went_on_elsewhere_records_both_precisions(data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "computes_bf16", lambda: False)
    train(data, tmp_path, replace(SEQUENCE_BF16, precision="fp32"))
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    # as if those epochs had run where there is bf16
    checkpoint["recipe"]["precision"] = "bf16"
    for row in checkpoint["state"]["history"]:
        row["precision"] = "bf16"
    checkpoint["state"] |= {"stage": 0, "step": 0, "cost": 0.0}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    assert train(data, tmp_path, SEQUENCE_BF16, earlier=Earlier(resume=True)).recipe["precision"] == "bf16+fp32"


def test_the_trial_of_bf16_leaves_the_random_numbers_alone():
    before = torch.random.get_rng_state()
    assert computes_bf16() in (True, False)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.thorough
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the variables are those of x86")
def test_training_in_bf16_where_there_is_no_avx512(data, tmp_path):
    sizes = ("--batch-size", "8", "--sequence-epochs", "1", "--modality", "sequence", "--precision", "bf16")
    done = subprocess.run(
        [sys.executable, "-m", "sgclassify.pipeline", "train", "--data", data, "--output", tmp_path, *sizes],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot train in bf16" in done.stderr
    assert _recorded(tmp_path) == {"fp32"}
    assert load(tmp_path / "model.pt").contract.training["recipe"]["precision"] == "fp32"


def test_a_diverged_training_ends_and_leaves_its_checkpoint(data, tmp_path, monkeypatch):
    recipe = Recipe(**{**SHORT.__dict__, "modality": "sequence"})
    train(data, tmp_path, recipe)
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", -1.0)
    true_loss = Trainer.loss

    def loss(self, *arguments):
        return true_loss(self, *arguments) * (math.inf if self.state.step == 3 else 1.0)

    monkeypatch.setattr(Trainer, "loss", loss)
    with pytest.raises(UsageError, match="diverged at step 4 of the first stage"):
        train(data, tmp_path, recipe)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["state"]["step"] == 3
    assert all(torch.isfinite(t).all() for t in kept["network"].values() if t.is_floating_point())


@pytest.mark.thorough
@pytest.mark.usefixtures("few_layers")
@pytest.mark.parametrize("architecture", ["bands", "resnet50"])
def test_another_network_answers_beside(data, tmp_path, architecture):
    other = train(data, tmp_path / "other", replace(SHORT, architecture=architecture))
    few = read_samples([data / "calibration" / "f0.parquet"])
    export(other, few, "0", tmp_path / "other.pt")
    recipe = replace(BANDS, seed=5, epochs=2)
    both = train(data, tmp_path / "both", recipe, earlier=Earlier(beside=tmp_path / "other.pt"))
    assert [n.architecture for n in both.networks] == ["bands", architecture]
    assert both.weights["fused"].shape == (6,)
    # in half precision, as the archive has it
    for name, value in other.networks[0].state_dict().items():
        torch.testing.assert_close(both.networks[1].state_dict()[name], value, rtol=1e-3, atol=1e-4)
    contract = export(both, few, "0", tmp_path / "both.pt")
    assert contract.model_id.startswith(f"fusion-bands-{architecture}-bilstm-")
    # what the archive answers is the weighted sum of all heads, calibrated
    batch = [torch.from_numpy(a.astype(np.float32)) for a in (few.image, few.sigma, few.features, few.psf)]
    image, sigma, features, psf = batch
    with torch.inference_mode():
        heads = [h for n in both.networks for h in n(image, torch.from_numpy(few.valid), sigma, features, psf)]
        total = sum(w * h for w, h in zip(both.weights["fused"], heads, strict=True))
        calibration = both.calibrations["fused"]
        expected = torch.softmax(calibration(total, calibration.brightness(features)), 1)[:, 0]
    got = load(tmp_path / "both.pt").probabilities(image.numpy(), few.valid, few.sigma, few.features, psf.numpy())
    np.testing.assert_allclose(got[:, 0], expected.numpy(), atol=2e-3)
    # one modality alone is what both networks make of it
    for k, name in enumerate(("image", "sequence"), 1):
        weights = both.weights[name]
        assert [*np.flatnonzero(weights)] in ([k], [k + 3], [k, k + 3])
        assert export(both, few, "0", tmp_path / f"{name}.pt", name).n_parameters == contract.n_parameters
    assert load(tmp_path / "image.pt").contract.model_id.startswith(f"image-bands-{architecture}-")
    # and the trained network is where another training starts
    own = started(data, tmp_path / "both", tmp_path / "both.pt", BANDS)
    torch.testing.assert_close(
        own["head.1.weight"], both.networks[0].state_dict()["head.1.weight"], rtol=1e-3, atol=1e-4
    )
    # where nothing is trained, both networks stay what they are, and are weighed and calibrated once more
    still = replace(BANDS, sequence_epochs=0, small_epochs=0, epochs=0)
    again = train(data, tmp_path / "again", still, earlier=Earlier(initial=tmp_path / "both.pt"))
    assert [n.architecture for n in again.networks] == ["bands", architecture]
    for old, new in zip(both.networks, again.networks, strict=True):
        for name, value in old.state_dict().items():
            if "running" not in name and "batches" not in name:
                torch.testing.assert_close(new.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert again.weights["fused"].shape == (6,)
    # what is given takes the place of what stood beside, with all its networks
    given = train(
        data,
        tmp_path / "given",
        still,
        earlier=Earlier(initial=tmp_path / "both.pt", beside=tmp_path / "both.pt"),
    )
    assert [n.architecture for n in given.networks] == ["bands", "bands", architecture]
    assert export(given, few, "0", tmp_path / "given.pt").model_id.startswith(f"fusion-bands-bands-{architecture}-")


@pytest.mark.usefixtures("few_layers")
def test_a_learning_curve_takes_the_first_fields(data, tmp_path):
    trainer = Trainer(data, tmp_path, SHORT, Place(0, 1, CPU), np.inf, fields=1)
    first = read_rows(sorted((data / "training").glob("*.parquet"))[:1])
    assert torch.equal(trainer.rows.image, first.image)
    assert trainer.n_rows == len(first)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_bands_that_are_absent_say_nothing(inputs, seed):
    torch.manual_seed(seed)
    network = FusionNetwork(SIZE, architecture="bands").eval()
    image, valid, sigma, _, psf = inputs(12, seed)
    with torch.inference_mode():
        expected = network.image_encoder(image, valid, sigma, psf)
        absent = ~valid.any(dim=(2, 3))
        image = torch.where(valid, image, torch.nan)
        other = network.image_encoder(image, valid, sigma, psf * (1 + absent[:, :, None, None]))
        torch.testing.assert_close(other, expected)
        # training leaves them out altogether: the same tokens, where norms do not mix the objects
        for layer in network.image_encoder.convolutions.modules():
            layer.training = False
        network.image_encoder.training = True
        torch.testing.assert_close(network.image_encoder(image, valid, sigma, psf), expected, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(expected).all()


def test_only_the_middle_is_looked_at(inputs):
    network = FusionNetwork(2 * SIZE, architecture="bands").eval()
    image, valid, sigma, _, psf = inputs(4, 1)
    wide = [torch.nn.functional.pad(t, (SIZE // 2,) * 4) for t in (image, valid, psf)]
    with torch.inference_mode():
        torch.testing.assert_close(
            network.image_encoder(wide[0], wide[1], sigma, wide[2]),
            network.image_encoder(image, valid, sigma, psf),
        )


@pytest.mark.parametrize(("prior", "balance"), [(0.1, False), (0.1, True), (0.8, False)])
def test_the_prior_is_put_in_afterwards(data, tmp_path, monkeypatch, prior, balance):
    recipe = replace(SHORT, modality="sequence", prior_star_fraction=prior, class_balance=balance)
    seen = []
    monkeypatch.setattr(
        outcome_module, "fit_calibration", lambda *a: seen.append(a) or Calibration().requires_grad_(False)
    )
    trained = train(data, tmp_path, recipe)
    rows = read_rows(sorted((data / "calibration").glob("*.parquet")))
    plain = predict(trained.networks[0], rows, CPU, SIZE, sequence_only=True)[2]
    # the odds of every object change by those of the priors
    before = 0.5 if balance else trained.counts["training_stars"] / trained.counts["training"]
    shift = math.log(prior / (1 - prior)) - math.log(before / (1 - before))
    torch.testing.assert_close(seen[0][0][:, 0], plain[:, 0] + shift)
    assert seen[0][-1] == prior
    assert float(trained.calibrations["sequence"].offset[0]) == pytest.approx(shift)
    assert trained.prior_star_fraction == prior


@pytest.mark.parametrize("pretrained", [0.0, 0.3])
def test_the_second_stage_leaves_the_sequence_alone_or_not(data, tmp_path, pretrained):
    trainer = Trainer(data, tmp_path, replace(BANDS, pretrained_rate=pretrained), Place(0, 1, CPU), np.inf)
    before = copy.deepcopy(trainer.network.state_dict())
    run_stage(trainer, True, threading.Event())
    after = trainer.network.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    learnt = {name for name, _ in trainer.network.named_parameters() if name.startswith("sequence_")}
    assert learnt <= same if pretrained == 0 else not learnt <= same
    assert "image_encoder.token.weight" not in same


def started(data, out, path, recipe=SHORT):
    """Network of a training at its start."""
    trainer = Trainer(data, out, recipe, Place(0, 1, CPU), np.inf)
    trainer.start_from(path)
    return trainer.network.state_dict()


@pytest.mark.usefixtures("few_layers")
def test_earlier_weights_are_a_start(data, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "out").mkdir()
    trained = train(data, tmp_path, Recipe(**{**SHORT.__dict__, "small_epochs": 0}))
    checkpoint = torch.load(_with_checkpoint(data, tmp_path / "kept"), weights_only=True)
    own = started(data, tmp_path / "out", tmp_path / "kept" / "checkpoint.pt")
    for name, value in checkpoint["best"].items():
        assert torch.equal(own[name], value), name
    export(trained, read_samples([data / "calibration" / "f0.parquet"]), "0", tmp_path / "model.pt")
    own = started(data, tmp_path / "out", tmp_path / "model.pt")
    for name, value in trained.networks[0].state_dict().items():
        # the archive is in half precision
        torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-4)
    # a network with fewer channels, and with another head
    checkpoint["best"][FIRST_LAYER] = checkpoint["best"][FIRST_LAYER][:, :21] + 1.0
    checkpoint["best"]["head.1.weight"] = torch.zeros(3, 3)
    torch.save(checkpoint, tmp_path / "old.pt")
    caplog.clear()
    fresh = Trainer(data, tmp_path / "out", SHORT, Place(0, 1, CPU), np.inf).network.state_dict()
    own = started(data, tmp_path / "out", tmp_path / "old.pt")
    assert torch.equal(own[FIRST_LAYER][:, :21], checkpoint["best"][FIRST_LAYER])
    for name, part in ((FIRST_LAYER, np.s_[:, 21:]), ("head.1.weight", np.s_[:])):
        assert torch.equal(own[name][part], fresh[name][part]), name
    assert "not taken: head.1.weight" in caplog.text
    for text in ("no weights", ""):
        (tmp_path / "text").write_text(text)
        with pytest.raises(UsageError, match="neither"):
            started(data, tmp_path / "out", tmp_path / "text")
    with pytest.raises(UsageError, match="no such file"):
        started(data, tmp_path / "out", tmp_path / "nope.pt")
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "foreign.pt"))
    with pytest.raises(UsageError, match="something else"):
        started(data, tmp_path / "out", tmp_path / "foreign.pt")


@pytest.mark.usefixtures("few_layers")
def test_without_an_epoch_the_networks_stay_as_they_are(data, tmp_path):
    path = _with_checkpoint(data, tmp_path / "kept")
    still = replace(SHORT, sequence_epochs=0, small_epochs=0, epochs=0)
    trained = train(data, tmp_path / "out", still, earlier=Earlier(initial=path))
    before = torch.load(path, weights_only=True)["best"]
    for name, value in trained.networks[0].state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("part", ["training", "validation", "calibration"])
def test_a_part_of_one_class_is_refused_before_the_training(data, tmp_path, arrays_of, part):
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data" / part).glob("*.parquet"):
        write_shard(path, pa.table({"true_class": ["galaxy"] * 30}), arrays_of(30, 1))
    with pytest.raises(UsageError, match=f"{part}: no star"):
        Trainer(tmp_path / "data", tmp_path, SHORT, Place(0, 1, CPU), np.inf)


def test_what_is_not_there_or_damaged_is_said_before_the_training(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    arguments = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    (tmp_path / "data" / "training" / "f0.parquet").write_bytes(b"PAR1")
    done = CliRunner().invoke(train_command, arguments)
    assert done.exit_code == 1
    assert "f0.parquet" in done.output
    assert "not a shard" in done.output
    (tmp_path / "data" / "manifest.json").unlink()
    done = CliRunner().invoke(train_command, arguments)
    assert done.exit_code == 2
    assert "manifest.json" in done.output
    assert "sgclassify dataset" in done.output


def test_devices_that_are_not_here_are_refused(data, tmp_path):
    for device, fault in (("gpu", "cpu or cuda"), ("cuda", "no GPU")):
        if device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(UsageError, match=fault):
            train(data, tmp_path, SHORT, device=device)


def _with_checkpoint(data, out):
    """Checkpoint that the end of the time writes."""
    out.mkdir()
    trainer = Trainer(data, out, SHORT, Place(0, 1, CPU), np.inf)
    trainer.save(trainer.optimizer(True))
    return out / "checkpoint.pt"


@pytest.mark.thorough
@pytest.mark.slow
def test_two_processes_train_one_model(data, tmp_path):
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--no-python", str(Path(sys.executable).with_name("sgclassify")), "train", "--data", str(data),
        "--output", str(tmp_path), "--sequence-epochs", "1", "--small-epochs", "0", "--epochs", "1",
        "--batch-size", "8", "--max-minutes", "5",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("model.pt", "image.pt", "sequence.pt", "curves.png"):
        assert (tmp_path / name).is_file()
    rows = json.loads((tmp_path / "history.json").read_text())
    assert {row["stage"] for row in rows} == {"sequence", "joint", "weighted"}
    assert "2 processes" in done.stderr or "training on" in done.stderr
