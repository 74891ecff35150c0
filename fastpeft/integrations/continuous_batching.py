"""Per-request adapters in transformers' continuous batching: here, and in overflow.py, are all its private names.

What it makes of a GenerationConfig is in batching_options.py.

Continuous batching packs the tokens of many requests into one row. Its manager knows which tokens are whose, the model
does not; and its prefix cache finds keys and values by tokens alone, although an adapter changes them. A
`RequestRouter` gives a manager both: every forward runs under the Routing of its batch, and cached blocks are found
only by requests of the same adapter and version.

    manager, router = manager_with_adapters(base, generation_config, batching_config)
    router.bind("req_0", "math", cache_key="math 1")
    manager.add_request(input_ids, request_id="req_0")

How it does that hangs on names that transformers does not promise to keep. They are listed in `_USED` and checked
before anything is changed; a version that lacks one is refused with a message that says so.
A request whose values overflow fails alone (fastpeft.integrations.overflow).
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

from fastpeft.integrations.batching_options import check_options
from fastpeft.integrations.overflow import OverflowGuard
from fastpeft.routing import BASE, Routing
from fastpeft.routing_scope import routed

WRITTEN_FOR = "5.23"  # the version of transformers whose continuous batching this file was written and tested against

_PACKAGE = "transformers.generation.continuous_batching"
# Module, class or "" for a function of the module, name, and the parameters it is called with, `self` left out.
_USED: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("continuous_api", "ContinuousBatchingManager", "_create_batch_processor", ()),
    ("continuous_api", "ContinuousBatchingManager", "pause", ()),
    ("continuous_api", "ContinuousMixin", "destroy_cached_continuous_batching_manager", ()),
    (
        "input_outputs",
        "ContinuousBatchingIOs",
        "prepare_batch_tensors",
        (
            "requests_in_batch",
            "logits_processors",
            "use_decode_fast_path",
            "num_q_tokens",
            "max_kv_read",
            "use_padding",
        ),
    ),
    ("model_runner", "ModelRunner", "_get_forward_fn", ("use_block_table",)),
    (
        "model_runner",
        "ModelRunner",
        "_forward_process_and_sample",
        ("model", "batch_data", "carry_over_ids", "prev_output_ids", "output_ids"),
    ),
    ("model_runner", "", "infer_max_single_request_tokens", ("cache",)),
    ("continuous_api", "ContinuousBatchProcessor", "_handle_request_error", ("error", "state")),
    ("input_outputs", "ContinuousBatchingIOs", "prepare_batch_update", ()),
    ("cache", "PagedAttentionCache", "update", ("key_states", "value_states", "layer_idx", "kwargs")),
    ("requests", "RequestState", "create_equivalent_initial_request", ()),
    ("scheduler", "Scheduler", "finish_request", ("request_id",)),
    ("cache", "PagedAttentionCache", "search_prefix_match", ("request_id", "prompt_ids")),
    (
        "cache_allocators.cache_allocator",
        "CacheAllocator",
        "mark_complete_blocks",
        ("request_id", "token_ids", "new_new_blocks"),
    ),
    ("scheduler", "Scheduler", "clear_cancelled_requests", ()),
)
_FORK = "__child#"  # stands in the ids of the further sequences of one request (num_return_sequences)

Adapter = str | Mapping[str, float] | None


def check_transformers() -> None:
    """Raise unless this transformers has what per-request adapters need of it.

    Raises:
        ImportError: a name is missing, or takes other parameters than those it is called with here.
    """
    missing = [problem for entry in _USED if (problem := _problem_with(*entry)) is not None]
    if missing:
        raise ImportError(
            f"adapters in continuous batching hang on names inside transformers, and version "
            f"{transformers.__version__} lacks: {'; '.join(missing)}. They were written for transformers "
            f"{WRITTEN_FOR}: install that (pip install 'transformers=={WRITTEN_FOR}.*'), or call "
            "model.generate(adapter_names=[...])"
        )


def _problem_with(module: str, owner: str, name: str, parameters: tuple[str, ...]) -> str | None:
    try:
        part: Any = importlib.import_module(f"{_PACKAGE}.{module}")
        for step in filter(None, (owner, name)):
            part = getattr(part, step)
    except (ImportError, AttributeError):
        return ".".join(filter(None, (module, owner, name)))
    found = tuple(inspect.signature(part).parameters)[1 if owner else 0 :]
    if found != parameters:
        return f"{module}.{owner}.{name}({', '.join(parameters)}), which takes ({', '.join(found)})"
    return None


def manager_with_adapters(
    base: Any,
    generation_config: GenerationConfig,
    batching_config: ContinuousBatchingConfig | None = None,
    on_cancelled: Callable[[str], None] | None = None,
    **options: Any,
) -> tuple[Any, RequestRouter]:
    """A manager of continuous batching, not started yet, and the router of its requests.

    Args:
        base: the model inside the PeftModel.
        generation_config, batching_config, options: as for `init_continuous_batching`.
        on_cancelled: as for RequestRouter.

    Raises:
        ImportError, ValueError: as RequestRouter, check_options and config_for_adapters. The model is as it was.
    """
    check_transformers()
    check_options(base, generation_config)
    batching_config = config_for_adapters(batching_config)
    attention = base.config._attn_implementation
    try:
        manager = base.init_continuous_batching(
            generation_config=generation_config, continuous_batching_config=batching_config, **options
        )
        return manager, RequestRouter(manager, on_cancelled)
    except Exception:
        base.set_attn_implementation(attention)  # which a manager may have changed for itself
        raise


def keeps_manager(base: Any) -> bool:
    """Whether a manager, with its cache, was kept for the next generate_batch of a base model.

    One that was made without a router is given up: its cache may hold blocks of any adapter, under the same tokens.
    """
    manager = getattr(base, "_cached_continuous_batching_manager", None)
    if manager is not None and "_fastpeft_router" not in vars(manager):
        base.destroy_cached_continuous_batching_manager()
        return False
    return manager is not None


def config_for_adapters(config: ContinuousBatchingConfig | None = None) -> ContinuousBatchingConfig:
    """A copy of a config for continuous batching, without CUDA graphs, which transformers else uses where it can.

    Raises:
        ValueError: CUDA graphs or torch.compile are asked for: they would keep the adapters of the batch that they saw.
    """
    config = ContinuousBatchingConfig() if config is None else copy.deepcopy(config)
    _check_not_frozen(config)
    config.use_cuda_graph = False
    return config


def _check_not_frozen(config: ContinuousBatchingConfig) -> None:
    graphs = config.use_cuda_graph
    wanted = {
        "use_cuda_graph": graphs if graphs is True or (isinstance(graphs, tuple) and any(graphs)) else None,
        "varlen_compile_config": config.varlen_compile_config,
        "decode_compile_config": config.decode_compile_config,
        "default_compile_level": config.default_compile_level or None,
    }
    for option, value in wanted.items():
        if value is not None:
            raise ValueError(
                f"{option}={value} cannot be used with an adapter per request: captured or compiled once, the forward "
                "would give every batch the adapters of its first one. Make the manager with "
                "fastpeft.integrations.continuous_batching.config_for_adapters(config), and leave the option out"
            )


@dataclass(frozen=True)
class _Batch:
    """The tokens of the next forward: how many in a row take which adapter, and which of them reach the head."""

    adapters: list[Adapter]
    lengths: list[int]
    last_tokens: list[int]  # of the requests that get a new token
    requests: Sequence[Any] = ()  # whose tokens they are

    def route(self, batch_data: dict[str, Any]) -> dict[str, Any]:
        """What `Routing.by_token` takes, for the tensors that the model is called with: padding takes no adapter."""
        tokens = batch_data["input_ids"].shape[-1]
        sequences = len(batch_data["logits_indices"])
        if sequences == tokens and self.last_tokens != list(range(len(self.last_tokens))):
            # As many tokens reach the head as there are, in another order (a prompt's part of one token gives no new
            # one): a routing could not tell the two. Without this, the head sees all in their order.
            batch_data.pop("logits_to_keep", None)
        kept = None
        if "logits_to_keep" in batch_data and sequences < tokens:  # else all are kept in their order, padding last
            kept = self.last_tokens + [0] * (sequences - len(self.last_tokens))  # the engine fills up with token 0
        lengths = [*self.lengths, tokens - sum(self.lengths)]
        return {"adapters": [*self.adapters, None], "lengths": lengths, "kept": kept}


class RequestRouter:
    """Lets each request of one manager take its own adapter.

    A request that was not bound takes no adapter and shares no cached blocks. To be made before the manager is started;
    a second router of the same manager is the first one.

    Args:
        manager: what `init_continuous_batching` of the base model returned.
        on_cancelled: called in the generation thread with the id of a request that will run no more because it was
            cancelled.

    Raises:
        ImportError: this version of transformers is not known.
        ValueError: the manager uses CUDA graphs or torch.compile, or has run already.

    Attributes:
        max_request_tokens: how many tokens, prompt and answer, one request may have; None before the manager has its
            cache (after `warmup`).
    """

    max_request_tokens: int | None

    def __new__(cls, manager: Any, on_cancelled: Callable[[str], None] | None = None) -> RequestRouter:
        existing = vars(manager).get("_fastpeft_router")
        return existing if existing is not None else super().__new__(cls)

    def __init__(self, manager: Any, on_cancelled: Callable[[str], None] | None = None) -> None:
        if vars(manager).get("_fastpeft_router") is self:
            return
        check_transformers()
        _check_not_frozen(manager.continuous_batching_config)
        if manager.batch_processor is not None:
            raise ValueError("this manager has run already; make the RequestRouter before its warmup or start")
        self.on_cancelled = on_cancelled
        self.max_request_tokens = None
        self._bindings: dict[str, tuple[Adapter, str]] = {}
        self._lock = threading.Lock()
        self._batch: _Batch | None = None
        self._last: tuple[dict[str, Any], Routing] | None = None  # the last forward's routing, and how it was made
        self._create = manager._create_batch_processor
        manager._create_batch_processor = self._create_batch_processor
        manager._fastpeft_router = self

    def bind(self, request_id: str, adapter: Adapter, cache_key: str) -> None:
        """Say what a request takes, before it is added to the manager.

        Args:
            request_id: its id.
            adapter: as in Routing: a name, weights by name, None or "__base__".
            cache_key: requests share cached keys and values if their keys are equal; "" is that of the base model. It
                must change whenever the weights of the adapter do.
        """
        if isinstance(adapter, Mapping):
            adapter = dict(adapter)  # the caller may go on with his
        with self._lock:
            self._bindings[request_id] = (adapter, cache_key)

    def release(self, request_id: str) -> None:
        """Forget a request that has ended."""
        with self._lock:
            self._bindings.pop(request_id, None)

    def binding(self, request_id: str) -> tuple[Adapter, str] | None:
        """What a request, or the one that it was forked from, was bound to."""
        with self._lock:
            found = self._bindings.get(request_id)
            return found if found is not None else self._bindings.get(request_id.partition(_FORK)[0])

    # What the manager calls, in the generation thread.

    def _create_batch_processor(self) -> Any:
        processor = self._create()
        if vars(processor).get("_fastpeft_router") is not self:
            self._follow(processor)
            processor._fastpeft_router = self
        return processor

    def _follow(self, processor: Any) -> None:
        """Stand in the way of a processor's calls: what a forward computes, what is cached, what has ended."""
        from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

        inputs, runner = processor.inputs_and_outputs, processor.model_runner
        cache, scheduler = processor.cache, processor.scheduler
        inputs.prepare_batch_tensors = self._noting_the_batch(inputs.prepare_batch_tensors)
        runner._get_forward_fn = self._with_routing(runner._get_forward_fn, OverflowGuard(processor))
        cache.search_prefix_match = self._among_equals(cache.search_prefix_match)
        for allocator in cache.cache_allocators.values():
            allocator.mark_complete_blocks = self._marked(allocator.mark_complete_blocks)
        scheduler.clear_cancelled_requests = self._telling(scheduler.clear_cancelled_requests)
        self.max_request_tokens = infer_max_single_request_tokens(cache)  # of a cache that nobody has used yet

    def _noting_the_batch(self, prepare: Callable[..., None]) -> Callable[..., None]:
        def prepare_batch_tensors(requests_in_batch: Sequence[Any], *args: Any, **kwargs: Any) -> None:
            prepare(requests_in_batch, *args, **kwargs)
            adapters, lengths, last_tokens, end = [], [], [], 0
            for request in requests_in_batch:
                bound = self.binding(request.state.request_id)
                adapters.append(None if bound is None else bound[0])
                lengths.append(request.query_length)
                end += request.query_length
                if request.has_new_token:
                    last_tokens.append(end - 1)
            self._batch = _Batch(adapters, lengths, last_tokens, list(requests_in_batch))

        return prepare_batch_tensors

    def _with_routing(
        self, choose: Callable[..., tuple[Callable[..., None], bool]], guard: OverflowGuard
    ) -> Callable[..., Any]:
        def _get_forward_fn(use_block_table: bool) -> tuple[Callable[..., None], bool]:
            forward, use_cuda_graph = choose(use_block_table=use_block_table)

            def routed_forward(model: Any, batch_data: dict[str, Any], *args: Any) -> None:
                batch = self._batch
                assert batch is not None, "a forward without prepare_batch_tensors"
                has_adapter = any(adapter not in (None, BASE) for adapter in batch.adapters)
                route = batch.route(batch_data)
                if self._last is None or self._last[0] != route:  # in decoding it is, and layers remember the batch
                    self._last = route, Routing.by_token(**route)
                with routed(self._last[1]):  # on the stream of the forward
                    forward(guard.watched(model, batch.requests, has_adapter), batch_data, *args)

            return routed_forward, use_cuda_graph

        return _get_forward_fn

    def _among_equals(self, search: Callable[[str, list[int]], int]) -> Callable[[str, list[int]], int]:
        def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
            bound = self.binding(request_id)
            return 0 if bound is None else search(request_id, _disguised(prompt_ids, bound[1]))

        return search_prefix_match

    def _marked(self, mark: Callable[[str, list[int], int], None]) -> Callable[..., None]:
        def mark_complete_blocks(request_id: str, token_ids: list[int], new_new_blocks: int) -> None:
            bound = self.binding(request_id)
            if bound is not None:  # else nobody knows whose adapter made these blocks
                mark(request_id, _disguised(token_ids, bound[1]), new_new_blocks)

        return mark_complete_blocks

    def _telling(self, clear: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
        def clear_cancelled_requests() -> list[Any]:
            states = clear()
            if self.on_cancelled is not None:
                for state in states:
                    self.on_cancelled(state.request_id)
            return states

        return clear_cancelled_requests


def _disguised(token_ids: list[int], cache_key: str) -> list[int]:
    """Tokens as the cache is to know them. It finds blocks by a hash of their tokens: those of two keys differ."""
    if not cache_key:
        return token_ids
    return [token ^ mask for token, mask in zip(token_ids, cycle(_masks(cache_key)), strict=False)]


def _masks(cache_key: str) -> list[int]:
    """16 numbers of 31 bits, from the key alone: the same in every process of a tensor-parallel group."""
    digest = hashlib.blake2b(cache_key.encode(), digest_size=64).digest()
    return [int.from_bytes(digest[i : i + 4], "little") >> 1 for i in range(0, 64, 4)]


def fatal_error_of(manager: Any) -> Exception | None:
    """What ended the generation loop of a manager, None while nothing has."""
    error: Exception | None = manager.background_thread_status.fatal_error
    return error
