"""fastpeft bench --compare: real changes are found, noise is not, what is no report is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from bench_reports import counted, full_report, report, spread, timed

from fastpeft.benchmark.compare import Comparison, compare
from fastpeft.benchmark.records import ReportError, read
from fastpeft.cli import main

BEFORE = {"ours": 1.0, "peft": 1.5, "frozen": 0.8}


def layer(**times: float) -> dict[str, Any]:
    return timed("layer", "bf16", **{**BEFORE, **times})


def figures(changes: list) -> set[str]:
    return {change.figure for change in changes}


def compared(old: dict[str, Any], new: dict[str, Any], **options: Any) -> Comparison:
    """Two single results on the same machine."""
    return compare(report(old), report(new), **options)


def test_a_report_against_itself_has_no_change():
    comparison = compare(full_report(), full_report())
    assert (comparison.regressions, comparison.improvements, comparison.failures, comparison.notes) == ([], [], [], [])
    assert comparison.figures > 10
    assert comparison.exit_code == 0
    assert comparison.lines() == [f"{comparison.figures} figures compared: no regression, 0 better"]


def test_a_slower_step_is_found_in_every_figure_that_shows_it():
    comparison = compared(layer(), layer(ours=1.2))
    assert figures(comparison.regressions) == {"x peft", "times the floor", "seconds"}
    assert [change.worse for change in comparison.regressions] == pytest.approx([0.2] * 3)
    assert comparison.exit_code == 1
    assert comparison.lines()[-1].endswith("3 regressions, 0 better")


def test_a_faster_step_is_an_improvement_and_no_reason_to_fail():
    comparison = compared(layer(), layer(ours=0.8))
    assert not comparison.regressions
    assert figures(comparison.improvements) == {"x peft", "times the floor", "seconds"}
    assert comparison.exit_code == 0


def test_a_slower_machine_alone_is_no_regression_of_a_ratio():
    comparison = compared(layer(), layer(ours=2.0, peft=3.0, frozen=1.6))
    assert figures(comparison.regressions) == {"seconds"}
    elsewhere = compare(report(layer()), report(layer(ours=2.0, peft=3.0, frozen=1.6), cpu="Another CPU"))
    assert elsewhere.exit_code == 0
    assert "absolute times are not compared: Some CPU, 1 thread(s) before, Another CPU, 1 thread(s) now" in "".join(
        elsewhere.notes
    )


def test_quartiles_that_overlap_are_noise():
    old = timed("layer", "bf16", **BEFORE, width=0.15)
    new = timed("layer", "bf16", **{**BEFORE, "ours": 1.2}, width=0.15)
    assert not compared(old, new).regressions
    assert compared(layer(), layer(ours=1.2)).regressions  # the same medians, apart


def test_the_threshold_is_the_least_change_of_a_median():
    old, new = layer(), layer(ours=1.1)
    assert compared(old, new, threshold=0.05).regressions
    assert not compared(old, new, threshold=0.15).regressions


def test_peft_becoming_slower_does_not_hide_that_we_did():
    comparison = compared(layer(), layer(ours=1.2, peft=1.8))
    assert figures(comparison.regressions) == {"times the floor", "seconds"}


def test_only_our_figures_are_judged():
    def with_peers(peft_ratio: float) -> dict[str, Any]:
        result = layer()
        result["speedup"]["peft-compiled"] = {"peft": spread(peft_ratio), "fastpeft": spread(1.0)}
        result["speedup"]["fastpeft-compiled"] = {"fastpeft": spread(peft_ratio)}
        return result

    comparison = compared(with_peers(1.0), with_peers(0.5))
    assert not comparison.regressions + comparison.improvements


def test_saved_bytes_are_exact():
    one_more = compared(counted("saved", "a", ours=1000, peft=9000), counted("saved", "a", ours=1001, peft=9000))
    assert [str(change) for change in one_more.regressions] == [
        "saved a fastpeft: saved own 1,000 -> 1,001, 0.1% worse"
    ]
    fewer = compared(counted("saved", "a", ours=1000, peft=9000), counted("saved", "a", ours=999, peft=9000))
    assert fewer.exit_code == 0
    assert fewer.improvements
    theirs = compared(counted("saved", "a", ours=1000, peft=9000), counted("saved", "a", ours=1000, peft=1))
    assert not theirs.regressions + theirs.improvements
    from_none = compared(counted("saved", "a", ours=0, peft=9), counted("saved", "a", ours=8, peft=9))
    assert from_none.regressions


def test_the_peak_may_move_within_the_threshold():
    def peak(ours: int) -> dict[str, Any]:
        return counted("peak", "a", ours=ours, peft=9000, key="peak", part="bytes")

    assert not compared(peak(1000), peak(1040)).regressions
    assert compared(peak(1000), peak(1060)).regressions


def facts(key: str, **contenders: Any) -> dict[str, Any]:
    """A case with one fact for each of its contenders, and a time that never changes."""
    result = layer()
    for name, value in contenders.items():
        result["contenders"]["fastpeft" if name == "ours" else name][key] = value
    return result


def gradient(ours: float, peft: float | None = 3e-7) -> dict[str, Any]:
    contenders = {"ours": {"lora_A": ours, "lora_B": 3e-7}, "peft": {"lora_A": peft, "lora_B": 3e-7}}
    return facts("gradient_error", **{name: value for name, value in contenders.items() if peft or name == "ours"})


def test_errors_against_fp64_are_compared():
    worse = compared(gradient(3e-7), gradient(3e-4))
    assert [str(change) for change in worse.regressions] == [
        "layer bf16 fastpeft: gradient error lora_A 3e-07 -> 0.0003, 99900.0% worse"
    ]
    assert worse.exit_code == 1
    assert figures(compared(gradient(3e-4), gradient(3e-7)).improvements) == {"gradient error lora_A"}
    routed = compared(facts("output_error", ours=0.004, peft=0.005), facts("output_error", ours=0.011, peft=0.005))
    assert figures(routed.regressions) == {"output error"}


@pytest.mark.parametrize(
    ("was", "now", "count"),
    [
        ((3e-7, 3e-7), (5.9e-7, 3e-7), 0),  # within twice: other shapes of products round otherwise
        ((3e-7, 3e-7), (6.1e-7, 3e-7), 1),
        ((1e-7, 3e-7), (2.9e-7, 3e-7), 0),  # three times what it was, and still no worse than PEFT's
        ((1e-7, 3e-7), (3.1e-7, 3e-7), 1),
        ((3e-7, 3e-7), (4.1e-4, 4e-4), 0),  # PEFT's moved with it: products in another precision
        ((3e-7, 3e-7), (9e-4, 4e-4), 1),
        ((0.0, 3e-7), (2e-7, 3e-7), 0),
        ((0.0, 3e-7), (4e-7, 3e-7), 1),
        ((3e-7, None), (5.9e-7, None), 0),
        ((3e-7, None), (6.1e-7, None), 1),
        ((3e-7, 3e-7), (float("nan"), 3e-7), 1),
        ((3e-7, 3e-7), (float("inf"), 3e-7), 1),
        ((3e-7, 3e-7), (float("nan"), float("nan")), 1),
        ((float("nan"), 3e-7), (float("nan"), 3e-7), 0),
    ],
)
def test_an_error_is_held_against_what_it_was_and_against_pefts(was, now, count):
    assert len(compared(gradient(*was), gradient(*now)).regressions) == count
    assert len(compared(gradient(*now), gradient(*was)).improvements) == count


def test_errors_of_another_device_need_pefts_beside_them():
    def elsewhere(was: dict[str, Any], now: dict[str, Any]) -> Comparison:
        return compare(report(was), report(now, cpu="Another CPU"))

    assert not elsewhere(gradient(3e-7, None), gradient(3e-4, None)).regressions
    assert elsewhere(gradient(3e-7), gradient(3e-4)).regressions


def test_an_error_that_is_no_number_is_read_and_a_regression(tmp_path, capsys):
    old = str(write(tmp_path / "old.json", report(gradient(3e-7))))
    new = str(write(tmp_path / "new.json", report(gradient(float("nan")))))
    assert main(["bench", "--compare", old, new]) == 1
    assert "REGRESSION  layer bf16 fastpeft: gradient error lora_A 3e-07 -> inf, worse" in capsys.readouterr().out


def test_first_steps_are_compared_on_the_same_device():
    was, within, now = (facts("first_step", ours={"seconds": seconds}) for seconds in (2.0, 2.9, 3.1))
    assert not compared(was, within).regressions
    assert figures(compared(was, now).regressions) == {"first step seconds"}
    assert not compared(was, now, threshold=0.6).regressions
    assert compare(report(was), report(now, cpu="Another CPU")).exit_code == 0
    theirs = compared(facts("first_step", peft={"seconds": 2.0}), facts("first_step", peft={"seconds": 9.0}))
    assert not theirs.regressions


def test_cases_without_a_partner_are_named_and_do_not_fail():
    comparison = compare(
        report(layer(), counted("saved", "gone", ours=1, peft=1)), report(layer(), layer() | {"case": "new"})
    )
    assert comparison.exit_code == 0
    assert comparison.notes == ["saved gone: not in the new report", "layer new: not in the old report"]


def test_a_case_or_contender_that_failed_since_is_a_regression():
    broken = layer() | {"error": "RuntimeError: \x1b[31mno", "contenders": {}}
    comparison = compared(layer(), broken)
    assert comparison.failures == ["layer bf16: RuntimeError:  [31mno"]
    assert comparison.exit_code == 1
    other = counted("saved", "a", ours=1000, peft=9000)
    assert compare(report(broken, other), report(layer(), other)).exit_code == 0
    without_us = layer()
    del without_us["contenders"]["fastpeft"]
    assert compared(layer(), without_us).failures == ["layer bf16: fastpeft is not measured any more"]


def test_cases_of_other_sizes_are_not_compared():
    old, new = timed("layer", "bf16", **BEFORE, M=512), timed("layer", "bf16", **{**BEFORE, "ours": 9.0}, M=4096)
    comparison = compared(old, new)
    assert comparison.notes == ["layer bf16: not the same case: M 512 before, 4096 now"]
    assert not comparison.regressions
    same = counted("saved", "a", ours=1000, peft=9000)
    assert compare(report(old, same), report(new, same)).exit_code == 0


def test_reports_without_a_common_figure_are_no_success(tmp_path, capsys):
    for new in (report(), report(layer() | {"case": "another"})):
        comparison = compare(report(layer()), new)
        assert comparison.exit_code == 1
        assert comparison.lines()[-1] == "0 figures compared: the reports have none in common, so nothing is known"
    old, empty = (str(write(tmp_path / f"{len(r)}.json", report(*r))) for r in ([layer()], []))
    assert main(["bench", "--compare", old, empty]) == 1
    assert "0 figures compared: the reports have none in common, so nothing is known" in capsys.readouterr().out


def test_changed_versions_are_said():
    new = report(layer())
    new["environment"]["versions"]["torch"] = "2.14.0"
    assert "torch 2.13.0 -> 2.14.0" in "".join(compare(report(layer()), new).notes)


def write(path: Path, record: Any) -> Path:
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return path


def test_the_command_prints_and_exits_by_what_it_found(tmp_path, capsys):
    old = str(write(tmp_path / "old.json", report(layer())))
    new = str(write(tmp_path / "new.json", report(layer(ours=1.2))))
    assert main(["bench", "--compare", old, new]) == 1
    assert "REGRESSION  layer bf16 fastpeft: x peft 1.5 -> 1.25, 20.0% worse" in capsys.readouterr().out
    assert main(["bench", "--compare", new, old]) == 0
    assert main(["bench", "--compare", old, new, "--threshold", "0.5"]) == 0


def test_reports_of_the_first_schema_are_read(tmp_path):
    old = report(layer())
    old["schema"] = 1
    for result in old["results"]:
        del result["floor"], result["roofline"]
    comparison = compare(read(write(tmp_path / "old.json", old)), report(layer(ours=1.2)))
    assert figures(comparison.regressions) == {"x peft", "seconds"}


def mutated(change: Any) -> dict[str, Any]:
    record = full_report()
    change(record)
    return record


def set_in(*path: Any) -> Any:
    """A change of the record: the last of `path` becomes the value at the place that the others name."""

    def change(record: Any) -> None:
        *parents, key, value = path
        for parent in parents:
            record = record[parent]
        record[key] = value

    return change


FIRST = ("results", 0)
HOSTILE = {
    "no JSON": ("{", "not JSON"),
    "nothing": ("", "not JSON"),
    "too deep": ("[" * 100_000, "not JSON"),
    "a list": ([], "names no schema"),
    "another JSON": ({"a": 1}, "names no schema"),
    "a later schema": (mutated(set_in("schema", 99)), "schema '99'"),
    "a schema that is a list": (mutated(set_in("schema", [2])), "schema '[2]'"),
    "no environment": (mutated(set_in("environment", None)), "environment: expected an object, got NoneType"),
    "no results": (mutated(set_in("results", {})), "results: expected a list"),
    "a result that is text": (mutated(set_in("results", ["layer"])), "results[0]: expected an object, got str"),
    "a name that moves the cursor": (mutated(set_in(*FIRST, "case", "a\x1b[2J")), "results[0].case: expected a line"),
    "a name that is no text": (mutated(set_in(*FIRST, "suite", 7)), "results[0].suite: expected a line"),
    "a case twice": (mutated(lambda record: record["results"].append(record["results"][0])), "appears twice"),
    "text for a number": (mutated(set_in(*FIRST, "contenders", "peft", "seconds", "median", "1")), "expected a number"),
    "NaN": (mutated(set_in(*FIRST, "contenders", "peft", "seconds", "median", float("nan"))), "positive finite number"),
    "no time at all": (mutated(set_in(*FIRST, "speedup", "peft", "fastpeft", "median", 0)), "positive finite number"),
    "a huge integer": (mutated(set_in(*FIRST, "floor", "peft", "q3", 10**400)), "positive finite number"),
    "quartiles turned around": (mutated(set_in(*FIRST, "floor", "peft", spread(1.0, -0.1))), "out of order"),
    "bytes that are a list": (mutated(set_in("results", -1, "contenders", "peft", "peak", [])), "expected an object"),
    "negative bytes": (mutated(set_in("results", -1, "contenders", "peft", "peak", "bytes", -1)), "non-negative"),
    "no machine": (mutated(set_in("environment", "cpu", {})), "environment.cpu.model: expected a line"),
    "flags that are text": (mutated(set_in("environment", "cpu", "flags", "avx")), "flags: expected a list"),
    "no date": (mutated(set_in("environment", "date", None)), "environment.date: expected a line"),
    "limits of nothing": (mutated(set_in("environment", "ceilings", "bytes_per_s", 0)), "positive finite number"),
    "a size that is text": (mutated(set_in("results", 2, "params", "M", "64")), "params.M: expected a number"),
    "an axis of its own": (mutated(set_in("results", 2, "params", "axis", "Q")), "axis: expected M, r or N"),
    "cases without end": (mutated(set_in("results", [{}] * 5000)), "5000 cases, at most 1000 are read"),
    "a fact that rings": (mutated(set_in("results", -1, "contenders", "peft", "peak", "\a", "1")), "peak. : expected"),
    "an error of text": (mutated(set_in(*FIRST, "contenders", "peft", "output_error", "1")), "expected a number"),
    "errors in a list": (mutated(set_in(*FIRST, "contenders", "peft", "gradient_error", [1])), "expected an object"),
    "a negative error": (
        mutated(set_in(*FIRST, "contenders", "peft", "gradient_error", {"lora_A": -1.0})),
        "non-negative finite number",
    ),
    "a huge error": (mutated(set_in(*FIRST, "contenders", "peft", "output_error", 10**400)), "finite number"),
    "a first step of no time": (
        mutated(set_in(*FIRST, "contenders", "peft", "first_step", {"seconds": 0})),
        "positive finite number",
    ),
    "an error that is a list": (mutated(set_in(*FIRST, "error", ["x"])), "error: expected text"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_report_is_refused_in_one_line(name, tmp_path, capsys):
    content, words = HOSTILE[name]
    bad, good = write(tmp_path / "bad.json", content), write(tmp_path / "good.json", full_report())
    with pytest.raises(ReportError) as caught:
        read(bad)
    assert words in str(caught.value)
    for pair in ((bad, good), (good, bad)):
        assert main(["bench", "--compare", *map(str, pair)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith(f"fastpeft bench: {bad}: ")


def test_files_that_cannot_be_read_are_refused(tmp_path, capsys):
    latin = tmp_path / "latin.json"
    latin.write_bytes(b'{"schema": "\xff"}')
    for path, words in (
        (tmp_path / "none.json", "no such file"),
        (tmp_path, "no such file"),
        (latin, "cannot be read"),
    ):
        assert main(["bench", "--compare", str(path), str(path)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--compare", "a.json"), "requires 2 arguments"),
        (("layer", "--compare", "a.json", "b.json"), "--compare measures nothing: leave out layer"),
        (("layer", "--draw", "a.json"), "--draw measures nothing: leave out layer"),
        (("--compare", "a", "b", "--draw", "c"), "exclude one another"),
        (("--threshold", "-1"), "--threshold"),
        (("--predict", "Voodoo 2"), "the limits of that GPU are not known, only those of H200"),
        (("saved", "--predict", "H200"), "none of these suites has a limit"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, words, capsys):
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err
