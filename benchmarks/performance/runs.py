"""Whole runs of the product: end to end, their start, and how they scale."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from performance.bench import Bench, MeasurementError, say
from performance.codes import Code, python
from performance.figures import RATIOS, speedups
from performance.inputs import FIELDS, files_of, first_fields
from performance.process import Usage, run

END_TO_END, START, SCALING = "end-to-end", "start", "scaling"

UNITS = {
    "objects/s": "1/s", "objects per core second": "1/s", "wall": "s", "CPU": "s", "read": "MB/s",
    "driver memory": "MiB", "worker memory": "MiB", "first object": "s", "objects": "",
}  # fmt: skip

Found = dict[str, dict[str, list[float]]]


def figures_of(usage: Usage, record: dict[str, Any], n_bytes: int) -> dict[str, float]:
    """The figures of one run, by quantity."""
    objects = record["counts"]["objects"]
    memory = [one.get("peak_mib", 0.0) for one in [*record["inputs"], *record["tiles"]]]
    return {
        "objects/s": objects / usage.wall_s,
        "objects per core second": objects / usage.cpu_s,
        "wall": usage.wall_s,
        "CPU": usage.cpu_s,
        "read": n_bytes / usage.wall_s / 1e6,
        "driver memory": record.get("peak_mib", {}).get("driver", float("nan")),
        "worker memory": max(memory, default=float("nan")),
        "first object": usage.first_s,
        "objects": float(objects),
    }


def enter(bench: Bench, group: str, found: Found, notes: dict[str, str] | None = None) -> None:
    """Enter figures by case and quantity."""
    for case, quantities in found.items():
        for quantity, each in quantities.items():
            note = (notes or {}).get(case, "") if quantity == "objects/s" else ""
            bench.results.add(group, case, quantity, UNITS.get(quantity, ""), each, note)
    bench.save()


def knows(code: Code, option: str) -> bool:
    """Whether the command ``run`` of a code has an option."""
    return option in run(python("-m", "sgclassify.pipeline", "run", "--help"), code.environment()).output


def end_to_end(bench: Bench) -> None:
    """Objects per second and memory of whole runs, this code and the other one in turns."""
    names = ["f528", *([] if bench.quick else ["f640x50", "f2560", "f2560-rice"]), *(["f9216"] if bench.large else [])]
    exact = knows(bench.codes[0], "--exact")
    for name in names:
        listed = bench.input(name)
        n_bytes = sum(path.stat().st_size for path in files_of(listed))
        variants: list[tuple[str, Code, tuple[str, ...]]] = [(bench.case(name, code), code, ()) for code in bench.codes]
        if exact and not name.endswith("-rice"):
            variants.append((f"{name} --exact", bench.codes[0], ("--exact",)))
        found: Found = defaultdict(lambda: defaultdict(list))
        # what takes minutes is not done five times by a slower code
        repeat = min(bench.repeat, 1) if name == "f9216" else bench.repeat
        for number in range(repeat):
            for case, code, options in variants:
                say(f"end to end: {case}, {number + 1} of {repeat}")
                usage, record = bench.classify(code, listed, bench.fresh("run"), *options)
                for quantity, value in figures_of(usage, record, n_bytes).items():
                    found[case][quantity].append(value)
        enter(bench, END_TO_END, found, {name: FIELDS[name].title})
        for code in bench.codes[1:]:
            old = bench.case(name, code)
            speedups(bench.results, END_TO_END, name, old, ("objects/s", "objects per core second"), True)
            speedups(bench.results, END_TO_END, name, old, ("first object", "driver memory", "worker memory"), False)
        speedups(bench.results, END_TO_END, name, f"{name} --exact", ("objects/s", "objects per core second"), True)
    plain, rice = (bench.results.value(END_TO_END, name, "CPU") for name in ("f2560", "f2560-rice"))
    if plain and rice:
        bench.results.add(RATIOS, "RICE against uncompressed", "CPU", "x", rice / plain, "f2560; wanted: 1.3 at most")
    bench.save()


def start(bench: Bench) -> None:
    """Time to the first object, of a run with nothing left to do, and of a refusal."""
    listed = bench.input("f528")
    found: Found = defaultdict(lambda: defaultdict(list))
    for number in range(bench.repeat):
        for code in bench.codes:
            say(f"start: {code.name}, {number + 1} of {bench.repeat}")
            output = bench.fresh("start")
            first, _ = bench.classify(code, listed, output)
            again, _ = bench.classify(code, listed, output)
            missing, _ = bench.classify(code, bench.work / "missing.txt", bench.fresh("refused"), expect=2)
            usage = run(python("-m", "sgclassify.pipeline", "--help"), code.environment())
            cases = {
                "to the first object": first.first_s, "whole run": first.wall_s, "nothing left to do": again.wall_s,
                "refusal of a missing list": missing.wall_s, "--help": usage.wall_s,
            }  # fmt: skip
            for case, seconds in cases.items():
                found[bench.case(case, code)]["wall"].append(seconds)
            found[bench.case("nothing left to do", code)]["CPU"].append(again.cpu_s)
    enter(bench, START, found)
    for code in bench.codes[1:]:
        for case in ("to the first object", "whole run", "nothing left to do", "refusal of a missing list"):
            speedups(bench.results, START, case, bench.case(case, code), ("wall",), False)
    bench.save()


def scaling(bench: Bench) -> None:
    """How a run scales over workers, the length of its list, and the size of its tiles."""
    for measure in (_over_workers, _over_lists, _over_tiles):
        try:
            measure(bench, 1 if bench.quick else min(3, bench.repeat))
        except MeasurementError as error:
            bench.results.skip(SCALING, measure.__name__.strip("_").replace("_", " "), str(error))
    bench.save()


def _runs(bench: Bench, lists: dict[str, tuple[Path, tuple[str, ...], int]], repeat: int) -> dict[str, dict[str, Any]]:
    """Run cases in turns and enter their figures; returns the last record of each."""
    found: Found = defaultdict(lambda: defaultdict(list))
    records: dict[str, dict[str, Any]] = {}
    for number in range(repeat):
        for case, (listed, options, workers) in lists.items():
            say(f"scaling: {case}, {number + 1} of {repeat}")
            usage, record = bench.classify(bench.codes[0], listed, bench.fresh("run"), *options, workers=workers)
            records[case] = record
            for quantity, value in figures_of(usage, record, 0).items():
                if quantity not in ("read", "first object"):
                    found[case][quantity].append(value)
    enter(bench, SCALING, found)
    return records


def _workers(count: int) -> str:
    return f"{count} worker" + "s" * (count > 1)


def _over_workers(bench: Bench, repeat: int) -> None:
    listed, counts = bench.input(bench.field), (1, 2) if bench.quick else (1, 2, 4)
    _runs(bench, {_workers(n): (listed, (), n) for n in counts}, repeat)
    one = bench.results.value(SCALING, _workers(1), "wall")
    for n in counts[1:]:
        many = bench.results.value(SCALING, _workers(n), "wall")
        if one and many:
            note = f"{n} times the time of {n} workers, over the time of one; start included"
            bench.results.add(SCALING, _workers(n), "time over share of the work", "", many * n / one, note)


def _over_lists(bench: Bench, repeat: int) -> None:
    whole = bench.input("f1024x8")
    bench.work.mkdir(parents=True, exist_ok=True)
    counts = (1, 2) if bench.quick else (1, 2, 4, 8)
    lists = {n: first_fields(whole, n, bench.work / f"first-{n}.txt") for n in counts}
    _runs(bench, {f"list x {n}": (listed, (), bench.workers) for n, listed in lists.items()}, repeat)


def _over_tiles(bench: Bench, repeat: int) -> None:
    listed = bench.input(bench.field)
    lists: dict[str, tuple[Path, tuple[str, ...], int]] = {}
    bench.work.mkdir(parents=True, exist_ok=True)
    for order in (10, 11) if bench.quick else (9, 10, 11, 12):
        config = bench.work / f"order-{order}.toml"
        config.write_text(f"config_version = 1\n[run]\ntile_order = {order}\n", encoding="utf-8")
        lists[f"tiles of order {order}"] = (listed, ("--config", str(config)), bench.workers)
    for case, record in _runs(bench, lists, repeat).items():
        sizes = [tile["n_objects"] for tile in record["tiles"]]
        bench.results.add(SCALING, case, "objects per tile, most", "", max(sizes, default=0))
        bench.results.add(SCALING, case, "tiles", "", len(sizes))
