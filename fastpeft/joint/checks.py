"""What must hold before a joint run begins, and which parameters are whose."""

import copy
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import OPTIMIZER_NAME

from fastpeft.joint.batches import JointBatches
from fastpeft.peft_model import PeftModel


def check_arguments(args: Any) -> None:
    """Refuse TrainingArguments that have no meaning for several adapters at once.

    Raises:
        ValueError: with what to do instead.
    """
    strategies = [str(getattr(args, f"{what}_strategy").value) for what in ("save", "eval", "logging")]
    advice = {
        "one process and one GPU are supported; set CUDA_VISIBLE_DEVICES": args.world_size > 1 or args.n_gpu > 1,
        "fp16=True scales all losses as one: an overflow of one would skip the others' step; use bf16": args.fp16,
        "label_smoothing_factor is not supported; give compute_loss_func": args.label_smoothing_factor != 0,
        "neftune_noise_alpha scales its noise by the longest row of all adapters; leave it out": (
            args.neftune_noise_alpha is not None
        ),
        "auto_find_batch_size cannot tell whose batch to shrink; set the batch sizes": args.auto_find_batch_size,
        "load_best_model_at_end: each adapter has a best step of its own; evaluate, and keep checkpoints": (
            args.load_best_model_at_end or "best" in strategies
        ),
        "an epoch is each adapter's own; count save, eval and logging in steps": "epoch" in strategies,
        "train_sampling_strategy must be random or sequential": (
            getattr(args, "train_sampling_strategy", "random") not in ("random", "sequential")
        ),
    }
    for text, refused in advice.items():
        if refused:
            raise ValueError(f"joint training: {text}")


def arguments_of_all(args: Any, batches: JointBatches) -> Any:
    """The TrainingArguments as Trainer's own loop needs them: one item is a batch, and clipping is not its business."""
    shared = copy.copy(args)
    shared.per_device_train_batch_size = 1
    shared.max_steps, shared.num_train_epochs = batches.updates, 1
    shared.max_grad_norm = 0.0
    return shared


def check_model(model: Any) -> None:
    """Raise ValueError for what is not a PeftModel."""
    if not isinstance(model, PeftModel):
        raise ValueError(f"expected a fastpeft model with adapters, got {type(model).__name__}; see get_peft_model")


def make_trainable(model: PeftModel, adapters: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """Train these adapters and freeze all others.

    Returns:
        The parameters of each adapter, in the model's order.

    Raises:
        ValueError: no adapter, an unknown one, or one with nothing to train; or parameters outside of adapters are
            trainable, which would belong to all of them. Nothing has changed then.
    """
    unknown = [name for name in adapters if name not in model.peft_config]
    if unknown or not adapters:
        asked = f"no adapter {', '.join(map(repr, unknown))}" if unknown else "no adapter to train"
        raise ValueError(f"{asked}; this model has {', '.join(map(repr, model.peft_config))}")
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.set_requires_grad(list(model.peft_config), False)
        shared = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if shared:
            raise ValueError(
                f"{shared[0]} and {len(shared) - 1} more are trainable and belong to no adapter, so that all adapters "
                'would train them together; use bias="none", and freeze the base'
            )
        found = {}
        for name in adapters:
            model.set_requires_grad(name, True)
            found[name] = [parameter for parameter in model.parameters() if parameter.requires_grad]
            model.set_requires_grad(name, False)
            if not found[name]:
                raise ValueError(f"adapter {name!r} has no parameters to train")
    except ValueError:
        for parameter, requires_grad in before.items():
            parameter.requires_grad = requires_grad
        raise
    model.set_requires_grad(list(adapters), True)
    return found


def order_of_checkpoint(folder: Path, adapters: Collection[str]) -> list[str]:
    """The adapters in the order that a checkpoint was saved in; as given where it has no optimizer.

    The optimizer, the schedules and the random state of dropout are restored by position, so a resumed run must take
    the checkpoint's order.

    Raises:
        ValueError: its run had other adapters.
    """
    file = folder / OPTIMIZER_NAME
    if not file.is_file():
        return list(adapters)
    groups = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["param_groups"]  # mmap: no moments read
    saved = dict.fromkeys(group.get("adapter") for group in groups)
    if None in saved:
        raise ValueError(f"{folder} has the optimizer of a run that was no joint run; train anew, without resuming")
    more, fewer = ([repr(n) for n in a if n not in b] for a, b in ((adapters, saved), (saved, adapters)))
    if more or fewer:
        lacks = [f"{text} {', '.join(names)}" for text, names in (("has no", more), ("also has", fewer)) if names]
        raise ValueError(
            f"{folder} is of a joint run of other adapters: it {' and '.join(lacks)}; resume with the adapters that it "
            "has, in any order, or train anew"
        )
    return list(saved)
