"""The device tier: a fixed number of places for adapters inside the model, and the way from the CPU into one.

A slot is an adapter name that requests are routed to. Loading another adapter into a slot by PEFT's own means,
`delete_adapter` and `load_adapter`, walks the whole model several times. Here it is done that way once for every layout
(config, keys and shapes); what it built is kept without its weights as a pattern. After that

- an adapter of the layout that the slot has is copied into the slot's tensors, in place;
- for one of another layout, the pattern is copied with new tensors, and takes the place of what the slot had.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastpeft.checkpoint import AdapterFileError, get_peft_model_state_dict
from fastpeft.config import PeftConfig
from fastpeft.mapping import get_peft_model
from fastpeft.peft_model import PeftModel
from fastpeft.serving.weights import AdapterWeights
from fastpeft.tuners.switching import settle_adapters
from fastpeft.tuners.tuner_layer import BaseTunerLayer
from fastpeft.utils.auxiliary import _ROWWISE, AuxiliaryTrainingWrapper
from fastpeft.utils.peft_types import PeftType

_PATTERNS = 64  # layouts whose pattern is kept
_BUILDING = "fastpeft_building"


@dataclass(frozen=True)
class _Part:
    """What one layer keeps by the name of an adapter: a module, a Parameter or a plain value."""

    owner: nn.Module
    container: MutableMapping[str, Any]
    value: Any  # tensors on the meta device
    device: torch.device | None

    def put(self, slot: str) -> Any:
        """Give the slot a value of its own, its tensors uninitialised."""
        value = self.value
        if isinstance(value, nn.Module):
            value = _with_new_tensors(value, self.device)
        elif isinstance(value, Tensor):
            value = _new_tensor(value, self.device)
        self.container[slot] = value
        if isinstance(self.owner, AuxiliaryTrainingWrapper):
            self.owner._adapters.add(slot)
        return value

    def remove(self, slot: str) -> None:
        """Take the slot's value away, if it has one."""
        if slot in self.container:
            del self.container[slot]
        if isinstance(self.owner, AuxiliaryTrainingWrapper):
            self.owner._adapters.discard(slot)


@dataclass(frozen=True)
class _Pattern:
    """All parts of an adapter, and where in them each tensor of a file goes."""

    parts: list[_Part]
    places: dict[str, tuple[int, str]]  # key of a file -> number of the part, name inside it ("" for a Parameter)

    def put(self, slot: str) -> dict[str, Tensor]:
        """Put an adapter into the layers under the slot's name. Returns its tensors by the keys of a file."""
        try:
            values = [part.put(slot) for part in self.parts]
        except BaseException:  # out of memory
            self.remove(slot)
            raise
        inside = [dict(_tensors_of(value)) for value in values]
        return {key: inside[number][name] for key, (number, name) in self.places.items()}

    def remove(self, slot: str) -> None:
        for part in self.parts:
            part.remove(slot)


@dataclass
class _Content:
    layout: tuple[object, ...]
    pattern: _Pattern
    tensors: dict[str, Tensor]


class AdapterSlots:
    """Places for adapters inside a model.

    Not for several threads at once, and nothing may run in the model meanwhile.

    Args:
        model: a PeftModel, whose own adapters stay as they are; or a base model, which is wrapped in place when the
            first adapter comes, frozen and in eval mode.
        count: number of slots.
        autocast_adapter_dtype: as in `load_adapter`: 16-bit adapter weights are raised to fp32.

    Raises:
        ValueError: `count` is no positive number, or the model's own adapters are merged or disabled.
    """

    def __init__(self, model: nn.Module, count: int, autocast_adapter_dtype: bool = True) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"expected a number of slots of at least 1, got {count!r}")
        _check_follows_routings(model)
        self.names = tuple(f"fastpeft_slot_{i}" for i in range(count))
        self.base_model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.autocast_adapter_dtype = autocast_adapter_dtype
        self.copied, self.built = 0, 0  # loads in place, and with new tensors
        self._wrapped: PeftModel | None = model if isinstance(model, PeftModel) else None
        self._is_own_wrapper = self._wrapped is None
        self._contents: list[_Content | None] = [None] * count
        self._patterns: OrderedDict[tuple[object, ...], _Pattern] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """What the tensors of all slots occupy."""
        return sum(t.nbytes for content in self._contents if content is not None for t in content.tensors.values())

    @property
    def method(self) -> str | None:
        """The method of all adapters in the model, such as "LORA"; None before the first one."""
        return None if self._wrapped is None else PeftType(self._wrapped.peft_type).value

    @torch.no_grad()
    def load(self, slot: int, weights: AdapterWeights) -> None:
        """Put an adapter into a slot, in place of what was there.

        Raises:
            ValueError, NotImplementedError: the adapter does not fit the model; the slot keeps what it had.
        """
        layout, content = weights.layout, self._contents[slot]
        if content is None or content.layout != layout:
            pattern = self._pattern(layout, weights)
            self.clear(slot)
            content = _Content(layout, pattern, pattern.put(self.names[slot]))
            self._contents[slot] = content
            self._configs()[self.names[slot]] = weights.config
            settle_adapters(self.base_model)
            self.built += 1
        else:
            self.copied += 1
        for key, tensor in weights.tensors.items():
            content.tensors[key].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in content.tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()  # the generation has a stream of its own

    def clear(self, slot: int) -> None:
        """Take what is in a slot out of the model, if anything is."""
        content = self._contents[slot]
        if content is not None:
            content.pattern.remove(self.names[slot])
            del self._configs()[self.names[slot]]
            self._contents[slot] = None

    def close(self) -> None:
        """Empty all slots. A base model that was wrapped gets its own layers back."""
        for slot in range(len(self.names)):
            self.clear(slot)
        self._patterns.clear()
        settle_adapters(self.base_model)  # layers let go of what they remember of these adapters
        if self._is_own_wrapper and self._wrapped is not None:
            self._wrapped.base_model.unload()
            vars(self.base_model).pop("peft_config", None)
            self._wrapped = None

    def _configs(self) -> dict[str, PeftConfig]:
        assert self._wrapped is not None
        return self._wrapped.peft_config

    def _pattern(self, layout: tuple[object, ...], weights: AdapterWeights) -> _Pattern:
        """The pattern of a layout, made by adding an adapter of it to the model and taking it out again."""
        if layout in self._patterns:
            self._patterns.move_to_end(layout)
            return self._patterns[layout]
        _check_leaves_base_alone(weights.config)
        config = copy.deepcopy(weights.config)
        config.inference_mode = True
        with self._built(config, on_meta=True) as own:  # a config may ask for any size; the file has what it has
            _check_fits(weights.tensors, own)
        with self._built(config, on_meta=False) as own:
            assert self._wrapped is not None
            pattern = _pattern_of(self._wrapped, _BUILDING, own)
            _check_rowwise(pattern)
        self._patterns[layout] = pattern
        while len(self._patterns) > _PATTERNS:
            self._patterns.popitem(last=False)
        return pattern

    @contextmanager
    def _built(self, config: PeftConfig, on_meta: bool) -> Iterator[dict[str, Tensor]]:
        """Have an adapter in the model meanwhile; its tensors by the keys of a file. On meta they occupy no memory."""
        config = copy.deepcopy(config)
        autocast = self.autocast_adapter_dtype
        with torch.device("meta") if on_meta else nullcontext():  # of this thread alone, as low_cpu_mem_usage is not
            if self._wrapped is None:
                wrapped = get_peft_model(self.base_model, config, _BUILDING, autocast_adapter_dtype=autocast)
                self._wrapped = cast(PeftModel, wrapped).eval()
            else:
                self._wrapped.add_adapter(_BUILDING, config, autocast_adapter_dtype=autocast)
        try:
            yield get_peft_model_state_dict(self._wrapped, adapter_name=_BUILDING, save_embedding_layers=False)
        finally:
            self._wrapped.delete_adapter(_BUILDING)


def _check_follows_routings(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and (module.merged or module.disable_adapters):
            state = f"merged ({', '.join(module.merged_adapters)})" if module.merged else "disabled"
            raise ValueError(
                f"the adapters of {name} are {state}: requests could not take their own. Call unmerge_adapter, or "
                "leave disable_adapter, before the model is served"
            )


def _check_rowwise(pattern: _Pattern) -> None:
    """A module that an adapter keeps whole must be one that a batch of several adapters can pass through."""
    for part in pattern.parts:
        if isinstance(part.owner, AuxiliaryTrainingWrapper) and not isinstance(part.owner.original_module, _ROWWISE):
            raise NotImplementedError(
                f"modules_to_save has a {type(part.owner.original_module).__name__}, which cannot take a batch of "
                f"several adapters; it can be one of {', '.join(kind.__name__ for kind in _ROWWISE)}"
            )


def _check_leaves_base_alone(config: Any) -> None:
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"the adapter trained biases of the base model (bias={config.bias!r}), which all adapters share: it cannot "
            "be served beside others. Merge it into a model of its own"
        )


def _check_fits(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise unless a file has exactly the tensors that the adapter needs: a missing one would be somebody else's."""
    problems = [f"lacks {key}" for key in own.keys() - weights.keys()]
    problems += [f"has {key}, which is no part of the adapter" for key in weights.keys() - own.keys()]
    problems += [
        f"has {key} of shape {tuple(weights[key].shape)}, the model {tuple(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if own[key].shape != weights[key].shape
    ]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise AdapterFileError(
            f"it does not fit this base model: it {'; it '.join(sorted(problems)[:4])}{more}. Serve it with the base "
            "model it was trained on; weights of the base itself (resized embeddings) cannot be served"
        )


def _pattern_of(model: PeftModel, name: str, own: Mapping[str, Tensor]) -> _Pattern:
    """Everything that the layers keep under an adapter's name, without its weights."""
    addresses = {tensor.data_ptr(): key for key, tensor in own.items()}
    parts: list[_Part] = []
    places: dict[str, tuple[int, str]] = {}
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        for attribute in (*module.adapter_layer_names, *module.other_param_names):
            container = getattr(module, attribute)
            if not isinstance(container, MutableMapping | nn.ModuleDict | nn.ParameterDict) or name not in container:
                continue
            value, device = container[name], None
            for inside, tensor in _tensors_of(value):
                device = tensor.device
                if tensor.data_ptr() in addresses:
                    places[addresses[tensor.data_ptr()]] = (len(parts), inside)
            parts.append(_Part(cast(nn.Module, module), cast(Any, container), _without_weights(value), device))
    unplaced = own.keys() - places.keys()
    if unplaced:
        raise NotImplementedError(
            f"{sorted(unplaced)[:4]} lie outside the adapter's layers; an adapter of {model.peft_type} cannot be served"
        )
    return _Pattern(parts, places)


def _with_new_tensors(module: nn.Module, device: torch.device | None) -> nn.Module:
    """A copy of a module with uninitialised tensors. As deepcopy and to_empty would make it, in a tenth of the time."""
    clone = module.__class__.__new__(module.__class__)
    vars(clone).update({name: part.copy() if isinstance(part, dict) else part for name, part in vars(module).items()})
    for table in (clone._parameters, clone._buffers):
        for name, tensor in table.items():
            table[name] = None if tensor is None else _new_tensor(tensor, device)  # type: ignore[assignment]
    for name, child in clone._modules.items():
        clone._modules[name] = None if child is None else _with_new_tensors(child, device)
    return clone


def _new_tensor(like: Tensor, device: torch.device | None) -> Tensor:
    tensor = torch.empty(like.shape, dtype=like.dtype, device=device)
    return nn.Parameter(tensor, requires_grad=False) if isinstance(like, nn.Parameter) else tensor


def _tensors_of(value: Any) -> list[tuple[str, Tensor]]:
    if isinstance(value, nn.Module):
        return [*value.named_parameters(), *value.named_buffers()]
    return [("", value)] if isinstance(value, Tensor) else []


def _without_weights(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to("meta").requires_grad_(False).eval()
    return nn.Parameter(value.detach().to("meta"), requires_grad=False) if isinstance(value, Tensor) else value
