"""The tuner: what puts adapters of one method on a model, switches, merges and removes them. Once for every method."""

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from fastpeft.not_yet import METHODS_NOT_YET
from fastpeft.routing import as_routing, check_names
from fastpeft.routing_scope import carry_through_checkpoints, entered, is_routed
from fastpeft.tuners import merging, targets
from fastpeft.tuners.switching import (
    cast_adapter_dtype,
    check_not_merged,
    delete_adapter,
    freeze_base_model,
    keep_trainability,
    set_adapter,
    set_requires_grad,
)
from fastpeft.tuners.targets import check_target_module_exists
from fastpeft.tuners.tuner_layer import BaseTunerLayer, check_adapters_to_merge
from fastpeft.utils.auxiliary import AuxiliaryTrainingWrapper
from fastpeft.utils.constants import DUMMY_MODEL_CONFIG, DUMMY_TARGET_MODULES, EMBEDDING_LAYER_NAMES
from fastpeft.utils.integrations import init_empty_weights, onload_layer
from fastpeft.utils.modules import get_submodules, module_names_tied_with_embedding
from fastpeft.utils.trainable import find_trainable_modules, set_additional_trainable_modules

__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "cast_adapter_dtype",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "delete_adapter",
    "onload_layer",
    "set_adapter",
    "set_requires_grad",
]


class BaseTuner(nn.Module, ABC):
    """A model with adapters of one method in it.

    A method's tuner states three things, and says how one module is replaced (`_create_and_replace`) and when it cannot
    be (`_check_target`). `model` is the user's model, changed in place; whatever the tuner lacks is looked up there.

    Attributes:
        peft_config: adapter name -> its config; the model has the same dict.
        active_adapter: the name or names that run.
        targeted_module_names: paths of the modules that have an adapter.
    """

    prefix: str  # what the method's weights are called in a state dict, "lora_"
    tuner_layer_cls: type[BaseTunerLayer]
    target_module_mapping: dict[str, list[str] | str]  # model_type -> targets for a config that names none
    uses_shared_state: bool = False  # weights shared between layers live on the tuner itself

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put a first adapter on a model, or one more if it has adapters already; the new one is active.

        Args:
            model: changed in place.
            peft_config: a config, or a dict of them by adapter name.
            low_cpu_mem_usage: create the adapter on the meta device, for weights that are loaded next.
            state_dict: adapters go where this checkpoint has weights, rather than where the config says.

        Raises:
            ValueError, NotImplementedError: the config does not fit the model; the model is as it was.
        """
        super().__init__()
        self.model = model
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self.active_adapter: str | list[str] = adapter_name
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        existing = getattr(model, "peft_config", None)
        if isinstance(existing, dict):
            warnings.warn("this model has adapters already; the new one is put on beside them", stacklevel=2)
            before = dict(existing)
            existing.update(configs)
            self.peft_config = existing
        else:
            before = {}
            self.peft_config = configs
        try:
            self._pre_injection_hook(model, configs[adapter_name], adapter_name)
            self.inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
        except Exception:
            if isinstance(existing, dict):
                existing.clear()
                existing.update(before)
            raise
        self._post_injection_hook(model, configs[adapter_name], adapter_name)
        self.model.peft_config = self.peft_config  # type: ignore[assignment]

    # What a method defines.

    @abstractmethod
    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Put the adapter on one module: replace it in its parent, or add to the adapter layer it is already."""

    def _check_target(self, peft_config: Any, target: nn.Module, current_key: str) -> None:
        """Raise if the adapter cannot go on this module. Called for every target before any is changed."""

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Raise if a module of this name cannot be adapted in this kind of model."""
        targets.check_mamba_targets(peft_config, model, target_name)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """Fill in the method's default targets for this kind of model, in place."""
        if peft_config.target_modules is None:
            model_type = model_config.get("model_type")
            default = self.target_module_mapping.get(model_type)  # type: ignore[arg-type]
            if default is None:
                raise ValueError(
                    f"there are no default target_modules for models of type {model_type!r}: name them in the config, "
                    'or use target_modules="all-linear"'
                )
            peft_config.target_modules = default if isinstance(default, str) else set(default)
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Change the model's structure before adapters are put on it."""

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Called before an adapter of a new tuner is put on the model."""

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Called after an adapter of a new tuner was put on the model."""

    # Injection.

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put the adapter `peft_config[adapter_name]` on the modules it targets.

        The first adapter freezes the base model. A further one changes no existing parameter's requires_grad and is
        not active, hence not trained, unless its name is among the active ones. An adapter of the same name that is on
        the model already is replaced.

        Args:
            model: the model, or a part of it.
            autocast_adapter_dtype: unused, as in PEFT: `cast_adapter_dtype` is a step of its own.
            low_cpu_mem_usage, state_dict: as for the tuner.

        Raises:
            NoMatchingPeftModuleError (a ValueError): nothing is targeted.
            ValueError, TypeError, NotImplementedError: something targeted cannot be adapted. The model is unchanged.
        """
        config = self.peft_config[adapter_name]
        keys = self._plan(config, model, adapter_name, state_dict)

        is_first = not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        with nullcontext() if is_first else keep_trainability(model):
            self._create_layers(config, model, adapter_name, keys, low_cpu_mem_usage)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            self._mark_only_adapters_as_trainable(model)
            is_active = adapter_name in self.active_adapters
            model_config = self.get_model_config(model)
            set_additional_trainable_modules(model, config, model_config, adapter_name, activate_adapter=is_active)
        known = set(self.targeted_module_names)
        self.targeted_module_names += [key for key in keys if key not in known]

    def _create_layers(
        self, config: Any, model: nn.Module, adapter_name: str, keys: list[str], low_cpu_mem_usage: bool
    ) -> None:
        """Put the adapter on all the modules, or, should that fail halfway (out of memory), on none."""
        self._discard_existing(model, adapter_name)
        try:
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                for key in keys:
                    parent, target, name = get_submodules(model, key)
                    self._create_and_replace(config, adapter_name, target, name, parent, current_key=key)
        except BaseException:
            self._discard_existing(model, adapter_name)
            for key in keys:
                parent, layer, name = get_submodules(model, key)
                if isinstance(layer, self.tuner_layer_cls) and not layer._get_available_adapters():
                    setattr(parent, name, layer.base_layer)
            raise

    def _plan(
        self, config: Any, model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor] | None
    ) -> list[str]:
        """The paths to put the adapter on, everything checked. Nothing in the model changes here."""
        _check_adapter_name(adapter_name)
        check_not_merged(model, adapter_name)
        self._check_new_adapter_config(config)
        self._prepare_adapter_config(config, self.get_model_config(model))
        self._prepare_model(config, model)
        self._warn_of_tied_targets(config, model)
        if getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES:
            return []
        targets.expand_all_linear(config, model)
        targets.condense_target_modules(config, model)

        found = targets.find_targets(config, model)
        names = None
        if state_dict is not None:
            names = targets.names_in_state_dict(state_dict, self.prefix, model)
            by_config, found = found, targets.find_targets(config, model, names)
            if found.matched:
                targets.warn_of_difference(config, found, by_config)
        targets.check_found(config, model, found, names)
        for key in found.matched:
            _, target, name = get_submodules(model, key)
            self._check_target_module_compatiblity(config, model, name)
            self._check_target(config, target, key)
        if getattr(config, "modules_to_save", None):
            find_trainable_modules(model, config.modules_to_save)
        return found.matched

    def _discard_existing(self, model: nn.Module, adapter_name: str) -> None:
        """Take what is left of an earlier adapter of this name off its layers: the new one may target fewer."""
        for module in model.modules():
            if isinstance(module, self.tuner_layer_cls) and adapter_name in module._get_available_adapters():
                module.discard_adapter(adapter_name)

    def _check_new_adapter_config(self, config: Any) -> None:
        """Raise if the config conflicts with those of the adapters on the model."""
        with_bias = [name for name, c in self.peft_config.items() if getattr(c, "bias", "none") != "none"]
        if len(with_bias) > 1:
            raise ValueError(
                f"only one adapter of a model can train biases, they have no copy each: {with_bias} have bias other "
                'than "none". Set bias="none" for all but one.'
            )

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freeze the base model, but for the biases that the active adapters' configs train."""
        biases = [getattr(self.peft_config[adapter], "bias", "none") for adapter in self.active_adapters]
        freeze_base_model(model, biases, self.tuner_layer_cls)

    # Switching.

    @property
    def active_adapters(self) -> list[str]:
        return [self.active_adapter] if isinstance(self.active_adapter, str) else self.active_adapter

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one or more adapters, and only these, and train them (unless `inference_mode`).

        Raises:
            ValueError: no such adapter, or two of them train the same module whole. Nothing has changed then.
        """
        self._check_names([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        set_adapter(self.model, adapter_name, inference_mode=inference_mode, layer_cls=self.tuner_layer_cls)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train or freeze adapters, whether they are active or not."""
        self._check_names([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        set_requires_grad(self.model, adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was the only active one, another becomes active, with a warning.

        Raises:
            ValueError: no such adapter, or it is merged. Nothing has changed then.
        """
        self._check_names([adapter_name])
        check_not_merged(self.model, adapter_name)
        self.active_adapter = delete_adapter(self.model, adapter_name, self.prefix, self.tuner_layer_cls) or []
        del self.peft_config[adapter_name]

    def enable_adapter_layers(self) -> None:
        """Switch all adapters on again."""
        self._enable_adapter_layers(True)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off: the model computes what the base model does, if no bias was trained."""
        for adapter in self.active_adapters:
            bias = getattr(self.peft_config[adapter], "bias", "none")
            if bias != "none":
                warnings.warn(
                    f"adapter {adapter!r} trains biases (bias={bias!r}), which are part of the base model and stay as "
                    "they are: without its adapters the model is not the base model",
                    stacklevel=2,
                )
        self._enable_adapter_layers(False)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                module.enable_adapters(enabled)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """While this context lasts, the layers follow the `adapter_names` of a mixed batch, if any are given.

        Args:
            adapter_names: an adapter for each row of the batch, see `Routing.by_row`; or a Routing.
            num_beams, num_return_sequences, generation_config, model_config: of a generation, which repeats every row
                so often; the first of them that says something, as in transformers.

        Raises:
            TypeError, ValueError: `adapter_names` is nothing of the kind, or has a name that no adapter has.
        """
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            if is_routed():  # by a block of the user's
                carry_through_checkpoints(self.model)
            yield
            return
        routing = as_routing(adapter_names)
        check_names(routing, self.peft_config)
        if repeats := _repeats_of_rows(kwargs):
            routing = routing.expanded(*repeats)
        carry_through_checkpoints(self.model)
        with entered(routing, self.model):
            yield

    def _check_names(self, names: Sequence[str]) -> None:
        unknown = sorted(set(names) - set(self.peft_config))
        if unknown:
            raise ValueError(f"no adapter {', '.join(map(repr, unknown))}; there are: {', '.join(self.peft_config)}")

    # Merging and removing.

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every adapter layer adds to its base weight, so that it can be written as LoRA."""
        layers = (module for module in self.model.modules() if isinstance(module, BaseTunerLayer))
        return all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Put adapters into the base weights; their own weights are kept, for `unmerge_adapter`.

        Args:
            adapter_names: those to merge, by default the active ones.
            safe_merge: look for NaN and infinity in the results first.

        Raises:
            ValueError, RuntimeError: one of them cannot be merged. Nothing is merged then.
        """
        self._check_merge(adapter_names, safe_merge)
        merging.merge(self.model, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights again, exact up to rounding."""
        merging.unmerge(self.model)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge adapters into the base model for good, and return it without any adapter layer in it.

        Args:
            progressbar: show one.
            safe_merge, adapter_names: as for `merge_adapter`.
        """
        return self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """Return the base model without any adapter layer in it, its own modules in place of `modules_to_save`.

        Where nothing was merged and no bias was trained, that is the base model bit by bit. What was merged before
        stays merged.
        """
        return self._unload_and_optionally_merge(merge=False)

    def _check_merge_allowed(self) -> None:
        """Raise or warn where the model as a whole should not be merged."""
        tied = self._get_tied_target_modules(self.model)
        if tied:
            warnings.warn(
                f"{', '.join(tied)} share their weight with another layer (tie_word_embeddings): merging changes both. "
                "To merge into one of them only, load the base with tie_word_embeddings=False and give it a copy of "
                "the weight.",
                stacklevel=4,
            )

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        self._check_merge_allowed()
        if adapter_names is not None:
            if isinstance(adapter_names, str):
                raise TypeError(f"adapter_names must be a list of names; pass [{adapter_names!r}]")
            self._check_names(adapter_names)
        merging.check_merge(self.model, adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        merging.unload(self.model, merge, progressbar, safe_merge, adapter_names)
        return self.model

    # Facts about the model.

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's config as a dict; a model without one is of type "custom"."""
        config: Any = getattr(model, "config", DUMMY_MODEL_CONFIG)
        if hasattr(config, "to_dict"):
            return config.to_dict()
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            return dataclasses.asdict(config)
        return config

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        if not self.get_model_config(model).get("tie_word_embeddings"):
            return []
        return [key for key in self.targeted_module_names if key.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]

    def _warn_of_tied_targets(self, config: Any, model: nn.Module) -> None:
        wanted = getattr(config, "target_modules", None) or ()
        saved = getattr(config, "modules_to_save", None) or ()
        ends = {name.rpartition(".")[2] for name in (*saved, *(() if isinstance(wanted, str) else wanted))}
        if isinstance(wanted, str):
            ends.update(name for name in EMBEDDING_LAYER_NAMES if targets.matches_name(wanted, name))
        named = sorted(ends.intersection(EMBEDDING_LAYER_NAMES))
        if named and module_names_tied_with_embedding(model):
            warnings.warn(
                f"{', '.join(named)} share their weight (tie_word_embeddings=True), but the adapter trains each on its "
                "own. Merging, and saving in formats without shared weights, can then give surprising results.",
                stacklevel=5,
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the tuner lacks is the model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not built yet: looking further would never end
                raise
            if name in METHODS_NOT_YET and not hasattr(self.model, name):
                raise AttributeError(f"{name} is not supported yet; reference PEFT's models have it") from None
            return getattr(self.model, name)


def _check_adapter_name(name: str) -> None:
    """Raises ValueError for a name that cannot be a key of a ModuleDict."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"{name!r} cannot be the name of an adapter: expected a non-empty string without dots that is not the name "
            "of a method of torch.nn.ModuleDict"
        )


def _repeats_of_rows(kwargs: dict[str, Any]) -> set[int]:
    """How often the model may see a row of a batch that it generates for: once a beam, or a returned sequence."""
    configs = [kwargs.get("generation_config"), kwargs.get("model_config")]
    repeats = set()
    for option in ("num_beams", "num_return_sequences"):
        said = [kwargs.get(option), *(getattr(config, option, None) for config in configs)]
        repeats.add(next((value for value in said if value is not None), 1))
    return repeats - {1}
