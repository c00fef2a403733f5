"""Commands for the person who retrains the model: dataset, train, evaluate."""

from __future__ import annotations

import json
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path

import click

from sgclassify.stages.errors import SgClassifyError

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


def _log() -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )


@click.command("dataset")
@click.option("--output", type=FOLDER, required=True, help="Folder for the shards and the manifest.")
@click.option("--fields", type=click.IntRange(1), default=60, show_default=True, help="Fields to simulate.")
@click.option(
    "--shifted", type=click.IntRange(0), default=0, show_default=True, help="Fields of the shifted test set."
)
@click.option("--seed", type=int, default=20260, show_default=True)
@click.option("--stamp-size", type=click.IntRange(8, 512), default=32, show_default=True, help="Pixels.")
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True)
def dataset(output: Path, fields: int, shifted: int, seed: int, stamp_size: int, processes: int) -> None:
    """Make training data: simulated exposures taken through the stages of a run, matched to truth.

    Goes on where it stopped. A smaller set is a prefix of a larger one.
    """
    from sgclassify.model.dataset import make_dataset

    _log()
    log = logging.getLogger("sgclassify.dataset")
    try:
        manifest = make_dataset(
            output,
            fields,
            seed,
            stamp_size,
            processes,
            shifted,
            lambda done, total: log.info("field %d of %d", done, total),
        )
    except (SgClassifyError, OSError) as error:
        raise click.ClickException(str(error)) from error
    counts = [shard["counts"] for shard in manifest["shards"].values()]
    for name in ("star", "galaxy", "qso", "spurious"):
        click.echo(f"{name:>9} {sum(c[name] for c in counts):>8}")


@click.command("train")
@click.option("--data", type=FOLDER, required=True, help="Folder that `sgclassify dataset` filled.")
@click.option(
    "--output", type=FOLDER, required=True, help="Folder for the checkpoint, the history and the model."
)
@click.option("--epochs", type=click.IntRange(1), default=8, show_default=True)
@click.option("--batch-size", type=click.IntRange(2), default=96, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--max-minutes", type=float, default=math.inf, help="Stop after the epoch that passes this time."
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoint.")
def train(
    data: Path, output: Path, epochs: int, batch_size: int, device: str, max_minutes: float, resume: bool
) -> None:
    """Train a model, calibrate it, and export it as OUTPUT/model.pt."""
    from sgclassify.model.dataset import read_samples
    from sgclassify.model.export import export
    from sgclassify.model.runtime import sha256_of
    from sgclassify.model.train import Recipe, usable
    from sgclassify.model.train import train as run_training

    _log()
    recipe = replace(Recipe(), epochs=epochs, batch_size=batch_size)
    trained = run_training(data, output, recipe, device=device, resume=resume, max_minutes=max_minutes)
    sample = read_samples(sorted((data / "calibration").glob("*.parquet")))
    contract = export(
        trained, sample.take(usable(sample)), sha256_of(data / "manifest.json"), output / "model.pt"
    )
    (output / "history.json").write_text(json.dumps(trained.history, indent=1))
    click.echo(f"{output / 'model.pt'}: {contract.model_id}, temperature {contract.temperature:.3f}")


@click.command("evaluate")
@click.option("--run", "run_dir", type=FOLDER, help="Output folder of `sgclassify run`; with --truth.")
@click.option("--truth", type=FILE, help="Truth table (Parquet) of the field.")
@click.option("--data", type=FOLDER, help="Instead of a run: folder that `sgclassify dataset` filled.")
@click.option(
    "--part",
    type=click.Choice(("validation", "calibration", "test")),
    default="validation",
    show_default=True,
)
@click.option("--model", type=FILE, help="Model archive to score --data with. [default: the shipped one]")
@click.option("--band", default="i", show_default=True, help="Band of the magnitudes.")
@click.option("--edges", default="18,20,22,24,26", show_default=True, help="Edges of the magnitude bins.")
@click.option("--unblended", is_flag=True, help="Leave out blended objects.")
@click.option("--json", "json_path", type=FILE, help="Write the figures here as well.")
def evaluate(
    run_dir: Path | None,
    truth: Path | None,
    data: Path | None,
    part: str,
    model: Path | None,
    band: str,
    edges: str,
    unblended: bool,
    json_path: Path | None,
) -> None:
    """Compare probabilities with truth: recall of stars and galaxies with 95 % intervals, by magnitude."""
    from sgclassify.model.evaluate import as_text, evaluate_part
    from sgclassify.model.evaluate import evaluate as evaluate_run

    try:
        bins = tuple(float(e) for e in edges.split(","))
        if data is not None and run_dir is None and truth is None:
            rows = evaluate_part(data, part, model, band, bins, unblended)
        elif data is None and run_dir is not None and truth is not None:
            rows = evaluate_run(run_dir, truth, band, bins, unblended)
        else:
            raise click.UsageError("give --run and --truth, or --data")
    except (SgClassifyError, ValueError, OSError, KeyError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(as_text(rows))
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1))
