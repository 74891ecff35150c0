"""PeftModel: a model with adapters, and what can be done with them: add, activate, disable, save, load.

The tuner (`base_model`, for example a LoraModel) owns the adapter layers; the user's model is `base_model.model`. What
PeftModel does not have itself is looked up on the tuner and then on the user's model. The classes by task are in
model_tasks.py, saving and loading in persistence.py, the status records in status.py; their public names are here too.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from fastpeft.batch_generation import BatchGeneration
from fastpeft.config import PeftConfig
from fastpeft.model_card import write_model_card
from fastpeft.persistence import SavedAdapters
from fastpeft.recognition import recognise_parts, recognised_class
from fastpeft.routing_scope import is_anothers, is_routed, routed
from fastpeft.status import TunerLayerStatus, TunerModelStatus, count_parameters, get_layer_status, get_model_status
from fastpeft.unattended import left_alone
from fastpeft.utils.frozen_head import rows_of_head_together
from fastpeft.utils.peft_types import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftType
from fastpeft.utils.walks import forget_gradients

if TYPE_CHECKING:
    from fastpeft.model_tasks import (
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
    )
    from fastpeft.tuners.tuners_utils import BaseTuner

__all__ = [
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "TunerLayerStatus",
    "TunerModelStatus",
    "get_layer_status",
    "get_model_status",
]


class PeftModel(SavedAdapters, BatchGeneration, nn.Module):
    """A model with adapters, for any task. `model` is changed in place.

    Args:
        model: the model to adapt, transformers' or any other module.
        peft_config: what to add to it.
        adapter_name: name of the first adapter; it becomes the active one.
        autocast_adapter_dtype: keep adapter weights in fp32 where the layer is in fp16 or bf16, as stable training
            needs; False leaves them in the dtype of their layer.
        low_cpu_mem_usage: make the adapter weights on the meta device, for weights that are loaded right after.

    Raises:
        ValueError: the config fits no layer of the model, or the adapter name cannot be used.

    Attributes:
        base_model: the tuner, for example LoraModel.
        peft_type: the method; all adapters of one model share it.
    """

    base_model: BaseTuner

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # not super(): reference PEFT's class may follow in the method order
        self.__class__ = recognised_class(type(self))
        tuner_class = PEFT_TYPE_TO_TUNER_MAPPING[peft_config.peft_type or ""]
        _check_adapter_name(adapter_name, peft_config)
        self.peft_type = peft_config.peft_type
        # What forward and generate take for the adapters' sake, and the base model must not see.
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._adapters_disabled = False
        self.base_model = tuner_class(
            model, {adapter_name: peft_config}, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
        )
        self.base_model._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        recognise_parts(self)

        if _checkpoints_activations(model):
            self.prepare_model_for_gradient_checkpointing(model)
        config: Any = getattr(model, "config", None)
        if hasattr(config, "pretraining_tp"):
            config.pretraining_tp = 1  # slices of a weight would pass the adapter layer by

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "base_model":  # not there yet: asking it for itself would never end
                raise
            return getattr(self.base_model, name)

    # ---- forward ----

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward with the active adapters.

        `adapter_names=[...]` picks an adapter for each row of the batch, "__base__" for none, {"a": 0.7, "b": 0.3} for
        several with weights; also a `fastpeft.Routing`. Each adapter gets the gradients of its own rows.
        """
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model()(*args, **self._base_kwargs(kwargs))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As nn.Module's."""
        if set_to_none and not getattr(self, "_is_replica", False):
            forget_gradients(self)
        else:
            super().zero_grad(set_to_none)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate with the active adapters; `adapter_names` as in forward, one for each prompt.

        A call in which no code of the caller's takes part (processors, criteria, streamers, hooks) looks at the modules
        of the adapters once: what another thread puts in their place by hand meanwhile is seen from the next call on.
        """
        with self._generation(args, kwargs):
            return self.base_model.generate(*args, **self._base_kwargs(kwargs))

    @contextmanager
    def _generation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        base = self.get_base_model()
        scope = self._enable_peft_forward_hooks(**self._generation_options(args, kwargs))
        with scope, rows_of_head_together(base), left_alone(base, args, kwargs):
            yield

    def _generation_options(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What of a call of `generate` says which rows it has, how often they are repeated, and for which adapters."""
        positional = dict(zip(("inputs", "generation_config"), args, strict=False))
        return {"model_config": getattr(self.get_base_model(), "generation_config", None)} | positional | kwargs

    def _base_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in kwargs.items() if key not in self.special_peft_forward_args}

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """The context in which the tuner honours `special_peft_forward_args`; an empty one where none is given."""
        given = sorted(name for name in self.special_peft_forward_args if kwargs.get(name) is not None)
        if not given and is_anothers(self.get_base_model()):
            return routed(None)
        if self._adapters_disabled or not (given or is_routed()):
            return nullcontext()
        if "alora_offsets" in given:
            raise NotImplementedError("alora_offsets belongs to activated LoRA, which is not supported yet")
        context: AbstractContextManager[None] = self.base_model._enable_peft_forward_hooks(*args, **kwargs)
        return context

    # ---- adapters ----

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter name to config, in the order in which they were added."""
        return self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        self.base_model.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters; several after `model.base_model.set_adapter([...])`, none after the last was deleted."""
        return list(self.base_model.active_adapters)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, the first one of several; an empty list when there is none."""
        return next(iter(self.active_adapters), [])

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the active adapter. Raises ValueError when none is active."""
        active = self.active_adapters
        if not active:
            raise ValueError(f"no adapter is active; activate one with set_adapter, of {list(self.peft_config)}")
        return self.peft_config[active[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter takes part in the forward: one is active, and adapters are not disabled."""
        return not self._adapters_disabled and bool(self.active_adapters)

    @property
    def modules_to_save(self) -> set[str] | None:
        """The module names that any config trains and saves in full, None when there are none."""
        names = {
            name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()
        }
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype, None where it does not tell."""
        return getattr(self.base_model, "dtype", None)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an untrained adapter. It stays inactive and frozen until set_adapter.

        Args:
            adapter_name: a name that no other adapter has.
            peft_config: of the same method as the first adapter.
            low_cpu_mem_usage, autocast_adapter_dtype: as in the constructor.

        Raises:
            ValueError: the name is taken or cannot be used, or the config is of another method or fits no layer.
        """
        _check_adapter_name(adapter_name, peft_config)
        if adapter_name in self.peft_config:
            raise ValueError(
                f"an adapter named {adapter_name!r} exists already; choose another name, or delete_adapter it first"
            )
        if peft_config.peft_type != self.peft_type:
            raise ValueError(
                f"all adapters of a model use one method: this one has {self.peft_type}, got {peft_config.peft_type}"
            )
        self.peft_config[adapter_name] = peft_config
        try:
            self.base_model.inject_adapter(self.base_model.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        self.base_model._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        recognise_parts(self)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make one adapter the active one, and trainable unless `inference_mode`; all others become frozen.

        For several at once: `model.base_model.set_adapter([...])`.

        Raises:
            ValueError: there is no such adapter.
        """
        self._check_known(adapter_name)
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the active one, the tuner activates one that is left, with a warning.

        Raises:
            ValueError: there is no such adapter, or it is merged into the base.
        """
        self._check_known(adapter_name)
        self.base_model.delete_adapter(adapter_name=adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make the parameters of the given adapters trainable, or freeze them, active or not."""
        self.base_model.set_requires_grad(adapter_names=adapter_names, requires_grad=requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the model computes what the base model does.

        >>> with model.disable_adapter():
        ...     base_logits = model(**batch).logits
        """
        was_disabled, enabled = self._adapters_disabled, self.get_model_status().enabled
        if enabled == "irregular":
            warnings.warn(
                "some adapter layers are enabled and others are not; all will be enabled when disable_adapter ends",
                stacklevel=3,
            )
        try:
            self.base_model.disable_adapter_layers()
            self._adapters_disabled = True
            yield
        finally:
            if enabled is not False:
                self.base_model.enable_adapter_layers()
            self._adapters_disabled = was_disabled

    def _check_known(self, adapter_name: str) -> None:
        if not isinstance(adapter_name, str):
            raise TypeError(
                f"expected the name of one adapter, got {adapter_name!r}; for several at once use "
                "model.base_model.set_adapter([...])"
            )
        if adapter_name not in self.peft_config:
            raise ValueError(f"there is no adapter {adapter_name!r}; this model has {list(self.peft_config)}")

    # ---- the base model ----

    def get_base_model(self) -> nn.Module:
        """The user's model, its targeted layers wrapped by adapter layers."""
        return self.base_model.model

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let the embeddings' output require gradients: reentrant checkpointing over a frozen base passes none else.

        A quantised model is left as it is: prepare_model_for_kbit_training takes care of it.
        """
        if any(getattr(model, flag, False) for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")):
            return model
        base: Any = model
        if hasattr(base, "enable_input_require_grads"):
            base.enable_input_require_grads()
        elif hasattr(base, "get_input_embeddings"):
            base.get_input_embeddings().register_forward_hook(_require_grad)
        return model

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter adds to the base weight and can so be written as LoRA."""
        return bool(self.base_model.supports_lora_conversion(adapter_name))

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> NoReturn:
        """The virtual tokens of a prompt-learning method."""
        raise self._not_prompt_learning("get_prompt")

    def get_prompt_embedding_to_save(self, adapter_name: str) -> NoReturn:
        """The virtual tokens of a prompt-learning method, as they are saved."""
        raise self._not_prompt_learning("get_prompt_embedding_to_save")

    def _not_prompt_learning(self, method: str) -> TypeError:
        return TypeError(
            f"{method} is for prompt-learning methods, which have virtual tokens; {self.peft_type} has none"
        )

    # ---- numbers ----

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters, the adapters' included."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print both numbers of get_nb_trainable_parameters and their ratio in percent."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of every adapter layer: see fastpeft.status.TunerLayerStatus."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The state of the adapters over all layers: see fastpeft.status.TunerModelStatus."""
        return get_model_status(self)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write README.md into `output_dir`, or bring its facts up to date: tags, base model, quantisation, version."""
        write_model_card(self, output_dir)

    def _check_new_adapter_config(self, peft_config: PeftConfig, is_trainable: bool) -> None:
        """The place for a method to refuse a loaded config beside those that are there; plain LoRA refuses none."""


def _check_adapter_name(adapter_name: str, peft_config: PeftConfig) -> None:
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(f"an adapter name is a string that is not empty and has no '.', got {adapter_name!r}")
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(peft_config.peft_type), "")
    if adapter_name in prefix:
        warnings.warn(
            f"adapter name {adapter_name!r} is part of {prefix!r}, which marks this method's weights, so that keys of "
            "files can be misread; choose another name",
            stacklevel=4,
        )


def _checkpoints_activations(model: nn.Module) -> bool:
    """Whether it recomputes activations in backward, or does not tell: then it is prepared for it."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):  # new and old transformers
        if hasattr(model, name):
            return bool(getattr(model, name))
    return True


def _require_grad(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    output.requires_grad_(True)


def __getattr__(name: str) -> Any:
    if name in __all__:  # the task classes derive from PeftModel, so their module is imported after this one
        from fastpeft import model_tasks

        return getattr(model_tasks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
