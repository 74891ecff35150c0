"""What a run leaves behind: the table's columns, the pictures, and both without matplotlib."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_reports import counted, full_report, report, timed
from PIL import Image

from fastpeft.benchmark import plots
from fastpeft.benchmark.cases import Result
from fastpeft.benchmark.report import Report, facts_of, machine
from fastpeft.cli import main

PICTURES = ("ratios", "floor", "memory", "roofline", "scaling")


def table_of(*results: dict[str, Any]) -> dict[str, list[list[str]]]:
    """The Markdown of made-up results, as {suite: rows of cells}."""
    made = Report(report()["environment"], [Result(**result) for result in results])
    tables: dict[str, list[list[str]]] = {}
    for line in made.to_markdown().splitlines():
        if line.startswith("### "):
            rows = tables.setdefault(line[4:], [])
        elif line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return tables


def test_the_table_has_ratios_the_floor_and_the_limit():
    heads, _, *rows = table_of(timed("layer", "a", ours=1.0, peft=1.5, frozen=0.8))["layer"]
    assert heads == [
        "case", "contender", "time (quartiles)", "x peft (quartiles)", "times the floor (quartiles)", "limit",
        "of the limit",
    ]  # fmt: skip
    cells = {row[1]: row for row in rows}
    assert cells["**fastpeft**"][3:] == ["1.500 (1.470 to 1.530)", "1.250 (1.225 to 1.275)", "720 ms", "72%"]
    assert cells["frozen"][3:] == ["", "", "640 ms", "80%"]  # its limit is that of the base alone


def test_bytes_stand_beside_pefts():
    heads, _, *rows = table_of(counted("saved", "a", ours=1000, peft=4000))["saved"]
    assert heads == ["case", "contender", "saved own"]
    assert [row[2] for row in rows] == ["1,000 (0.250 x peft's)", "4,000"]


def test_a_contender_that_failed_says_so_and_a_pipe_breaks_no_row():
    result = timed("peers", "a", ours=1.0, peft=1.5, frozen=0.8)
    result["contenders"]["unsloth"] = {"failed": "TypeError: int | None"}
    heads, _, *rows = table_of(result)["peers"]
    assert {len(row) for row in rows} == {len(heads)}
    assert "TypeError: int / None" in rows[-1]


def test_a_case_that_was_not_measured_shows_its_limit_beside_an_empty_time():
    result = timed("llama-layer", "all", ours=1.0, peft=1.5, frozen=0.8)
    result.update(contenders={}, speedup={}, floor={})
    heads, _, *rows = table_of(result)["llama-layer"]
    assert heads == ["case", "contender", "time (quartiles)", "limit"]
    assert rows == [["all", "frozen", "", "640 ms"], ["all", "**fastpeft**", "", "720 ms"]]


def test_times_are_no_facts():
    assert facts_of({"seconds": {}, "rounds": 3, "peak": {"bytes": 1024}}) == {"peak bytes": "1,024"}


def test_pictures_name_themselves_and_the_machine(tmp_path):
    record = full_report(gpu="Some GPU")
    files = plots.draw(record, tmp_path / "new", "run")
    assert [file.name for file in files] == [f"run-{name}.png" for name in PICTURES]
    titles = set()
    for file in files:
        with Image.open(file) as picture:
            assert picture.text["Description"] == machine(record["environment"])
            titles.add(picture.text["Title"])
    assert len(titles) == len(files)
    signature = machine(record["environment"])
    for part in ("Some GPU", "Some CPU", "1 thread(s)", "torch 2.13.0", "0123456789ab", "2026-01-02"):
        assert part in signature


@pytest.mark.parametrize("cases", [1, 30])
def test_no_picture_has_text_over_text(cases):
    from matplotlib import pyplot as plt

    record = full_report()
    record["results"] += [
        timed("fused-linear", f"fwd+bwd-8192-M{n}", ours=1.0, peft=1.5, frozen=0.8) for n in range(cases)
    ]
    seen = []
    for name, title, figure in plots.figures(record):
        figure.canvas.draw()
        blocks = {f"axes {n}": axes.get_tightbbox() for n, axes in enumerate(figure.axes)}
        blocks |= {"title": figure._suptitle.get_window_extent(), "signature": figure._supxlabel.get_window_extent()}
        for (one, a), (other, b) in itertools.combinations(blocks.items(), 2):
            assert not a.padded(-1).overlaps(b.padded(-1)), f"{name}: {one} over {other}"
        for block, box in blocks.items():
            assert figure.bbox.padded(1).contains(box.x0, box.y0), f"{name}: {block} leaves the picture"
            assert figure.bbox.padded(1).contains(box.x1, box.y1), f"{name}: {block} leaves the picture"
        assert figure._suptitle.get_text() == title
        labelled = [axes for axes in figure.axes if axes.get_xlabel()]
        assert labelled, f"{name} has no axis with a name"
        seen.append(name)
        plt.close(figure)
    assert tuple(seen) == PICTURES


def test_bars_are_as_long_as_the_figures():
    from matplotlib import pyplot as plt

    made = {
        name: figure for name, _, figure in plots.figures(report(timed("layer", "a", ours=1.0, peft=1.5, frozen=0.8)))
    }
    assert [bar.get_width() for bar in made["ratios"].axes[0].patches] == [1.5]
    assert [bar.get_width() for bar in made["floor"].axes[0].patches] == [1.25, 1.875]
    assert any(set(line.get_xdata()) == {1.0} for line in made["ratios"].axes[0].lines)  # the line at 1
    assert "memory" not in made  # nothing was counted
    plt.close("all")


def test_nothing_to_draw_is_said(tmp_path, capsys):
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(report()))
    assert main(["bench", "--draw", str(empty)]) == 1
    assert "there is nothing to draw" in capsys.readouterr().err


def test_draw_puts_the_pictures_beside_the_report(tmp_path, capsys):
    file = tmp_path / "old.json"
    file.write_text(json.dumps(full_report()))
    assert main(["bench", "--draw", str(file)]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {f"old-{name}.png" for name in PICTURES}


def test_without_matplotlib_the_figures_are_written_and_the_next_step_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "saved", "--quick", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "no pictures: pictures need matplotlib: pip install 'fastpeft[bench]'" in out
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md"}
    assert main(["bench", "--draw", str(tmp_path / "bench.json")]) == 1
    assert "pip install 'fastpeft[bench]'" in capsys.readouterr().err


def test_predicted_times_are_the_least_and_no_gpu_is_needed(tmp_path, capsys):
    assert main(["bench", "llama-layer", "saved", "--predict", "nvidia h200", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Nothing was measured: the least possible times on H200, and those that" in out
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert {result["suite"] for result in results} == {"llama-layer"}  # counting bytes has no limit
    assert all(result["contenders"] == {} and result["roofline"]["seconds"] > 0 for result in results)
    assert all(result["roofline"]["predicted_seconds"] > result["roofline"]["seconds"] for result in results)
    assert Path(tmp_path / "bench.md").read_text().count("not measured") == 0
