"""Mixed batches that train: each adapter gets the gradients of its rows, also through recomputed checkpoints."""

import models
import pytest
import torch
from routed_models import adapted
from torch.utils.checkpoint import checkpoint

from fastpeft import LoraConfig
from fastpeft.routing import Routing
from fastpeft.routing_scope import routed
from fastpeft.tuners import mixed_batch


def gradients(model, inputs, names):
    model.zero_grad()
    losses = model(**inputs, adapter_names=names).logits.square().mean((1, 2))
    losses.sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trained(**options):
    model, inputs = adapted(**options), models.batch("llama", rows=5)
    model.set_requires_grad(["a", "b"])
    return model.train(), inputs, ["b", "a", "__base__", "b", {"a": 0.5, "b": 2.0}]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=repr)
def test_a_row_gives_its_gradients_to_its_own_adapter(options):
    model, inputs, _ = trained(**options)
    names = ["b", "a", "__base__", "b", "__base__"]
    together = {key: grad.clone() for key, grad in gradients(model, inputs, names).items()}
    seen = set()
    for name in ("a", "b"):
        rows = [i for i, other in enumerate(names) if other == name]
        model.set_adapter(name)
        model.zero_grad()
        model(**{key: value[rows] for key, value in inputs.items()}).logits.square().mean((1, 2)).sum().backward()
        for key, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(together[key], p.grad, msg=key)
                seen.add(key)
    assert seen == together.keys()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpoints_recompute_with_the_same_routing(reentrant, dropout):
    model, inputs, names = trained(lora_dropout=dropout)
    model.enable_input_require_grads()
    torch.manual_seed(7)
    expected = {key: grad.clone() for key, grad in gradients(model, inputs, names).items()}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(7)
    found = gradients(model, inputs, names)
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        assert torch.equal(grad, expected[key]), key


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_that_nobody_told_are_refused(reentrant):
    model, inputs, names = trained()
    layer = model.get_base_model().model.layers[0]
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(plain, *args, use_reentrant=reentrant, **kwargs)
    if reentrant:  # it passes no keywords on
        layer.forward = lambda x, **kwargs: checkpoint(lambda t: plain(t, **kwargs), x, use_reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="cannot reach the recomputation of an activation checkpoint"):
        gradients(model, inputs, names)


def test_a_checkpoint_where_gradients_are_switched_on_inside_a_forward_is_refused():
    model, inputs, names = trained()
    model.eval()
    mlp = model.get_base_model().model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = torch.enable_grad()(lambda x: checkpoint(plain, x.requires_grad_(), use_reentrant=False))
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot reach the recomputation"):
        model(**inputs, adapter_names=names)


def test_modules_are_walked_for_checkpoints_where_there_may_be_one(monkeypatch):
    model, inputs, names = trained()
    walked, carry = [], mixed_batch.carry_through_checkpoints
    monkeypatch.setattr(
        mixed_batch, "carry_through_checkpoints", lambda modules: carry(walked.append(list(modules)) or walked[-1])
    )
    model(**inputs, adapter_names=names)
    kinds = {type(module).__name__ for module in walked[0]}
    assert {"LlamaForCausalLM", "LlamaDecoderLayer", "Linear"} <= kinds  # every module but those of adapters
    base = len([name for name, _ in model.get_base_model().named_modules() if "lora_" not in name])
    assert len(walked[0]) == base
    model.eval()
    with torch.no_grad():
        model(**inputs, adapter_names=names)
    assert len(walked) == 1


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_a_checkpoint_inside_a_known_one_is_refused(outer, inner):
    model, inputs, names = trained()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": outer})
    model.enable_input_require_grads()
    mlp = model.get_base_model().model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: checkpoint(plain, x, use_reentrant=inner)
    with pytest.raises(RuntimeError, match="cannot reach the recomputation of an activation checkpoint"):
        gradients(model, inputs, names)


def assert_gradients_are(model, expected):
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        assert torch.equal(grad, expected[key]), key


def test_a_checkpoint_around_the_whole_model():
    model, inputs, names = trained()
    expected = {key: grad.clone() for key, grad in gradients(model, inputs, names).items()}
    model.zero_grad()
    out = checkpoint(lambda: model(**inputs, adapter_names=names).logits, use_reentrant=False)
    out.square().mean((1, 2)).sum().backward()
    assert_gradients_are(model, expected)


def test_a_block_around_a_model_with_checkpoints():
    model, inputs, names = trained()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    expected = {key: grad.clone() for key, grad in gradients(model, inputs, names).items()}
    model.zero_grad()
    with routed(Routing.by_row(names)):
        logits = model(**inputs).logits
    logits.square().mean((1, 2)).sum().backward()
    assert_gradients_are(model, expected)


def test_checkpoints_of_models_that_are_no_longer_routed():
    """A part without gradients in a mixed batch is no reason to refuse what comes after it without a routing."""
    model, inputs, names = trained()
    model.get_base_model().config.use_cache = False  # a recomputation would add to it
    layer = model.get_base_model().model.layers[0]
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: torch.no_grad()(plain)(*args, **kwargs)
    gradients(model, inputs, names)
    layer.forward = lambda x, **kwargs: checkpoint(lambda t: plain(t, **kwargs), x, use_reentrant=True)
    model.enable_input_require_grads()
    model.set_adapter("a")
    model(**inputs).logits.square().mean().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_refill_between_forward_and_backward_is_refused(reentrant):
    model, inputs, names = trained()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    routing = Routing.by_row(names)
    loss = model(**inputs, adapter_names=routing).logits.square().mean()
    routing.refill(names[::-1])
    with pytest.raises(RuntimeError, match="refilled between a forward and its backward"):
        loss.backward()


def test_several_forwards_before_one_backward():
    model, inputs, names = trained()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    expected = {key: grad.clone() for key, grad in gradients(model, inputs, names).items()}
    other = {key: grad.clone() for key, grad in gradients(model, inputs, names[::-1]).items()}
    model.zero_grad()
    losses = [model(**inputs, adapter_names=order).logits.square().mean((1, 2)).sum() for order in (names, names[::-1])]
    sum(losses).backward()
    for key, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[key] + other[key], msg=key)


@pytest.mark.parametrize("reentrant", [False, True])
def test_compiled_checkpoints_follow_a_routing(reentrant):
    """Tables made within a checkpoint cannot be kept: they are made before it, or for one layer alone."""
    model, inputs = adapted(), models.batch("llama")
    model.add_adapter("c", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))  # not on all layers
    model.set_requires_grad(["a", "b", "c"])
    turns = [["a", {"a": 0.5, "b": 0.5}, "__base__"], ["b", {"a": 0.2, "b": 0.7}, "a"], ["a", "c", "b"]]

    def outcome(run, rows):
        model.zero_grad()
        logits = run(**inputs, use_cache=False, adapter_names=rows).logits
        logits.square().mean().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        return [logits.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained)]

    expected = [outcome(model.train(), rows) for rows in turns]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for rows, wanted in zip(turns, expected, strict=True):
        for mine, theirs in zip(outcome(compiled, rows), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
