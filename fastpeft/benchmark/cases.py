"""What a suite consists of: cases, each of which compares contenders and yields one result."""

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import torch

from fastpeft.benchmark.libraries import FROZEN, REFERENCE, is_ours
from fastpeft.benchmark.roofline import Ceilings, Work, predict
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
    reserve_s: ClassVar[float] = 0.0  # with less than this before the deadline, the case is not begun
    repeats: ClassVar[int] = 1  # calls in one step; times are those of one call
    keeps_first_step: ClassVar[bool] = False  # the time of each contender's first step is a figure of the case

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

    def work(self) -> Work | None:
        """What a step must move and compute; None: the case has no roofline."""
        return None

    def clock(self) -> Clock:
        return clock_for(self.device)

    def surroundings(self) -> AbstractContextManager[object]:
        """What must hold while the steps are made and run."""
        return nullcontext()


@dataclass
class Result:
    """What one case gave; times in seconds.

    Attributes:
        contenders: by name "seconds" and "rounds", the case's facts, or "failed" with the reason.
        speedup: `speedup[baseline][contender]` is baseline time over contender time, round by round.
        floor: contender time over the frozen base's time, round by round.
        roofline: bytes and FLOP that the step must move and compute, and the least seconds for that; on a GPU also the
            bytes that our kernels were counted to move beyond the base, and the seconds that these predict.
    """

    suite: str
    case: str
    params: dict[str, Any]
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)
    speedup: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    floor: dict[str, dict[str, float]] = field(default_factory=dict)
    roofline: dict[str, float] | None = None
    error: str | None = None

    def add_timing(self, timing: Timing, baselines: tuple[str, ...]) -> None:
        for name in timing.seconds:
            self.contenders.setdefault(name, {}).update(seconds=timing.spread(name).to_dict(), rounds=timing.rounds)
        for baseline in baselines:
            if baseline in timing.seconds:
                others = [name for name in timing.seconds if name not in (baseline, FROZEN)]
                self.speedup[baseline] = {name: timing.speedup(name, baseline).to_dict() for name in others}
        if FROZEN in timing.seconds:
            adapted = [name for name in timing.seconds if name != FROZEN]
            self.floor = {name: timing.speedup(FROZEN, name).to_dict() for name in adapted}


QUICK = Effort(budget_s=1.0, warmup=1, min_rounds=3, max_rounds=20)


def measure(case: Case, found: Libraries, effort: Effort, ceilings: Ceilings | None = None) -> Result:
    """Time a case and collect its facts. What goes wrong in it is its result, so that the other cases still run."""
    result = predicted(case, ceilings)
    try:
        with case.surroundings():
            _time(case, found, case.effort or effort, result)
        for name, facts in case.facts(found).items():
            result.contenders.setdefault(name, {}).update(facts)
    except Exception as error:
        result.error = _one_line(error)
    finally:
        if torch.device(case.device).type == "cuda":
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()
    return result


def predicted(case: Case, ceilings: Ceilings | None) -> Result:
    """The case's result before anything was measured: its roofline, where it has one."""
    result = Result(case.suite, case.name, case.params)
    work = case.work()
    if ceilings and work:
        result.roofline = predict(work, ceilings, on_gpu=torch.device(case.device).type == "cuda")
    return result


def _time(case: Case, found: Libraries, effort: Effort, result: Result) -> None:
    clock = case.clock()
    steps = {}
    for name, step in case.steps(found).items():
        try:
            first = clock(step) / case.repeats
        except Exception as error:  # a peer that cannot do the case is named; the others are still compared
            if is_ours(name):
                raise
            result.contenders[name] = {"failed": _one_line(error)}
            continue
        steps[name] = step
        if case.keeps_first_step:
            result.contenders[name] = {"first_step": {"seconds": first}}
    if steps:
        timing = effort.measure(steps, lambda step: clock(step) / case.repeats)
        result.add_timing(timing, case.baselines)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
