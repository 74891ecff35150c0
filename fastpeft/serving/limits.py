"""What a request may ask for. One that the model or the cache cannot take would end the generation for all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig


class RequestLimits:
    """Checks requests before anything of them reaches the generation.

    Args:
        model: the base model.
        generation_config: where max_new_tokens comes from if a request does not say.
        cache_tokens: how many tokens the cache can keep of one request.
    """

    def __init__(self, model: nn.Module, generation_config: GenerationConfig, cache_tokens: int) -> None:
        config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
        self._vocabulary: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        self._max_new_tokens = generation_config.max_new_tokens
        self._limits = {"the cache keeps of one request": cache_tokens}
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None:
            self._limits["the model has positions for"] = positions

    def check(self, input_ids: Sequence[int] | Tensor, max_new_tokens: int | None) -> tuple[list[int], int]:
        """The prompt as a list, and the number of tokens to generate.

        Raises:
            ValueError: one of them cannot be served.
        """
        tokens = self._tokens(input_ids)
        length = self._max_new_tokens if max_new_tokens is None else max_new_tokens
        if length is None:
            raise ValueError("say how many tokens to generate: pass max_new_tokens, or set it in the generation_config")
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"max_new_tokens must be a positive integer, got {length!r}")
        for what, limit in self._limits.items():
            if len(tokens) + length > limit:
                raise ValueError(
                    f"a prompt of {len(tokens)} tokens and max_new_tokens={length} are more than the {limit} tokens "
                    f"that {what}; shorten one of them"
                )
        return tokens, length

    def _tokens(self, input_ids: Sequence[int] | Tensor) -> list[int]:
        if isinstance(input_ids, Tensor):
            input_ids = input_ids[0].tolist() if input_ids.dim() == 2 and len(input_ids) == 1 else input_ids.tolist()
        if isinstance(input_ids, str) or not isinstance(input_ids, Sequence) or not input_ids:
            raise ValueError(f"input_ids must be the tokens of one prompt, a list of integers; got {input_ids!r:.80}")
        for token in input_ids:
            if isinstance(token, bool) or not isinstance(token, int):
                raise ValueError(f"input_ids must be the tokens of one prompt, integers; got {token!r:.80} among them")
            if not 0 <= token < self._vocabulary:
                raise ValueError(f"token {token} is not in the model's vocabulary of {self._vocabulary}")
        return list(input_ids)
