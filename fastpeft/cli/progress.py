"""A training run on the terminal: a bar with loss, tokens a second and the time left; without a terminal, lines."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LogLastStep(TrainerCallback):
    """Logs the loss of the last steps too: a run ends between two logs, or before the first."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class AfterFirstStep(TrainerCallback):
    """Does something once, when a step was done: what fails at all mostly fails before that. No checkpoint is yet."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.action is not None:
            self.action()
            self.action = None


class Progress(TrainerCallback):
    """Shows each step on `console`; evaluations get a line of their own."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Bar | None = None
        self.loss = "loss  -   "
        self.start = self.first_tokens = 0.0
        self.first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.start, self.first_tokens = time.monotonic(), state.num_input_tokens_seen
        self.first_step = state.global_step
        if state.global_step:
            self.console.print(f"going on from step {state.global_step} of {state.max_steps}")
        if self.console.is_terminal:
            self.bar = Bar(
                TextColumn("[bold]train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
                TextColumn("{task.fields[speed]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                console=self.console,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, loss="", speed="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar:
            self.bar.update(self.task, completed=state.global_step, loss=self.loss, speed=self.speed(state))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, Any] = kwargs["logs"]
        if "eval_loss" in logs:
            self.console.print(f"step {state.global_step}: held-out loss {logs['eval_loss']:.3f}", highlight=False)
        elif "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.3f}"
            if self.bar is None:
                a_step = (time.monotonic() - self.start) / max(state.global_step - self.first_step, 1)
                left = a_step * (state.max_steps - state.global_step)
                text = (
                    f"step {state.global_step}/{state.max_steps}: {self.loss}, {self.speed(state)}, {left:.0f} s left"
                )
                self.console.print(text, highlight=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    def speed(self, state: TrainerState) -> str:
        seconds = max(time.monotonic() - self.start, 1e-6)
        return f"{(state.num_input_tokens_seen - self.first_tokens) / seconds:,.0f} tokens/s"
