"""PeftModel and folders: what save_pretrained, from_pretrained and load_adapter do.

checkpoint.py knows the files; this module knows the model. Everything is read and checked before the model is touched,
and a model that could not take what was read is given back as it was.
"""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers.utils.hub import PushToHubMixin

from fastpeft.checkpoint import (
    adapter_folder,
    get_peft_model_state_dict,
    load_peft_weights,
    save_adapter_files,
    set_peft_model_state_dict,
)
from fastpeft.config import PeftConfig
from fastpeft.tuners.tuners_utils import BaseTunerLayer
from fastpeft.utils.auxiliary import AuxiliaryTrainingWrapper
from fastpeft.utils.other import infer_device
from fastpeft.utils.peft_types import PEFT_TYPE_TO_PREFIX_MAPPING, PeftType

if TYPE_CHECKING:
    from torch.nn.modules.module import _IncompatibleKeys

    from fastpeft.peft_model import PeftModel

# What push_to_hub and callers written for transformers' models also pass to save_pretrained. An adapter is one file, so
# none of these changes what is written.
_WITHOUT_EFFECT_ON_SAVE = {"max_shard_size", "save_function", "save_peft_format", "token"}
# Where weights are placed. Adapter layers stand where their base layer stands, so these have nothing left to decide.
_WITHOUT_EFFECT_ON_LOAD = {"device_map", "max_memory", "offload_folder", "offload_dir", "offload_index", "torch_dtype"}


class SavedAdapters(PushToHubMixin):
    """The part of PeftModel that reads and writes folders."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters, each as adapter_config.json and adapter_model.safetensors, and a README.md.

        Args:
            save_directory: folder, made if it is not there. The adapter named "default" goes into it, every other into
                a subfolder of its name. Each adapter is written beside its target and renamed into place.
            safe_serialization: False writes a pickled adapter_model.bin instead.
            selected_adapters: which to save; all unless given.
            save_embedding_layers: also save the base's embeddings. "auto": if they are targets or were resized.
            is_main_process: only the main process writes.
            path_initial_model_for_weight_conversion: not supported yet: the initial values that the conversion of
                PiSSA, CorDA and OLoRA adapters to plain LoRA subtracts.
            kwargs: `state_dict`, weights to save in place of the model's own; names that callers written for
                transformers' models pass (`max_shard_size`, ...) are taken, an adapter being one file.

        Raises:
            ValueError: save_directory is a file, a selected adapter does not exist, or its name leads out of it.
        """
        if path_initial_model_for_weight_conversion is not None:
            raise NotImplementedError(
                "path_initial_model_for_weight_conversion is not supported yet, nor is an initialisation that rewrites "
                "the base weight and would need it; leave it None"
            )
        model, directory = cast("PeftModel", self), os.fspath(save_directory)
        if os.path.isfile(directory):
            raise ValueError(f"save_directory must be a folder, and {directory!r} is a file; choose another path")
        known = list(model.peft_config)
        names = known if selected_adapters is None else list(selected_adapters)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"selected_adapters={unknown} are not in this model, which has {known}")
        _check_save_kwargs(kwargs)
        folders = {name: adapter_folder(directory, name) for name in names}

        for name in names:
            weights = get_peft_model_state_dict(  # on every process: gathering shards needs them all
                model,
                state_dict=kwargs.get("state_dict"),
                adapter_name=name,
                save_embedding_layers=save_embedding_layers,
            )
            if is_main_process:
                config, auto_mapping = _config_to_save(model, name)
                save_adapter_files(
                    folders[name],
                    config,
                    weights,
                    safe_serialization=safe_serialization,
                    auto_mapping_dict=auto_mapping,
                )
        if is_main_process:
            os.makedirs(directory, exist_ok=True)
            model.create_or_update_model_card(directory)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Wrap a model with a saved adapter. `model` is changed in place, unless this fails.

        Args:
            model: the base model.
            model_id: folder with the adapter's files, or a repository of the model hub.
            adapter_name: name to give it here.
            is_trainable: False freezes the adapter and puts the model into eval mode.
            config: use this config instead of the one that is saved.
            autocast_adapter_dtype: as in the constructor.
            ephemeral_gpu_offload: not supported yet.
            low_cpu_mem_usage: do not initialise what is loaded right after: faster.
            key_mapping: pattern -> replacement, for the keys of the file less their "base_model.model." prefix.
            kwargs: `torch_device`, where to read the weights to; `ignore_mismatched_sizes`, skip weights of another
                shape; those of huggingface_hub.hf_hub_download (`subfolder`, `revision`, `token`, ...). `device_map`
                and its kin are taken; adapter layers stand where their base layer stands.

        Returns:
            The PeftModel class of the config's task_type.

        Raises:
            ValueError, OSError: a file is missing or damaged, or does not fit the model.
        """
        from fastpeft.model_tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        hub, options = _split_load_kwargs(kwargs, ephemeral_gpu_offload)
        own_config = config is not None  # then the one beside the weights need not be the one they were saved with
        if config is None:
            config = PeftConfig.from_pretrained(model_id, **hub)
        elif not isinstance(config, PeftConfig):
            raise ValueError(
                f"config must be a PeftConfig, got {type(config).__name__}; PeftConfig.from_pretrained reads one"
            )
        config.inference_mode = not is_trainable
        if key_mapping is None:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        weights = _read_weights(model_id, options, key_mapping, hub, check_config=False if own_config else config)

        restore = _restorer(model)
        model_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", cast("type[PeftModel]", cls))
        wrapped = None
        try:
            wrapped = model_class(
                model,
                config,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            result = _apply_weights(wrapped, weights, adapter_name, options, autocast_adapter_dtype, low_cpu_mem_usage)
        except Exception:
            restore(wrapped)
            raise
        if not is_trainable:
            wrapped.eval()
        _warn_unmatched(result, model_id)
        return wrapped

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> _IncompatibleKeys:
        """Load a saved adapter under a new name, or its weights into the adapter that has this name.

        A new adapter stays inactive until set_adapter. The model is as it was if this fails. Arguments as in
        from_pretrained.

        Returns:
            `missing_keys`: keys of this adapter that the file lacks; `unexpected_keys`: keys that fit nothing here.
        """
        model = cast("PeftModel", self)
        hub, options = _split_load_kwargs({**kwargs, "torch_device": torch_device}, ephemeral_gpu_offload)
        is_new = adapter_name not in model.peft_config
        config = PeftConfig.from_pretrained(model_id, **hub) if is_new else None
        weights = _read_weights(model_id, options, key_mapping, hub, check_config=config or True)
        if config is not None:
            model._check_new_adapter_config(config, is_trainable=is_trainable)
            config.inference_mode = not is_trainable
            restore = _restorer(model.base_model.model)
            model.add_adapter(
                adapter_name,
                config,
                low_cpu_mem_usage=low_cpu_mem_usage,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )
        try:
            result = _apply_weights(model, weights, adapter_name, options, autocast_adapter_dtype, low_cpu_mem_usage)
        except Exception:
            if is_new:
                restore(model)
            raise
        if is_new and is_trainable:
            model.set_requires_grad(adapter_name)
        if not is_trainable:
            model.eval()
        return result

    @classmethod
    def _split_kwargs(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments of huggingface_hub.hf_hub_download, and the rest."""
        from huggingface_hub import hf_hub_download

        known = {*inspect.signature(hf_hub_download).parameters, "use_auth_token"}
        hub = {name: value for name, value in kwargs.items() if name in known}
        return hub, {name: value for name, value in kwargs.items() if name not in known}


def _check_save_kwargs(kwargs: dict[str, Any]) -> None:
    if kwargs.get("push_to_hub"):
        raise NotImplementedError("save_pretrained(push_to_hub=True) is not supported; call model.push_to_hub(repo_id)")
    known = _WITHOUT_EFFECT_ON_SAVE | {"state_dict", "push_to_hub"}
    if unknown := sorted(set(kwargs) - known):
        raise TypeError(
            f"save_pretrained does not know {unknown}; besides its named arguments it takes {sorted(known)}"
        )


def _config_to_save(model: PeftModel, adapter_name: str) -> tuple[PeftConfig, dict[str, str] | None]:
    """A copy of the config as a file states it, and for a model without a task the class to load it with."""
    config = copy.copy(model.peft_config[adapter_name])
    base = model.get_base_model()
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    if config.task_type is not None:
        return config, None
    return config, {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}


def _split_load_kwargs(kwargs: dict[str, Any], ephemeral_gpu_offload: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    if ephemeral_gpu_offload:
        raise NotImplementedError("ephemeral_gpu_offload=True is not supported yet; leave it False")
    hub, options = SavedAdapters._split_kwargs(kwargs)
    known = _WITHOUT_EFFECT_ON_LOAD | {"torch_device", "ignore_mismatched_sizes"}
    if unknown := sorted(set(options) - known):
        raise TypeError(
            f"loading an adapter does not know {unknown}; besides the named arguments it takes {sorted(known)} and "
            "those of huggingface_hub.hf_hub_download. To change a config field, pass config="
        )
    return hub, options


def _read_weights(
    model_id: str | os.PathLike[str],
    options: dict[str, Any],
    key_mapping: dict[str, str] | None,
    hub: dict[str, Any],
    check_config: bool | PeftConfig = True,
) -> dict[str, Tensor]:
    device = options.get("torch_device") or infer_device()
    return load_peft_weights(
        os.fspath(model_id), device=device, key_mapping=key_mapping, check_config=check_config, **hub
    )


def _apply_weights(
    model: PeftModel,
    weights: dict[str, Tensor],
    adapter_name: str,
    options: dict[str, Any],
    autocast_adapter_dtype: bool,
    low_cpu_mem_usage: bool,
) -> _IncompatibleKeys:
    """Returns the keys of this adapter that the weights lack, and the weights that fit nothing."""
    result = set_peft_model_state_dict(
        model,
        weights,
        adapter_name=adapter_name,
        ignore_mismatched_sizes=options.get("ignore_mismatched_sizes", False),
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(model.peft_config[adapter_name].peft_type), "")
    result.missing_keys[:] = [
        key
        for key in result.missing_keys
        if adapter_name in key.split(".") and (prefix in key or ".modules_to_save." in key)
    ]
    weights.clear()  # what was put into the model as it is is the model's alone
    model.base_model._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
    return result


def _warn_unmatched(result: _IncompatibleKeys, model_id: str | os.PathLike[str]) -> None:
    if result.missing_keys:
        warnings.warn(
            f"{model_id} lacks weights of these adapter keys, which keep their initial values: {result.missing_keys}",
            stacklevel=4,
        )
    if result.unexpected_keys:
        warnings.warn(
            f"{model_id} has weights that fit nothing in this model and are not used: {result.unexpected_keys}",
            stacklevel=4,
        )


def _restorer(model: nn.Module) -> Callable[[PeftModel | None], None]:
    """A function that makes the model what it is now, given the wrapper that was put on it or None if it got none."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    active = [list(layer.active_adapters) for layer in layers]
    configs = getattr(model, "peft_config", None)
    training, adapters = model.training, None if configs is None else set(configs)

    def restore(wrapped: PeftModel | None) -> None:
        if wrapped is not None and adapters is not None:
            for name in wrapped.peft_config.keys() - adapters:
                wrapped.delete_adapter(name)
            wrapped.base_model._take_off(keep=layers)
            for layer, names in zip(layers, active, strict=True):
                layer.set_adapter(names)
        elif wrapped is not None:
            wrapped.base_model.unload()
        if adapters is None:
            model.__dict__.pop("peft_config", None)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        model.train(training)

    return restore
