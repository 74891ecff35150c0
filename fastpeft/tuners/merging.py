"""Merging the adapters of a model into its base weights, and taking the adapter layers off again."""

from collections.abc import Collection, Iterator

from torch import nn
from tqdm import tqdm

from fastpeft.tuners.shared_inputs import dissolve_groups
from fastpeft.tuners.tied import untie_if_diverged
from fastpeft.tuners.tuner_layer import BaseTunerLayer
from fastpeft.utils.auxiliary import AuxiliaryTrainingWrapper
from fastpeft.utils.integrations import onload_layer
from fastpeft.utils.modules import get_submodules

_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def _loaded_layers(model: nn.Module) -> Iterator[BaseTunerLayer]:
    """The adapter layers one by one, each with its offloaded weights brought in while it is looked at."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            with onload_layer(module):
                yield module


def check_merge(model: nn.Module, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Raise what merging these adapters would raise on any layer, before the first one is changed.

    With `safe_merge` this computes every merged weight once more than the merge itself: the price of all or nothing
    without a second copy of the model in memory.
    """
    for layer in _loaded_layers(model):
        layer.check_merge(adapter_names, safe_merge)


def merge(model: nn.Module, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Put adapters, by default the active ones, into the base weights of all layers."""
    for layer in _loaded_layers(model):
        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)


def unmerge(model: nn.Module) -> None:
    """Take all merged adapters out of the base weights of all layers."""
    for layer in _loaded_layers(model):
        layer.unmerge()


def unload(model: nn.Module, merge: bool, progressbar: bool, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Replace every adapter layer and wrapper by what it wraps, in place.

    Args:
        merge: put the adapters into the base weights first, and leave trained copies of `modules_to_save` in place.
            Otherwise the original modules come back.
    """
    dissolve_groups(model)
    keys = _wrapping(model, keep=())
    for key in tqdm(keys, disable=not progressbar, desc="Merging" if merge else "Unloading"):
        _unwrap(model, key, merge, safe_merge, adapter_names)
    if hasattr(model, "peft_config"):
        del model.peft_config
    if merge:
        untie_if_diverged(model)


def take_off(model: nn.Module, keep: Collection[nn.Module]) -> None:
    """Replace adapter layers and wrappers by what they wrap, all but those in `keep`: nothing is merged."""
    dissolve_groups(model)
    for key in _wrapping(model, keep):
        _unwrap(model, key)


def _wrapping(model: nn.Module, keep: Collection[nn.Module]) -> list[str]:
    """Innermost first: an adapter layer may be part of a module that is trained whole."""
    kept = set(map(id, keep))
    keys = [key for key, module in model.named_modules() if isinstance(module, _WRAPPERS) and id(module) not in kept]
    return keys[::-1]


def _unwrap(
    model: nn.Module,
    key: str,
    merge: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    parent, target, name = get_submodules(model, key)
    with onload_layer(target):
        if isinstance(target, AuxiliaryTrainingWrapper):
            bare = target.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        else:
            assert isinstance(target, BaseTunerLayer)
            if merge:
                target.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            bare = target.get_base_layer()
    setattr(parent, name, bare)
