"""Train a LoRA adapter with transformers' Trainer: what `fastpeft train` and the demo run."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpeft.cli.curves import write_curves
from fastpeft.cli.data import Document, PadRight, hold_out, make_blocks, read_documents
from fastpeft.cli.errors import CommandError, one_line
from fastpeft.cli.models import load_base, load_tokenizer, resolve_base
from fastpeft.cli.settings import TrainSettings

if TYPE_CHECKING:
    from rich.console import Console

Rows = list[dict[str, list[int]]]
RECORD = "training.json"  # the settings of the run, and its result when it is done
OURS = ("adapter_config.json", "adapter_model.safetensors", "README.md", "loss.csv", "loss.png", RECORD, "checkpoints")


@dataclass(frozen=True)
class TrainResult:
    """What a run reached."""

    model: Any  # the PeftModel, on its device
    tokenizer: Any
    steps: int
    train_loss: float
    eval_loss: float | None
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
        CommandError: any argument or file that cannot be used; nothing is written before the arguments are checked.
    """
    settings.base = resolve_base(settings.base)
    checkpoint = prepare_output(settings)
    documents, held = load_documents(settings)
    tokenizer = load_tokenizer(settings.base, settings.revision)
    blocks = make_blocks(documents, tokenizer, settings.block_size, settings.pack)
    eval_blocks = make_blocks(held, tokenizer, settings.block_size, settings.pack)
    if not blocks:
        raise CommandError("the data is too short: not one training row of two tokens comes out of it")
    model = make_model(settings)
    trainer = make_trainer(settings, model, tokenizer, blocks, eval_blocks, show)

    settings.output.mkdir(parents=True, exist_ok=True)
    record = settings.record()
    write_json(settings.output / RECORD, record)
    start = time.monotonic()
    output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.monotonic() - start
    log = trainer.state.log_history
    losses = [row["eval_loss"] for row in log if "eval_loss" in row]
    if losses and settings.load_best:
        losses.append(trainer.state.best_metric)

    model.save_pretrained(settings.output)
    trainable, parameters = model.get_nb_trainable_parameters()
    result = TrainResult(
        model=model.eval(), tokenizer=tokenizer, steps=trainer.state.global_step, train_loss=output.training_loss,
        eval_loss=losses[-1] if losses else None, seconds=seconds, tokens=trainer.state.num_input_tokens_seen,
        trainable=trainable, parameters=parameters, png=write_curves(log, settings.output),
    )  # fmt: skip
    keep = ("steps", "train_loss", "eval_loss", "seconds", "tokens", "trainable", "parameters")
    write_json(settings.output / RECORD, record | {"result": {key: getattr(result, key) for key in keep}})
    return result


def prepare_output(settings: TrainSettings) -> Path | None:
    """Check the output folder; returns the checkpoint to go on from, if any."""
    folder = settings.output
    if folder.is_file():
        raise CommandError(f"{folder} is a file: give another --output folder")
    if settings.resume and settings.overwrite:
        raise CommandError("--resume and --overwrite contradict each other: give one of them")
    if settings.resume:
        if not (folder / RECORD).exists():
            raise CommandError(f"nothing to resume in {folder}: no run began there; leave --resume out")
        settings.check_resumable(read_record(folder))
        return last_checkpoint(folder / "checkpoints")  # None: killed before the first one, so from the start
    if folder.exists() and any(folder.iterdir()):
        if not settings.overwrite:
            raise CommandError(f"{folder} is not empty: give another --output, or --resume, or --overwrite")
        for name in OURS:  # never more than a run of ours writes: the folder may hold other things
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return None


def read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text())
        return {"settings": dict(record["settings"]), "data_sha256": dict(record["data_sha256"])}
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"{folder / RECORD} cannot be read ({one_line(error)}): start anew with --overwrite"
        ) from error


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: a kill may have left a later one without its last file."""
    whole = {}
    for path in folder.glob("checkpoint-*"):
        try:
            whole[json.loads((path / "trainer_state.json").read_text())["global_step"]] = path
        except (OSError, ValueError, KeyError):
            continue  # Trainer writes trainer_state.json last
    return whole[max(whole)] if whole else None


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

    from fastpeft.cli.progress import Progress
    from fastpeft.integrations.transformers import AdapterTrainerMixin

    class AdapterTrainer(AdapterTrainerMixin, Trainer):  # type: ignore[misc]
        pass

    try:
        arguments = TrainingArguments(
            output_dir=str(settings.output / "checkpoints"),
            use_cpu=model.device.type == "cpu",
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,  # Progress shows more
            include_num_input_tokens_seen="non_padding",
            **optimisation(settings, len(blocks)),
            **evaluation(settings, len(blocks), bool(eval_blocks)),
        )
    except (ValueError, ImportError) as error:
        raise CommandError(f"these training options do not fit together: {one_line(error)}") from error
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=blocks,
        eval_dataset=eval_blocks or None,
        data_collator=PadRight(tokenizer.pad_token_id or 0),
    )
    trainer.remove_callback(PrinterCallback)
    if show is not None:
        trainer.add_callback(Progress(show))
    return trainer


def steps_an_epoch(settings: TrainSettings, rows: int) -> int:
    return -(-rows // (settings.batch_size * settings.accumulation))


def optimisation(settings: TrainSettings, rows: int) -> dict[str, Any]:
    """The TrainingArguments of the steps themselves."""
    steps = settings.max_steps if settings.max_steps > 0 else settings.epochs * steps_an_epoch(settings, rows)
    return {
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": round(settings.warmup * steps),
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
        "save_strategy": "steps",
        "save_steps": save_steps,
        "save_total_limit": settings.keep_checkpoints,
    }


def write_json(path: Path, value: Any) -> None:
    """Write beside and rename: the file is whole or as before."""
    draft = path.with_suffix(".json.part")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    draft.replace(path)
