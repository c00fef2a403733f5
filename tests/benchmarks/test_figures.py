"""Figures, their table and their JSON; the survey on paper; the processes of a run."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from performance.cli import GROUPS, PAGE, main, parser, with_block, write_page
from performance.codes import ROOT, code_of, this_code
from performance.figures import RATIOS, Results, shown, speedups, table
from performance.inputs import FIELDS, files_of, first_fields, lines_of
from performance.process import run
from performance.survey import Survey, bottlenecks, costs, report

# --- figures


def _results() -> Results:
    results = Results({"version": "1.2.3", "commit": "abc"})
    results.add("end-to-end", "f528", "wall", "s", [3.0, 1.0, 2.0], "seven | exposures")
    results.add("end-to-end", "f528 (commit old)", "wall", "s", [20.0])
    results.skip("gpu", "network", "no GPU")
    return results


def test_figure_is_the_median() -> None:
    results = _results()
    figure = results.find("end-to-end", "f528", "wall")
    assert figure is not None
    assert (figure.value, figure.spread) == (2.0, 0.5)
    assert results.find("gpu", "network", "not measured") is None


def test_later_figure_takes_the_place_of_an_earlier_one() -> None:
    results = _results()
    before = len(results.figures)
    results.add("end-to-end", "f528", "wall", "s", 7.0)
    assert (len(results.figures), results.value("end-to-end", "f528", "wall")) == (before, 7.0)


def test_json_is_read_back(tmp_path: Path) -> None:
    results = _results()
    results.write(tmp_path / "deep" / "results.json")
    again = Results.read(tmp_path / "deep" / "results.json")
    assert again == results
    assert again.to_json() == results.to_json()
    with pytest.raises(ValueError, match="format 99"):
        Results.from_json('{"format": 99}')


def test_ratio_says_by_which_factor_the_new_one_is_better() -> None:
    results = _results()
    speedups(results, "end-to-end", "f528", "f528 (commit old)", ("wall", "CPU"), more_is_better=False)
    assert results.value(RATIOS, "end-to-end: f528 against f528 (commit old)", "wall") == 10.0
    assert sum(figure.group == RATIOS for figure in results.figures) == 1


def test_table_has_a_row_per_figure_ratios_first() -> None:
    results = _results()
    results.add(RATIOS, "a against b", "CPU", "x", 12.34)
    rows = table(results).splitlines()
    assert len(rows) == 2 + len(results.figures)
    assert rows[2] == "| ratios | a against b | CPU | 12.3 x |  |  |"
    assert "| end-to-end | f528 | wall | 2 s | 50 % | seven / exposures |" in rows
    assert "| gpu | network | not measured | - |  | no GPU |" in rows


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(12345.6, "1/s", "12,346 1/s"), (12.34, "s", "12.3 s"), (1.234, "", "1.23"), (0.0123, "ms", "0.012 ms"),
     (0.0, "s", "0 s"), (1.5e-5, "", "1.5e-05"), (math.nan, "s", "-"), (2.0, "x", "2 x")],
)  # fmt: skip
def test_figures_are_shown_with_three_digits(value: float, unit: str, text: str) -> None:
    assert shown(value, unit) == text


# --- the survey


def _measured() -> Results:
    results = Results({})
    for stage, ms in {
        "headers": 2.0, "prepare": 2000.0, "extract": 5.0, "network": 1.0, "network --exact": 6.0, "publish": 0.1,
        "join": 0.25, "finish": 1.0,
    }.items():  # fmt: skip
        results.add("stages", f"{stage} (f2560)", "CPU ms per item", "ms", ms)
    results.add("scheduler", "tiles without content", "driver CPU ms per tile", "ms", 3.6)
    results.add("stages", "written (f2560)", "bytes per object", "B", 1000.0)
    return results


def test_survey_is_the_camera_on_the_sky() -> None:
    survey = Survey(area_deg2=100.0, visits=(1,) * 7, detector=(1000, 1000), pixel_arcsec=3.6)
    # a detector of one degree by one, seven bands
    assert survey.exposures == pytest.approx(700.0)
    assert survey.bytes_read == pytest.approx(700 * 1e6 * 10)
    # 12 x 4^10 tiles cover the sky
    assert Survey(area_deg2=41_252.96).tiles == pytest.approx(12 * 4**10)
    # nine million detectors, as the mission plans: 486,000 places, 18 exposures
    assert Survey().exposures == pytest.approx(8.76e6, rel=0.01)


def test_survey_costs_what_its_parts_cost() -> None:
    survey = Survey(area_deg2=100.0, visits=(2,) * 7, detector=(2560, 2560), pixel_arcsec=3.6, objects=3.6e6)
    hours = {one.name: one.hours for one in costs(_measured(), survey)}
    assert hours["prepare"] == pytest.approx(survey.exposures * 2.0 / 3600)
    assert hours["extract"] == pytest.approx(3.6e6 * 2 * 0.005 / 3600)
    assert hours["network"] == pytest.approx(1.0)
    assert hours["network --exact"] == pytest.approx(6.0)
    assert hours["join"] == pytest.approx(3.6e6 * 14 * 0.00025 / 3600)
    assert hours["scheduler"] == pytest.approx(survey.tiles * 1e-6)
    assert "network on a GPU" not in hours


def test_what_breaks_first_is_what_takes_longest() -> None:
    results = _measured()
    assert bottlenecks(results, Survey(cores=1))[0][0] == "1 cores"
    assert bottlenecks(results, Survey(read_gb_s=1e-6))[0][0].startswith("storage")
    assert bottlenecks(results, Survey(cores=10**9, read_gb_s=1e9))[0][0] in (
        "scheduler, in one process", "headers, in one process",
    )  # fmt: skip


def test_survey_is_told_whatever_was_measured() -> None:
    results = _measured()
    text = report(results, Survey())
    assert "Breaks first:" in text
    assert "| network --exact |" in text
    # the whole model is instead of the cascade, and not counted beside it
    total = sum(one.hours for one in costs(results, Survey()) if one.name != "network --exact")
    assert shown(total, "CPU h") in text
    results.add("gpu", "CUDA graph, bf16, batch 1024", "stamps/s", "1/s", 1e6)
    assert "GPU h" in report(results, Survey())
    assert "Breaks first: storage" in report(Results({}), Survey())


# --- processes, codes, inputs


def test_time_of_all_processes_counts() -> None:
    # a grandchild that outlives the command
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {burn!r}])"
    usage = run([sys.executable, "-c", code])
    assert usage.code == 0
    assert usage.cpu_s > 0.3


def test_first_file_is_seen(tmp_path: Path) -> None:
    code = f"import pathlib, time; pathlib.Path({str(tmp_path)!r}, 'a.parquet').touch(); time.sleep(0.3); print('done')"
    usage = run([sys.executable, "-c", code], folder=tmp_path, pattern="*.parquet")
    assert usage.first_s < usage.wall_s
    assert usage.output == "done\n"
    none = run([sys.executable, "-c", "raise SystemExit(3)"], folder=tmp_path, pattern="*.fits")
    assert math.isnan(none.first_s)
    assert none.code == 3


def test_codes_have_their_own_path(tmp_path: Path) -> None:
    assert str(ROOT / "benchmarks") in this_code().environment()["PYTHONPATH"]
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    with pytest.raises(Exception, match="rev-parse"):
        code_of("no-such-commit", tmp_path)


def test_lists(tmp_path: Path) -> None:
    names = [f"field_{k}/a{k}_IMG.fits" for k in range(3)]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir()
        for kind in ("IMG", "WHT", "CAT"):
            path.with_name(path.name.replace("IMG", kind)).touch()
    listed = tmp_path / "list.txt"
    listed.write_text("# comment\n" + "\n".join(names) + "\n")
    assert [path.name for path in lines_of(first_fields(listed, 2, tmp_path / "two.txt"))] == [
        "a0_IMG.fits",
        "a1_IMG.fits",
    ]
    assert len(files_of(listed)) == 9


# --- the command


def test_command_names_its_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["run", "--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in GROUPS)
    with pytest.raises(SystemExit, match="no such group: nonsense"):
        main(["run", "nonsense"])
    assert "f2560" in FIELDS


def test_page_has_the_table_and_the_survey(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    whole = PAGE.read_text(encoding="utf-8")
    page.write_text(whole)
    for _ in range(2):
        write_page(_measured(), Survey(), page)
    text = page.read_text()
    assert text.count(table(_measured())) == text.count(report(_measured(), Survey())) == 1
    assert text.partition("<!--")[0] == whole.partition("<!--")[0]
    with pytest.raises(ValueError, match="no markers of figures"):
        with_block("no page", "figures", "text")


def test_table_and_survey_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    _measured().write(path)
    assert main(["table", str(path)]) == 0
    assert "| scheduler | tiles without content |" in capsys.readouterr().out
    assert main(["survey", str(path), "--cores", "1"]) == 0
    assert "Breaks first: 1 cores" in capsys.readouterr().out
