"""From a config to a model with adapters, and the tables that say which class belongs to which method and task."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn

from fastpeft.config import PeftConfig
from fastpeft.model_tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from fastpeft.peft_model import PeftModel
from fastpeft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from fastpeft.utils.peft_types import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

if TYPE_CHECKING:
    from fastpeft.tuners.lora.config import LoraConfig
    from fastpeft.tuners.lora.model import LoraModel

    # What a model forwards to its tuner is part of its interface; a type checker sees it as inherited.
    class _LoraPeftModel(PeftModel, LoraModel): ...  # type: ignore[misc, override]

    class _TunerPeftModel(PeftModel, BaseTuner): ...  # type: ignore[misc, override]


__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "get_peft_model",
    "inject_adapter_in_model",
]


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The config that a dict describes; `peft_type` in it picks the class.

    Raises:
        ValueError: there is no `peft_type`.
        UnsupportedMethodError: the method is unknown or not built yet.
        TypeError: the class has no such field.
    """
    if "peft_type" not in config_dict:
        raise ValueError(f"config_dict needs the key 'peft_type', for example 'LORA'; got {sorted(config_dict)}")
    config: PeftConfig = PEFT_TYPE_TO_CONFIG_MAPPING[config_dict["peft_type"]](**config_dict)
    return config


@overload
def get_peft_model(  # type: ignore[overload-overlap]
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = ...,
    mixed: Literal[False] = ...,
    autocast_adapter_dtype: bool = ...,
    revision: str | None = ...,
    low_cpu_mem_usage: bool = ...,
) -> _LoraPeftModel: ...


@overload
def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = ...,
    mixed: bool = ...,
    autocast_adapter_dtype: bool = ...,
    revision: str | None = ...,
    low_cpu_mem_usage: bool = ...,
) -> _TunerPeftModel: ...


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Add an adapter to a model and wrap it. `model` is changed in place.

    Args:
        model: the model to adapt. Task classes expect transformers' conventions; any module works with no task_type.
        peft_config: what to add. Its base_model_name_or_path and revision are set here.
        adapter_name: name of the adapter.
        mixed: allow adapters of different methods in one model; not supported yet.
        autocast_adapter_dtype: keep adapter weights in fp32 over an fp16 or bf16 base, as stable training needs.
        revision: revision of the base model, to be written into the config.
        low_cpu_mem_usage: make the adapter weights on the meta device, for weights that are loaded right after.

    Returns:
        The PeftModel class of the config's task_type.

    Raises:
        ValueError: the config fits no layer of the model, or the adapter name cannot be used.
    """
    if mixed:
        raise NotImplementedError("mixed=True is not supported yet; give all adapters of a model one method")
    _note_base_model(model, peft_config, revision)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        warnings.warn(
            "this model already has adapter layers, and a second wrapper puts its own inside or beside them. Use "
            "add_adapter for another adapter, or unload() first to start afresh",
            stacklevel=2,
        )
    model_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type or "", PeftModel)
    return model_class(
        model,
        peft_config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


def _note_base_model(model: nn.Module, peft_config: PeftConfig, revision: str | None) -> None:
    """Write into the config which base model, and which revision of it, the adapter is made for."""
    name = model.__dict__.get("name_or_path") or None  # a model built from a config has "", which names nothing
    previous = peft_config.base_model_name_or_path
    peft_config.base_model_name_or_path = name
    if previous not in (None, name):
        warnings.warn(
            f"the config was made for base model {previous!r} and now names {name!r}; check that you mean this one",
            stacklevel=3,
        )
    if revision is not None:
        if peft_config.revision not in (None, revision):
            warnings.warn(f"the config's revision {peft_config.revision!r} becomes {revision!r}", stacklevel=3)
        peft_config.revision = revision


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Put adapter layers into a model, in place, and return the model itself without a wrapper.

    Args:
        peft_config: what to add.
        model: the model to adapt.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: make the adapter weights on the meta device, for weights that are loaded right after.
        state_dict: take the layers to adapt from these keys, not from target_modules; values are not used.

    Raises:
        ValueError: the method needs the wrapper of get_peft_model, or the config fits no layer.
    """
    tuner_class = PEFT_TYPE_TO_TUNER_MAPPING[peft_config.peft_type or ""]
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt or tuner_class.uses_shared_state:
        raise ValueError(
            f"{peft_config.peft_type} keeps state beside the layers, and a bare model has no place for it; use "
            "get_peft_model"
        )
    tuner: BaseTuner = tuner_class(
        model, peft_config, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
    )
    return tuner.model
