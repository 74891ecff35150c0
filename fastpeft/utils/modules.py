"""Small helpers on modules and their parameters that every tuner shares."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.utils.constants import DUMMY_MODEL_CONFIG


def set_requires_grad_on(target: nn.Module | Tensor, requires_grad: bool) -> None:
    """Set requires_grad on a tensor, or on every parameter of a module.

    A tensor that is not a leaf (a sharded parameter seen through FSDP) cannot be toggled and one of integer type has
    no gradient: both are left alone.
    """
    for tensor in [target] if isinstance(target, Tensor) else target.parameters():
        if tensor.is_leaf and (tensor.is_floating_point() or tensor.is_complex()):
            tensor.requires_grad_(requires_grad)


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """`(parent, module, name of the module in its parent)` of a dotted path.

    Raises:
        AttributeError: the model has no such module.
    """
    parent_key, _, name = key.rpartition(".")
    return model.get_submodule(parent_key), model.get_submodule(key), name


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """`weight.T` where the weight is stored (in, out); the weight itself otherwise. A Parameter stays one."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """requires_grad=False on every parameter that belongs to an adapter: its name is one part of the dotted path."""
    for name, parameter in model.named_parameters():
        if adapter_name in name.split("."):
            parameter.requires_grad = False


def config_as_dict(model: Any) -> Any:
    """The model's config as a dict; one that is of no kind that can be, as it is."""
    config: Any = getattr(model, "config", DUMMY_MODEL_CONFIG)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return config


def input_embeddings_name(model: Any, default: str | None = None) -> str | None:
    """The path of a transformers model's input embedding, or `default` where there is none."""
    if not hasattr(model, "get_input_embeddings"):
        return default
    embedding = model.get_input_embeddings()
    return next((name for name, module in model.named_modules() if module is embedding), default)


def module_names_tied_with_embedding(model: Any) -> list[str]:
    """Paths of the modules that hold the very Parameter of the model's input embedding, the embedding left out.

    Empty where the model's config says `tie_word_embeddings=False`. Tuners and PeftModels are looked through, so the
    paths are the base model's own.
    """
    if hasattr(model, "get_base_model"):  # a PeftModel
        model = model.get_base_model()
    elif hasattr(model, "tuner_layer_cls"):  # a BaseTuner
        model = model.model
    if getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False:
        return []
    if not hasattr(model, "get_input_embeddings"):
        return []
    embedding = model.get_input_embeddings()
    if embedding is None:
        return []
    weights = {id(parameter) for parameter in embedding.parameters()}
    own_prefix = f"{input_embeddings_name(model)}."
    tied = {
        name.rpartition(".")[0]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in weights and not name.startswith(own_prefix)
    }
    return sorted(tied)


def storage_identity(tensor: Tensor) -> tuple[torch.device, int, int]:
    """A value that two tensors share exactly when they share memory. All meta tensors of one size look alike."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()
