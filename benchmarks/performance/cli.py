"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from performance import parts, runs
from performance.bench import Bench, MeasurementError, say
from performance.codes import ROOT, code_of, commit_of, this_code
from performance.figures import RATIOS, Results, heading, table
from performance.inputs import FIELDS
from performance.machine import describe
from performance.survey import Survey, report

BASELINE = "457b371"
"""The commit that the aims of speed refer to."""

PAGE = ROOT / "docs" / "performance.md"
"""The page that has the table and the cost of the survey, between markers."""

HISTORY = ROOT / "benchmarks" / "history"

COMMANDS = {
    "table": "print the table of a file",
    "survey": "print what the whole survey costs",
    "page": "put both into docs/performance.md",
}
"""What can be done with the results in a file."""

GROUPS: dict[str, Callable[[Bench], None]] = {
    "ceilings": parts.ceilings,
    "end-to-end": runs.end_to_end,
    "start": runs.start,
    "stages": parts.stages,
    "naive": parts.naive,
    "network": parts.network,
    "scaling": runs.scaling,
    "scheduler": parts.scheduler,
    "plan": parts.plan,
    "gpu": parts.gpu,
    "incumbent": parts.incumbent,
}
"""What can be measured, in the order in which it is."""


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    top = argparse.ArgumentParser(prog="bench.py", description="Measure what a run costs, part by part.")
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, print the table, write the JSON")
    run.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)} [default: all]")
    run.add_argument("--quick", action="store_true", help="small inputs, once: to see that everything works")
    run.add_argument("--large", action="store_true", help="full-size detectors too: 6 GB, half an hour")
    run.add_argument("--repeat", type=int, help="measurements of each figure; the median counts [default: 5; quick: 1]")
    run.add_argument("--workers", type=int, default=2, help="workers of a run [default: 2]")
    run.add_argument("--against", metavar="COMMIT", nargs="?", const=BASELINE,
                     help=f"measure another commit in turns with this code [without a name: {BASELINE}]")  # fmt: skip
    run.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sgclassify-bench",
                     help="where the inputs are kept [default: %(default)s]")  # fmt: skip
    run.add_argument("--json", type=Path, help="file for the results; one that exists is added to "
                     "[default: benchmarks/history/VERSION.json; quick: quick.json in the folder]")  # fmt: skip
    for name, text in COMMANDS.items():
        one = commands.add_parser(name, help=text)
        one.add_argument("json", type=Path, nargs="?", default=None)
        if name != "table":
            one.add_argument("--cores", type=int, default=Survey.cores)
            one.add_argument("--read-gb-s", type=float, default=Survey.read_gb_s)
    inputs = commands.add_parser("inputs", help="simulate inputs only")
    inputs.add_argument("names", nargs="*", metavar="FIELD", help=f"of {', '.join(FIELDS)}")
    inputs.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sgclassify-bench")
    return top


def with_block(page: str, name: str, text: str) -> str:
    """A page with another text between the markers of a name."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    head, found, rest = page.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"the page has no markers of {name}")
    return f"{head}{begin}\n{text}\n\n{rest[rest.index(end) :]}"


def write_page(results: Results, survey: Survey, page: Path = PAGE) -> None:
    """Put the table and the cost of the survey into a page."""
    about = "Measured with: " + "; ".join(heading(results.about).splitlines()) + "."
    text = with_block(page.read_text(encoding="utf-8"), "figures", f"{about}\n\n{table(results)}")
    page.write_text(with_block(text, "survey", report(results, survey)), encoding="utf-8")


def released() -> Path:
    """The JSON of this version."""
    return HISTORY / f"{version('sgclassify')}.json"


def about(options: dict[str, Any]) -> dict[str, Any]:
    """Where and how this benchmark is measured."""
    return {
        "version": version("sgclassify"),
        "commit": commit_of(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": describe(),
        "options": options,
    }


def measure(arguments: argparse.Namespace) -> int:
    """Measure the groups that were asked for; 1 if a measurement failed."""
    unknown = sorted(set(arguments.groups) - set(GROUPS))
    if unknown:
        sys.exit(f"no such group: {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    repeat = arguments.repeat or (1 if arguments.quick else 5)
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = arguments.json or (folder / "quick.json" if arguments.quick else released())
    options = {"repeat": repeat, "workers": arguments.workers, "against": arguments.against or "nothing"}
    results = Results(about(options | {"quick": arguments.quick}))
    if path.is_file():
        results.figures = Results.read(path).figures
    codes = [this_code()]
    if arguments.against:
        codes.append(code_of(arguments.against, folder))
    bench = Bench(
        results, folder, repeat, arguments.quick, arguments.large, arguments.workers, codes, lambda: results.write(path)
    )
    failed = 0
    wanted = arguments.groups or list(GROUPS)
    # what is measured again goes, with the ratios that rest on it
    results.figures = [
        one for one in results.figures
        if one.group not in wanted and not (one.group == RATIOS and one.case.partition(":")[0] in wanted)
    ]  # fmt: skip
    for name in wanted:
        try:
            GROUPS[name](bench)
        except MeasurementError as error:
            failed = 1
            say(f"{name}: {error}")
            results.skip(name, "all", str(error))
            bench.save()
    shutil.rmtree(bench.work, ignore_errors=True)
    print(heading(results.about), table(results), sep="\n\n")
    say(f"{path}, load of the machine {os.getloadavg()[0]:.1f}")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit status."""
    arguments = parser().parse_args(argv)
    if arguments.command == "run":
        return measure(arguments)
    if arguments.command == "inputs":
        bench = Bench(Results({}), arguments.folder.absolute())
        for name in arguments.names or FIELDS:
            print(bench.input(name))
        return 0
    results = Results.read(arguments.json or released())
    if arguments.command == "table":
        print(heading(results.about), table(results), sep="\n\n")
        return 0
    survey = Survey(cores=arguments.cores, read_gb_s=arguments.read_gb_s)
    if arguments.command == "survey":
        print(report(results, survey))
    else:
        write_page(results, survey)
    return 0
