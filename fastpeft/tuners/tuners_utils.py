"""The tuner: what puts adapters of one method on a model, switches, merges and removes them. Once for every method."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastpeft.not_yet import METHODS_NOT_YET
from fastpeft.tuners import merging, targets, tied
from fastpeft.tuners.biases import bias_of, check_biases, warn_of_biases
from fastpeft.tuners.injection import check_adapter_name, put_on_modules
from fastpeft.tuners.mixed_batch import following
from fastpeft.tuners.switching import (
    cast_adapter_dtype,
    check_not_merged,
    delete_adapter,
    freeze_base_model,
    keep_trainability,
    set_adapter,
    set_requires_grad,
    settle_adapters,
)
from fastpeft.tuners.targets import check_target_module_exists
from fastpeft.tuners.tuner_layer import BaseTunerLayer, check_adapters_to_merge
from fastpeft.utils.auxiliary import AuxiliaryTrainingWrapper
from fastpeft.utils.constants import DUMMY_TARGET_MODULES, EMBEDDING_LAYER_NAMES
from fastpeft.utils.integrations import onload_layer
from fastpeft.utils.modules import config_as_dict, get_submodules
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

    def _layers_changed(self, model: nn.Module) -> None:
        """Called after adapter layers came or went, on the model or a part of it."""

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
            put = partial(self._create_and_replace, config, adapter_name)
            put_on_modules(model, keys, adapter_name, put, self.tuner_layer_cls, low_cpu_mem_usage)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            self._mark_only_adapters_as_trainable(model)
            is_active = adapter_name in self.active_adapters
            model_config = self.get_model_config(model)
            set_additional_trainable_modules(model, config, model_config, adapter_name, activate_adapter=is_active)
        known = set(self.targeted_module_names)
        self.targeted_module_names += [key for key in keys if key not in known]
        self._layers_changed(model)

    def _plan(
        self, config: Any, model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor] | None
    ) -> list[str]:
        """The paths to put the adapter on, everything checked. Nothing in the model changes here."""
        check_adapter_name(adapter_name)
        check_not_merged(model, adapter_name)
        self._check_new_adapter_config(config)
        self._prepare_adapter_config(config, self.get_model_config(model))
        self._prepare_model(config, model)
        tied.warn_of_targets(config, model)
        if getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES:
            return []
        keys = targets.choose_targets(config, model, self.prefix, state_dict)
        for key in keys:
            _, target, name = get_submodules(model, key)
            self._check_target_module_compatiblity(config, model, name)
            self._check_target(config, target, key)
        if getattr(config, "modules_to_save", None):
            find_trainable_modules(model, config.modules_to_save)
        return keys

    def _check_new_adapter_config(self, config: Any) -> None:
        """Raise if the config conflicts with those of the adapters on the model."""
        check_biases(self.peft_config)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freeze the base model, but for the biases that the active adapters' configs train."""
        biases = [bias_of(self.peft_config[adapter]) for adapter in self.active_adapters]
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
        warn_of_biases(self.peft_config, self.active_adapters)
        self._enable_adapter_layers(False)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                module.enable_adapters(enabled)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)
        settle_adapters(self.model)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """While this context lasts, the layers follow the `adapter_names` of a mixed batch, if any are given.

        Args:
            adapter_names: an adapter for each row of the batch, see `Routing.by_row`; or a Routing.
            num_beams, num_return_sequences, generation_config, model_config: of a generation, which repeats every row
                so often; the first of them that says something, as in transformers.

        Raises:
            TypeError, ValueError: `adapter_names` is nothing of the kind, or has a name that no adapter has.
        """
        return following(self.model, self.peft_config, kwargs)

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
        if keys := self._get_tied_target_modules(self.model):
            tied.warn_of_merge(keys)

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

    def _take_off(self, keep: Collection[nn.Module]) -> None:
        """Replace adapter layers and wrappers that are not in `keep`, and hold no adapter, by what they wrap."""
        merging.take_off(self.model, keep)
        modules = dict(self.model.named_modules())
        self.targeted_module_names[:] = [
            key for key in self.targeted_module_names if isinstance(modules.get(key), BaseTunerLayer)
        ]
        self._layers_changed(self.model)

    # Facts about the model.

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's config as a dict; a model without one is of type "custom"."""
        return config_as_dict(model)

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        if not self.get_model_config(model).get("tie_word_embeddings"):
            return []
        return [key for key in self.targeted_module_names if key.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]

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
