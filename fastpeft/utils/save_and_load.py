"""PEFT's path to fastpeft.checkpoint."""

from fastpeft.checkpoint import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

__all__ = ["get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"]
