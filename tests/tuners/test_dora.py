"""DoRA layers: which path runs, what hangs on modules, an adapter's life, what is refused. Numbers: tests/parity."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batch, tiny_llama
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastpeft
from fastpeft.benchmark.memory import saved_bytes
from fastpeft.tuners.lora import fused, variants
from fastpeft.tuners.lora.variants import DORA, PLAIN


class Net(nn.Module):
    """`second` is called on the same tensor as `linear`: a group, where both are plain LoRA."""

    def __init__(self, linear: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        sizes = (24, 20) if linear is nn.Linear else (20, 24)  # Conv1D takes (out, in)
        self.linear, self.second, self.third = linear(*sizes), linear(*sizes), linear(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.linear(x), self.second(x), self.third(x)
        return a * b + c


def adapted(net: nn.Module | None = None, targets: Any = ("linear",), **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"r": 4, "use_dora": True, "init_lora_weights": False} | options
    model = fastpeft.get_peft_model(net or Net(), fastpeft.LoraConfig(target_modules=list(targets), **options))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(torch.linspace(0.5, 1.5, len(parameter)))
    return model


def layer_of(model: Any, name: str = "linear") -> Any:
    return getattr(model.base_model.model, name)


def by_modules(layer: Any, x: Tensor) -> Tensor:
    """PEFT's formula, with the update made out of what the modules compute."""
    A, B, s = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]
    W = layer.base_layer.weight.T if isinstance(layer.base_layer, Conv1D) else layer.base_layer.weight
    with torch.no_grad():
        norm = torch.linalg.norm(W + s * B(A(torch.eye(24))).T, dim=1)
    g = layer.lora_magnitude_vector["default"](norm)
    base = layer.base_layer(x)
    return base + (g - 1) * (base - layer.base_layer.bias) + g * s * B(A(x))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that ran, in order."""
    seen: list[str] = []
    for module, names in ((fused, ("lora_linear", "lora_add", "lora_group")), (variants, ("dora_linear", "dora_norm"))):
        for name in names:
            op = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *args, op=op, name=name: seen.append(name) or op(*args))
    return seen


SHIFT = lambda module, args, out: out + 1.0  # noqa: E731
OBSTACLES: dict[str, tuple[Callable[[Any], Any], str, bool]] = {  # change, why not fused, whether the norm is an op
    "hook on the base": (lambda layer: layer.base_layer.register_forward_hook(SHIFT), "a hook", True),
    "hook on lora_A": (lambda layer: layer.lora_A["default"].register_forward_hook(SHIFT), "on lora_A", False),
    "hook on lora_B": (lambda layer: layer.lora_B["default"].register_forward_hook(SHIFT), "on lora_B", False),
    "hook on the magnitude": (
        lambda layer: layer.lora_magnitude_vector["default"].register_forward_hook(SHIFT), "on lora_magnitude", True
    ),
    "trained base": (lambda layer: layer.base_layer.weight.requires_grad_(), "is trained", True),
    "magnitude of a third dtype": (
        lambda layer: layer.lora_magnitude_vector["default"].double(), "neither fp32 nor", True
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OBSTACLES)
def test_what_hangs_on_a_module_still_runs(case, calls):
    change, why, norm_by_op = OBSTACLES[case]
    model = adapted()
    layer = layer_of(model)
    change(layer)
    (explained,) = fastpeft.explain(model)
    assert explained.path == "plain"
    assert explained.backend == "-"
    assert why in explained.why
    grads = []
    for forward in (layer, lambda x: by_modules(layer, x)):
        x = torch.linspace(-1, 1, 72).view(3, 24).requires_grad_()
        out = forward(x)
        out.square().sum().backward()
        grads.append((out.detach().float(), x.grad))
    assert calls == (["dora_norm"] if norm_by_op else [])
    for ours, eager in zip(*grads, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("linear", [nn.Linear, Conv1D])
def test_path_and_numbers(linear, calls):
    model = adapted(Net(linear))
    layer = layer_of(model)
    x = torch.randn(2, 3, 24)
    torch.testing.assert_close(layer(x), by_modules(layer, x))
    assert calls == (["dora_linear"] if linear is nn.Linear else ["dora_norm"])


@pytest.mark.usefixtures("ops_for_few")
def test_a_group_is_made_without_dora_layers(calls):
    model = adapted(targets=("linear",))
    config = fastpeft.LoraConfig(r=3, target_modules=["second", "third"], init_lora_weights=False)
    model.add_adapter("plain", config)
    model.base_model.set_adapter(["default", "plain"])
    assert [layer.shares for layer in fastpeft.explain(model)] == [(), ("third",), ("second",)]
    x = torch.randn(5, 24)
    together = model(x)
    assert calls == ["dora_linear", "lora_group"]
    with fastpeft.share_inputs(False):
        torch.testing.assert_close(together, model(x))


@pytest.mark.usefixtures("ops_for_few")
def test_a_dora_layer_is_not_computed_by_its_siblings(calls):
    model = adapted(targets=("second",))
    model.add_adapter("plain", fastpeft.LoraConfig(r=3, target_modules=["linear", "third"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "plain"])
    model(torch.randn(5, 24))
    assert calls == ["lora_group", "dora_linear"]


@pytest.mark.usefixtures("ops_for_few")
def test_several_adapters_take_the_modules(calls):
    model = adapted()
    model.add_adapter("other", fastpeft.LoraConfig(r=3, target_modules=["linear"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    (explained,) = fastpeft.explain(model)
    assert (explained.path, explained.why) == (
        "plain",
        "one of several adapters is DoRA, which scales what the others add",
    )
    model(torch.randn(5, 24))
    assert calls == ["dora_norm", "lora_add"]


def test_eval_mode_of_the_layer_decides_on_dropout():
    """As in PEFT: a dropout left in training mode does nothing in a layer that is not."""
    model = adapted(lora_dropout=0.5).eval()
    x = torch.randn(5, 24)
    expected = model(x)
    layer_of(model).lora_dropout.train()
    assert torch.equal(model(x), expected)
    assert not torch.equal(model.train()(x), expected)


def test_the_norm_follows_the_weights():
    """Nothing is remembered from one forward to the next."""
    model = adapted()
    layer, x = layer_of(model), torch.randn(5, 24)
    layer(x)
    layer.lora_B["default"].weight.data.mul_(3)
    layer.base_layer.weight.data.add_(0.1)
    layer.set_scale("default", 0.4)
    torch.testing.assert_close(layer(x), by_modules(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_weight_s_size_is_kept(dtype):
    M, K, N, r = 8, 128, 96, 4
    net = nn.Sequential()
    net.add_module("linear", nn.Linear(K, N, bias=False).to(dtype))
    model = adapted(net)
    x = torch.randn(M, K).to(dtype).requires_grad_()
    saved = saved_bytes(lambda: model(x), inputs=[x], parameters=model.parameters())
    assert saved.own == M * N * x.element_size() + 4 * M * r + 4 * N
    assert saved.by_reference == x.numel() * x.element_size()


def test_under_autocast(calls):
    model = adapted()
    layer, x = layer_of(model), torch.randn(5, 24)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert calls == ["dora_linear"] * 2
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("linear", [nn.Linear, Conv1D])
def test_compiles_to_one_graph(linear):
    model = adapted(Net(linear), targets=("linear", "third"))
    eager, x = copy.deepcopy(model), torch.randn(5, 24)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for run in (compiled, eager):
        run(x).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        if theirs.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# An adapter's life.


def test_a_new_adapter_changes_nothing_and_is_trained():
    model = adapted(init_lora_weights=True)
    layer = layer_of(model)
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert magnitude.requires_grad
    magnitude.data.copy_(layer.base_layer.weight.norm(dim=1))
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    assert layer.variants == {"default": DORA}
    model.base_model.set_requires_grad("default", False)
    assert not magnitude.requires_grad


def test_disabled_and_unloaded_it_is_the_base():
    net = Net()
    before, x = copy.deepcopy(net), torch.randn(5, 24)
    model = adapted(net)
    with model.disable_adapter():
        assert torch.equal(model(x), before(x))
    base = model.unload()
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), before.parameters(), strict=True))


def test_deleted_and_replaced():
    model = adapted()
    layer = layer_of(model)
    model.add_adapter("other", fastpeft.LoraConfig(r=3, target_modules=["linear"], use_dora=True))
    model.delete_adapter("other")
    assert list(layer.lora_magnitude_vector) == ["default"]
    layer.update_layer("default", 2, lora_alpha=2, config=fastpeft.LoraConfig(r=2, target_modules=["linear"]))
    assert not layer.lora_magnitude_vector
    assert layer.variants == {"default": PLAIN}
    assert not any("magnitude" in key for key in model.state_dict())


def test_an_unmerge_divides_by_what_the_merge_multiplied_with():
    """The scaling may have changed in between, as the factors may not."""
    model = adapted()
    layer = layer_of(model)
    weight = layer.base_layer.weight.clone()
    model.merge_adapter()
    assert not torch.allclose(layer.base_layer.weight, weight)
    layer.set_scale("default", 5.0)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, weight)


def test_a_merge_that_fails_leaves_the_layer_as_it_was():
    model = adapted()
    layer = layer_of(model)
    weight = layer.base_layer.weight.clone()
    layer.lora_magnitude_vector["default"].weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="nothing was merged"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(low_cpu_mem_usage, tmp_path):
    config = fastpeft.LoraConfig(r=4, use_dora=True, target_modules="all-linear", init_lora_weights=False)
    model = fastpeft.get_peft_model(tiny_llama(), config).eval()
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.5)
    model.save_pretrained(tmp_path)
    again = fastpeft.PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert again.peft_config["default"].use_dora
    inputs = batch("llama")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


# What is refused.


def test_embeddings_are_refused_before_anything_is_changed():
    base = tiny_llama()
    config = fastpeft.LoraConfig(use_dora=True, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(
        NotImplementedError, match=r"use_dora=True is not supported yet on Embedding for .*embed_tokens"
    ):
        fastpeft.get_peft_model(base, config)
    assert not any("lora" in name for name, _ in base.named_parameters())


def test_offloading_its_initialisation_is_refused():
    runtime = fastpeft.LoraRuntimeConfig(ephemeral_gpu_offload=True)
    with pytest.raises(NotImplementedError, match="ephemeral_gpu_offload=True is not supported yet"):
        fastpeft.LoraConfig(use_dora=True, runtime_config=runtime)


def test_merging_rows_of_zeros_and_unmerging_after_training():
    """A row of zeros has length 0; what was merged comes out again whatever was trained since."""
    linear = nn.Linear(6, 5)
    with torch.no_grad():
        linear.weight[2] = 0
    model = fastpeft.get_peft_model(
        nn.Sequential(linear), fastpeft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    )
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight[1] = 0
    before, x = layer.get_base_layer().weight.clone(), torch.randn(4, 6)
    expected = model(x)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(3)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight, before)
