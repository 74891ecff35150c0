"""Wrappers around modules that an adapter trains whole, beside its low-rank layers (`modules_to_save`).

A wrapper keeps the module it replaced as `original_module` and one trained copy per adapter. Its state-dict keys are
PEFT's: `<path>.original_module.*` and `<path>.modules_to_save.<adapter>.*`.
"""

import copy
import inspect
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from fastpeft.routing import Routing, as_routing
from fastpeft.routing_scope import routing_for
from fastpeft.tuners.tuner_layer import BaseTunerLayer
from fastpeft.utils.integrations import gather_params_ctx
from fastpeft.utils.modules import set_requires_grad_on

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
_ROWWISE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # row i of the output depends on row i alone


class AuxiliaryTrainingWrapper(nn.Module):
    """What wrappers of whole modules have in common: which adapters they hold, which one is active, on or off."""

    adapter_layer_names: tuple[str, ...] = ()  # attributes that hold trainable weights by adapter name
    other_param_names: tuple[str, ...] = ()  # further attributes keyed by adapter name
    merged_adapters: list[str] = []  # noqa: RUF012  (part of the interface of tuner layers; nothing is ever merged)

    def __init__(self, module_to_save: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.check_target(module_to_save)
        self._active_adapter: list[str] = [adapter_name]
        self._disable_adapters = False
        self._adapters: set[str] = set()
        self.original_module = module_to_save  # from here on, __getattr__ forwards
        self.init_modules(adapter_name, **kwargs)
        self.update(adapter_name, **kwargs)

    # What a wrapper has to define.

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        """Create the containers that `update` fills."""
        raise NotImplementedError

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Make room for one more adapter."""
        self._adapters.add(adapter_name)

    def module_of(self, adapter_name: str) -> nn.Module:
        """The module that runs for this adapter; the original one if the adapter does not train this module."""
        raise NotImplementedError

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None) -> None:
        raise NotImplementedError

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is saved of this module for an adapter, by the names of the original module's own state dict.

        Args:
            state_dict: the wrapper's state dict, keys relative to the wrapper.
        """
        raise NotImplementedError

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Key in the file -> key in the wrapper's state dict, for every key that a file must bring."""
        raise NotImplementedError

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that takes the wrapper's place: the trained one with `merge`, else the original."""
        raise NotImplementedError

    def _get_available_adapters(self) -> set[str]:
        return set(self._adapters)

    # Checks.

    @classmethod
    def check_target(cls, module: nn.Module) -> None:
        """Raises TypeError for a module that cannot be wrapped: a container, or an adapter layer."""
        if isinstance(module, (*_CONTAINERS, BaseTunerLayer)):
            raise TypeError(
                f"modules_to_save cannot be applied to {type(module).__name__}: expected a module with a forward of "
                "its own and no adapter on it. Name the modules inside a container one by one, and do not name a "
                "module that is also in target_modules."
            )

    # State.

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    @property
    def active_adapter(self) -> list[str]:
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return self._active_adapter

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled

    def check_set_adapter(self, adapter_name: str | Sequence[str]) -> str | None:
        """The one of the given adapters that this module would switch to, or None.

        Raises:
            ValueError: more than one of them trains this module; their copies cannot both run.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        here = [name for name in names if name in self._adapters]
        if len(here) > 1:
            kind = type(self.original_module).__name__
            raise ValueError(
                f"only one active adapter may train a whole module: {here} all have the same {kind} in "
                "modules_to_save. Activate one of them."
            )
        return here[0] if here else None

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter of this module active, or none with an empty list."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(f"a module that is trained whole takes one adapter at a time, got {names}")
        if names and names[0] not in self._adapters:
            raise ValueError(f"no adapter {names[0]!r} here; expected one of {sorted(self._adapters)}")
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for attribute in self.adapter_layer_names:
            for name, layer in attrgetter(attribute)(self).items():
                if name in names:
                    set_requires_grad_on(layer, requires_grad)

    # Forward.

    def _current_module(self) -> nn.Module:
        if self._disable_adapters or not self._active_adapter:
            return self.original_module
        return self.module_of(self._active_adapter[0])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter_names = kwargs.pop("adapter_names", None)
        routing = routing_for(self) if adapter_names is None else as_routing(adapter_names)
        if routing is None or self._disable_adapters:
            return self._current_module()(*args, **kwargs)
        names = tuple(name for name in routing.names if self.module_of(name) is not self.original_module)
        if not names:
            return self.original_module(*args, **kwargs)
        return self._routed_forward(routing, names, *args, **kwargs)

    def _routed_forward(
        self, routing: Routing, names: tuple[str, ...], input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Each row through the module of its own adapter; several add what they differ by, times their weight."""
        x = input  # named as in torch's modules
        if not isinstance(self.original_module, _ROWWISE):
            raise TypeError(
                f"a batch of mixed adapters cannot pass through a whole {type(self.original_module).__name__} in "
                f"modules_to_save; supported are {', '.join(c.__name__ for c in _ROWWISE)}. "
                "Run one batch per adapter instead."
            )
        shape = x.shape[: _leading(self.original_module, x)]
        tables, bounds = routing.tables(shape, names, x.device), None
        if not torch.compiler.is_compiling():
            bounds = routing.bounds(shape, names, x.device)
        base = self.original_module(x, *args, **kwargs)  # whole, so that its rows keep the very bits of the base model
        flat = x.reshape(-1, *x.shape[len(shape) :])
        out = flat_base = base.reshape(len(flat), *base.shape[len(shape) :])
        for p, order in enumerate(tables.rows.long()):
            for slot, name in enumerate(names):
                if bounds is None:  # a compiler knows no number but that of all rows
                    numbers = torch.arange(len(order), device=x.device)
                    taken = (numbers >= tables.starts[p, slot]) & (numbers < tables.starts[p, slot + 1])
                    lines = slice(None)
                else:
                    lines, taken = slice(*bounds[p][slot : slot + 2]), None
                rows = order[lines]
                if len(rows) == 0 and not torch.is_grad_enabled():  # else distributed training wants its gradient
                    continue
                part = self.module_of(name)(flat[rows], *args, **kwargs)
                if len(tables.rows) > 1 or tables.weights is not None:
                    change = part - flat_base[rows]
                    if tables.weights is not None:
                        change = change * _as_column(tables.weights[p, lines], part)
                    part = out[rows] + change
                if taken is not None:
                    part = torch.where(_as_column(taken, part), part, out[rows])
                out = out.index_copy(0, rows, part.to(out.dtype))
        return out.view(base.shape)

    def __getattr__(self, name: str) -> Any:
        """Attributes that the wrapper lacks are those of the module that would run (`lm_head.weight`, ...)."""
        try:
            return nn.Module.__getattr__(self, name)  # not super(): see fastpeft.recognition
        except AttributeError:
            # half built, being copied, or asked for a protocol method: nothing to forward to
            if name.startswith("__") or "original_module" not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self._current_module(), name)


def _as_column(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1))


def _leading(module: nn.Module, x: Tensor) -> int:
    """How many leading dimensions of x count rows: without the features of a linear layer; all of an embedding's."""
    if isinstance(module, nn.Linear):
        return x.ndim - 1
    return x.ndim if isinstance(module, nn.Embedding) else 1


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """One full, trainable copy of the module per adapter."""

    adapter_layer_names = ("modules_to_save",)

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        self.modules_to_save = nn.ModuleDict({})
        self._paused: list[str] | None = None  # while disabled: the adapters that were trainable before

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Add a frozen copy of the original module for this adapter; `set_adapter` makes it trainable."""
        super().update(adapter_name)
        self.original_module.requires_grad_(False)
        if adapter_name in self.modules_to_save:
            return
        with gather_params_ctx(list(self.original_module.parameters())):
            module = copy.deepcopy(self.original_module)
        if hasattr(module, "_hf_hook"):  # a copied hook still moves the weights of the module it was made for
            hook = module._hf_hook
            remove_hook_from_module(module)
            accepted = inspect.signature(type(hook).__init__).parameters
            add_hook_to_module(module, type(hook)(**{k: v for k, v in vars(hook).items() if k in accepted}))
        self.modules_to_save[adapter_name] = module

    def module_of(self, adapter_name: str) -> nn.Module:
        return self.modules_to_save[adapter_name] if adapter_name in self._adapters else self.original_module

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Switch to this adapter's copy and train it (unless `inference_mode`); all other copies are frozen."""
        super().set_adapter(adapter_names, inference_mode)
        self._paused = None
        for name, module in self.modules_to_save.items():
            set_requires_grad_on(module, name in self._active_adapter and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch between the active copy and the original. Off freezes the copies; on restores what was trainable."""
        if enabled:
            trainable = self._active_adapter if self._paused is None else self._paused
            self._paused = None
        else:
            trainable = []
            if self._paused is None:
                copies = self.modules_to_save.items()
                self._paused = [name for name, copy_ in copies if any(p.requires_grad for p in copy_.parameters())]
        for name, module in self.modules_to_save.items():
            set_requires_grad_on(module, name in trainable)
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None) -> None:
        """Drop an adapter's copy. If it was active, the one of `new_active_adapters` that has a copy here follows."""
        if adapter_name not in self._adapters:
            return
        remaining = [name for name in new_active_adapters or [] if name != adapter_name]
        successor = self.check_set_adapter(remaining)
        self._adapters.discard(adapter_name)
        del self.modules_to_save[adapter_name]
        if adapter_name in self._active_adapter:
            self.set_adapter([successor] if successor else [])

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self._adapters:
            return {}  # the module is trained by another adapter
        keys = self.modules_to_save[adapter_name].state_dict()
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in keys}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: state_dict[own] for key, own in self.adapter_state_dict_load_map(adapter_name).items()}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The trained copy with `merge`, of the adapter that is active or the one that is named; else the original."""
        if not merge:
            return self.original_module
        name = self.check_set_adapter(self._active_adapter if adapter_names is None else adapter_names)
        return self.original_module if name is None else self.modules_to_save[name]
