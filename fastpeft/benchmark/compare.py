"""Two reports of `fastpeft bench` against each other: what became slower, what became faster, what cannot be said.

Machines are noisy. What is compared first is our ratio to each baseline and to the frozen base, measured in turn in one
process; absolute times are compared only where both reports come from the same device. A change counts when the
quartiles of the two do not overlap and the medians differ by more than the threshold. Saved bytes are exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastpeft.benchmark.libraries import is_ours

THRESHOLD = 0.05


@dataclass(frozen=True)
class Change:
    """One figure of one contender that is surely worse or better than it was.

    Attributes:
        figure: "x peft", "times the floor", "seconds", "saved own" ...
        worse: the relative change of the median for the worse; below zero it became better.
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
        return f"{self.suite} {self.case} {self.contender}: {self.figure} {old} -> {new}, {abs(self.worse):.1%} {word}"


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
        return 1 if self.regressions or self.failures else 0

    def lines(self) -> list[str]:
        """The comparison as plain text, the worst first."""
        worst = sorted(self.regressions, key=lambda change: -change.worse)
        best = sorted(self.improvements, key=lambda change: change.worse)
        lines = [*(f"REGRESSION  {change}" for change in worst), *(f"FAILED      {line}" for line in self.failures)]
        lines += [f"improvement {change}" for change in best] + [f"note        {line}" for line in self.notes]
        count = len(self.regressions) + len(self.failures)
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
    if not comparison.figures:
        comparison.notes.append("the reports have no figure in common")
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
            found = Change(old["suite"], old["case"], contender, figure, was["median"], now["median"], change)
            (comparison.regressions if change > 0 else comparison.improvements).append(found)
    for contender, figure, was_bytes, now_bytes in _bytes(old, new):
        comparison.figures += 1
        change = now_bytes / was_bytes - 1 if was_bytes else float(bool(now_bytes))
        if abs(change) > (threshold if figure == "peak bytes" else 0.0):
            found = Change(old["suite"], old["case"], contender, figure, was_bytes, now_bytes, change)
            (comparison.regressions if change > 0 else comparison.improvements).append(found)


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


def _bytes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    """(contender, figure, old bytes, new bytes) of what we keep for backward, and at the peak of a step."""
    for name, contender in old["contenders"].items():
        for key, part in (("saved", "own"), ("saved", "by_reference"), ("peak", "bytes")):
            was = contender.get(key, {}).get(part)
            now = new["contenders"].get(name, {}).get(key, {}).get(part)
            if is_ours(name) and was is not None and now is not None:
                yield name, f"{key} {part.replace('_', ' ')}", was, now


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
