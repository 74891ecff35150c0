"""AutoPeftModel...: the base model and the adapter on it, from the adapter's folder alone."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from huggingface_hub import hf_hub_download
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from fastpeft.config import PeftConfig
from fastpeft.model_tasks import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from fastpeft.peft_model import PeftModel
from fastpeft.utils.constants import TOKENIZER_CONFIG_NAME
from fastpeft.utils.other import check_file_exists_on_hf_hub

# An adapter_config.json may name a class to load the base model with. Importing a module runs its code, so only modules
# of these packages are imported unless the caller names others.
IMPORT_ALLOWLIST = ("diffusers", "lerobot", "megatron-core", "transformers")

# Arguments that concern the adapter and not the base model; others go to the base, and to the adapter if it knows them.
_ADAPTER_ONLY = {"autocast_adapter_dtype", "ephemeral_gpu_offload", "subfolder", "torch_device"}
_ADAPTER_TOO = {"device_map", "ignore_mismatched_sizes", "max_memory", "offload_dir", "offload_folder", "offload_index"}


class _BaseAutoPeftModel:
    _target_class: ClassVar[Any] = None
    _target_peft_class: ClassVar[type[PeftModel]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(f"{name} has no instances: {name}.from_pretrained(adapter) returns a PeftModel on its base model")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that an adapter names, and the adapter.

        Where the adapter comes with a tokenizer that has more tokens than the base model has embeddings, the embeddings
        are resized first.

        Args:
            pretrained_model_name_or_path: folder or hub id of the adapter.
            adapter_name: name to give it.
            is_trainable: False freezes the adapter and puts the model into eval mode.
            config: use this config for the adapter instead of the saved one.
            revision: of the adapter; that of the base model is in the adapter's config.
            import_allowlist: packages that the config of an adapter without a task may import the base class from; by
                default transformers, diffusers, lerobot and megatron-core.
            kwargs: for the base model's `from_pretrained` (`dtype`, `device_map`, ...), for PeftModel.from_pretrained
                (`torch_device`, `subfolder`, ...), and `token`, `cache_dir` and other hub arguments for both.

        Raises:
            ValueError: no adapter there, it names no base model, its task is another class's, or its config wants to
                import a package that is not on the list.
        """
        saved = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **_hub_arguments(kwargs))
        if saved.base_model_name_or_path is None:
            raise ValueError(
                f"the config of the adapter at '{pretrained_model_name_or_path}' names no base model; load the base "
                f"model yourself and use {cls._target_peft_class.__name__}.from_pretrained(model, adapter)"
            )
        base_class = cls._base_class(saved, IMPORT_ALLOWLIST if import_allowlist is None else import_allowlist)
        for_base = {key: value for key, value in kwargs.items() if key not in _ADAPTER_ONLY}
        base = base_class.from_pretrained(saved.base_model_name_or_path, revision=saved.revision, **for_base)
        _make_room_for_tokens(base, os.fspath(pretrained_model_name_or_path), revision, kwargs)
        return cls._target_peft_class.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **_adapter_arguments(kwargs),
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, import_allowlist: Sequence[str]) -> Any:
        """The class whose from_pretrained loads the base model: by task, or as an adapter without a task says."""
        name = cls.__name__
        if config.task_type is not None:
            expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[config.task_type]
            if cls._target_peft_class is not expected:
                raise ValueError(
                    f"{name} loads other adapters: this one has task_type={config.task_type!r}; use "
                    f"Auto{expected.__name__}.from_pretrained"
                )
            return cls._target_class
        if config.auto_mapping is None:
            raise ValueError(
                f"{name} cannot tell how to load the base model: the adapter's config has neither task_type nor "
                f"auto_mapping. Load it yourself and use {cls._target_peft_class.__name__}.from_pretrained"
            )
        library, class_name = config.auto_mapping["parent_library"], config.auto_mapping["base_model_class"]
        if not any(library == allowed or library.startswith(f"{allowed}.") for allowed in import_allowlist):
            raise ValueError(
                f"the adapter's config wants to import {library!r}, which is not on the list of allowed packages "
                f"{list(import_allowlist)}. If you trust it, pass import_allowlist=[{library!r}]"
            )
        return getattr(importlib.import_module(library), class_name)


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    known = inspect.signature(hf_hub_download).parameters
    return {key: value for key, value in kwargs.items() if key in known}


def _adapter_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    known = {*inspect.signature(PeftModel.from_pretrained).parameters, *_ADAPTER_ONLY, *_ADAPTER_TOO}
    return _hub_arguments(kwargs) | {key: value for key, value in kwargs.items() if key in known}


def _make_room_for_tokens(base: nn.Module, adapter: str, revision: str | None, kwargs: dict[str, Any]) -> None:
    """Grow the embeddings of the base model to the vocabulary of the tokenizer that was saved with the adapter."""
    token = kwargs.get("token") or kwargs.get("use_auth_token")
    if os.path.isdir(adapter):  # then the hub has nothing to say of it
        exists: bool | None = os.path.exists(os.path.join(adapter, TOKENIZER_CONFIG_NAME))
    else:
        exists = check_file_exists_on_hf_hub(
            repo_id=adapter,
            filename=TOKENIZER_CONFIG_NAME,
            revision=revision,
            repo_type=kwargs.get("repo_type"),
            token=token,
        )
    if not exists or not hasattr(base, "get_input_embeddings"):
        return
    tokenizer = AutoTokenizer.from_pretrained(
        adapter, revision=revision, token=token, trust_remote_code=kwargs.get("trust_remote_code", False)
    )
    model: Any = base
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))


class AutoPeftModel(_BaseAutoPeftModel):
    """For an adapter without a task; its config says which class loads the base model."""

    _target_peft_class = PeftModel


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """For an adapter with task_type CAUSAL_LM."""

    _target_class = AutoModelForCausalLM
    _target_peft_class = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """For an adapter with task_type SEQ_2_SEQ_LM."""

    _target_class = AutoModelForSeq2SeqLM
    _target_peft_class = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """For an adapter with task_type SEQ_CLS."""

    _target_class = AutoModelForSequenceClassification
    _target_peft_class = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """For an adapter with task_type TOKEN_CLS."""

    _target_class = AutoModelForTokenClassification
    _target_peft_class = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """For an adapter with task_type QUESTION_ANS."""

    _target_class = AutoModelForQuestionAnswering
    _target_peft_class = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """For an adapter with task_type FEATURE_EXTRACTION."""

    _target_class = AutoModel
    _target_peft_class = PeftModelForFeatureExtraction
