"""recompute_mlp: fewer bytes kept, the same gradients to the bit, whatever else hangs on saved tensors."""

import contextlib
import copy
import io
import weakref
from typing import Any

import pytest
import torch
from models import batch, build, tiny_llama
from torch import Tensor, nn

import fastpeft
from fastpeft.benchmark.memory import saved_bytes
from fastpeft.recompute import _Scope


def adapted(p: float = 0.0, dtype: torch.dtype = torch.float32, checkpointing: bool | None = None) -> nn.Module:
    torch.manual_seed(0)
    config = fastpeft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=p, init_lora_weights=False)
    model = fastpeft.get_peft_model(tiny_llama(dtype, use_cache=False), config).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    return model


def gradients(model: nn.Module, family: str = "llama") -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    model(**batch(family)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def kept(model: nn.Module) -> int:
    inputs = batch("llama")
    there = [*model.parameters(), *model.buffers()]
    return saved_bytes(lambda: model(**inputs).loss, inputs=[inputs["input_ids"]], parameters=there).own


@pytest.mark.usefixtures("ops_for_few")
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_of_four_wide_tensors_are_not_kept(p, dtype):
    model = adapted(p, dtype)
    before, expected = kept(model), gradients(model)
    config = model.config
    assert fastpeft.recompute_mlp(model) == config.num_hidden_layers
    wide = batch("llama")["input_ids"].numel() * config.intermediate_size * dtype.itemsize
    assert before - kept(model) == 2 * wide * config.num_hidden_layers
    assert_same_bits(gradients(model), expected)
    fastpeft.recompute_mlp(model, enabled=False)
    assert kept(model) == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(reentrant):
    """The hooks of a checkpoint are handed what is not made again: it keeps as little as without."""
    model = adapted(0.3, checkpointing=reentrant)
    before, expected = kept(model), gradients(model)
    fastpeft.recompute_mlp(model)
    assert kept(model) == before
    assert_same_bits(gradients(model), expected)


def test_hooks_around_see_the_others():
    model = adapted()
    expected = gradients(model)
    fastpeft.recompute_mlp(model)
    with torch.autograd.graph.save_on_cpu():
        assert_same_bits(gradients(model), expected)


def test_an_activation_of_many_small_steps():
    """GPT-2's GELU is written out: of its products only those are made again whose node keeps both factors."""
    torch.manual_seed(0)
    config = fastpeft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = fastpeft.get_peft_model(build("gpt2"), config).train()
    expected = gradients(model, "gpt2")
    assert fastpeft.recompute_mlp(model) > 0
    assert_same_bits(gradients(model, "gpt2"), expected)


@pytest.mark.usefixtures("ops_for_few")
@pytest.mark.parametrize("activation", ["relu", "relu6", "sigmoid", "tanh", "hardswish", "leaky_relu", "prelu"])
def test_llamas_with_a_plain_activation_of_torch(activation):
    """hidden_act: "relu" and the like give a bare torch module; at least the product is not kept."""
    torch.manual_seed(0)
    config = fastpeft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, init_lora_weights=False)
    llama = tiny_llama(use_cache=False, hidden_act=activation)
    assert type(llama.model.layers[0].mlp.act_fn).__module__ == "torch.nn.modules.activation"
    model = fastpeft.get_peft_model(llama, config).train()
    before, expected = kept(model), gradients(model)
    assert fastpeft.recompute_mlp(model) == llama.config.num_hidden_layers
    wide = batch("llama")["input_ids"].numel() * llama.config.intermediate_size * 4
    assert before - kept(model) >= wide * llama.config.num_hidden_layers
    assert_same_bits(gradients(model), expected)


def test_an_activation_in_place_and_what_is_none():
    model = nn.Sequential(Mlp(nn.ReLU(inplace=True)))
    x = torch.randn(2, 3, 4)
    twin = copy.deepcopy(model)
    assert fastpeft.recompute_mlp(model) == 1
    for net in (model, twin):
        net(x).square().sum().backward()
    assert_same_bits(*({name: p.grad for name, p in net.named_parameters()} for net in (model, twin)))
    for other in (nn.Softmax(-1), nn.LogSoftmax(-1), nn.GLU(), nn.MultiheadAttention(4, 2)):
        with pytest.raises(ValueError, match="has no MLP to recompute"):
            fastpeft.recompute_mlp(nn.Sequential(Mlp(other)))


class Mlp(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.act = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4), act or nn.SiLU()
        self.fails: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.gate(x)) * self.up(x)
        if self.fails:
            raise self.fails
        return self.down(h.view(-1, 6)).view_as(x)


def test_an_error_inside_leaves_no_hooks_behind():
    model = nn.Sequential(Mlp())
    fastpeft.recompute_mlp(model)
    model[0].fails = RuntimeError("boom")
    with pytest.raises(RuntimeError, match="boom"):
        model(torch.randn(3, 4))
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


@pytest.mark.parametrize(("again", "nested"), [(False, False), (True, False), (True, True)])
def test_after_a_keyboard_interrupt_the_hooks_end(again, nested):
    """With the next tensor that autograd keeps, or the next call of an MLP: hooks around it then end as well."""
    model = nn.Sequential(Mlp())
    fastpeft.recompute_mlp(model)
    model[0].fails = KeyboardInterrupt()
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(KeyboardInterrupt), torch.autograd.graph.save_on_cpu() if nested else contextlib.nullcontext():
        model(x)
    model[0].fails = None
    if again:
        model(x).sum().backward()
        twin = copy.deepcopy(model)
        fastpeft.recompute_mlp(twin, enabled=False)
        twin.zero_grad()
        twin(x).sum().backward()
        grads = [{name: p.grad for name, p in net.named_parameters()} for net in (model, twin)]
        assert_same_bits(*grads)
    else:
        x.exp().sum().backward()
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


@pytest.mark.parametrize("frozen", ["gate", "up"])
def test_a_factor_without_a_gradient(frozen):
    """The product's node keeps one factor only: it cannot make the product again."""
    model = nn.Sequential(Mlp())
    getattr(model[0], frozen).requires_grad_(False)
    x = torch.randn(2, 3, 4)
    twin = copy.deepcopy(model)
    fastpeft.recompute_mlp(model)
    for net in (model, twin):
        net(x).square().sum().backward()
    assert_same_bits(
        *({name: p.grad for name, p in net.named_parameters() if p.requires_grad} for net in (model, twin))
    )


def test_backward_twice():
    model = nn.Sequential(Mlp())
    fastpeft.recompute_mlp(model)
    loss = model(torch.randn(3, 4)).sum()
    loss.backward(retain_graph=True)
    first = model[0].gate.weight.grad.clone()
    loss.backward()
    assert torch.equal(model[0].gate.weight.grad, 2 * first)


def test_a_change_in_place_is_noticed():
    model = nn.Sequential(Mlp())
    fastpeft.recompute_mlp(model)
    x = torch.randn(3, 4, requires_grad=True) * 1
    out = model(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class TanhMlp(Mlp):
    """tanh keeps its own output."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.act(self.gate(x)).tanh()
        return self.down(self.seen * self.up(x))


def test_a_graph_that_is_dropped_is_freed():
    model = nn.Sequential(TanhMlp())
    fastpeft.recompute_mlp(model)
    model(torch.randn(3, 4))
    seen = weakref.ref(model[0].seen)
    model[0].seen = None
    assert seen() is None


def test_a_call_within_a_call_and_functional_transforms():
    """A call without gradients in the middle of one that records them takes no hooks off but its own."""
    model = nn.Sequential(Mlp())
    fastpeft.recompute_mlp(model)
    mlp, x, inside = model[0], torch.randn(3, 4), []

    def again(module: nn.Module, args: Any) -> None:
        if not inside:
            inside.append(1)
            around = torch._C._autograd._top_saved_tensors_default_hooks(False)
            with torch.no_grad():
                mlp(x)
            assert torch._C._autograd._top_saved_tensors_default_hooks(False) == around is not None

    handle = mlp.up.register_forward_pre_hook(again)
    model(x).sum().backward()
    assert inside
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    handle.remove()
    assert torch.func.grad(lambda x: model(x).sum())(x).shape == x.shape


def test_compiles_to_one_graph():
    model = adapted().eval()
    expected = gradients(model)
    fastpeft.recompute_mlp(model)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


def test_a_model_can_be_copied_and_pickled():
    model = adapted()
    expected = gradients(model)
    fastpeft.recompute_mlp(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert kept(twin) == kept(model)
        assert_same_bits(gradients(twin), expected)


def test_twice_is_once_and_a_model_without_one_is_an_error():
    model = nn.Sequential(Mlp())
    fastpeft.recompute_mlp(model)
    fastpeft.recompute_mlp(model)
    assert sum(isinstance(hook.__self__, _Scope) for hook in model[0]._forward_pre_hooks.values()) == 1
    with pytest.raises(ValueError, match="Sequential has no MLP to recompute: expected modules with an activation"):
        fastpeft.recompute_mlp(nn.Sequential(nn.Linear(2, 2)))
