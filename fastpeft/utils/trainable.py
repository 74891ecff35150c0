"""Putting wrappers of whole modules (`modules_to_save`) on a model, and switching them between adapters."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from fastpeft.tuners.tuner_layer import BaseTunerLayer
from fastpeft.utils.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from fastpeft.utils.modules import get_submodules


def find_trainable_modules(
    model: nn.Module, module_names: Iterable[str], wrapper_cls: type[AuxiliaryTrainingWrapper] = ModulesToSaveWrapper
) -> list[str]:
    """Paths of the modules whose path ends in one of the names, the outermost ones, each checked to be wrappable.

    Raises:
        TypeError: one of them is a container or an adapter layer.
        ValueError: one of them lies inside an adapter layer; its name is that of the adapter by accident.
    """
    suffixes = tuple(module_names)
    found: list[str] = []
    closed: list[str] = []  # prefixes below which nothing is looked for
    for key, module in model.named_modules(remove_duplicate=False):
        if not key or any(key.startswith(prefix) for prefix in closed):
            continue
        if isinstance(module, BaseTunerLayer):
            assert isinstance(module, nn.Module)
            closed.append(f"{key}.")
            parts = (f"{key}.{name}" for name, _ in module.named_modules() if name)
            accident = next((part for part in parts if part.endswith(suffixes)), None)
            if accident:
                raise ValueError(
                    f"modules_to_save={sorted(suffixes)} matches {accident}, a part of an adapter layer. An adapter "
                    "and a module to save cannot have the same name; rename the adapter."
                )
        if isinstance(module, AuxiliaryTrainingWrapper):
            closed.append(f"{key}.")
        if not key.endswith(suffixes):
            continue
        if not isinstance(module, wrapper_cls):
            wrapper_cls.check_target(module)
        found.append(key)
        closed.append(f"{key}.")
    return found


def set_trainable(
    model: nn.Module,
    adapter_name: str,
    module_names: Sequence[str] | set[str] | None,
    inference_mode: bool,
    strict_module_check: bool = False,
    wrapper_cls: type[AuxiliaryTrainingWrapper] | None = None,
    activate_adapter: bool = True,
    **wrapper_kwargs: Any,
) -> list[AuxiliaryTrainingWrapper]:
    """Wrap the modules whose path ends in one of the names, or add the adapter where they are wrapped already.

    Args:
        inference_mode: the new copies stay frozen.
        strict_module_check: a model without any such module is an error, not a warning.
        wrapper_cls: ModulesToSaveWrapper by default.
        activate_adapter: whether the new copies run from now on. False leaves every active adapter as it is.

    Returns:
        The wrappers that are new in the model.
    """
    wrapper_cls = wrapper_cls or ModulesToSaveWrapper
    if not module_names:
        return []
    keys = find_trainable_modules(model, module_names, wrapper_cls)
    if not keys:
        message = f"modules_to_save={sorted(module_names)} names no module of {type(model).__name__}"
        if strict_module_check:
            raise ValueError(f"{message}; see model.named_modules() for the names there are")
        warnings.warn(f"{message}: nothing is trained whole", stacklevel=2)
    new = []
    for key in keys:
        parent, target, name = get_submodules(model, key)
        if isinstance(target, AuxiliaryTrainingWrapper):
            target.update(adapter_name, **wrapper_kwargs)
            wrapper = target
        else:
            wrapper = wrapper_cls(target, adapter_name, **wrapper_kwargs)
            wrapper.set_adapter([])
            setattr(parent, name, wrapper)
            new.append(wrapper)
        if activate_adapter:
            wrapper.set_adapter(adapter_name, inference_mode=inference_mode)
        else:
            wrapper.set_requires_grad(adapter_name, False)
    return new


def set_auxiliary_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """Switch every wrapper of the model to whichever of the adapters it holds, or to none.

    Raises:
        ValueError: two of the adapters train the same module; no wrapper has changed then.
    """
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    choices = [wrapper.check_set_adapter(adapter_name) for wrapper in wrappers]
    for wrapper, choice in zip(wrappers, choices, strict=True):
        wrapper.set_adapter([] if choice is None else choice, inference_mode=inference_mode)


def set_additional_trainable_modules(
    model: nn.Module, peft_config: Any, model_config: Any, adapter_name: str, activate_adapter: bool = True
) -> None:
    """Wrap what an adapter trains besides its own layers, as its config says.

    Args:
        model_config: unused; kept for programs that call this function of PEFT.
    """
    for field in ("modules_to_tie", "trainable_token_indices"):
        if getattr(peft_config, field, None):
            raise NotImplementedError(f"{field} is not supported yet; use modules_to_save for the whole module")
    if getattr(peft_config, "modules_to_save", None):
        set_trainable(
            model,
            adapter_name,
            module_names=peft_config.modules_to_save,
            inference_mode=peft_config.inference_mode,
            activate_adapter=activate_adapter,
        )
