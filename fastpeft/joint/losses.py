"""Which loss a model would take of its labels, as far as it can be taken of each adapter's rows alone."""

import inspect
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import (
    LOSS_MAPPING,
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)

GIVE_ONE = "give the loss of one adapter's rows with compute_loss_func"
ONE_LABEL = "single_label_classification"
CROSS_ENTROPIES = (ForCausalLMLoss, ForMaskedLMLoss, ForSequenceClassificationLoss, ForTokenClassification)


def shifts_labels(base: Any) -> bool:
    """Whether the model's own loss compares a position's logits with the next one's label."""
    return _loss_of(base) is ForCausalLMLoss and not _is_encoder_decoder(base)


def check_loss(base: Any) -> None:
    """Refuse a model whose own loss is not a cross entropy of the logits and one label for each of their rows.

    Raises:
        ValueError: its loss is another one, adds something over the rows of all adapters, or is not known.
    """
    name = type(base).__name__
    config: Any = getattr(base, "config", None)
    nested = [part for part in getattr(config, "__dict__", {}).values() if isinstance(part, PreTrainedConfig)]
    if any(getattr(part, "output_router_logits", False) for part in (config, *nested)):
        raise ValueError(
            f"joint training: {name} adds a loss of its router over the rows of all adapters, which has no part for "
            f"each (config.output_router_logits=True); set it to False, or {GIVE_ONE}"
        )
    loss = _loss_of(base)
    if loss not in CROSS_ENTROPIES:
        found = f"loss_type={getattr(base, 'loss_type', None)}"
        raise ValueError(f"joint training: the loss of {name} is not known ({found}); {GIVE_ONE}")
    if loss is ForSequenceClassificationLoss:
        problem, labels = getattr(config, "problem_type", None), getattr(config, "num_labels", None)
        problem = problem or ("regression" if labels == 1 else ONE_LABEL)
        if problem != ONE_LABEL:
            raise ValueError(
                f"joint training: expected {ONE_LABEL}, but {name} is for {problem} (problem_type, or num_labels="
                f"{labels}, of its config); {GIVE_ONE}"
            )


def _loss_of(base: Any) -> Any:
    """As transformers finds it: by the class's name, and the causal one where that says nothing (GPT2LMHeadModel).

    That default is for forwards which ask for it, or make decoder inputs of their labels. XLNet has a loss of its own.
    """
    known = LOSS_MAPPING.get(getattr(base, "loss_type", None) or "")
    if known is not None or not (isinstance(base, PreTrainedModel) and base.can_generate()):
        return known
    asks = "loss_function" in inspect.unwrap(type(base).forward).__code__.co_names
    return ForCausalLMLoss if asks or _is_encoder_decoder(base) else None


def _is_encoder_decoder(base: Any) -> bool:
    return bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
