"""How often layers look at their adapters while `generate` runs: once, unless somebody could change them meanwhile."""

from functools import partial
from typing import Any

import pytest
import torch
from models import tiny_llama
from torch import nn
from transformers import LogitsProcessorList, StoppingCriteriaList

import fastpeft
from fastpeft.tuners.lora import LoraLayer, repeated_batch

NAMES = ["one", "two", "one"]
NEW = 6


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = fastpeft.LoraConfig(r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = fastpeft.get_peft_model(tiny_llama(), config, adapter_name="one")
    model.add_adapter("two", config)
    return model.eval()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every look of a layer at all of its adapters."""
    seen: list[Any] = []
    look = repeated_batch._Found._holds
    monkeypatch.setattr(repeated_batch._Found, "_holds", lambda self, layer: seen.append(layer) or look(self, layer))
    return seen


def generate(model: Any, **options: Any) -> torch.Tensor:
    ids = torch.arange(3, 15).view(3, 4)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    tokens: torch.Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=NAMES, **options
    )
    return tokens


def layers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def forgetful(patch: pytest.MonkeyPatch) -> None:
    """No layer remembers anything."""
    patch.setattr(repeated_batch.RepeatedBatch, "forward", lambda *args: None)
    patch.setattr(repeated_batch.RepeatedBatch, "remember", lambda *args: None)


class Exchange:
    """Gives every layer another lora_B when it is called for the third time: as whatever `generate` may call."""

    def __init__(self, model: Any) -> None:
        self.layers, self.calls = layers_of(model), 0

    def exchange(self) -> None:
        self.calls += 1
        if self.calls == 3:
            for layer in self.layers:
                factor = layer.lora_B["one"]
                factor.weight = nn.Parameter(8 * factor.weight.detach().neg().clone())

    def processor(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.exchange()
        return scores

    def criterion(self, ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.exchange()
        return torch.zeros(len(ids), dtype=torch.bool)

    def allowed(self, row: int, ids: torch.Tensor) -> list[int]:
        self.exchange()
        return list(range(3, 20))

    def hook(self, *args: Any) -> None:
        self.exchange()

    def forward(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        self.exchange()
        return forward(*args, **kwargs)


def with_processor(model: Any, by: Exchange) -> torch.Tensor:
    return generate(model, logits_processor=LogitsProcessorList([by.processor]))


def with_criterion(model: Any, by: Exchange) -> torch.Tensor:
    return generate(model, stopping_criteria=StoppingCriteriaList([by.criterion]))


def with_allowed_tokens(model: Any, by: Exchange) -> torch.Tensor:
    by.calls = -6  # it is called for each row
    return generate(model, prefix_allowed_tokens_fn=by.allowed)


def with_hook(model: Any, by: Exchange) -> torch.Tensor:
    handle = model.base_model.model.model.norm.register_forward_hook(by.hook)
    try:
        return generate(model)
    finally:
        handle.remove()


def with_hook_on_a_base_layer(model: Any, by: Exchange) -> torch.Tensor:
    handle = layers_of(model)[-1].get_base_layer().register_forward_pre_hook(by.hook)
    try:
        return generate(model)
    finally:
        handle.remove()


def with_another_forward(model: Any, by: Exchange) -> torch.Tensor:
    norm = model.base_model.model.model.norm
    norm.forward = partial(by.forward, norm.forward)
    try:
        return generate(model)
    finally:
        del norm.forward


def with_another_generate(model: Any, by: Exchange) -> torch.Tensor:
    base = model.get_base_model()

    class Other(type(base)):  # type: ignore[misc]
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return super().generate(*args, logits_processor=LogitsProcessorList([by.processor]), **kwargs)

    kind, base.__class__ = base.__class__, Other
    try:
        return generate(model)
    finally:
        base.__class__ = kind


def test_one_look_in_a_call(model, looks):
    first = generate(model)
    assert looks == layers_of(model)  # when the second token comes: with the first one they were found
    assert torch.equal(generate(model), first)
    assert looks[len(layers_of(model)) :] == layers_of(model)


@pytest.mark.parametrize(
    "way",
    [
        with_processor,
        with_criterion,
        with_allowed_tokens,
        with_hook,
        with_hook_on_a_base_layer,
        with_another_forward,
        with_another_generate,
    ],
)
def test_what_is_changed_from_within_a_call_is_seen(way, model, monkeypatch):
    before = [layer.lora_B["one"].weight for layer in layers_of(model)]
    unchanged = generate(model)
    changed = way(model, Exchange(model))
    assert not torch.equal(changed, unchanged)
    for layer, weight in zip(layers_of(model), before, strict=True):
        layer.lora_B["one"].weight = weight
    with monkeypatch.context() as patch:
        forgetful(patch)
        assert torch.equal(changed, way(model, Exchange(model)))


def test_what_is_changed_between_calls_is_seen(model, monkeypatch):
    generate(model)
    by = Exchange(model)
    for _ in range(3):
        by.exchange()
    changed = generate(model)
    with monkeypatch.context() as patch:
        forgetful(patch)
        assert torch.equal(changed, generate(model))


def test_a_hook_of_another_thread_is_seen(model, looks):
    """As soon as torch has counted it."""
    ran: list[int] = []
    layer, forward = layers_of(model)[0], repeated_batch._Found.add_to

    def registering(self: Any, *args: Any) -> torch.Tensor:
        if len(looks) == len(layers_of(model)) and not layer.lora_A["one"]._forward_hooks:
            layer.lora_A["one"].register_forward_hook(lambda *args: ran.append(1))
        return forward(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeated_batch._Found, "add_to", registering)
        generate(model)
    assert len(ran) >= NEW - 3
