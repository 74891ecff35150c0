"""Results as JSON (everything) and as a Markdown table (what a reader wants first)."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastpeft.benchmark.cases import Result
from fastpeft.benchmark.libraries import OURS

SCHEMA = 1


@dataclass
class Report:
    """The results of one run, with the machine they were measured on."""

    environment: dict[str, Any]
    results: list[Result]

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "environment": self.environment, "results": [asdict(r) for r in self.results]}

    @property
    def errors(self) -> list[Result]:
        return [result for result in self.results if result.error]

    def write(self, folder: Path, stem: str = "bench") -> tuple[Path, Path]:
        """Write `<stem>.json` and `<stem>.md` into `folder`. Returns both paths."""
        folder.mkdir(parents=True, exist_ok=True)
        data, table = folder / f"{stem}.json", folder / f"{stem}.md"
        data.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        table.write_text(self.to_markdown())
        return data, table

    def to_markdown(self) -> str:
        lines = [self._machine(), ""]
        for suite in dict.fromkeys(result.suite for result in self.results):
            lines += self._table(suite, [result for result in self.results if result.suite == suite])
        return "\n".join(lines)

    def _machine(self) -> str:
        env = self.environment
        versions = ", ".join(f"{name} {value}" for name, value in env["versions"].items() if value)
        where = f"{env['cpu']['model']} ({' '.join(env['cpu']['flags'])}), {env['threads']} thread(s)"
        if env["gpu"]:
            where = f"{env['gpu']['model']}, {where}"
        return f"{where}; Python {env['python']}, {versions}; commit {env['commit']}; {env['date']}"

    def _table(self, suite: str, results: list[Result]) -> list[str]:
        baselines = list(dict.fromkeys(name for result in results for name in result.speedup))
        heads = ["case", "contender", "time (quartiles)", *(f"x {name} (quartiles)" for name in baselines)]
        facts = list(
            dict.fromkeys(key for result in results for c in result.contenders.values() for key in facts_of(c))
        )
        rows = [[*heads, *facts], ["---"] * (len(heads) + len(facts))]
        for result in results:
            if result.error:
                rows.append([result.case, result.error, *[""] * (len(heads) + len(facts) - 2)])
            for name, contender in result.contenders.items():
                bold = f"**{name}**" if name == OURS else name
                ratios = [_ratio(result.speedup.get(baseline, {}).get(name)) for baseline in baselines]
                known = facts_of(contender)
                rows.append([result.case, bold, _time(contender), *ratios, *(known.get(key, "") for key in facts)])
        return [f"### {suite}", "", *("| " + " | ".join(row) + " |" for row in rows), ""]


def _time(contender: dict[str, Any]) -> str:
    if "seconds" not in contender:
        return ""
    median, q1, q3 = (contender["seconds"][key] * 1e3 for key in ("median", "q1", "q3"))
    return f"{median:.4g} ms ({q1:.4g} to {q3:.4g})"


def _ratio(speedup: dict[str, float] | None) -> str:
    return f"{speedup['median']:.3f} ({speedup['q1']:.3f} to {speedup['q3']:.3f})" if speedup else ""


def facts_of(contender: dict[str, Any]) -> dict[str, str]:
    """A contender's figures that are not times, one column each."""
    facts: dict[str, str] = {}
    for key, value in contender.items():
        if key in ("seconds", "rounds"):
            continue
        for name, number in value.items() if isinstance(value, dict) else {"": value}.items():
            text = f"{number:,}" if isinstance(number, int) else f"{number:.4g}"
            facts[f"{key} {name}".strip().replace("_", " ")] = text
    return facts
