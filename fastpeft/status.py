"""What state the adapters of a model are in: per layer, and summed up for the whole model.

Both functions only read. A value that differs from place to place where it should not is reported as "irregular".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from fastpeft.tuners.tuners_utils import BaseTunerLayer
    from fastpeft.utils.other import AuxiliaryTrainingWrapper

Irregular = Literal["irregular"]
_Value = TypeVar("_Value")
_Hashable = TypeVar("_Hashable", bound=Hashable)


@dataclass
class TunerLayerStatus:
    """One adapter layer.

    Attributes:
        name: dotted path of the layer, for example `model.layers.0.self_attn.q_proj`.
        module_type: method and kind of layer, for example `lora.Linear`.
        enabled: False inside `disable_adapter()`.
        active_adapters: the adapters that the forward applies, in order.
        merged_adapters: the adapters that are folded into the base weight, in merge order.
        requires_grad: per adapter, whether its parameters train.
        available_adapters: every adapter that has parameters here, sorted.
        devices: per adapter, the sorted device types its parameters are on.
        quantization_backend: what quantises the base layer, for example `bnb 4bit`; None for a plain one.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """A whole model: the fields of TunerLayerStatus where all layers agree, and what only the model knows.

    Attributes:
        base_model_type: class name of the base model; "other" for a plain module with injected adapters.
        adapter_model_type: class name of the tuner, for example `LoraModel`; "None" without a PeftModel.
        peft_types: adapter name to method, for example `{"default": "LORA"}`; empty without a PeftModel.
        trainable_params, total_params: numbers of parameters.
        num_adapter_layers: number of adapter layers.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every adapter layer of a PeftModel, or of a module that adapters were injected into.

    Raises:
        TypeError: a PeftModel whose method has no adapter layers (prompt learning).
        ValueError: the model has no adapter layer.
    """
    from fastpeft.tuners.tuners_utils import BaseTunerLayer
    from fastpeft.utils.other import AuxiliaryTrainingWrapper

    tree = _adapter_tree(model, "get_layer_status")
    statuses = [
        _layer_status(name, module)
        for name, module in tree.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    if not statuses:
        raise ValueError(
            f"{type(model).__name__} has no adapter layer; add some with get_peft_model or inject_adapter_in_model"
        )
    return statuses


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of a PeftModel, or of a module that adapters were injected into, as one record.

    Raises:
        TypeError, ValueError: as get_layer_status.
    """
    from transformers import PreTrainedModel

    from fastpeft.peft_model import PeftModel

    layers = get_layer_status(model)
    base_model_type, adapter_model_type, peft_types = "other", "None", {}
    if isinstance(model, PeftModel):
        base_model_type = type(model.get_base_model()).__name__
        adapter_model_type = type(model.base_model).__name__
        peft_types = {name: str(config.peft_type).partition(".")[-1] for name, config in model.peft_config.items()}
    elif isinstance(model, PreTrainedModel):
        base_model_type = type(model).__name__
    trainable_params, total_params = count_parameters(model)

    active = _common(tuple(layer.active_adapters) for layer in layers)
    return TunerModelStatus(
        base_model_type=base_model_type,
        adapter_model_type=adapter_model_type,
        peft_types=peft_types,
        trainable_params=trainable_params,
        total_params=total_params,
        num_adapter_layers=len(layers),
        enabled=_common(layer.enabled for layer in layers),
        active_adapters="irregular" if active == "irregular" else list(active),
        merged_adapters=_merged_everywhere(layers),
        requires_grad={
            name: _common(flags) for name, flags in _grouped(layer.requires_grad.items() for layer in layers).items()
        },
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={
            name: sorted({device for devices in found for device in devices})
            for name, found in _grouped(layer.devices.items() for layer in layers).items()
        },
        quantization_backend=_common(layer.quantization_backend for layer in layers),
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters, as they were before packing and sharding.

    A bitsandbytes 4-bit weight holds two values a byte; a weight that DeepSpeed ZeRO-3 partitioned away has no element
    of its own and tells its real size in `ds_numel`.
    """
    trainable = total = 0
    for parameter in model.parameters():
        size = parameter.numel() or getattr(parameter, "ds_numel", 0)
        if type(parameter).__name__ == "Params4bit":
            size *= 2 * parameter.element_size()
        total += size
        trainable += size if parameter.requires_grad else 0
    return trainable, total


def _adapter_tree(model: nn.Module, caller: str) -> nn.Module:
    """The module whose submodule names the status reports: the tuner of a PeftModel, else the model itself."""
    from fastpeft.peft_model import PeftModel
    from fastpeft.tuners.tuners_utils import BaseTuner

    if not isinstance(model, PeftModel):
        return model
    if not isinstance(model.base_model, BaseTuner):
        raise TypeError(f"{caller} needs a method that puts adapters into layers; {model.peft_type} does not")
    return model.base_model


def _layer_status(name: str, module: BaseTunerLayer | AuxiliaryTrainingWrapper) -> TunerLayerStatus:
    trained = _adapter_tensors(module, module.adapter_layer_names)
    placed = _adapter_tensors(module, (*module.adapter_layer_names, *module.other_param_names))
    backend = getattr(module, "quantization_backend", None)
    return TunerLayerStatus(
        name=name,
        module_type=repr(module).partition("(")[0],
        enabled=not module.disable_adapters,
        active_adapters=module.active_adapters,
        merged_adapters=module.merged_adapters,
        requires_grad={
            key: _common(tensor.requires_grad for tensor in found) for key, found in trained.items() if found
        },
        available_adapters=sorted(module._get_available_adapters()),
        devices={key: sorted({tensor.device.type for tensor in found}) for key, found in placed.items()},
        quantization_backend=None if backend is None else backend.backend_name,
    )


def _adapter_tensors(module: object, attributes: Iterable[str]) -> dict[str, list[Tensor]]:
    """Per adapter name, its tensors under the given attributes; those that hold no tensors by adapter are skipped."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for attribute in attributes:
        per_adapter = getattr(module, attribute)
        if isinstance(per_adapter, nn.ModuleDict):
            for adapter, child in per_adapter.items():
                found[adapter].extend(child.parameters())
        elif isinstance(per_adapter, nn.ParameterDict) or type(per_adapter).__name__ == "BufferDict":
            for adapter, tensor in per_adapter.items():
                found[adapter].append(tensor)
    return dict(found)


def _common(values: Iterable[_Hashable]) -> _Hashable | Irregular:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else "irregular"


def _grouped(items: Iterable[Iterable[tuple[str, _Value]]]) -> dict[str, list[_Value]]:
    grouped: dict[str, list[_Value]] = defaultdict(list)
    for pairs in items:
        for key, value in pairs:
            grouped[key].append(value)
    return dict(grouped)


def _merged_everywhere(layers: list[TunerLayerStatus]) -> list[str] | Irregular:
    """The merged adapters, sorted; "irregular" when a layer that has one of them has not merged it."""
    merged = {name for layer in layers for name in layer.merged_adapters}
    for layer in layers:
        if merged & (set(layer.available_adapters) - set(layer.merged_adapters)):
            return "irregular"
    return sorted(merged)
