"""Two reports of `fastpeft bench` against each other: what became slower, what became faster, what cannot be said.

Machines are noisy. What is compared first is our ratio to each baseline and to the frozen base, measured in turn in one
process; absolute times are compared only where both reports come from the same device. A change counts when the
quartiles of the two do not overlap and the medians differ by more than the threshold. Saved bytes are exact. A first
step is measured once, so has no quartiles: it counts from FIRST_STEP on. Errors against fp64 count from ERRORS on, and
only above reference PEFT's own in the same run: no product of other shapes rounds the same.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastpeft.benchmark.libraries import REFERENCE, is_ours

THRESHOLD = 0.05
FIRST_STEP = 0.5  # two runs of `fastpeft bench first-step` on a Zen 4 differed by 16 % for us and by 28 % for PEFT
ERRORS = 2.0  # times: what the tests allow us over eager torch


@dataclass(frozen=True)
class Change:
    """One figure of one contender that is surely worse or better than it was.

    Attributes:
        figure: "x peft", "times the floor", "seconds", "saved own", "gradient error lora_A" ...
        worse: the relative change of the median for the worse; below zero it became better. inf: from nothing, or to
            no number at all.
    """

    suite: str
    case: str
    contender: str
    figure: str
    old: float
    new: float
    worse: float

    def __str__(self) -> str:
        old, new = (f"{value:,}" if isinstance(value, int) else f"{value:.4g}" for value in (self.old, self.new))
        word = "worse" if self.worse > 0 else "better"
        share = f"{abs(self.worse):.1%} " if math.isfinite(self.worse) else ""
        return f"{self.suite} {self.case} {self.contender}: {self.figure} {old} -> {new}, {share}{word}"


@dataclass
class Comparison:
    """What two reports say about each other."""

    regressions: list[Change] = field(default_factory=list)
    improvements: list[Change] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # measured before, not any more
    notes: list[str] = field(default_factory=list)  # what was not compared, and why
    figures: int = 0

    @property
    def exit_code(self) -> int:
        return 1 if self.regressions or self.failures or not self.figures else 0

    def add(self, change: Change) -> None:
        (self.regressions if change.worse > 0 else self.improvements).append(change)

    def lines(self) -> list[str]:
        """The comparison as plain text, the worst first."""
        worst = sorted(self.regressions, key=lambda change: -change.worse)
        best = sorted(self.improvements, key=lambda change: change.worse)
        lines = [*(f"REGRESSION  {change}" for change in worst), *(f"FAILED      {line}" for line in self.failures)]
        lines += [f"improvement {change}" for change in best] + [f"note        {line}" for line in self.notes]
        count = len(self.regressions) + len(self.failures)
        if not self.figures and not count:
            return [*lines, "0 figures compared: the reports have none in common, so nothing is known"]
        verdict = f"{count} regression{'' if count == 1 else 's'}" if count else "no regression"
        return [*lines, f"{self.figures} figures compared: {verdict}, {len(best)} better"]


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float = THRESHOLD) -> Comparison:
    """Compare the records of two reports, as `records.read` gives them, case by case and contender by contender.

    Args:
        threshold: how much worse a median may be, as a share of what it was.
    """
    comparison = Comparison()
    same_device = _device(old) == _device(new)
    if not same_device:
        comparison.notes.append(
            f"absolute times are not compared: {_device(old)} before, {_device(new)} now; ratios and bytes are"
        )
    before, after = ({(r["suite"], r["case"]): r for r in record["results"]} for record in (old, new))
    for key, result in before.items():
        name = " ".join(key)
        if key not in after:
            comparison.notes.append(f"{name}: not in the new report")
        elif result["error"] is None and after[key]["error"] is not None:
            comparison.failures.append(f"{name}: {_printable(after[key]['error'])}")
        elif result["error"] is not None:
            comparison.notes.append(f"{name}: it failed before: nothing to compare with")
        elif different := _different(result["params"], after[key]["params"]):
            comparison.notes.append(f"{name}: not the same case: {different}")
        else:
            _compare_case(comparison, result, after[key], threshold, same_device)
    if changed := _versions(old, new):
        comparison.notes.append(f"other versions, so a ratio may have changed on either side: {changed}")
    comparison.notes += [f"{' '.join(key)}: not in the old report" for key in after if key not in before]
    return comparison


def _compare_case(
    comparison: Comparison, old: dict[str, Any], new: dict[str, Any], threshold: float, same_device: bool
) -> None:
    lost = [name for name in old["contenders"] if is_ours(name) and name not in new["contenders"]]
    comparison.failures += [f"{old['suite']} {old['case']}: {name} is not measured any more" for name in lost]
    for contender, figure, was, now, higher_is_better in _spreads(old, new, same_device):
        comparison.figures += 1
        change = was["median"] / now["median"] - 1 if higher_is_better else now["median"] / was["median"] - 1
        apart = now["q3"] < was["q1"] or now["q1"] > was["q3"]
        if apart and abs(change) > threshold:
            comparison.add(Change(old["suite"], old["case"], contender, figure, was["median"], now["median"], change))
    single = (*_single(old, new, threshold, same_device), *_errors(old, new, same_device))
    for contender, figure, one_was, one_now, apart in single:
        comparison.figures += 1
        if apart:
            change = _change(one_was, one_now)
            comparison.add(Change(old["suite"], old["case"], contender, figure, one_was, one_now, change))


def _spreads(
    old: dict[str, Any], new: dict[str, Any], same_device: bool
) -> Iterator[tuple[str, str, dict[str, float], dict[str, float], bool]]:
    """(contender, figure, old spread, new spread, whether higher is better) of all that both have and that is ours."""
    for baseline, ratios in old["speedup"].items():
        for name, ratio in ratios.items():
            now = new["speedup"].get(baseline, {}).get(name)
            if is_ours(name) and not is_ours(baseline) and now:
                yield name, f"x {baseline}", ratio, now, True
    for name, ratio in old["floor"].items():
        if is_ours(name) and name in new["floor"]:
            yield name, "times the floor", ratio, new["floor"][name], False
    for name, contender in old["contenders"].items():
        now = new["contenders"].get(name, {}).get("seconds")
        if same_device and is_ours(name) and "seconds" in contender and now:
            yield name, "seconds", contender["seconds"], now, False


def _single(
    old: dict[str, Any], new: dict[str, Any], threshold: float, same_device: bool
) -> Iterator[tuple[str, str, float, float, bool]]:
    """(contender, figure, old, new, whether they are apart) of what is measured once: the bytes that we keep for
    backward and that a step holds at its peak, the seconds of a first step.
    """
    tolerances = {
        ("saved", "own"): 0.0, ("saved", "by_reference"): 0.0, ("peak", "bytes"): threshold,
        ("first_step", "seconds"): max(FIRST_STEP, threshold),
    }  # fmt: skip
    for name, contender in old["contenders"].items():
        for (key, part), tolerance in tolerances.items():
            was = contender.get(key, {}).get(part)
            now = new["contenders"].get(name, {}).get(key, {}).get(part)
            if is_ours(name) and was is not None and now is not None and (same_device or key != "first_step"):
                yield name, f"{key} {part}".replace("_", " "), was, now, abs(_change(was, now)) > tolerance


def _errors(
    old: dict[str, Any], new: dict[str, Any], same_device: bool
) -> Iterator[tuple[str, str, float, float, bool]]:
    """(contender, figure, old error, new error, whether they are apart) of our errors against fp64.

    Apart: one is more than ERRORS times the other, beyond what PEFT's moved by, and above PEFT's in its own run.
    Without PEFT's, only errors from the same device can be told apart: another one may multiply in another precision.
    """
    for name, contender in old["contenders"].items():
        before, after = _errors_of(contender), _errors_of(new["contenders"].get(name, {}))
        for figure in [key for key in before if key in after and is_ours(name)]:
            was, now = before[figure], after[figure]
            theirs_was, theirs_now = (
                _errors_of(result["contenders"].get(REFERENCE, {})).get(figure) for result in (old, new)
            )
            if same_device or None not in (theirs_was, theirs_now):
                apart = _above(now, was, theirs_now, theirs_was) or _above(was, now, theirs_was, theirs_now)
                yield name, figure, was, now, apart


def _change(was: float, now: float) -> float:
    """Relative; from nothing it is infinite."""
    return now / was - 1 if was else math.inf if now else 0.0


def _above(error: float, other: float, theirs: float | None, theirs_other: float | None) -> bool:
    """Whether an error is too far above the other one; `theirs` and `theirs_other` are PEFT's beside each."""
    if math.isinf(error):  # whatever became of PEFT's
        return not math.isinf(other)
    moved = theirs / theirs_other if theirs and theirs_other else 1.0
    return error > ERRORS * other * max(1.0, moved) and error > (theirs or 0.0)


def _errors_of(contender: dict[str, Any]) -> dict[str, float]:
    """By figure; an error that is no number is the largest."""
    errors = {f"gradient error {name}": error for name, error in contender.get("gradient_error", {}).items()}
    if "output_error" in contender:
        errors["output error"] = contender["output_error"]
    return {figure: math.inf if math.isnan(error) else error for figure, error in errors.items()}


def _versions(old: dict[str, Any], new: dict[str, Any]) -> str:
    before, after = old["environment"]["versions"], new["environment"]["versions"]
    changed = (name for name in before if name != "fastpeft" and before[name] != after.get(name))
    return ", ".join(f"{name} {before[name]} -> {after.get(name)}" for name in changed)


def _different(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The parameters that both reports state and that differ; one that either of them does not know is no reason."""
    pairs = ((key, old[key], new[key]) for key in old if key in new and old[key] != new[key])
    return ", ".join(_printable(f"{key} {was} before, {now} now") for key, was, now in pairs)


def _device(record: dict[str, Any]) -> str:
    environment = record["environment"]
    cpu = f"{environment['cpu']['model']}, {environment['threads']} thread(s)"
    return f"{environment['gpu']['model']}, {cpu}" if environment.get("gpu") else cpu


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:200]
