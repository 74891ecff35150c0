"""Results as JSON (everything) and as a Markdown table (what a reader wants first)."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastpeft.adapter_files import write_text
from fastpeft.benchmark.cases import Result
from fastpeft.benchmark.libraries import FROZEN, OURS, REFERENCE

SCHEMA = 2  # 1 had no floor and no roofline
BYTES = (("saved", "own"), ("allocator", "own"), ("peak", "bytes"))  # facts whose ratio to PEFT's is wanted


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
        """Write `<stem>.json` and `<stem>.md` into `folder`, each whole or not at all. Returns both paths."""
        data, table = folder / f"{stem}.json", folder / f"{stem}.md"
        write_text(data, json.dumps(self.to_dict(), indent=1) + "\n")
        write_text(table, self.to_markdown())
        return data, table

    def to_markdown(self) -> str:
        lines = [machine(self.environment), ""]
        if self.environment.get("predicted"):
            lines += [
                f"Nothing was measured: the least possible times on {self.environment['predicted']}, and those that "
                "the bytes counted in our kernels predict.",
                "",
            ]
        if self.environment.get("ceilings"):
            lines += [_ceilings(self.environment["ceilings"]), ""]
        for suite in dict.fromkeys(result.suite for result in self.results):
            lines += _table(suite, [result for result in self.results if result.suite == suite])
        return "\n".join(lines)


def machine(environment: dict[str, Any]) -> str:
    """Device, threads, versions, commit and date, on one line."""
    env = environment
    versions = ", ".join(f"{name} {value}" for name, value in env["versions"].items() if value)
    where = f"{env['cpu']['model']} ({' '.join(env['cpu']['flags'])}), {env['threads']} thread(s)"
    if env["gpu"]:
        where = f"{env['gpu']['model']}, {where}"
    return f"{where}; Python {env['python']}, {versions}; commit {env['commit']}; {env['date']}"


def _ceilings(ceilings: dict[str, Any]) -> str:
    rates = ", ".join(f"{rate / 1e12:.4g} TFLOP/s {dtype}" for dtype, rate in ceilings["flops_per_s"].items())
    return (
        f"Limit: bytes over {ceilings['bytes_per_s'] / 1e9:.4g} GB/s or FLOP over {rates}, whichever takes longer "
        f"({ceilings['device']}, {ceilings['source']})."
    )


def _table(suite: str, results: list[Result]) -> list[str]:
    """One row for each contender of each case; a column that would be empty everywhere is left out."""
    columns: dict[str, None] = {}
    rows: list[dict[str, str]] = []
    for result in results:
        found = list(_rows(result))
        for row in found:
            columns.update(dict.fromkeys(row))
        rows += found
    heads = sorted(columns, key=lambda head: _ORDER.index(head) if head in _ORDER else _place(head))
    table = [heads, ["---"] * len(heads), *([row.get(head, "") for head in heads] for row in rows)]
    return [
        f"### {suite}",
        "",
        *("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in table),
        "",
    ]


_ORDER = (
    "case",
    "contender",
    "time (quartiles)",
    "x ",
    "times the floor (quartiles)",
    "limit",
    "predicted",
    "of the limit",
)


def _place(head: str) -> int:
    return _ORDER.index("x ") if head.startswith("x ") else len(_ORDER)


def _rows(result: Result) -> list[dict[str, str]]:
    rows = []
    if result.error:
        rows.append({"case": result.case, "contender": result.error})
    elif not result.contenders:
        for name in (FROZEN, OURS):
            rows.append({"case": result.case, "contender": _bold(name), "time (quartiles)": "", **_limit(result, name)})
    for name, contender in result.contenders.items():
        row = {"case": result.case, "contender": _bold(name)}
        if "seconds" in contender:
            row["time (quartiles)"] = _time(contender["seconds"])
        for baseline, ratios in result.speedup.items():
            if name in ratios:
                row[f"x {baseline} (quartiles)"] = _spread(ratios[name])
        if name in result.floor:
            row["times the floor (quartiles)"] = _spread(result.floor[name])
        rows.append({**row, **_limit(result, name), **_facts(result, name)})
    return rows


def _bold(name: str) -> str:
    return f"**{name}**" if name == OURS else name


def _limit(result: Result, name: str) -> dict[str, str]:
    """The least seconds of a contender, and how near it came: 100 % is the limit itself. Of ours also what its counted
    bytes predict."""
    if not result.roofline:
        return {}
    seconds = result.roofline["base_seconds" if name == FROZEN else "seconds"]
    cells = {"limit": f"{seconds * 1e3:.4g} ms"}
    if name == OURS and "predicted_seconds" in result.roofline:
        cells["predicted"] = f"{result.roofline['predicted_seconds'] * 1e3:.4g} ms"
    measured = result.contenders.get(name, {}).get("seconds")
    return {**cells, "of the limit": f"{seconds / measured['median']:.0%}"} if measured else cells


def _facts(result: Result, name: str) -> dict[str, str]:
    facts = facts_of(result.contenders[name])
    for key, part in BYTES:
        theirs = result.contenders.get(REFERENCE, {}).get(key, {}).get(part)
        ours = result.contenders[name].get(key, {}).get(part)
        if theirs and ours is not None and name != REFERENCE:
            facts[f"{key} {part}"] += f" ({ours / theirs:.3f} x peft's)"
    return facts


def _time(seconds: dict[str, float]) -> str:
    median, q1, q3 = (seconds[key] * 1e3 for key in ("median", "q1", "q3"))
    return f"{median:.4g} ms ({q1:.4g} to {q3:.4g})"


def _spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"


def facts_of(contender: dict[str, Any]) -> dict[str, str]:
    """A contender's figures that are not times, one column each."""
    facts: dict[str, str] = {}
    for key, value in contender.items():
        if key in ("seconds", "rounds"):
            continue
        for name, number in value.items() if isinstance(value, dict) else {"": value}.items():
            facts[f"{key} {name}".strip().replace("_", " ")] = _number(number)
    return facts


def _number(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
