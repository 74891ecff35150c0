"""Train a LoRA adapter with transformers' Trainer: what `fastpeft train` and the demo run."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpeft.cli.curves import write_curves
from fastpeft.cli.data import Document, PadRight, hold_out, make_blocks, read_documents
from fastpeft.cli.errors import CommandError, one_line
from fastpeft.cli.models import load_base, load_tokenizer, resolve_base
from fastpeft.cli.output import RECORD, check_output, open_output, step_of, write_json
from fastpeft.cli.settings import TrainSettings

if TYPE_CHECKING:
    from rich.console import Console

Rows = list[dict[str, list[int]]]


@dataclass(frozen=True)
class TrainResult:
    """What a run reached."""

    model: Any  # the PeftModel, on its device
    tokenizer: Any
    steps: int
    train_loss: float  # of the last logged steps
    eval_loss: float | None  # of the saved adapter
    seconds: float
    tokens: int
    trainable: int
    parameters: int
    png: Path | None


def train(settings: TrainSettings, show: "Console | None" = None) -> TrainResult:
    """Train, evaluate, save.

    Args:
        show: a rich Console for progress; None is silent.

    Raises:
        CommandError: an argument or a file that cannot be used, a device that is out of memory, or a training that
            diverged. Nothing is written or removed before a first step was done.
    """
    from fastpeft.cli.progress import AfterFirstStep

    settings.base = resolve_base(settings.base)
    settings.check()
    checkpoint = check_output(settings)
    documents, held = load_documents(settings)
    tokenizer = load_tokenizer(settings.base, settings.revision)
    blocks = make_blocks(documents, tokenizer, settings.block_size, settings.pack)
    eval_blocks = make_blocks(held, tokenizer, settings.block_size, settings.pack)
    if not blocks:
        raise CommandError("the data is too short: not one training row of two tokens comes out of it")
    model = make_model(settings)
    check_length(model, max(len(row["input_ids"]) for row in blocks + eval_blocks))
    trainer = make_trainer(settings, model, tokenizer, blocks, eval_blocks, show)
    trainer.add_callback(AfterFirstStep(lambda: open_output(settings)))
    seconds = run_trainer(trainer, checkpoint, planned_steps(settings, len(blocks)))
    check_finite(model, settings)
    model.save_pretrained(settings.output)

    log = trainer.state.log_history
    evaluations = [row["eval_loss"] for row in log if "eval_loss" in row]
    eval_loss = trainer.state.best_metric if settings.load_best else (evaluations or [None])[-1]
    trainable, parameters = model.get_nb_trainable_parameters()
    result = TrainResult(
        model=model.eval(), tokenizer=tokenizer, steps=trainer.state.global_step,
        train_loss=[row["loss"] for row in log if "loss" in row][-1], eval_loss=eval_loss, seconds=seconds,
        tokens=trainer.state.num_input_tokens_seen, trainable=trainable, parameters=parameters,
        png=write_curves(log, settings.output),
    )  # fmt: skip
    keep = ("steps", "train_loss", "eval_loss", "seconds", "tokens", "trainable", "parameters")
    record = settings.record() | {"result": {key: getattr(result, key) for key in keep}}
    write_json(settings.output / RECORD, record)
    return result


def run_trainer(trainer: Any, checkpoint: Path | None, planned: int) -> float:
    """The steps themselves; returns the seconds they took."""
    from transformers import TrainerState

    start = time.monotonic()
    if checkpoint and step_of(checkpoint) >= planned:  # Trainer would take one step more
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        trainer._load_from_checkpoint(str(checkpoint))
        return time.monotonic() - start
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's has no class of its own
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        advice = "lower --batch-size (and raise --accumulation), lower --block-size, or add --gradient-checkpointing"
        raise CommandError(f"out of memory: {advice}", code=1) from error
    return time.monotonic() - start


def check_length(model: Any, longest: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and 0 < limit < longest:
        raise CommandError(f"the model reads {limit} tokens and a training row has {longest}: add --block-size {limit}")


def check_finite(model: Any, settings: TrainSettings) -> None:
    if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
        raise CommandError(
            f"the training diverged: the adapter holds NaN or infinity and was not saved; lower --learning-rate "
            f"(it was {settings.learning_rate:g}) and start anew with --overwrite",
            code=1,
        )


def load_documents(settings: TrainSettings) -> tuple[list[Document], list[Document]]:
    documents = [d for path in settings.data for d in read_documents(path, settings.text_field)]
    if settings.eval_data:
        return documents, [d for path in settings.eval_data for d in read_documents(path, settings.text_field)]
    return hold_out(documents, settings.eval_fraction)


def make_model(settings: TrainSettings) -> Any:
    """The base with a fresh adapter on it."""
    from transformers import set_seed

    from fastpeft import LoraConfig, get_peft_model

    base = load_base(settings.base, settings.dtype, settings.device, settings.revision)
    base.config.use_cache = False
    set_seed(settings.seed)
    try:
        return get_peft_model(base, LoraConfig(**settings.lora_arguments()))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise CommandError(f"these LoRA options do not fit: {one_line(error)}") from error


def make_trainer(
    settings: TrainSettings, model: Any, tokenizer: Any, blocks: Rows, eval_blocks: Rows, show: "Console | None"
) -> Any:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from fastpeft.cli.progress import LogLastStep, Progress
    from fastpeft.integrations.transformers import AdapterTrainerMixin

    class AdapterTrainer(AdapterTrainerMixin, Trainer):  # type: ignore[misc]
        pass

    try:
        arguments = TrainingArguments(
            output_dir=".",  # Trainer makes this folder at once
            use_cpu=model.device.type == "cpu",
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,  # Progress shows more
            include_num_input_tokens_seen="non_padding",
            **optimisation(settings, len(blocks)),
            **evaluation(settings, len(blocks), bool(eval_blocks)),
        )
        trainer = AdapterTrainer(
            model=model,
            args=arguments,
            train_dataset=blocks,
            eval_dataset=eval_blocks or None,
            data_collator=PadRight(tokenizer.pad_token_id or 0),
        )
    except (ValueError, ImportError) as error:
        raise CommandError(f"these training options do not fit together: {one_line(error)}") from error
    arguments.output_dir = str(settings.output / "checkpoints")
    try:
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # these make it of the wrapped model
            trainer.create_optimizer()
    except Exception as error:  # whatever a package that is not there or does not fit raises
        raise CommandError(
            f"--optimizer {settings.optimizer} cannot be used here: {one_line(error)}; adamw_torch always can"
        ) from error
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogLastStep())
    if show is not None:
        trainer.add_callback(Progress(show))
    return trainer


def steps_an_epoch(settings: TrainSettings, rows: int) -> int:
    return math.ceil(rows / (settings.batch_size * settings.accumulation))


def planned_steps(settings: TrainSettings, rows: int) -> int:
    if settings.max_steps > 0:
        return settings.max_steps
    return math.ceil(settings.epochs * steps_an_epoch(settings, rows))


def optimisation(settings: TrainSettings, rows: int) -> dict[str, Any]:
    """The TrainingArguments of the steps themselves."""
    return {
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": round(settings.warmup * planned_steps(settings, rows)),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": settings.optimizer,
        "bf16": settings.autocast == "bf16",
        "fp16": settings.autocast == "fp16",
        "gradient_checkpointing": settings.gradient_checkpointing,
        "seed": settings.seed,
    }


def evaluation(settings: TrainSettings, rows: int, evaluate: bool) -> dict[str, Any]:
    """The TrainingArguments of logs, evaluations and checkpoints."""
    epoch = steps_an_epoch(settings, rows)
    if settings.max_steps > 0:
        epoch = min(epoch, settings.max_steps)
    save_steps = settings.save_steps or epoch
    eval_steps = settings.eval_steps or (save_steps if settings.load_best else epoch)
    measured: dict[str, Any] = {"eval_strategy": "no"}
    if evaluate:
        measured = {
            "eval_strategy": "steps",
            "eval_steps": eval_steps,
            "per_device_eval_batch_size": settings.batch_size,
            "load_best_model_at_end": settings.load_best,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    return measured | {
        "logging_steps": settings.log_steps,
        "logging_nan_inf_filter": False,  # a NaN is shown, not averaged away
        "save_strategy": "steps",
        "save_steps": save_steps,
        "save_total_limit": settings.keep_checkpoints,
    }
