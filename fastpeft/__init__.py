"""PEFT's API and file formats on fused kernels.

Importing the package imports almost nothing: a name is imported from its module when it is first asked for (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastpeft.lazy import lazy_names

if TYPE_CHECKING:
    from fastpeft.auto import AutoPeftModel as AutoPeftModel
    from fastpeft.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from fastpeft.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from fastpeft.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from fastpeft.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from fastpeft.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from fastpeft.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from fastpeft.checkpoint import get_peft_model_state_dict as get_peft_model_state_dict
    from fastpeft.checkpoint import load_peft_weights as load_peft_weights
    from fastpeft.checkpoint import set_peft_model_state_dict as set_peft_model_state_dict
    from fastpeft.config import PeftConfig as PeftConfig
    from fastpeft.config import PromptLearningConfig as PromptLearningConfig
    from fastpeft.mapping import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    from fastpeft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING
    from fastpeft.mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING as PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    from fastpeft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as PEFT_TYPE_TO_TUNER_MAPPING
    from fastpeft.mapping import get_peft_config as get_peft_config
    from fastpeft.mapping import get_peft_model as get_peft_model
    from fastpeft.mapping import inject_adapter_in_model as inject_adapter_in_model
    from fastpeft.model_tasks import PeftModelForCausalLM as PeftModelForCausalLM
    from fastpeft.model_tasks import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from fastpeft.model_tasks import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from fastpeft.model_tasks import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from fastpeft.model_tasks import PeftModelForSequenceClassification as PeftModelForSequenceClassification
    from fastpeft.model_tasks import PeftModelForTokenClassification as PeftModelForTokenClassification
    from fastpeft.paths import explain as explain
    from fastpeft.peft_model import PeftModel as PeftModel
    from fastpeft.recompute import recompute_mlp as recompute_mlp
    from fastpeft.routing import Routing as Routing
    from fastpeft.routing_scope import routed as routed
    from fastpeft.status import get_layer_status as get_layer_status
    from fastpeft.status import get_model_status as get_model_status
    from fastpeft.tuners.ia3 import IA3Config as IA3Config
    from fastpeft.tuners.ia3 import IA3Model as IA3Model
    from fastpeft.tuners.lora import LoraConfig as LoraConfig
    from fastpeft.tuners.lora import LoraModel as LoraModel
    from fastpeft.tuners.lora.config import LoraRuntimeConfig as LoraRuntimeConfig
    from fastpeft.tuners.shared_inputs import share_inputs as share_inputs
    from fastpeft.utils.error import NoMatchingPeftModuleError as NoMatchingPeftModuleError
    from fastpeft.utils.error import PeftError as PeftError
    from fastpeft.utils.other import cast_mixed_precision_params as cast_mixed_precision_params
    from fastpeft.utils.other import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from fastpeft.utils.other import shift_tokens_right as shift_tokens_right
    from fastpeft.utils.peft_types import PeftType as PeftType
    from fastpeft.utils.peft_types import TaskType as TaskType
    from fastpeft.utils.warning import PeftWarning as PeftWarning
    from fastpeft_kernels.dispatch import backend as backend

__version__ = "0.1.0"

_import_name, __all__ = lazy_names(
    __name__,
    {
        "fastpeft.auto": [
            "AutoPeftModel",
            "AutoPeftModelForCausalLM",
            "AutoPeftModelForFeatureExtraction",
            "AutoPeftModelForQuestionAnswering",
            "AutoPeftModelForSeq2SeqLM",
            "AutoPeftModelForSequenceClassification",
            "AutoPeftModelForTokenClassification",
        ],
        "fastpeft.checkpoint": ["get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"],
        "fastpeft.config": ["PeftConfig", "PromptLearningConfig"],
        "fastpeft.paths": ["explain"],
        "fastpeft.mapping": [
            "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
            "PEFT_TYPE_TO_CONFIG_MAPPING",
            "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
            "PEFT_TYPE_TO_TUNER_MAPPING",
            "get_peft_config",
            "get_peft_model",
            "inject_adapter_in_model",
        ],
        "fastpeft.model_tasks": [
            "PeftModelForCausalLM",
            "PeftModelForFeatureExtraction",
            "PeftModelForQuestionAnswering",
            "PeftModelForSeq2SeqLM",
            "PeftModelForSequenceClassification",
            "PeftModelForTokenClassification",
        ],
        "fastpeft.peft_model": ["PeftModel"],
        "fastpeft.recompute": ["recompute_mlp"],
        "fastpeft.routing": ["Routing"],
        "fastpeft.routing_scope": ["routed"],
        "fastpeft.status": ["get_layer_status", "get_model_status"],
        "fastpeft.tuners.ia3": ["IA3Config", "IA3Model"],
        "fastpeft.tuners.lora": ["LoraConfig", "LoraModel"],
        "fastpeft.tuners.lora.config": ["LoraRuntimeConfig"],
        "fastpeft.tuners.shared_inputs": ["share_inputs"],
        "fastpeft.utils.error": ["NoMatchingPeftModuleError", "PeftError"],
        "fastpeft.utils.other": [
            "cast_mixed_precision_params",
            "prepare_model_for_kbit_training",
            "shift_tokens_right",
        ],
        "fastpeft.utils.peft_types": ["PeftType", "TaskType"],
        "fastpeft.utils.warning": ["PeftWarning"],
        "fastpeft_kernels.dispatch": ["backend"],
    },
)


def __getattr__(name: str) -> Any:
    try:
        return _import_name(name)
    except AttributeError:
        from fastpeft.not_yet import NOT_YET

        if name not in NOT_YET:
            raise
        raise AttributeError(f"fastpeft.{name} is not supported yet; reference PEFT has it: peft.{name}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
