"""What the demo measures: held-out losses, and a training step beside reference PEFT's."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.benchmark import available, interleave, saved_bytes, wall_clock
from fastpeft.benchmark.environment import version
from fastpeft.cli.data import IGNORED, PadRight

Rows = Sequence[dict[str, list[int]]]
OPTIONS = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@torch.no_grad()
def heldout_loss(model: nn.Module, rows: Rows, padding: int) -> float:
    """Mean cross entropy in nats over every target token of the rows."""
    total, count = 0.0, 0
    for start in range(0, len(rows), 8):
        batch = PadRight(padding)(rows[start : start + 8])
        targets = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += model(**batch).loss.double().item() * targets
        count += targets
    return total / count


def settle_threads(model: nn.Module, rows: Rows, padding: int) -> int:
    """Let torch use all its threads, or one where that is faster: on a busy machine they wait for each other."""
    most = torch.get_num_threads()
    if most > 1:
        batch = PadRight(padding)(rows[:4])
        timing = interleave(
            {str(n): partial(_forward_with, n, model, batch) for n in (1, most)}, clock=wall_clock, budget_s=2
        )
        fastest = min((1, most), key=lambda n: timing.spread(str(n)).median)
        torch.set_num_threads(fastest)
    return torch.get_num_threads()


@torch.no_grad()
def _forward_with(threads: int, model: nn.Module, batch: dict[str, Tensor]) -> None:
    torch.set_num_threads(threads)
    model(**batch)


def reference_installed() -> bool:
    return "peft" in available()


def compare_with_reference(load: Callable[[], nn.Module], rows: Rows, padding: int, seconds: float) -> dict[str, Any]:
    """One training step of both libraries, in turn in this process: same base, same options, same batch.

    Args:
        load: makes the base, afresh for each library.
        seconds: how long to measure.

    Returns:
        {"version", "batch", "rounds", "ratio", "step_seconds": {library: median}, "saved_bytes": {library: bytes}}.
    """
    batch = PadRight(padding)(rows[:8])
    steps, kept = {}, {}
    for name, library in available().items():
        model = library.get_peft_model(load(), library.LoraConfig(**OPTIONS)).train()
        saved = saved_bytes(partial(model, **batch), parameters=model.parameters())
        kept[name] = saved.own + saved.by_reference
        steps[name] = training_step(model, batch)
    timing = interleave(steps, clock=wall_clock, budget_s=seconds)
    return {
        "version": version("peft"),
        "batch": list(batch["input_ids"].shape),
        "rounds": timing.rounds,
        "ratio": timing.speedup("fastpeft", "peft").median,
        "step_seconds": {name: timing.spread(name).median for name in steps},
        "saved_bytes": kept,
    }


def training_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
