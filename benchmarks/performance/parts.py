"""The parts alone: stages, network, ceilings, scheduler, plan, and what the product is compared with."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import threading
from collections import defaultdict
from typing import Any

from performance.bench import ONE_THREAD, Bench, MeasurementError, last_line, say
from performance.codes import python
from performance.figures import RATIOS, speedups
from performance.headers import simulate
from performance.inputs import files_of
from performance.process import Usage, run
from performance.runs import END_TO_END, knows

PRODUCT = "matrix product"
"""As `performance.forward` names it."""

STAGES, NAIVE, NETWORK, CEILINGS = "stages", "naive", "network", "ceilings"
SCHEDULER, PLAN, GPU, INCUMBENT = "scheduler", "plan", "gpu", "incumbent"

PER_OBJECT = ("extract", "network", "network --exact", "publish")
NOT_NETWORK = ("headers", "plan", "prepare", "extract", "publish", "join", "finish")


def stages(bench: Bench) -> None:
    """CPU time of every stage alone, this code and the other one in turns, on one thread."""
    listed = bench.input(bench.field)
    for number in range(bench.repeat):
        for code in bench.codes:
            say(f"stages: {code.name}, {number + 1} of {bench.repeat}")
            try:
                found = bench.child(code, "performance.stages", listed, bench.fresh("stages"), env=ONE_THREAD)
            except MeasurementError as error:
                bench.results.skip(STAGES, bench.case(bench.field, code), str(error))
                continue
            _enter_stages(bench, code.name, bench.case(bench.field, code), found)
    for code in bench.codes[1:]:
        for stage in ("headers", "prepare", "extract", "network", "publish", "join", "finish"):
            new, old = (f"{stage} ({case})" for case in (bench.field, bench.case(bench.field, code)))
            speedups(bench.results, STAGES, new, old, ("CPU",), False)
    speedups(bench.results, STAGES, f"network ({bench.field})", f"network --exact ({bench.field})", ("CPU",), False)
    bench.save()


def _enter_stages(bench: Bench, code: str, field: str, found: dict[str, dict[str, Any]]) -> None:
    """Add one measurement of all stages to those before."""

    def more(case: str, quantity: str, unit: str, value: float, note: str = "") -> None:
        before = bench.results.find(STAGES, case, quantity)
        bench.results.add(STAGES, case, quantity, unit, (*(before.each if before else ()), value), note)

    written = found.pop("written")
    more(f"written ({field})", "bytes per object", "B", written["bytes"] / max(written["objects"], 1))
    for stage, one in found.items():
        case, count = f"{stage} ({field})", max(one["count"], 1)
        more(case, "CPU", "s", one["cpu_s"])
        more(case, "wall", "s", one["wall_s"])
        more(case, "CPU ms per item", "ms", 1000 * one["cpu_s"] / count, f"per {one['per']}, of {one['count']}")
    rest = sum(found[stage]["cpu_s"] for stage in NOT_NETWORK if stage in found)
    more(f"all but the network ({field})", "CPU", "s", rest)


def naive(bench: Bench) -> None:
    """The pipeline that a user would write: its time, and whether the answers are the same."""
    listed, code = bench.input(bench.field), bench.codes[0]
    exact = ("--exact",) if knows(code, "--exact") else ()
    product = bench.fresh("product")
    bench.classify(code, listed, product, *exact)
    found: dict[str, list[float]] = defaultdict(list)
    answer: dict[str, Any] = {}
    for number in range(min(bench.repeat, 3)):
        say(f"naive: {number + 1} of {min(bench.repeat, 3)}")
        answer = bench.child(code, "performance.naive", listed, bench.fresh("naive"), product, env=ONE_THREAD)
        for step, seconds in answer["cpu_s"].items():
            found[step].append(seconds)
        found["all but the network"].append(sum(s for k, s in answer["cpu_s"].items() if k not in ("network", "model")))
    for step, each in found.items():
        note = answer["network"] if step == "network" else ""
        bench.results.add(NAIVE, step, "CPU", "s", each, note)
    same = answer["agreement"]
    for quantity, key in (("objects that it finds too", "objects"), ("of these, p_star within 0.001", "same")):
        bench.results.add(NAIVE, "agreement", quantity, "%", 100 * same[key])
    bench.results.add(NAIVE, "agreement", "largest difference of p_star", "", same["largest"])
    _against_naive(bench)
    bench.save()


def _against_naive(bench: Bench) -> None:
    pairs = {"prepare": "prepare", "extract": "extract", "network": "network", "all but the network": None}
    for step in pairs:
        slow = bench.results.value(NAIVE, step, "CPU")
        fast = bench.results.value(STAGES, f"{step} ({bench.field})", "CPU")
        if slow and fast:
            bench.results.add(RATIOS, "product against naive pipeline", f"{step}, CPU", "x", slow / fast)


def network(bench: Bench) -> None:
    """Raw forward pass of the whole model and of its parts, on one thread and on all."""
    for threads in dict.fromkeys((1, bench.workers)):
        say(f"network: {threads} threads")
        found = bench.child(bench.codes[0], "performance.forward", threads, bench.repeat)
        bench.results.add(NETWORK, "whole", "work per object", "GFLOP", found["gflop"])
        for part, rates in found["rates"].items():
            what, unit = ("GFLOP", "GFLOP/s") if part == PRODUCT else ("objects", "1/s")
            case = f"{part}, {threads} threads"
            bench.results.add(NETWORK, case, f"{what}/s", unit, [wall for wall, _ in rates])
            bench.results.add(NETWORK, case, f"{what} per core second", unit, [cpu for _, cpu in rates])
        _against_product(bench, threads, found)
    _against_raw(bench)
    bench.save()


def _against_product(bench: Bench, threads: int, found: dict[str, Any]) -> None:
    """Share of the matrix product that the whole network reaches, turn by turn; by CPU time on one thread."""
    clock, note = (1, "by CPU time") if threads == 1 else (0, "by wall time")
    turns = zip(found["rates"]["whole"], found["rates"][PRODUCT], strict=True)
    shares = [100 * found["gflop"] * whole[clock] / most[clock] for whole, most in turns]
    bench.results.add(RATIOS, "network: whole network", f"of the matrix product, {threads} threads", "%", shares, note)


def ceilings(bench: Bench) -> None:
    """Matrix product, reading of the same files, copies to a GPU."""
    say("ceilings")
    listed = bench.input(bench.field)
    found = bench.child(bench.codes[0], "performance.ceilings", bench.repeat, *files_of(listed))
    for case, (unit, rates) in found.items():
        bench.results.add(CEILINGS, case, "rate", unit, rates)
    if not any("GPU" in case for case in found):
        bench.results.skip(CEILINGS, "copy to the GPU", "no GPU that torch can use")
    bench.save()


def _against_raw(bench: Bench) -> None:
    """Share of the raw rates of the networks that whole runs reach."""
    results = bench.results
    raw = results.value(NETWORK, f"whole, {bench.workers} threads", "objects/s")
    exact = f"{bench.field} --exact"
    if results.value(END_TO_END, exact, "objects/s") is None:
        exact = bench.field
    run_rate = results.value(END_TO_END, exact, "objects/s")
    if raw and run_rate:
        note = f"{exact}; one core each" if bench.workers > 1 else exact
        results.add(RATIOS, "end to end", "of the whole network's raw rate", "%", 100 * run_rate / raw, note)
    raw = results.value(NETWORK, "whole, 1 threads", "objects per core second")
    run_rate = results.value(END_TO_END, exact, "objects per core second")
    if raw and run_rate:
        share = 100 * run_rate / raw
        results.add(RATIOS, "end to end", "of the whole network's raw rate, CPU time", "%", share, exact)
    cpu = results.value(STAGES, f"network ({bench.field})", "CPU ms per item")
    rate = results.value(END_TO_END, bench.field, "objects/s")
    if cpu and rate:
        own = 1000 * bench.workers / cpu
        results.add(RATIOS, "end to end", "of the rate of its own network stage", "%", 100 * rate / own, bench.field)


def scheduler(bench: Bench) -> None:
    """Tiles with nothing in them through the dispatcher."""
    n_tiles = 2_000 if bench.quick else 100_000
    say(f"scheduler: {n_tiles} tiles")
    found = bench.child(bench.codes[0], "performance.scheduler", n_tiles, bench.workers)
    case = "tiles without content"
    bench.results.add(SCHEDULER, case, "tiles", "", found["tiles"])
    bench.results.add(SCHEDULER, case, "wall ms per tile", "ms", 1000 * found["wall_s"] / found["tiles"])
    bench.results.add(SCHEDULER, case, "driver CPU ms per tile", "ms", 1000 * found["driver_cpu_s"] / found["tiles"])
    bench.results.add(SCHEDULER, case, "driver memory", "MiB", found["driver_mib"])
    bench.save()


def plan(bench: Bench) -> None:
    """Headers and plan of many exposures, of which only the headers exist."""
    count = 700 if bench.quick else 100_000
    say(f"plan: {count} headers")
    small, _, _ = _planned(bench, 7)
    peak, found, done = _planned(bench, count)
    case = "headers only"
    for quantity, value in found.items():
        bench.results.add(PLAN, case, quantity, "", value)
    bench.results.add(PLAN, case, "wall", "s", done.wall_s)
    bench.results.add(PLAN, case, "CPU", "s", done.cpu_s)
    bench.results.add(PLAN, case, "driver memory", "MiB", peak / 1024)
    note = "beyond that of seven exposures"
    bench.results.add(PLAN, case, "driver KiB per exposure", "KiB", (peak - small) / (count - 7), note)
    bench.save()


def _planned(bench: Bench, count: int) -> tuple[int, dict[str, int], Usage]:
    """Largest memory of a plan (KiB), how many exposures and tiles it has, and what it cost."""
    folder = bench.fresh("plan")
    folder.mkdir(parents=True)
    command = python("-c", _MEASURED_PLAN, str(simulate(folder, count)), str(folder / "output"))
    done = run(command, bench.codes[0].environment())
    shutil.rmtree(folder)
    match = re.search(r"(\d+) exposures can be used.*?(\d+) tiles", done.output)
    peak = re.search(r"peak_kib (\d+)", done.output)
    if done.code or match is None or peak is None:
        raise MeasurementError(f"plan of {count} headers: {last_line(done.errors)}")
    return int(peak[1]), {"exposures": int(match[1]), "tiles": int(match[2])}, done


_MEASURED_PLAN = """
import resource, sys
from sgclassify.pipeline.cli import main
sys.argv = ["sgclassify", "run", "--exposure-list", sys.argv[1], "--output", sys.argv[2], "--dry-run",
            "--log-format", "json"]
try:
    main()
finally:
    print("peak_kib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def gpu(bench: Bench) -> None:
    """Stamps per second on a GPU, and the share of a run in which it is busy."""
    say("gpu")
    found = bench.child(bench.codes[0], "performance.gpu", bench.repeat)
    if "missing" in found:
        bench.results.skip(GPU, "network", found["missing"])
        bench.save()
        return
    for case, rates in found["rates"].items():
        if isinstance(rates, str):
            bench.results.skip(GPU, case, rates)
        else:
            bench.results.add(GPU, case, "stamps/s", "1/s", rates)
    listed = bench.input(bench.field)
    with _Busy() as busy:
        usage, record = bench.classify(bench.codes[0], listed, bench.fresh("run"), "--device", "gpu")
    bench.results.add(GPU, f"run of {bench.field}", "objects/s", "1/s", record["counts"]["objects"] / usage.wall_s)
    if busy.samples:
        bench.results.add(GPU, f"run of {bench.field}", "GPU busy", "%", statistics.mean(busy.samples))
    bench.save()


class _Busy:
    """Samples how busy the GPU is, five times a second."""

    def __enter__(self) -> _Busy:
        self.samples: list[float] = []
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def _read(self) -> None:
        for line in self._process.stdout or ():
            if line.strip().isdigit():
                self.samples.append(float(line))

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._thread.join()


def incumbent(bench: Bench) -> None:
    """SExtractor and PSFEx on the same exposures."""
    say("incumbent")
    found = bench.child(bench.codes[0], "performance.incumbent", bench.input(bench.field))
    if "missing" in found:
        bench.results.skip(INCUMBENT, "SExtractor and PSFEx", found["missing"])
    else:
        case = f"SExtractor and PSFEx ({bench.field})"
        bench.results.add(INCUMBENT, case, "CPU per exposure", "s", found["cpu_s"])
        bench.results.add(INCUMBENT, case, "CPU ms per detection", "ms", 1000 * sum(found["cpu_s"]) / found["sources"])
    bench.save()
