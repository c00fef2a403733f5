"""The command ``sgclassify``."""

from __future__ import annotations

import importlib
import json
import logging
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import click

from sgclassify.pipeline import surroundings
from sgclassify.pipeline.config import DEVICES, RunConfig
from sgclassify.pipeline.streams import lenient
from sgclassify.stages.errors import ExitCode, SgClassifyError
from sgclassify.stages.settings import declared

if TYPE_CHECKING:
    from sgclassify.pipeline.record.record import RunRecord

log = logging.getLogger(__name__)

_MODEL_CLI: Final = "sgclassify.model.cli"

LAZY: Final[Mapping[str, tuple[str, str, str]]] = {
    "simulate": ("sgclassify.simulation.cli", "simulate", "Simulate Level-1 exposures with truth."),
    "dataset": (_MODEL_CLI, "dataset", "Make training data from simulated exposures."),
    "train": (_MODEL_CLI, "train", "Train the model."),
    "cascade": (_MODEL_CLI, "cascade", "Let a model answer in stages."),
    "baselines": (_MODEL_CLI, "baselines", "Score a part of a data set by classical methods."),
    "evaluate": (_MODEL_CLI, "evaluate", "Compare the products of a run with the truth."),
}
"""Commands of the other packages: module, attribute, help. They are imported when they are called."""

_WRITING: Final = ("run", "simulate", "dataset", "train", "cascade", "baselines")
"""Commands whose result is files; the result of the others is what they print."""
_DRY: Final = "sgclassify.dry"

_SETTINGS: Final = {setting.name: setting for setting in declared(RunConfig)}

_EXTRA: Final = {"sgclassify.simulation.cli": "simulate", _MODEL_CLI: "train"}


class _Group(click.Group):
    """A group that imports the commands of other packages when they are called."""

    _written = False

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command; if standard output cannot be written, say so at the end."""
        self._written = False
        surroundings.have_home()
        with lenient() as output:
            try:
                return super().main(*args, **extra)
            except SystemExit as end:
                failure = output.failure()
                if failure is None:
                    raise
                click.echo(f"standard output cannot be written: {failure.strerror}", err=True)
                # the files that were written count, and so does an earlier fault
                raise SystemExit(end.code if self._written or end.code else 1) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that the arguments name."""
        try:
            return super().invoke(ctx)
        finally:
            self._written = ctx.invoked_subcommand in _WRITING and not ctx.meta.get(_DRY, False)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *LAZY]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in LAZY:
            return super().get_command(ctx, cmd_name)
        module, attribute, _ = LAZY[cmd_name]
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise click.UsageError(
                f"'{cmd_name}' needs {error.name}, which is not installed; "
                f"install sgclassify with the extra '{_EXTRA[module]}'"
            ) from error
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}.{attribute} is no click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Help must not import what may not be installed.
        own = [(name, command.get_short_help_str()) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl([*own, *((name, text) for name, (_, _, text) in LAZY.items())])


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(metadata.version("sgclassify"), prog_name="sgclassify")
def main() -> None:
    """Star/galaxy classification of CSST survey exposures."""


@main.command(epilog="Exit status: " + "; ".join(f"{code} {code.meaning}" for code in ExitCode) + ".")
@click.option(
    "--exposure-list",
    required=True,
    type=click.Path(path_type=Path),
    help="Text file with an IMG file or a folder per line, or a CSV file with a header.",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the products.")
@click.option("--model", type=click.Path(path_type=Path), help="Model archive. [default: the shipped one]")
@click.option("--scheduler", help="Address of a Dask scheduler, tcp:// or tls://. [default: a cluster on this machine]")
@click.option(
    "--scheduler-file",
    type=click.Path(path_type=Path),
    help="JSON file that a Dask scheduler wrote its address into, instead of --scheduler.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 4096),
    help="Worker processes [default: one per core]; with --scheduler, workers to wait for [default: 1].",
)
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    help=f"{_SETTINGS['device'].meaning} {_SETTINGS['device'].reason} [default: as configured]",
)
@click.option("--config", type=click.Path(path_type=Path), help="TOML file with settings.")
@click.option(
    "--prior-star-fraction",
    "prior",
    help="Share of stars that the probabilities assume: a number, or a CSV or Parquet table by magnitude."
    " [default: the model's own]",
)
@click.option("--tta", is_flag=True, help=f"{_SETTINGS['tta'].meaning} {_SETTINGS['tta'].reason}")
@click.option("--exact", is_flag=True, help=f"{_SETTINGS['exact'].meaning} {_SETTINGS['exact'].reason}")
@click.option("--overwrite", is_flag=True, help="Replace the products of a run with other inputs or settings.")
@click.option("--keep-work", is_flag=True, help="Keep the work folder of a finished run.")
@click.option("--dry-run", is_flag=True, help="Print what the run would do; write nothing.")
@click.option(
    "--verify-inputs",
    is_flag=True,
    help="Compare inputs with those of an earlier run by checksum, not only by size and time.",
)
@click.option(
    "--metrics-file",
    type=click.Path(path_type=Path),
    help="Write metrics into this file, for the textfile collector of Prometheus' node exporter.",
)
@click.option("--log-format", type=click.Choice(("text", "json")), default="text", show_default=True)
def run(dry_run: bool, log_format: str, **options: Any) -> None:
    """Classify the sources of a list of exposures.

    The same command again continues from what is complete. Exposures that were appended to the list add the tiles
    that they touch.
    """
    from sgclassify.pipeline.cluster import forks
    from sgclassify.pipeline.progress import reporting
    from sgclassify.pipeline.request import Options, check

    click.get_current_context().meta[_DRY] = dry_run
    given = Options(**options, command=("sgclassify", *sys.argv[1:]))
    with reporting(log_format) as reporter, _terminable():
        try:
            request = check(given, dry=dry_run)
            if not request.folder().has_products:
                # workers get ready while this process does; a run that continues may not need any
                if given.own_cluster and not dry_run:
                    forks.start()
                surroundings.import_dask()
            # Imported here: it takes seconds, which --help and wrong usage need not wait for.
            from sgclassify.pipeline.run import plan
            from sgclassify.pipeline.run import run as carry_out

            if dry_run:
                click.echo(plan(request, reporter))
                return
            record = carry_out(request, reporter)
        except SgClassifyError as error:
            log.error("%s", error, extra={"exit_code": error.exit_code})
            sys.exit(error.exit_code)
        except OSError as error:
            log.exception("the system refused: %s", error)
            sys.exit(ExitCode.DEFECT)
        except Exception:
            log.exception("a defect in the program; please report it with the lines below")
            sys.exit(ExitCode.DEFECT)
    click.echo(summary(record))
    sys.exit(record.exit_code)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(folder: Path, as_json: bool) -> None:
    """Say what the run in an output FOLDER is doing, or how far it came."""
    from sgclassify.pipeline.record.status import describe, read_status

    try:
        found = read_status(folder)
    except SgClassifyError as error:
        raise click.UsageError(str(error)) from error
    click.echo(json.dumps(found, indent=1) if as_json else describe(found))


def summary(record: RunRecord) -> str:
    """The table at the end of a run."""
    from sgclassify.pipeline.record.record import pending

    n = record.counts()
    waiting = pending(n)
    rows = (
        ("exposures", f"{n['exposures_done']} done"),
        ("", f"{n['exposures_set_aside']} set aside"),
        ("", f"{n['exposures_skipped']} skipped"),
        ("tiles", f"{n['tiles_done']} done, {n['tiles_set_aside']} set aside"),
        *([("", f"{n['tiles_reused']} of an earlier run")] if n["tiles_reused"] else []),
        *([("pending", f"{waiting}: run the same command again")] if waiting else []),
        ("objects", f"{n['objects']}"),
        ("stars", f"{n['stars']}"),
        ("galaxies", f"{n['galaxies']}"),
        ("not scored", f"{n['not_scored']}"),
        ("time", f"{sum(record.timings.values()):.1f} s"),
        ("products", f"{record.output}"),
    )
    return "\n".join(f"{name:<12}{text}" for name, text in rows)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let signals end the run in order: the workers end, the lock is released, the exit status is 128 + signal."""
    ends: list[SystemExit] = []

    def end(signum: int, frame: FrameType | None) -> None:
        # the alarm stands for the signal that came first
        ends.append(SystemExit(ends[0].code if ends else 128 + signum))
        raise ends[-1]

    def ignored(unraisable: sys.UnraisableHookArgs) -> None:
        # Python ignores what is raised in finalisers and callbacks of the garbage collector: raise it again soon
        if any(unraisable.exc_value is one for one in ends):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            hook(unraisable)

    hook, sys.unraisablehook = sys.unraisablehook, ignored
    signals = [signal.SIGTERM, signal.SIGINT, signal.SIGALRM]
    # under nohup, a terminal that closes ends nothing
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in signals}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
