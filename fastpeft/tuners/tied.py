"""Embeddings that share their weight with another layer (tie_word_embeddings), and what adapters do to them."""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastpeft.tuners.targets import matches_name
from fastpeft.utils.constants import EMBEDDING_LAYER_NAMES
from fastpeft.utils.modules import module_names_tied_with_embedding


def warn_of_targets(config: Any, model: nn.Module) -> None:
    """Warn of a config by which an adapter trains one of the layers that share a weight."""
    wanted = getattr(config, "target_modules", None) or ()
    saved = getattr(config, "modules_to_save", None) or ()
    ends = {name.rpartition(".")[2] for name in (*saved, *(() if isinstance(wanted, str) else wanted))}
    if isinstance(wanted, str):
        ends.update(name for name in EMBEDDING_LAYER_NAMES if matches_name(wanted, name))
    named = sorted(ends.intersection(EMBEDDING_LAYER_NAMES))
    if named and module_names_tied_with_embedding(model):
        warnings.warn(
            f"{', '.join(named)} share their weight (tie_word_embeddings=True), but the adapter trains each on its "
            "own. Merging, and saving in formats without shared weights, can then give surprising results.",
            stacklevel=5,
        )


def warn_of_merge(keys: Sequence[str]) -> None:
    """Warn that adapters on these paths, which share their weight with another layer, are merged into both."""
    warnings.warn(
        f"{', '.join(keys)} share their weight with another layer (tie_word_embeddings): merging changes both. To "
        "merge into one of them only, load the base with tie_word_embeddings=False and give it a copy of the weight.",
        stacklevel=5,
    )


def untie_if_diverged(model: Any) -> None:
    """Make the model's config say so when its embeddings, tied before, are two different weights after a merge."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    try:
        weights = [embedding.weight for embedding in (model.get_input_embeddings(), model.get_output_embeddings())]
    except (AttributeError, NotImplementedError):
        return  # a model without a language head
    if weights[0].data_ptr() != weights[1].data_ptr():
        config.tie_word_embeddings = False
        warnings.warn(
            "input and output embeddings differ after the merge: config.tie_word_embeddings is False now", stacklevel=5
        )
