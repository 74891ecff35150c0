"""Trainer without reference PEFT.

Trainer knows adapter models by reference PEFT's class. Where that library is installed, our models are instances of
it (see fastpeft.recognition) and Trainer needs nothing from here. Where it is not, Trainer would write the whole base
model into every checkpoint, refuse to resume from an adapter, and ask our wrapper what only the base model can tell.
The mixin mends that:

    class AdapterTrainer(AdapterTrainerMixin, Trainer): ...
"""

from __future__ import annotations

import functools
import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastpeft.adapter_files import find_weights
from fastpeft.peft_model import PeftModel

logger = logging.getLogger(__name__)


class AdapterTrainerMixin:
    """Checkpoints that hold the adapter only. Stands before Trainer; a model without adapters is left to Trainer."""

    model: Any
    args: Any
    state: Any
    accelerator: Any
    processing_class: Any
    label_smoother: Any
    data_collator: Any
    label_names: list[str]
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    _signature_columns: list[str] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self._adapter_model()
        if model is None:
            return
        base = model.get_base_model()
        if not hasattr(base, "accepts_loss_kwargs"):  # our forward takes any keyword, the base's may not
            parameters = inspect.signature(base.forward).parameters.values()
            self.model_accepts_loss_kwargs = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        if self.label_smoother is not None and type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            self.label_smoother = functools.partial(self.label_smoother, shift_labels=True)

    def _set_signature_columns_if_needed(self) -> None:
        model = self._adapter_model()
        if model is None or self._signature_columns is not None:
            super()._set_signature_columns_if_needed()  # type: ignore[misc]
            return
        parameters = inspect.signature(model.get_base_model().forward).parameters
        self._signature_columns = list(dict.fromkeys([*parameters, "label", "label_ids", *self.label_names]))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        model = self._adapter_model()
        if model is None:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)
        if not self.args.should_save:
            return
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapters = self._adapter_model(model)
        if adapters is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        folder = Path(resume_from_checkpoint)
        active = adapters.active_adapters
        for name in adapters.peft_config:
            source = folder_of(folder, name, adapters)
            if source is None:
                raise ValueError(f"{folder} has no weights of adapter {name!r}; resume from a checkpoint of this run")
            adapters.load_adapter(source, name, is_trainable=name in active)

    def _load_best_model(self) -> None:
        adapters = self._adapter_model()
        if adapters is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()  # type: ignore[misc]
            return
        folder = Path(self.state.best_model_checkpoint)
        logger.info("loading the best adapters from %s (score: %s)", folder, self.state.best_metric)
        for name in adapters.active_adapters:
            source = folder_of(folder, name, adapters)
            if source is None:
                raise ValueError(f"{folder}, the best checkpoint, no longer has weights of adapter {name!r}")
            adapters.load_adapter(source, name)

    def _adapter_model(self, model: nn.Module | None = None) -> PeftModel | None:
        """The PeftModel inside the wrappers of acceleration and compilation, if there is one."""
        model = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
        return model if isinstance(model, PeftModel) else None


def folder_of(checkpoint: Path, adapter_name: str, model: PeftModel) -> Path | None:
    """Where save_pretrained put an adapter. One adapter alone may also lie in the folder itself, under any name."""
    folder = checkpoint if adapter_name == "default" else checkpoint / adapter_name
    if find_weights(folder) is None and len(model.peft_config) == 1:
        folder = checkpoint
    return folder if find_weights(folder) is not None else None
