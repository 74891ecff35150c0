"""How the pytest-benchmark suites measure: reference PEFT's step runs before each of ours, outside the timed part."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from fastpeft.benchmark import Timing, available, environment, torch_threads, wall_clock
from fastpeft.benchmark.cases import Case
from fastpeft.benchmark.libraries import OURS, REFERENCE
from fastpeft.benchmark.report import facts_of


@pytest.fixture(scope="session")
def libraries() -> dict[str, Any]:
    found = available()
    if REFERENCE not in found:
        pytest.exit("compared with reference PEFT: install it (pip install 'fastpeft[bench]')", returncode=2)
    return found


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield


class Comparison:
    """One case, measured for us and for reference PEFT; all figures go into pytest-benchmark's record."""

    def __init__(self, benchmark: Any, libraries: Mapping[str, Any]) -> None:
        self.benchmark, self.libraries = benchmark, libraries

    def time(self, case: Case, rounds: int) -> None:
        """Time our step with PEFT's in between; keep the ratio of each round."""
        steps = case.steps(self.libraries)
        reference: list[float] = []
        for step in steps.values():  # to warm up
            step()
        self.benchmark.pedantic(
            steps[OURS], setup=lambda: reference.append(wall_clock(steps[REFERENCE])), rounds=rounds, iterations=1
        )
        if self.benchmark.disabled:  # --benchmark-disable: each ran, nothing was measured
            return
        timing = Timing({OURS: self.benchmark.stats.stats.data, REFERENCE: reference})
        speedup, peft = timing.speedup(OURS, REFERENCE), timing.spread(REFERENCE)
        self._keep(case, case.facts(self.libraries), speedup=speedup.to_dict(), peft_seconds=peft.to_dict())

    def count(self, case: Case) -> None:
        """Figures that are not times; the time in the table is what counting took."""
        facts = self.benchmark.pedantic(case.facts, args=(self.libraries,), rounds=1)
        self._keep(case, facts)

    def _keep(self, case: Case, facts: Mapping[str, Any], **more: Any) -> None:
        self.benchmark.group = case.suite
        described = {"suite": case.suite, "name": case.name, "params": case.params}
        self.benchmark.extra_info.update(case=described, facts=facts, **more)


@pytest.fixture
def compare(benchmark: Any, libraries: dict[str, Any]) -> Comparison:
    return Comparison(benchmark, libraries)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The record that pytest-benchmark writes also says what decides bf16 speed here."""
    machine_info["fastpeft"] = environment.describe(threads=1)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the ratios: pytest-benchmark's own table has ours alone."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    rows = [bench for bench in (session.benchmarks if session else []) if "case" in bench.extra_info]
    if not rows:
        return
    terminalreporter.section("fastpeft against reference PEFT: times as fast, median of rounds (quartiles)")
    for bench in rows:
        info = bench.extra_info
        speedup = "saved bytes only"
        if "speedup" in info:
            speedup = "{median:.3f} ({q1:.3f} to {q3:.3f})".format(**info["speedup"])
        terminalreporter.write_line(f"{info['case']['suite']:12s} {info['case']['name']:20s} {speedup}")
        for name, facts in info["facts"].items():
            columns = ", ".join(f"{key} {value}" for key, value in facts_of(facts).items())
            terminalreporter.write_line(f"{'':12s} {name:20s} {columns}")
