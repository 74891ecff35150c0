"""Configs: what an adapter is, as a dataclass and as adapter_config.json.

The JSON is reference PEFT's, key by key, so each library reads the other's files.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from huggingface_hub import hf_hub_download
from transformers.utils.hub import PushToHubMixin, http_user_agent

from fastpeft import adapter_files
from fastpeft.utils.constants import CONFIG_NAME
from fastpeft.utils.peft_types import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType, TaskType

PEFT_FORMAT = "0.21.0"  # the version of reference PEFT whose files we write; it goes into adapter_config.json

_Config = TypeVar("_Config", bound="PeftConfigMixin")


@dataclass
class PeftConfigMixin(PushToHubMixin):
    """What every config has: its place on disk and on the hub.

    Args:
        task_type: a TaskType or its name; None for a model of no listed task.
        peft_type: a PeftType or its name; config classes of a method set it themselves.
        auto_mapping: class and module of the base model, saved for models without a task type.
        peft_version: version of the file format; filled in unless given.
    """

    task_type: str | TaskType | None = field(default=None)
    peft_type: str | PeftType | None = field(default=None)
    auto_mapping: dict[str, Any] | None = field(default=None)
    peft_version: str | None = field(default=None)

    # Fields that say where an adapter came from or how it is trained: they may be edited in the file at will.
    _bookkeeping: ClassVar[frozenset[str]] = frozenset(
        {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    )

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ValueError(f"task_type must be one of {', '.join(t.value for t in TaskType)}; got {self.task_type!r}")
        if self.peft_version is None:
            self.peft_version = PEFT_FORMAT

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, nested configs as dicts."""
        return asdict(self)

    def to_json(self, auto_mapping_dict: dict[str, Any] | None = None) -> str:
        """The text of adapter_config.json: keys and sets sorted, so that equal configs give equal files."""
        values = {key: _sorted_if_set(value) for key, value in self.to_dict().items()}
        if auto_mapping_dict is not None:
            values["auto_mapping"] = auto_mapping_dict
        return json.dumps(values, indent=2, sort_keys=True, default=_plain_number)

    def signature(self) -> str:
        """Canonical JSON of what decides the meaning of the weights: fields away from their default, less bookkeeping.

        Two configs with one signature make the same model of the same tensors. Weights files keep it, to notice a
        config that is not theirs.
        """
        defaults = {f.name: _default_of(f) for f in dataclasses.fields(self)}
        meaning = {
            key: _canonical(value)
            for key, value in self.to_dict().items()
            if key not in self._bookkeeping and value != defaults[key]
        }
        return json.dumps(meaning, sort_keys=True, default=_plain_number)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write adapter_config.json.

        Args:
            save_directory: folder, made if missing.
            kwargs: `auto_mapping_dict`, to be stored as the `auto_mapping`. Others, which `push_to_hub` passes on, have
                no meaning for one small file.

        Raises:
            ValueError: `save_directory` is a file.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory must be a folder, but {os.fspath(save_directory)!r} is a file")
        adapter_files.write_config(Path(save_directory), self.to_json(kwargs.get("auto_mapping_dict")))

    @classmethod
    def from_pretrained(
        cls: type[_Config],
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> _Config:
        """The config in a local folder or a hub repository, as the class of its method.

        Args:
            pretrained_model_name_or_path: folder that holds adapter_config.json, or a hub id.
            subfolder: where inside it.
            kwargs: arguments of `huggingface_hub.hf_hub_download` (`revision`, `token`, `cache_dir`, ...). The names of
                config fields fill in fields that the file lacks; they do not override the file. Others, meant for the
                loading of weights, are left to it.

        Raises:
            ValueError: no adapter_config.json there, or no JSON object in it.
            TypeError: the file has unknown keys and no `peft_type`, so it is not an adapter config.
            UnsupportedMethodError: the adapter is of a method that this library does not build.
        """
        hub_kwargs, class_kwargs, _ = cls._split_kwargs(kwargs)
        path = _config_file(pretrained_model_name_or_path, subfolder, hub_kwargs)
        values = {**class_kwargs, **cls.from_json_file(path)}
        return cls.from_peft_type(**cls.check_kwargs(**values))

    @classmethod
    def from_peft_type(cls: type[_Config], **kwargs: Any) -> _Config:
        """A config of the class that `peft_type` names; of this class when there is no `peft_type`.

        Keys that the class does not know come from a newer version. They are left out with a warning that names them,
        as the new fields of a version default to what was there before.
        """
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kwargs["peft_type"]] if "peft_type" in kwargs else cls
        known = {f.name for f in dataclasses.fields(config_class) if f.init}
        unknown = sorted(set(kwargs) - known)
        if unknown and "peft_type" not in kwargs:
            raise TypeError(
                f"{cls.__name__} has no fields {unknown[:8]}; an adapter config must at least name a peft_type"
            )
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {config_class.__name__} are ignored: a newer PEFT "
                "may have written this config, and the adapter may need features that this version lacks. Upgrade "
                "fastpeft if it does not behave as trained.",
                stacklevel=2,
            )
        config: _Config = config_class(**{key: value for key, value in kwargs.items() if key in known})
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """The content of a config file as a dict, less `runtime_config`, which is not a property of an adapter."""
        path = Path(path_json_file)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); it may be truncated: save or download it again") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} should hold a JSON object, one key a field, but holds a {type(values).__name__}")
        if values.pop("runtime_config", None) is not None:
            warnings.warn(
                "`runtime_config` in the configuration file is ignored: set it on the config of the running program",
                stacklevel=2,
            )
        return values

    @classmethod
    def _split_kwargs(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Sort keyword arguments into those of hf_hub_download, those that are fields of this class, and others."""
        hub_names = inspect.signature(hf_hub_download).parameters
        field_names = {f.name for f in dataclasses.fields(cls)}
        hub = {key: value for key, value in kwargs.items() if key in hub_names}
        fields = {key: value for key, value in kwargs.items() if key in field_names and key not in hub}
        return hub, fields, {key: value for key, value in kwargs.items() if key not in hub and key not in fields}

    @classmethod
    def _get_peft_type(cls, model_id: str | os.PathLike[str], **hf_hub_download_kwargs: Any) -> str:
        """The method of the adapter at `model_id`, without building its config."""
        kwargs = dict(hf_hub_download_kwargs)
        path = _config_file(model_id, kwargs.pop("subfolder", None), kwargs)
        values = cls.from_json_file(path)
        if "peft_type" not in values:
            raise ValueError(f"{path} has no peft_type, so it is not the config of an adapter")
        return str(values["peft_type"])

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Look at, and perhaps change, what a file says before a config is made of it. For methods to override."""
        return kwargs

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method learns prompts and leaves the layers of the base model alone."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is adaption prompt."""
        return False


@dataclass
class PeftConfig(PeftConfigMixin):
    """The config of any adapter.

    Args:
        base_model_name_or_path: what the adapter was trained on.
        revision: of the base model.
        inference_mode: True freezes the adapter; saved files say True.
    """

    base_model_name_or_path: str | None = field(default=None)
    revision: str | None = field(default=None)
    inference_mode: bool = field(default=False)


@dataclass
class PromptLearningConfig(PeftConfig):
    """The config of a method that learns prompts.

    Args:
        num_virtual_tokens: length of the prompt.
        token_dim: hidden size of the base model's embedding.
        num_transformer_submodules: 2 for an encoder with a decoder, else 1.
        num_attention_heads: of the base model.
        num_layers: of the base model.
        modules_to_save: further modules to train in full and save.
    """

    num_virtual_tokens: int | None = field(default=None)
    token_dim: int | None = field(default=None)
    num_transformer_submodules: int | None = field(default=None)
    num_attention_heads: int | None = field(default=None)
    num_layers: int | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    @property
    def is_prompt_learning(self) -> bool:
        return True


def _config_file(model_id: str | os.PathLike[str], subfolder: str | None, hub_kwargs: dict[str, Any]) -> Path:
    """The config in the local folder `model_id`/`subfolder`; else from the hub."""
    folder = Path(model_id, subfolder or "")
    local = adapter_files.find_config(folder)
    if local is not None:
        return local
    hub_kwargs = {"user_agent": http_user_agent(), **hub_kwargs}
    try:
        return Path(hf_hub_download(os.fspath(model_id), CONFIG_NAME, subfolder=subfolder, **hub_kwargs))
    except Exception as error:  # whatever the hub raises, the adapter is not there
        there = (
            f"that folder holds {sorted(os.listdir(folder))[:8]}" if folder.is_dir() else f"no such folder, and {error}"
        )
        where = f"'{os.fspath(model_id)}'" + (f", subfolder '{subfolder}'" if subfolder else "")
        raise ValueError(
            f"Can't find '{CONFIG_NAME}' at {where}: {there}. Pass a folder that save_pretrained wrote, or a hub id"
        ) from error


def as_module_names(name: str, modules: Any) -> set[str] | str | None:
    """The value of a config's field `name` that selects modules: a set of names, one regular expression, or None."""
    if modules is None or isinstance(modules, str):
        return modules
    if not isinstance(modules, (list, tuple, set, frozenset)) or not all(isinstance(item, str) for item in modules):
        raise TypeError(f"{name} must be a list of module names, one regular expression, or None; got {modules!r}")
    return set(modules)


def _default_of(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _plain_number(value: Any) -> Any:
    """A number of numpy or torch as Python's, for JSON."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a config holds plain values; {value!r}, a {type(value).__name__}, cannot be written as JSON")


def _sorted_if_set(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def _canonical(value: Any) -> Any:
    """`value` as JSON would give it back, names in one order: a set of targets becomes a list and back."""
    if isinstance(value, dict):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)) or (
        isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    ):
        return sorted(value)
    return [_canonical(item) for item in value] if isinstance(value, (list, tuple)) else value
