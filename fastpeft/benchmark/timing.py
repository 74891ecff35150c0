"""Time several versions of one step fairly on a machine that is never quite at rest.

The versions run in turn, A B A B ..., one step each a round, so that a slow minute hits all of them. What is compared
is the ratio within a round; what is reported is the median over rounds, with quartiles: a mean follows the outliers.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

Step = Callable[[], object]
Clock = Callable[[Step], float]  # runs a step, returns the seconds it took


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and minimum of some repeated measurement, in its own unit."""

    median: float
    q1: float
    q3: float
    min: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) < 2:
            return cls(*[values[0]] * 4)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3, min(values))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Timing:
    """Seconds of every version in every round: `seconds[name][round]`."""

    seconds: Mapping[str, Sequence[float]]

    @property
    def rounds(self) -> int:
        return min(len(values) for values in self.seconds.values())

    def spread(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def speedup(self, name: str, baseline: str) -> Spread:
        """How many times as fast `name` is as `baseline`: the ratio of their times, round by round."""
        pairs = zip(self.seconds[baseline], self.seconds[name], strict=True)
        return Spread.of([theirs / ours for theirs, ours in pairs])


def interleave(
    steps: Mapping[str, Step],
    *,
    clock: Clock,
    budget_s: float,
    warmup: int = 2,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> Timing:
    """Run every step once a round until the rounds have taken `budget_s` seconds (within the two bounds on rounds)."""
    for _ in range(warmup):
        for step in steps.values():
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    spent, rounds = 0.0, 0
    with _no_garbage_collection():
        while rounds < min_rounds or (spent < budget_s and rounds < max_rounds):
            for name, step in steps.items():
                seconds[name].append(clock(step))
                spent += seconds[name][-1]
            rounds += 1
    return Timing(seconds)


def wall_clock(step: Step) -> float:
    """Seconds of a step that is over when it returns: on the CPU."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def cuda_clock(step: Step) -> float:
    """Seconds between two events around what the step queues on the current CUDA stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def clock_for(device: str) -> Clock:
    return cuda_clock if torch.device(device).type == "cuda" else wall_clock


def graph_replay(step: Step, device: str) -> Step:
    """`step` captured as a CUDA graph, to be replayed without Python; on the CPU the step itself."""
    if torch.device(device).type != "cuda":
        return step
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialisation must be over before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
