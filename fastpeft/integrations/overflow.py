"""One request whose values overflow must not reach the others of its batch: a part of continuous_batching.

The requests of a batch share one attention with an additive mask, and 0 * NaN = NaN: keys and values that are not
finite, in one request, would reach everybody's hidden states, and stay in the cache for later ones. They never enter it
here; the request that made them fails. Costs seven small launches a layer in batches with an adapter, none in others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIMIT = 1e18  # times a query of 1e19, far beyond any that a model has, a sum over a head still fits fp32

_IN_FLIGHT = 2  # forwards whose results transformers has not looked at yet

Update = tuple[list[Any], list[int], list[float] | None]


class OverflowGuard:
    """Watches the forwards of one batch processor.

    Args:
        processor: transformers' ContinuousBatchProcessor. Its cache and its inputs_and_outputs are wrapped.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._in_flight: deque[tuple[Sequence[Any], list[Tensor]]] = deque(maxlen=_IN_FLIGHT)
        self._has_adapter = False
        self._fine: list[Tensor] = []  # (tokens,) bool, one a layer
        inputs, cache = processor.inputs_and_outputs, processor.cache
        cache.update = self._with_finite(cache.update)
        inputs.prepare_batch_update = self._without_failed(inputs.prepare_batch_update)

    def watched(self, model: Any, requests: Sequence[Any], has_adapter: bool) -> Callable[..., Any]:
        """The model for one forward.

        Args:
            model: called with the tensors of the batch.
            requests: the batch's FutureRequestStates, in the order of their tokens.
            has_adapter: some of them take an adapter.
        """

        def forward(**batch_data: Any) -> Any:
            self._has_adapter, self._fine = has_adapter, []
            output = model(**batch_data)
            output.logits, fine = finite_logits(output.logits, batch_data)
            layers: dict[torch.device, list[Tensor]] = {}
            for tensor in (*self._fine, fine):
                layers.setdefault(tensor.device, []).append(tensor)
            self._in_flight.append((requests, [torch.stack(group).all(0) for group in layers.values()]))
            self._has_adapter, self._fine = False, []
            return output

        return forward

    def _with_finite(self, update: Callable[..., Any]) -> Callable[..., Any]:
        def checked_update(key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> Any:
            if self._has_adapter:
                fine = within_limit(key_states, value_states)
                self._fine.append(fine)
                mask = fine[None, None, :, None]
                key_states, value_states = key_states.where(mask, 0), value_states.where(mask, 0)
            return update(key_states, value_states, layer_idx, kwargs)

        return checked_update

    def _without_failed(self, prepare: Callable[[], Update]) -> Callable[[], Update]:
        def prepare_batch_update() -> Update:
            requests, tokens, logprobs = prepare()
            overflowed = self._overflowed(requests)
            if not overflowed and all(request.state.error is None for request in requests):
                return requests, tokens, logprobs
            left: Update = ([], [], None if logprobs is None else [])
            position = 0
            for request in requests:
                if request.state.request_id in overflowed:
                    self._fail(request.state)
                if request.state.error is None:  # else it failed here, or while this forward was under way
                    left[0].append(request)
                if request.has_new_token:
                    if request.state.error is None:
                        left[1].append(tokens[position])
                        if left[2] is not None and logprobs is not None:
                            left[2].append(logprobs[position])
                    position += 1
            return left

        return prepare_batch_update

    def _overflowed(self, requests: Sequence[Any]) -> set[str]:
        """Ids of the requests of a forward that has ended which have values that are not finite."""
        for in_flight in self._in_flight:
            if requests and in_flight[0] and in_flight[0][0] is requests[0]:
                self._in_flight.remove(in_flight)
                break
        else:
            return set()  # the forward itself failed
        fine, overflowed, start = [flags.tolist() for flags in in_flight[1]], set[str](), 0
        active = self._processor.scheduler.active_requests
        for request in requests:
            end, name = start + request.query_length, request.state.request_id
            if name in active and not all(all(flags[start:end]) for flags in fine):
                overflowed.add(name)
            start = end
        return overflowed

    def _fail(self, state: Any) -> None:
        """End a request, and the sequences that were to be forked from it, with an error."""
        processor, error = (
            self._processor,
            OverflowError("its values overflow: check the adapter's weights and scaling"),
        )
        for child in range(state.num_children):
            fork = state.create_equivalent_initial_request()
            fork.request_id = f"{state.request_id}__child#{child}"
            processor._handle_request_error(error, fork)
        state.num_children = 0
        waiting = processor.scheduler._requests_to_fork
        waiting[:] = [other for other in waiting if other is not state]
        processor._handle_request_error(error, state)
        processor.scheduler.finish_request(state.request_id)
        processor.scheduler.block_new_requests = False


def within_limit(key: Tensor, value: Tensor) -> Tensor:
    """Which tokens have keys and values that can enter the cache.

    Args:
        key, value: (1, heads, tokens, head_dim), any float dtype.

    Returns:
        (tokens,) bool.
    """
    limit = min(LIMIT, torch.finfo(key.dtype).max)
    largest = [torch.linalg.vector_norm(states, float("inf"), dim=(0, 1, 3)) for states in (key, value)]
    return torch.maximum(*largest) <= limit  # False for NaN


def finite_logits(logits: Tensor, batch_data: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits that can be sampled from: rows that cannot are 0, whose tokens are never handed out.

    Args:
        logits: (1, tokens, vocabulary), or with `logits_to_keep` in the batch only the rows of `logits_indices`.
        batch_data: what the model was called with.

    Returns:
        The logits, and (tokens,) bool: False where they were not finite. -inf beside finite ones bans a token.
    """
    fine = logits.amax(-1).float().isfinite()[0]  # transformers goes on in fp32
    logits = logits.where(fine[None, :, None], 0)
    if "logits_to_keep" not in batch_data:
        return logits, fine
    bad = torch.zeros(batch_data["input_ids"].shape[-1], dtype=torch.int32, device=logits.device)
    bad.index_add_(
        0, batch_data["logits_indices"].to(logits.device), (~fine).to(torch.int32)
    )  # some come twice: padding
    return logits, bad == 0
