"""Whether, and which, embeddings of the base model are saved with an adapter (`save_embedding_layers`).

They are when they are targets themselves (the base weight then belongs to what was trained) or when the vocabulary was
resized (the rows that were added exist nowhere else).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastpeft.config import PeftConfig
from fastpeft.utils.constants import EMBEDDING_LAYER_NAMES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from fastpeft.utils.other import check_file_exists_on_hf_hub, match_target_against_key


def embedding_keys(
    model: Any, state: Mapping[str, Tensor], config: PeftConfig, save_embedding_layers: bool | str
) -> set[str]:
    """The keys in `state` of the embeddings that are to be saved.

    Args:
        model: a PeftModel, or a model with injected adapters.
        state: the model's state dict.
        config: of the adapter.
        save_embedding_layers: True, False, or "auto": if they are targets or were resized.

    Raises:
        ValueError: `save_embedding_layers` is something else.
    """
    if save_embedding_layers not in (True, False, "auto"):
        raise ValueError(f"save_embedding_layers must be True, False or 'auto'; got {save_embedding_layers!r}")
    targeted = _are_targets(model, config)
    wanted = save_embedding_layers is True
    if save_embedding_layers == "auto":
        wanted = targeted or _were_resized(model, config.base_model_name_or_path)
        if wanted:
            why = "are in target_modules" if targeted else "were resized"
            warnings.warn(f"the embedding layers are saved with the adapter because they {why}", stacklevel=3)
    if not wanted:
        return set()
    if not hasattr(model, "get_input_embeddings"):
        warnings.warn(
            f"save_embedding_layers=True has no effect: {type(model).__name__} has no get_input_embeddings, so its "
            "embeddings are not known. Name them in modules_to_save",
            stacklevel=3,
        )
        return set()
    keys: set[str] = set()
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        # a target keeps the weight in its base layer; with targets, a layer that is none is as it was loaded
        saved = getattr(layer, "base_layer", None) if targeted else layer
        if isinstance(saved, nn.Module):
            name = next((name for name, module in model.named_modules() if module is saved), None)
            keys |= {key for key in state if name is not None and key.startswith(f"{name}.")}
    return keys


def _are_targets(model: Any, config: PeftConfig) -> bool:
    targets = getattr(config, "target_modules", None)
    if not targets:
        return False
    if not isinstance(targets, str):
        return any(name in targets for name in EMBEDDING_LAYER_NAMES)
    if targets == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return False
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    paths = (name for name, _ in base.named_modules() if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES)
    return any(match_target_against_key(targets, path) for path in paths)


def _were_resized(model: Any, base_id: str | None) -> bool:
    """Whether the model has another vocabulary than the base model on disk or on the hub says."""
    model_config: Any = getattr(model, "config", None)
    vocab_size = getattr(model_config, "vocab_size", None)
    if not vocab_size or not base_id:
        return False
    try:
        exists = os.path.exists(os.path.join(base_id, "config.json")) or check_file_exists_on_hf_hub(
            base_id, "config.json"
        )
        if exists is False:
            return False
        if exists:
            return bool(vocab_size != type(model_config).from_pretrained(base_id).vocab_size)
        reason = "offline, or no such repository"
    except Exception as error:  # a base config that cannot be read must not cost the adapter
        reason = str(error)
    warnings.warn(
        f"could not read the config of the base model {base_id!r} ({reason}), so its vocabulary is taken to be "
        "unchanged; pass save_embedding_layers=True if you resized it",
        stacklevel=4,
    )
    return False
