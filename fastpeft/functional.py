"""For programs that keep adapters on a model of their own class, without a PeftModel around it."""

from fastpeft.checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from fastpeft.mapping import inject_adapter_in_model
from fastpeft.tuners.switching import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]
