"""Suite "joint": a sweep over rank, alpha and learning rate, all adapters in one run and one run after the other."""

import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, ClassVar, cast

import torch
from torch import nn

from fastpeft.benchmark.cases import DTYPES, Case, Effort, Libraries
from fastpeft.benchmark.libraries import FROZEN, OURS, REFERENCE
from fastpeft.benchmark.timing import Clock, Step, clock_for

ALONE = f"{OURS}-alone"  # our adapters, one run after the other
COMPARED = 5  # updates whose losses are compared
UPDATES = 3  # that a timed step makes
ROWS = 16  # of each adapter's dataset


@dataclass(frozen=True)
class JointCase(Case):
    """An update of every adapter on the demo's model, in Trainer's own loop: data, forward, backward, clipping, AdamW.

    `fastpeft` makes them all at once with JointTrainer; `fastpeft-alone` and `peft`, which refuses to train mixed
    batches, make one after the other with transformers' Trainer, each on a model of its own. Starting a run is outside
    of the times, which favours the many. The frozen base runs forward and backward on the rows of all.
    """

    suite: ClassVar[str] = "joint"
    baselines: ClassVar[tuple[str, ...]] = (ALONE, REFERENCE)
    effort: ClassVar[Effort | None] = Effort(budget_s=15.0, warmup=1, min_rounds=7, max_rounds=40)
    repeats: ClassVar[int] = UPDATES

    dtype: str
    rows: int
    tokens: int
    adapters: int = 8

    @property
    def name(self) -> str:
        return f"{self.dtype}-A{self.adapters}-{self.rows}x{self.tokens}"

    @property
    def sweep(self) -> dict[str, dict[str, Any]]:
        """By adapter: rank, alpha over rank, learning rate."""
        grid = itertools.product((8, 16), (1, 2), (5e-4, 2e-3))
        points = itertools.islice(itertools.cycle(grid), self.adapters)
        return {f"run_{i}": {"r": r, "alpha": r * ratio, "lr": lr} for i, (r, ratio, lr) in enumerate(points)}

    def base(self) -> nn.Module:
        from fastpeft.cli.models import load_base
        from fastpeft.demo import BASE

        model = load_base(str(BASE), self.dtype, self.device).to(DTYPES[self.dtype])
        model.config.use_cache = False
        return cast(nn.Module, model)

    def model(self, library: ModuleType, names: list[str]) -> Any:
        """The base with these points of the sweep on it; an adapter's weights depend on its name alone."""
        model: Any = None
        for name in names:
            point = self.sweep[name]
            config = library.LoraConfig(
                r=point["r"], lora_alpha=point["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
            )
            torch.manual_seed(int(name.rpartition("_")[2]))
            if model is None:
                model = library.get_peft_model(self.base(), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        return model.train()

    def data(self, name: str) -> list[dict[str, list[int]]]:
        """Rows of random tokens, other ones for each adapter: their values do not change the time."""
        generator = torch.Generator().manual_seed(1000 + int(name.rpartition("_")[2]))
        ids = torch.randint(3, 3000, (ROWS, self.tokens), generator=generator).tolist()
        return [{"input_ids": row, "labels": row} for row in ids]

    def arguments(self, folder: str, timed: bool, **more: Any) -> Any:
        from transformers import TrainingArguments

        return TrainingArguments(
            output_dir=folder, use_cpu=torch.device(self.device).type == "cpu", report_to="none", disable_tqdm=True,
            logging_strategy="no" if timed else "steps", logging_steps=1, save_strategy="no",
            per_device_train_batch_size=self.rows, max_steps=UPDATES if timed else COMPARED,
            lr_scheduler_type="constant", **more,
        )  # fmt: skip

    def together(self, library: ModuleType, folder: str, timed: bool = False) -> Any:
        from fastpeft.cli.data import PadRight
        from fastpeft.joint import AdapterTraining, JointTrainer

        runs = {
            name: AdapterTraining(train_dataset=self.data(name), learning_rate=point["lr"])
            for name, point in self.sweep.items()
        }
        model = self.model(library, list(self.sweep))
        return _quiet(JointTrainer(model, self.arguments(folder, timed), runs, data_collator=PadRight(0)))

    def alone(self, library: ModuleType, name: str, folder: str, timed: bool = False) -> Any:
        from transformers import Trainer

        from fastpeft.cli.data import PadRight

        args = self.arguments(folder, timed, learning_rate=self.sweep[name]["lr"])
        model = self.model(library, [name])
        return _quiet(Trainer(model, args, data_collator=PadRight(0), train_dataset=self.data(name)))

    def one_by_one(self, found: Libraries) -> dict[str, ModuleType]:
        """Contenders that train one adapter after the other."""
        return {ALONE if name == OURS else name: library for name, library in found.items()}

    def clock(self) -> Clock:
        """Each step measures its own seconds: those of the loops, without what starts and ends a run."""
        return lambda step: cast(float, step())

    def steps(self, found: Libraries) -> Mapping[str, Step]:
        steps: dict[str, Step] = {FROZEN: self._frozen_step()}
        with tempfile.TemporaryDirectory() as folder:  # Trainer asks for one, and writes nothing into it
            if OURS in found:
                steps[OURS] = partial(_seconds_of_loops, [self.together(found[OURS], folder, timed=True)])
            for contender, library in self.one_by_one(found).items():
                runs = [self.alone(library, name, folder, timed=True) for name in self.sweep]
                steps[contender] = partial(_seconds_of_loops, runs)
        return steps

    def _frozen_step(self) -> Step:
        model: Any = self.base().requires_grad_(False).train()
        model.get_input_embeddings().register_forward_hook(lambda module, ids, out: out.requires_grad_())
        rows = [row["input_ids"] for name in self.sweep for row in self.data(name)[: self.rows]]
        ids = torch.tensor(rows, device=self.device)

        def updates() -> None:
            for _ in range(UPDATES):
                model(input_ids=ids, labels=ids).loss.backward()

        return lambda: clock_for(self.device)(updates)

    def facts(self, found: Libraries) -> dict[str, dict[str, Any]]:
        """The largest relative difference between an adapter's loss in the joint run and in a run of it alone."""
        with tempfile.TemporaryDirectory() as folder:
            if OURS not in found:
                return {}
            joint = self.together(found[OURS], folder)
            joint.train()
            together = {name: _losses(joint, f"loss/{name}") for name in self.sweep}
            facts = {}
            for contender, library in self.one_by_one(found).items():
                worst = 0.0
                for name in self.sweep:
                    single = self.alone(library, name, folder)
                    single.train()
                    pairs = zip(together[name], _losses(single, "loss"), strict=True)
                    worst = max(worst, *(abs(ours - its) / its for ours, its in pairs))
                facts[contender] = {"loss_difference": worst}
        return facts


def _quiet(trainer: Any) -> Any:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def _losses(trainer: Any, key: str) -> list[float]:
    return [record[key] for record in trainer.state.log_history if key in record]


def _seconds_of_loops(trainers: list[Any]) -> float:
    """Train each for its updates, and add up the seconds from the beginning of the first to the end of the last one."""
    total = 0.0
    for trainer in trainers:
        watch = _stopwatch()
        trainer.add_callback(watch)
        trainer.train()
        trainer.remove_callback(watch)
        total += watch.end - watch.start
    return total


def _stopwatch() -> Any:
    """A callback that knows when a run began its first update and ended its last one."""
    from transformers import TrainerCallback

    def now(args: Any) -> float:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    class Stopwatch(TrainerCallback):
        start = end = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.start = self.start or now(args)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.end = now(args)

    return Stopwatch()


def joint_cases(quick: bool, device: str) -> Iterator[JointCase]:
    for dtype in ("bf16",) if quick else ("fp32", "bf16"):
        for rows, tokens in ((1, 32),) if quick else ((1, 32), (1, 64), (2, 128)):
            yield JointCase(dtype, rows, tokens, device=device)
