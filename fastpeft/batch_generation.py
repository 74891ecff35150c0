"""generate_batch with an adapter per prompt: a part of PeftModel."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from tqdm import tqdm

from fastpeft.routing import BASE, Routing, check_names
from fastpeft.tuners.tuner_layer import BaseTunerLayer

if TYPE_CHECKING:
    from fastpeft.peft_model import PeftModel

_calls = itertools.count()


class BatchGeneration:
    """The part of PeftModel that generates by transformers' continuous batching."""

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        *,
        adapter_names: Sequence[str | Mapping[str, float] | None] | None = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        max_new_tokens: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Continue many prompts by continuous batching, each with an adapter of its own.

        Args:
            inputs: the prompts' tokens.
            adapter_names: one entry a prompt: a name, weights by name ({"a": 0.7, "b": 0.3}), or None or "__base__" for
                no adapter. Without it, every prompt takes the active adapters, or none while they are disabled.
            generation_config, continuous_batching_config, record_timestamps, progress_bar, persistent_manager, warmup,
                max_new_tokens, kwargs: as in the generate_batch of transformers' models.

        Returns:
            Request id -> transformers' GenerationOutput, in the order of the prompts. One that failed has an `error`.

        Raises:
            ValueError: not one name a prompt, an unknown name, merged adapters, or generation options that continuous
                batching does not honour; these also with a manager that is kept between calls.
            ImportError: the installed transformers is not known to fastpeft.integrations.continuous_batching.
            RuntimeError: the generation broke down.
        """
        model = cast("PeftModel", self)
        options = {
            "record_timestamps": record_timestamps,
            "progress_bar": progress_bar,
            "persistent_manager": persistent_manager,
            "warmup": warmup,
        }
        if _keeps_manager(model) or persistent_manager:  # its cache must know whose blocks it holds
            adapter_names = _active_names(model, len(inputs)) if adapter_names is None else adapter_names
        if adapter_names is None:
            if max_new_tokens is not None:
                kwargs["max_new_tokens"] = max_new_tokens
            result: dict[str, Any] = model.base_model.generate_batch(
                inputs, generation_config, continuous_batching_config, **options, **kwargs
            )
            return result
        if kwargs:
            raise TypeError(f"generate_batch with adapters does not know {sorted(kwargs)}")
        _check_names(model, adapter_names, len(inputs))
        if not inputs:
            return {}
        run = _Run(model, generation_config, continuous_batching_config, inputs, max_new_tokens)
        return run.outputs(inputs, adapter_names, **options)


class _Run:
    """One call: a manager, the requests that it gets, and what it answers."""

    def __init__(
        self,
        model: PeftModel,
        generation_config: Any,
        batching_config: Any,
        inputs: Sequence[Sequence[int]],
        max_new_tokens: int | None,
    ) -> None:
        from transformers.generation.continuous_batching.utils import WorkloadHints

        from fastpeft.integrations.continuous_batching import manager_with_adapters

        base: Any = model.get_base_model()
        config = base.generation_config if generation_config is None else generation_config
        self.max_new_tokens = config.max_new_tokens if max_new_tokens is None else max_new_tokens
        if self.max_new_tokens is None and config.max_length is not None:
            raise ValueError(
                f"max_length={config.max_length} is not what continuous batching goes by: pass max_new_tokens, how "
                "many tokens to add to each prompt"
            )
        self.answers = config.num_return_sequences or 1
        self.manager, self.router = manager_with_adapters(
            base,
            config,
            batching_config,
            workload_hints=WorkloadHints(
                max_prompt_length=max(map(len, inputs)),
                max_generated_length=self.max_new_tokens or 0,
                num_requests=len(inputs) * self.answers,
            ),
        )

    def outputs(
        self,
        inputs: Sequence[Sequence[int]],
        adapter_names: Sequence[Any],
        record_timestamps: bool,
        progress_bar: bool,
        persistent_manager: bool,
        warmup: bool,
    ) -> dict[str, Any]:
        from fastpeft.integrations.continuous_batching import fatal_error_of

        manager, call = self.manager, next(_calls)
        if warmup and not manager.warmed_up:
            manager.warmup()
        manager.start()
        results: dict[str, Any] = {}
        try:
            ids = [f"fastpeft-{call}-{i}" for i in range(len(inputs))]
            for request_id, tokens, adapter in zip(ids, inputs, adapter_names, strict=True):
                # weights may change between two calls: blocks cached for one are no good for the next
                key = "" if adapter in (None, BASE) else f"call {call} {json.dumps(adapter, sort_keys=True)}"
                self.router.bind(request_id, adapter, key)
                manager.add_request(
                    list(tokens),
                    request_id=request_id,
                    max_new_tokens=self.max_new_tokens,
                    record_timestamps=record_timestamps,
                )
            wanted = [name for request_id in ids for name in self._answers_to(request_id)]
            with tqdm(total=len(wanted), disable=not progress_bar, unit="request") as progress:
                while len(results) < len(wanted):
                    output = manager.get_result(timeout=1)
                    if output is None and not manager.is_running():
                        break
                    if output is not None and output.is_finished():
                        results[output.request_id] = output
                        progress.update(1)
        finally:
            manager.stop(block=True, keep_for_next_session=persistent_manager)
            if not persistent_manager:
                manager.destroy()
            for request_id in ids:
                self.router.release(request_id)
        cause = fatal_error_of(manager)
        if cause is not None or len(results) < len(wanted):
            answered = sum(output.error is None for output in results.values())
            raise RuntimeError(
                f"the generation broke down with {answered} of {len(wanted)} answers: {cause!r}"
            ) from cause
        return {name: results[name] for name in wanted}

    def _answers_to(self, request_id: str) -> list[str]:
        return [*(f"{request_id}__child#{i}" for i in range(self.answers - 1)), request_id]


def _keeps_manager(model: PeftModel) -> bool:
    if getattr(model.get_base_model(), "_cached_continuous_batching_manager", None) is None:
        return False  # the usual case, for which nothing of transformers is looked at
    from fastpeft.integrations.continuous_batching import keeps_manager

    return keeps_manager(model.get_base_model())


def _active_names(model: PeftModel, prompts: int) -> list[str | Mapping[str, float] | None]:
    """What every prompt takes that was given no adapter of its own."""
    merged = _merged(model)
    if merged:
        raise ValueError(
            f"persistent_manager=True cannot be used while {merged} are merged: its cache would serve their keys and "
            "values after they are unmerged. Call unmerge_adapter first; or leave the option out, and call "
            "destroy_cached_continuous_batching_manager on the base model if a manager was kept before"
        )
    is_disabled = any(isinstance(m, BaseTunerLayer) and m.disable_adapters for m in model.modules())
    names = [] if is_disabled else model.active_adapters
    if len(names) > 1:
        return [dict.fromkeys(names, 1.0)] * prompts
    return [names[0] if names else None] * prompts


def _merged(model: PeftModel) -> list[str]:
    return sorted({n for m in model.modules() if isinstance(m, BaseTunerLayer) for n in m.merged_adapters})


def _check_names(model: PeftModel, adapter_names: Sequence[Any], prompts: int) -> None:
    if isinstance(adapter_names, str) or len(adapter_names) != prompts:
        raise ValueError(
            f"adapter_names needs one entry a prompt: expected {prompts}, got {adapter_names!r:.200}. A prompt that "
            f"should take no adapter has {BASE!r} or None"
        )
    check_names(Routing.by_row(adapter_names), model.peft_config)
    if merged := _merged(model):
        raise ValueError(f"adapter_names cannot be used while {merged} are merged; call unmerge_adapter first")
