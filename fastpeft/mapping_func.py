"""The name under which PEFT's users also find get_peft_model."""

from fastpeft.mapping import get_peft_model as get_peft_model
