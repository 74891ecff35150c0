"""Which modules of a model an adapter goes on, and with which rank.

A config names modules by suffix (`q_proj`), by regular expression over the whole path, or with "all-linear"; narrows
them by `exclude_modules`, `modules_to_save` and `layers_to_transform`; and sets rank and alpha by pattern. The answer
to all of it is a list of paths, found before anything in the model changes.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastpeft.tuners.bases import is_linear
from fastpeft.tuners.tuner_layer import BaseTunerLayer
from fastpeft.utils.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from fastpeft.utils.constants import (
    DUMMY_TARGET_MODULES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    MAMBA_INCOMPATIBLE_MODULES,
    MAMBA_MODEL_TYPES,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
    SEQ_CLS_HEAD_NAMES,
)
from fastpeft.utils.error import NoMatchingPeftModuleError
from fastpeft.utils.other import get_pattern_key

FIRST_INDEX = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")  # the layer's number; an expert's would come later


@dataclass
class Targets:
    """What a config selects in a model: paths in the model's order."""

    matched: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)


def suffixes(key: str) -> list[str]:
    """All ends of a dotted path, shortest first: "a.b.c" gives "c", "b.c", "a.b.c"."""
    parts = key.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def matches_name(names: str | Iterable[str], key: str) -> bool:
    """Whether a regular expression matches the whole path, or a name in a collection is the path or its end."""
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    names = names if isinstance(names, set) else set(names)
    return not names.isdisjoint(suffixes(key))


def is_excluded(config: Any, key: str) -> bool:
    """Whether `exclude_modules` names the module, or it is (a part of) one that `modules_to_save` trains whole."""
    if (excluded := getattr(config, "exclude_modules", None)) and matches_name(excluded, key):
        return True
    saved = getattr(config, "modules_to_save", None) or ()
    return any(f".{key}.".find(f".{name}.") >= 0 for name in saved)


def _is_in_layers(config: Any, key: str) -> bool:
    """Whether `layers_to_transform` (with `layers_pattern`) lets this module through; no such field lets all."""
    layers = getattr(config, "layers_to_transform", None)
    if layers is None or layers == []:
        return True
    pattern = getattr(config, "layers_pattern", None) or ()
    patterns = [pattern] if isinstance(pattern, str) else pattern
    if patterns:
        found = (re.match(rf"(?:^|.*?\.){p}\.(?P<index>\d+)\.", key) for p in patterns)
        match = next((m for m in found if m), None)
    else:
        match = FIRST_INDEX.match(key)
    if match is None:
        return False
    index = int(match["index"])
    return index == layers if isinstance(layers, int) else index in layers


def is_target(config: Any, key: str) -> bool:
    """Whether the config names the module at this path. A path given in full is taken whatever layer it is in."""
    targets = config.target_modules
    if targets is None or is_excluded(config, key):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, key) is not None
    return key in targets or (matches_name(targets, key) and _is_in_layers(config, key))


def check_target_module_exists(config: Any, key: str) -> bool:
    """PEFT's name of `is_target`."""
    return is_target(config, key)


def choose_targets(config: Any, model: nn.Module, prefix: str, state_dict: Mapping[str, Tensor] | None) -> list[str]:
    """The modules that an adapter goes on, by its config or, where there is one, by its checkpoint.

    Args:
        config: its target_modules become the names that stand for them, in place.
        prefix: what the method's weights are called in a checkpoint, "lora_".

    Raises:
        NoMatchingPeftModuleError (a ValueError): there are none.
    """
    expand_all_linear(config, model)
    condense_target_modules(config, model)
    found = find_targets(config, model)
    names = None
    if state_dict is not None:
        names = names_in_state_dict(state_dict, prefix, model)
        by_config, found = found, find_targets(config, model, names)
        if found.matched:
            _warn_of_difference(config, found, by_config)
    _check_found(config, model, found, names)
    return found.matched


def find_targets(config: Any, model: nn.Module, names: set[str] | None = None) -> Targets:
    """The modules of a model that the config, or a set of exact paths, selects.

    The insides of adapter layers, and other adapters' copies of `modules_to_save`, are never selected.
    """
    targets = Targets()
    for key in adaptable_names(model):
        if names is not None:
            if key.removeprefix("_orig_mod.") in names:  # torch.compile puts this in front
                targets.matched.append(key)
        elif is_target(config, key):
            targets.matched.append(key)
        elif is_excluded(config, key):
            targets.excluded.append(key)
    return targets


def adaptable_names(model: nn.Module) -> Iterable[str]:
    """Paths of all modules, except the root and what lies inside adapter layers and other adapters' trained copies."""
    closed: list[str] = []
    for key, module in model.named_modules():
        if not key or any(key.startswith(prefix) for prefix in closed):
            continue
        if isinstance(module, BaseTunerLayer):
            closed.append(f"{key}.")
        elif isinstance(module, ModulesToSaveWrapper):
            closed.append(f"{key}.modules_to_save.")
        yield key


def names_in_state_dict(state_dict: Mapping[str, Tensor], prefix: str, model: nn.Module) -> set[str]:
    """Paths of the modules that a checkpoint holds adapter weights for: what stands before `.lora_...` in its keys."""
    wrapped = "base_model" in dict(model.named_children())
    names = {key.rsplit(f".{prefix}", 1)[0].removeprefix("_orig_mod.") for key in state_dict}
    return names if wrapped else {name.removeprefix("base_model.model.") for name in names}


# Before matching: what the config says is rewritten as the modules it stands for.


def expand_all_linear(config: Any, model: nn.Module) -> Any:
    """Replace target_modules="all-linear" by the paths of all linear layers except the output head, in place.

    Left out: the output embeddings of a language model, the head of a sequence classifier, and whatever belongs to
    adapters that are on the model already (their layers are targets, what is inside them is not).
    """
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, str) or targets.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return config
    head = _output_head(model, getattr(config, "task_type", None))
    closed = [f"{key}." for key, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    names = set()
    for key in adaptable_names(model):
        module = model.get_submodule(key)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if is_linear(base) and module is not head and not any(key.startswith(prefix) for prefix in closed):
            names.add(key)
    config.target_modules = names
    return config


def _output_head(model: Any, task_type: Any) -> nn.Module | None:
    """The head that "all-linear" leaves alone."""
    try:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    except (AttributeError, NotImplementedError):
        head = None
    if head is None and task_type == "SEQ_CLS":
        head = next((h for name in SEQ_CLS_HEAD_NAMES if (h := getattr(model, name, None)) is not None), None)
    return head


def condense_target_modules(config: Any, model: nn.Module) -> Any:
    """Replace a long list of targets by the fewest suffixes that name the same modules, in place.

    The saved config is then short and works for a model of another depth, as PEFT's does.
    """
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, list | set) or len(targets) < MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        return config
    if config.peft_type == "IA3":  # its feedforward_modules have to stay a subset
        return config
    wanted = set(targets)
    others = [key for key, _ in model.named_modules() if wanted.isdisjoint(suffixes(key))]
    condensed = minimal_target_modules(wanted, others)
    if len(condensed) < len(wanted):
        config.target_modules = condensed
    return config


def minimal_target_modules(target_modules: Iterable[str], other_module_names: Iterable[str]) -> set[str]:
    """The shortest suffixes that cover all targets and name none of the others.

    Raises:
        ValueError: the two overlap, or a target is no name.
    """
    targets, others = set(target_modules), set(other_module_names)
    if isinstance(target_modules, str) or not targets or "" in targets:
        raise ValueError(f"target_modules must be a non-empty collection of names, got {target_modules!r}")
    if both := sorted(targets & others):
        raise ValueError(f"a module cannot be a target and not be one; in both lists: {both}")
    taken = {suffix for key in others for suffix in suffixes(key)}
    chosen: set[str] = set()
    for ends in sorted(suffixes(key) for key in targets):
        if chosen.isdisjoint(ends):
            chosen.add(next((end for end in ends if end not in taken), ends[-1]))
    return chosen


# Rank and alpha by pattern.


def resolve_pattern(pattern: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    """The value of the first pattern that matches the path, from some dot on to its end; else the default."""
    if not pattern:
        return default
    return pattern.get(get_pattern_key(pattern, key), default)


def unmatched_patterns(pattern: Iterable[str], keys: Sequence[str]) -> list[str]:
    """The patterns that match none of the paths."""
    return sorted(p for p in pattern if not any(re.match(rf"(.*\.)?({p})$", key) for key in keys))


# Checks and errors.


def check_mamba_targets(config: Any, model: nn.Module, target_name: str) -> None:
    """Raises ValueError for a module that a state-space model reads without calling it."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in MAMBA_MODEL_TYPES and target_name in MAMBA_INCOMPATIBLE_MODULES:
        raise ValueError(
            f"{target_name} cannot be adapted in a {model_type} model: its weight is read by a fused kernel that "
            "would not see the adapter. Leave it out of target_modules."
        )


def _check_found(config: Any, model: nn.Module, targets: Targets, names: set[str] | None) -> None:
    """Raises NoMatchingPeftModuleError when nothing is selected; warns of parts of the config that select nothing."""
    if getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES:
        return
    if not targets.matched:
        raise NoMatchingPeftModuleError(_nothing_found(config, model, targets, names))
    if getattr(config, "exclude_modules", None) and not targets.excluded and names is None:
        warnings.warn(
            f"exclude_modules={config.exclude_modules} excludes no module of {type(model).__name__}", stacklevel=5
        )
    if not isinstance(wanted := getattr(config, "target_modules", None), str | None) and names is None:
        ends = {end for key in (*targets.matched, *targets.excluded) for end in suffixes(key)}
        if unused := sorted(set(wanted) - ends):
            warnings.warn(f"target_modules {unused} match no layer of {type(model).__name__}", stacklevel=5)
    for attribute in ("rank_pattern", "alpha_pattern"):
        if unused := unmatched_patterns(getattr(config, attribute, None) or (), targets.matched):
            warnings.warn(f"{attribute} {unused} match no targeted module", RuntimeWarning, stacklevel=5)


def _warn_of_difference(config: Any, targets: Targets, by_config: Targets) -> None:
    """Warn where a checkpoint and its config select different modules; the checkpoint is followed."""
    only_config = sorted(set(by_config.matched) - set(targets.matched))
    only_checkpoint = sorted(set(targets.matched) - set(by_config.matched))
    parts = [
        text
        for names, text in (
            (only_config, f"the config also targets {only_config}, for which the checkpoint has no weights"),
            (
                only_checkpoint,
                f"the checkpoint also has weights of {only_checkpoint}, which the config does not target",
            ),
        )
        if names
    ]
    if parts:
        warnings.warn(f"adapters go where the checkpoint has weights: {'; '.join(parts)}", RuntimeWarning, stacklevel=5)


def _nothing_found(config: Any, model: nn.Module, targets: Targets, names: set[str] | None) -> str:
    kind = type(model).__name__
    if names is not None:
        some = sorted(names)[:5]
        return f"the checkpoint's keys name no module of {kind}; they begin with {some}. Is it for another base model?"
    wanted = config.target_modules
    if not wanted:
        return f"target_modules is empty: name the modules of {kind} to adapt. {_linear_layers(model)}"
    shown = f"target_modules={wanted!r}" if isinstance(wanted, str) else f"target_modules={set(wanted)!r}"
    everywhere = [key for key in adaptable_names(model) if matches_name(wanted, key)]
    if not everywhere:
        return f"{shown} matches no layer of {kind}. {_linear_layers(model)}"
    narrowed = [
        f"{name}={value!r}"
        for name in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
        if (value := getattr(config, name, None))
    ]
    return (
        f"{shown} matches {len(everywhere)} layers of {kind} ({everywhere[0]}, ...), but {', '.join(narrowed)} "
        "leaves none of them. Widen these fields."
    )


def _linear_layers(model: nn.Module) -> str:
    ends = set()
    for key in adaptable_names(model):
        module = model.get_submodule(key)
        if is_linear(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module):
            ends.add(key.rpartition(".")[2])
    if not ends:
        return "There are no linear layers here; see model.named_modules() for the names there are."
    return f"Linear layers here end in:\n{', '.join(sorted(ends))}"
