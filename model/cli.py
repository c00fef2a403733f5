"""Commands for the person who retrains the model: dataset, train, evaluate."""

from __future__ import annotations

import itertools
import json
import logging
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sgclassify.stages.errors import SgClassifyError

if TYPE_CHECKING:
    import pyarrow as pa

    from sgclassify.model.judge.results import Evaluation

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
SHARE = click.FloatRange(0, 1, min_open=True, max_open=True)
RATE = click.FloatRange(0, min_open=True)
FILLED = click.option("--data", type=FOLDER, required=True, help="Folder that `sgclassify dataset` filled.")
PRIOR = click.option(
    "--prior-star-fraction",
    "prior",
    type=SHARE,
    help="With --data: share of stars to assume, say that of the data  [default: the model's own prior]",
)
MODELS = click.option(
    "--model",
    "given",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Model archive that scores --data [default: the shipped one]. NAME=FILE adds another one, say of an ablation."
    " Repeatable.",
)


def _log() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


def _edges(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(e) for e in text.split(","))
    except ValueError:
        found = ()
    if len(found) < 2 or not all(a < b for a, b in itertools.pairwise(found)):
        raise click.UsageError(f"--edges must be two or more rising numbers, not {text}")
    return found


def _models(given: tuple[str, ...], taken: tuple[str, ...] = ()) -> dict[str, Path | None]:
    """Archives of ``--model [NAME=]FILE``; None is the shipped model."""
    models: dict[str, Path | None] = {"model": None}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not name.isidentifier():
            name, path = "model", text
        elif name in ("model", "star", "galaxy", *taken):
            raise click.UsageError(f"--model {text}: the name {name} is taken")
        if models.get(name) is not None or not path:
            raise click.UsageError(f"--model {text}: give one archive without a name, and others as NAME=FILE")
        models[name] = Path(path)
    return models


@click.command("dataset")
@click.option("--output", type=FOLDER, required=True, help="Folder for the shards and the manifest.")
@click.option("--fields", type=click.IntRange(1), default=60, show_default=True, help="Fields to simulate.")
@click.option("--shifted", type=click.IntRange(0), default=0, show_default=True, help="Fields of the shifted test set.")
@click.option(
    "--first", type=click.IntRange(0), default=0, show_default=True, help="Leave out the fields before this one."
)
@click.option("--seed", type=click.IntRange(0), default=20260, show_default=True)
@click.option("--stamp-size", type=click.IntRange(8, 512), default=32, show_default=True, help="Pixels.")
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True)
def dataset(output: Path, fields: int, shifted: int, first: int, seed: int, stamp_size: int, processes: int) -> None:
    """Make training data: simulated exposures taken through the stages of a run, matched to truth.

    Continues where it stopped. A smaller set is a prefix of a larger one.
    """
    if first >= fields:
        raise click.UsageError(f"--first {first} leaves nothing of --fields {fields}")
    from sgclassify.model.data.dataset import make_dataset

    _log()
    log = logging.getLogger("sgclassify.dataset")
    try:
        manifest = make_dataset(
            output, fields, seed, stamp_size, processes, shifted,
            lambda done, total: log.info("field %d of %d", done, total), first,
        )  # fmt: skip
    except (SgClassifyError, OSError) as error:
        raise click.ClickException(str(error)) from error
    counts = [shard["counts"] for shard in manifest["shards"].values()]
    for name in ("star", "galaxy", "qso", "spurious"):
        click.echo(f"{name:>9} {sum(c[name] for c in counts):>8}")


@click.command("train")
@FILLED
@click.option("--output", type=FOLDER, required=True, help="Folder for the checkpoint, the history and the models.")
@click.option("--sequence-epochs", type=click.IntRange(0), help="Passes of the sequence alone.")
@click.option("--small-epochs", type=click.IntRange(0), help="Passes with small stamps.")
@click.option("--epochs", type=click.IntRange(0), help="Passes with whole stamps.")
@click.option("--batch-size", type=click.IntRange(2))
@click.option("--architecture", type=click.Choice(("bands", "resnet50")), help="Image encoder.")
@click.option("--modality", type=click.Choice(("fused", "image", "sequence")))
@click.option("--augmentation/--no-augmentation", default=None, help="Turn, shift and mask stamps, and add noise.")
@click.option("--class-balance/--no-class-balance", default=None, help="Give both classes the same weight in training.")
@click.option("--prior-star-fraction", type=SHARE, help="Share of stars that the probabilities assume.")
@click.option("--learning-rate", type=RATE, help="Peak rate of the second stage.")
@click.option("--sequence-learning-rate", type=RATE, help="Peak rate of the first stage.")
@click.option("--precision", type=click.Choice(("auto", "fp32", "bf16")))
@click.option("--seed", type=click.IntRange(0))
@click.option(
    "--initial", type=FILE, help="Checkpoint or archive to start from, with the networks that stand beside it there."
)
@click.option("--beside", type=FILE, help="Checkpoint or archive whose networks answer together with the trained one.")
@click.option(
    "--training-fields", "fields", type=click.IntRange(1), help="Train on this many fields only, the first ones."
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda; several processes by torchrun.")
@click.option(
    "--max-minutes", type=float, default=math.inf, help="Shorten the passes so that training ends in this time."
)
@click.option("--resume", is_flag=True, help="Continue from the checkpoint.")
def train(data: Path, output: Path, device: str, max_minutes: float, fields: int | None, **options: Any) -> None:
    """Train a model, calibrate it, and export it as OUTPUT/model.pt, its parts alone as image.pt and sequence.pt."""
    manifest = data / "manifest.json"
    if not manifest.is_file():
        raise click.UsageError(f"{manifest} is not there; `sgclassify dataset` writes it when it is complete")
    from sgclassify.model.data.shards import read_samples
    from sgclassify.model.train.loop import Earlier
    from sgclassify.model.train.loop import train as run_training
    from sgclassify.model.train.outcome import draw_history, export
    from sgclassify.model.train.recipe import Recipe
    from sgclassify.stages.columns import CLASSES
    from sgclassify.stages.read.checksum import sha256_of

    _log()
    earlier = Earlier(**{name: options.pop(name) for name in ("resume", "initial", "beside")})
    chosen = replace(Recipe(), **{name: value for name, value in options.items() if value is not None})
    try:
        training_set = sha256_of(manifest)
        trained = run_training(
            data, output, chosen, device=device, max_minutes=max_minutes, fields=fields, earlier=earlier
        )
    except (SgClassifyError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if trained is None:
        return
    sample = read_samples(sorted((data / "calibration").glob("*.parquet"))[:3], CLASSES)
    heads = ("fused", "image", "sequence") if chosen.modality == "fused" else (chosen.modality,)
    for name in heads:
        path = output / ("model.pt" if name == chosen.modality else f"{name}.pt")
        contract = export(trained, sample, training_set, path, name)
        click.echo(f"{path}: {contract.model_id}, temperature {contract.temperature:.3f}")
    draw_history(trained.history, output / "curves.png")


@click.command("cascade")
@FILLED
@click.option("--model", type=FILE, help="Model archive.  [default: the shipped one]")
@click.option("--output", type=FILE, required=True, help="Archive to write.")
def cascade(data: Path, model: Path | None, output: Path) -> None:
    """Let a model answer in stages: fit when each is certain on the calibration fields, and write the archive anew.

    The networks and the answers of the whole model stay what they are. `sgclassify train` does the same at its end.
    """
    from sgclassify.model.data.rows import read_rows
    from sgclassify.model.data.shards import read_samples
    from sgclassify.model.serve.archive import default_model
    from sgclassify.model.train.outcome import export, with_cascade
    from sgclassify.stages.columns import CLASSES

    _log()
    paths = sorted((data / "calibration").glob("*.parquet"))
    try:
        trained, contract = with_cascade(model or default_model(), read_rows(paths))
        made = export(trained, read_samples(paths[:3], CLASSES), contract.training_set_id, output)
    except (SgClassifyError, OSError) as error:
        raise click.ClickException(str(error)) from error
    assert made.cascade is not None
    click.echo(f"{output}: {made.model_id}")
    click.echo(json.dumps(made.cascade.figures, indent=1))


@click.command("evaluate")
@click.option("--run", "run_dir", type=FOLDER, help="Output folder of `sgclassify run`; with --truth.")
@click.option(
    "--truth",
    type=FILE,
    help="Truth table of the field, with ra, dec (degrees) and true_class: Parquet, FITS, VOTable, ECSV, CSV.",
)
@click.option("--data", type=FOLDER, help="Instead of a run: folder that `sgclassify dataset` filled.")
@click.option(
    "--part",
    type=click.Choice(("validation", "calibration", "test", "shifted", "all")),
    default="validation",
    show_default=True,
    help="Fields of --data. Use `all` (without the shifted ones) for data that the model was not trained on.",
)
@MODELS
@click.option("--table", type=FILE, help="Instead: any table with p_star and true_class, in one of these formats.")
@click.option("--band", default="i", show_default=True, help="Band of the magnitudes.")
@click.option("--edges", default="18,20,22,24,26", show_default=True, help="Edges of the magnitude bins.")
@click.option("--unblended", is_flag=True, help="Leave out blended objects.")
@click.option("--paper", is_flag=True, help="Only objects like the paper's: SNR in i of at least 10, unblended.")
@click.option("--min-snr", type=float, help="Only objects whose SNR reaches this in some band.")
@click.option("--bands", is_flag=True, help="With --data: also judge with bands hidden.")
@PRIOR
@click.option("--exact", is_flag=True, help="With --data: ask the whole model about every object.")
@click.option("--symmetries", is_flag=True, help="With --data: also judge with stamps turned and mirrored.")
@click.option("--json", "json_path", type=FILE, help="Write all figures here.")
@click.option("--report", type=FILE, help="Write a page with plots and, with --data, the worst mistakes.")
def evaluate(**options: Any) -> None:
    """Compare probabilities with truth: recall, ranking and calibration, with 95 % intervals, by magnitude and more."""
    asked = _Evaluate(**options)
    edges, models = _edges(asked.edges), _models(asked.given)
    asked.check()
    # imported here: it takes seconds, and wrong usage should fail at once
    from sgclassify.model.judge import results, robustness
    from sgclassify.model.judge.evaluate import evaluate as judge

    model = models.pop("model")
    try:
        scores = asked.scores(model, models)
        others = [name for name in scores.column_names if name.startswith("mag_")]
        chosen = click.get_current_context().get_parameter_source("band") is not ParameterSource.DEFAULT
        if chosen and others and f"mag_{asked.band}" not in others:
            raise click.UsageError(f"--band {asked.band}: no column mag_{asked.band}; there are {', '.join(others)}")
        result = judge(scores, asked.band, edges, asked.unblended, asked.paper, asked.min_snr)
        again = None if asked.data is None else (asked.data, asked.part, model, asked.prior)
        if again and asked.bands:
            result = replace(result, bands=robustness.by_bands(*again, exact=asked.exact))
        if again and asked.symmetries:
            result = replace(result, symmetries=robustness.by_symmetry(*again))
    except (SgClassifyError, ValueError, OSError, KeyError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(results.as_text(result))
    if result.bands is not None:
        click.echo(results.bands_as_text(result.bands))
    if result.symmetries is not None:
        click.echo(results.symmetry_as_text(result.symmetries))
    try:
        asked.write(result, scores)
    except OSError as error:
        raise click.ClickException(str(error)) from error


@dataclass(frozen=True)
class _Evaluate:
    """Options of ``sgclassify evaluate``."""

    run_dir: Path | None
    truth: Path | None
    data: Path | None
    part: str
    given: tuple[str, ...]
    table: Path | None
    band: str
    edges: str
    unblended: bool
    paper: bool
    min_snr: float | None
    bands: bool
    prior: float | None
    symmetries: bool
    exact: bool
    json_path: Path | None
    report: Path | None

    def check(self) -> None:
        """Refuse options that do not go together, and paths that do not exist."""
        of_run = self.run_dir is not None and self.truth is not None
        of_data = self.bands or self.symmetries or self.exact or self.prior is not None or self.given
        if (
            sum((of_run, self.data is not None, self.table is not None)) != 1
            or (self.run_dir is None) != (self.truth is None)
            or (of_data and self.data is None)
        ):
            raise click.UsageError(
                "give --run and --truth, or --data, or --table;"
                " --model, --bands, --symmetries, --exact and --prior-star-fraction go with --data"
            )
        for path in (self.run_dir, self.truth, self.data, self.table):
            if path is not None and not path.exists():
                raise click.UsageError(f"{path} does not exist")

    def scores(self, model: Path | None, others: dict[str, Path | None]) -> pa.Table:
        """The scored objects, beside their truth."""
        from sgclassify.model.judge.scores import read_scores, scores_of_part, scores_of_run

        if self.data is not None:
            return scores_of_part(self.data, self.part, model, self.prior, others, self.exact)
        if self.table is not None:
            return read_scores(self.table)
        assert self.run_dir is not None
        assert self.truth is not None
        return scores_of_run(self.run_dir, self.truth)

    def write(self, result: Evaluation, scores: pa.Table) -> None:
        """Write the figures and the page, where they are asked for."""
        if self.json_path is not None:
            from sgclassify.model.judge.results import plain
            from sgclassify.stages.write.atomic import write_atomic_text

            write_atomic_text(json.dumps(plain(result), indent=1) + "\n", self.json_path)
        if self.report is not None:
            from sgclassify.model.judge.evaluate import Judged
            from sgclassify.model.judge.page import gallery, write_page

            keep = Judged(scores, self.band).kept(replace(result.sample.selection, unblended=True))
            stamps = None if self.data is None else gallery(self.data, self.part, scores, keep)
            title = f"Evaluation of {self.data or self.run_dir or self.table}"
            write_page(self.report, title, result, scores, stamps)


@click.command("baselines")
@FILLED
@click.option(
    "--part",
    type=click.Choice(("validation", "test", "shifted", "all")),
    default="test",
    show_default=True,
    help="Fields of --data. Use `all` (without the shifted ones) for data that nothing here was trained on.",
)
@click.option(
    "--training", type=FOLDER, help="Data set whose training fields the methods are fitted to.  [default: --data]"
)
@MODELS
@PRIOR
@click.option("--found-only", is_flag=True, help="Leave out objects that SExtractor did not find.")
@click.option(
    "--oracle",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Objects to judge also by an oracle that knows the true PSF, a few per second.",
)
@click.option("--output", type=FILE, required=True, help="Table (Parquet) for `sgclassify evaluate --table`.")
def baselines(
    data: Path, part: str, training: Path | None, given: tuple[str, ...],
    found_only: bool, oracle: int, output: Path, prior: float | None,
) -> None:  # fmt: skip
    """Score the same objects by classical methods: CLASS_STAR, SPREAD_MODEL, concentration, boosted trees.

    An object without a value for a method gets the prior. Prints the coverage of each method.
    """
    _models(given)  # wrong usage fails before the slow imports
    import pyarrow.parquet as pq

    from sgclassify.model.judge.baselines import METHODS, ORACLE, as_text, score_part
    from sgclassify.stages.write.atomic import atomic_path

    models = _models(given, taken=(ORACLE, *METHODS))
    try:
        table, summaries = score_part(data, part, models, found_only, oracle, prior, training)
        with atomic_path(output) as part_path:
            pq.write_table(table, part_path)
    except (SgClassifyError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{output}: {table.num_rows} objects")
    click.echo(as_text(summaries))
