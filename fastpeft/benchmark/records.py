"""Reading a report that some run wrote. The file may come from anywhere: nothing in it is taken on trust."""

import json
import math
from pathlib import Path
from typing import Any

from fastpeft.benchmark.report import SCHEMA

READABLE = (1, SCHEMA)  # schema 1 lacks the floor and the roofline, and is read as one that has none
LARGEST = 64 * 2**20  # bytes; a full run writes well under one
MOST_CASES = 1000  # a full run on a GPU has some 300


class ReportError(ValueError):
    """A file is not a report of `fastpeft bench`; the message names the file and says what was found, on one line."""


def read(path: Path) -> dict[str, Any]:
    """The record of a report, checked as far as comparing and drawing rely on it.

    Raises:
        ReportError: the file is missing, too large, not JSON, of another schema, or not shaped like a report.
    """
    try:
        if not path.is_file():
            raise ReportError(f"{path}: no such file; give the bench.json that a run wrote")
        if path.stat().st_size > LARGEST:
            raise ReportError(f"{path}: larger than {LARGEST >> 20} MiB, so no report of fastpeft bench")
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: cannot be read: {type(error).__name__}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ReportError):
            raise
        raise ReportError(f"{path}: not JSON; give the bench.json that a run wrote, not bench.md") from error
    try:
        return _checked(record)
    except _WrongShape as error:
        said = "".join(
            char if char.isprintable() else " " for char in str(error)
        )  # parts of it are the file's own words
        raise ReportError(f"{path}: {said[:300]}") from None


class _WrongShape(Exception):
    pass


def _checked(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict) or "schema" not in record:
        raise _WrongShape("no report of fastpeft bench: it names no schema")
    if record["schema"] not in READABLE or isinstance(record["schema"], bool):
        raise _WrongShape(
            f"schema {str(record['schema'])[:20]!r}, but this version reads {' and '.join(map(str, READABLE))}; "
            "measure again"
        )
    environment = _dict(record.get("environment"), "environment")
    for key in ("cpu", "versions"):
        _dict(environment.get(key), f"environment.{key}")
    _text(environment["cpu"].get("model"), "environment.cpu.model")
    if environment.setdefault("gpu", None) is not None:
        _text(_dict(environment["gpu"], "environment.gpu").get("model"), "environment.gpu.model")
    _number(environment.get("threads"), "environment.threads")
    for key in ("python", "date"):
        _text(environment.get(key), f"environment.{key}")
    for key in ("commit", "device"):
        if environment.setdefault(key, None) is not None:
            _text(environment[key], f"environment.{key}")
    if not isinstance(environment["cpu"].get("flags"), list):
        raise _WrongShape("environment.cpu.flags: expected a list")
    for flag in environment["cpu"]["flags"]:
        _text(flag, "environment.cpu.flags")
    for name, version in environment["versions"].items():
        _text(name, "environment.versions")
        if version is not None:
            _text(version, f"environment.versions.{name}")
    if environment.get("ceilings") is not None:
        _check_ceilings(_dict(environment["ceilings"], "environment.ceilings"))
    if not isinstance(record.get("results"), list):
        raise _WrongShape("results: expected a list")
    if len(record["results"]) > MOST_CASES:
        raise _WrongShape(f"results: {len(record['results'])} cases, at most {MOST_CASES} are read")
    seen = set()
    for place, result in enumerate(record["results"]):
        _check_result(_dict(result, f"results[{place}]"), f"results[{place}]")
        pair = result["suite"], result["case"]
        if pair in seen:
            raise _WrongShape(f"{pair[0]} {pair[1]} appears twice")
        seen.add(pair)
    return record


def _check_ceilings(ceilings: dict[str, Any]) -> None:
    for key in ("device", "source"):
        _text(ceilings.get(key), f"environment.ceilings.{key}")
    _number(ceilings.get("bytes_per_s"), "environment.ceilings.bytes_per_s", above=0)
    for name, rate in _dict(ceilings.get("flops_per_s"), "environment.ceilings.flops_per_s").items():
        _number(rate, f"environment.ceilings.flops_per_s.{name}", above=0)


def _check_result(result: dict[str, Any], where: str) -> None:
    for key in ("suite", "case"):
        _text(result.get(key), f"{where}.{key}")
    where = f"{result['suite']} {result['case']}"
    if not isinstance(result.setdefault("error", None), str | None):
        raise _WrongShape(f"{where}: error: expected text")
    _check_params(_dict(result.get("params"), f"{where}: params"), f"{where}: params")
    for name, contender in _dict(result.get("contenders"), f"{where}: contenders").items():
        _text(name, f"{where}: contender")
        if "seconds" in _dict(contender, f"{where}: {name}"):
            _spread(contender["seconds"], f"{where}: {name}: seconds")
        for key in ("saved", "allocator", "peak"):
            for part, value in _dict(contender.get(key, {}), f"{where}: {name}: {key}").items():
                _number(value, f"{where}: {name}: {key}.{part}")
        _check_single(contender, f"{where}: {name}")
    for baseline, ratios in _dict(result.get("speedup"), f"{where}: speedup").items():
        _text(baseline, f"{where}: speedup")
        for name, ratio in _dict(ratios, f"{where}: speedup {baseline}").items():
            _spread(ratio, f"{where}: speedup {baseline} {_text(name, 'contender')}")
    for name, ratio in _dict(result.setdefault("floor", {}), f"{where}: floor").items():
        _spread(ratio, f"{where}: floor {_text(name, 'contender')}")
    roofline = result.setdefault("roofline", None)
    if roofline is not None:
        for key in ("bytes", "flops", "base_seconds", "seconds"):
            _number(_dict(roofline, f"{where}: roofline").get(key), f"{where}: roofline.{key}", above=0)
        for key in ("kernel_bytes", "predicted_seconds"):  # on a GPU only, and not in older reports
            _number(roofline.get(key, 1.0), f"{where}: roofline.{key}", above=0)


def _check_single(contender: dict[str, Any], where: str) -> None:
    """What comparing reads beside times and bytes. An error against fp64 may be infinite or no number."""
    first_step = _dict(contender.get("first_step", {}), f"{where}: first_step")
    if "seconds" in first_step:
        _number(first_step["seconds"], f"{where}: first_step.seconds", above=0)
    gradients = _dict(contender.get("gradient_error", {}), f"{where}: gradient_error")
    for name, error in [*gradients.items(), ("output_error", contender.get("output_error", 0.0))]:
        _text(name, f"{where}: gradient_error")
        if not isinstance(error, float) or error < 0:
            _number(error, f"{where}: error of {name}")


def _check_params(params: dict[str, Any], where: str) -> None:
    """Where a case lies on the axis of a scaling plot. Anything else is only ever compared for equality."""
    if "axis" not in params:
        return
    if params["axis"] not in ("M", "r", "N"):
        raise _WrongShape(f"{where}.axis: expected M, r or N")
    for size in ("M", "K", "N", "r"):
        _number(params.get(size), f"{where}.{size}", above=0)
    _text(params.get("dtype"), f"{where}.dtype")
    _number(params.get("dropout"), f"{where}.dropout")


def _spread(value: Any, where: str) -> None:
    """Median and quartiles, in their order, above zero: they are divided by."""
    q1, median, q3 = (
        _number(_dict(value, where).get(key), f"{where}.{key}", above=0) for key in ("q1", "median", "q3")
    )
    if not 1e-12 < q1 <= median <= q3:
        raise _WrongShape(f"{where}: quartiles out of order")


def _dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _WrongShape(f"{where}: expected an object, got {type(value).__name__}")
    return value


def _text(value: Any, where: str) -> str:
    """A name that may be printed: no control characters, which a terminal would obey."""
    if not isinstance(value, str) or not value.isprintable() or len(value) > 200:
        raise _WrongShape(f"{where}: expected a line of text")
    return value


def _number(value: Any, where: str, above: float | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _WrongShape(f"{where}: expected a number, got {type(value).__name__}")
    if abs(value) > 1e24 or not math.isfinite(value) or value < 0 or (above is not None and value <= above):
        raise _WrongShape(f"{where}: expected a {'positive' if above is not None else 'non-negative'} finite number")
    return value
