"""What a suite consists of: cases, each of which compares contenders and yields one result."""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import torch

from fastpeft.benchmark.libraries import REFERENCE
from fastpeft.benchmark.timing import Clock, Step, Timing, clock_for, interleave

Libraries = Mapping[str, ModuleType]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Effort:
    """How long to measure one case."""

    budget_s: float = 6.0
    warmup: int = 2
    min_rounds: int = 7
    max_rounds: int = 200

    def measure(self, steps: Mapping[str, Step], clock: Clock) -> Timing:
        return interleave(
            steps, clock=clock, budget_s=self.budget_s,
            warmup=self.warmup, min_rounds=self.min_rounds, max_rounds=self.max_rounds,
        )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One comparison between contenders. A suite's own class adds the fields that tell its cases apart."""

    suite: ClassVar[str]
    baselines: ClassVar[tuple[str, ...]] = (REFERENCE,)
    effort: ClassVar[Effort | None] = None  # where a protocol says how long to measure

    device: str = field(default="cpu", kw_only=True)

    @property
    def name(self) -> str:
        """Unique within the suite."""
        raise NotImplementedError

    @property
    def params(self) -> dict[str, Any]:
        """What a reader needs in order to run the same case elsewhere."""
        return asdict(self)

    def steps(self, found: Libraries) -> Mapping[str, Step]:
        """What is timed, by contender."""
        del found
        return {}

    def facts(self, found: Libraries) -> Mapping[str, dict[str, Any]]:
        """Figures that are not times, by contender."""
        del found
        return {}


@dataclass
class Result:
    """What one case gave. Times in seconds; `speedup[baseline][contender]` is baseline time over contender time."""

    suite: str
    case: str
    params: dict[str, Any]
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)
    speedup: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    error: str | None = None

    def add_timing(self, timing: Timing, baselines: tuple[str, ...]) -> None:
        for name in timing.seconds:
            self.contenders.setdefault(name, {}).update(seconds=timing.spread(name).to_dict(), rounds=timing.rounds)
        for baseline in baselines:
            if baseline in timing.seconds:
                others = [name for name in timing.seconds if name != baseline]
                self.speedup[baseline] = {name: timing.speedup(name, baseline).to_dict() for name in others}


QUICK = Effort(budget_s=1.0, warmup=1, min_rounds=3, max_rounds=20)


def measure(case: Case, found: Libraries, effort: Effort) -> Result:
    """Time a case and collect its facts. What goes wrong in it is its result, so that the other cases still run."""
    result = Result(case.suite, case.name, case.params)
    try:
        steps = case.steps(found)
        if steps:
            result.add_timing((case.effort or effort).measure(steps, clock_for(case.device)), case.baselines)
        for name, facts in case.facts(found).items():
            result.contenders.setdefault(name, {}).update(facts)
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        if torch.device(case.device).type == "cuda":
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()
    return result
