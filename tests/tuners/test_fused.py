"""Eligibility: a fused path runs where it is right, and everything that hangs on a module is still run elsewhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_close_as_torch
from torch import Tensor, nn

import fastpeft
from fastpeft.tuners.lora import fused

pytestmark = pytest.mark.usefixtures("ops_for_few")


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, linear: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.linear = linear(24, 20).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def adapted(dtype: torch.dtype = torch.float32, net: nn.Module | None = None, **options: Any) -> nn.Module:
    config = fastpeft.LoraConfig(r=4, target_modules=["linear"], init_lora_weights=False, **options)
    return fastpeft.get_peft_model(net or Net(dtype), config)


def layer_of(model: nn.Module) -> Any:
    return model.base_model.model.linear


def by_modules(model: nn.Module, x: Tensor) -> Tensor:
    """PEFT's forward, module by module."""
    layer = layer_of(model)
    out = layer.base_layer(x)
    dtype = out.dtype
    for name in layer.active_adapters:
        A, B = layer.lora_A[name], layer.lora_B[name]
        out = out + B(A(layer.lora_dropout[name](x.to(A.weight.dtype)))) * layer.scaling[name]
    return out.to(dtype)


def path(model: nn.Module) -> tuple[str, str]:
    (layer,) = fastpeft.explain(model)
    return layer.path, layer.why


class Spy:
    """Counts the calls of both ops."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        for name in ("lora_linear", "lora_add"):
            monkeypatch.setattr(fused, name, self.watch(name, getattr(fused, name)))

    def watch(self, name: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(*args: Any, **kwargs: Any) -> Tensor:
            self.calls.append(name)
            return op(*args, **kwargs)

        return watched


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_plain_linear_is_fused(dtype, spy):
    model = adapted(dtype)
    x = torch.randn(3, 5, 24).to(dtype)
    assert path(model) == ("fused", "")
    ours, eager = model(x), by_modules(model, x)
    assert spy.calls == ["lora_linear"]
    assert_as_close_as_torch("out", ours, eager, by_modules(adapted_in_double(model), x.double()))


def adapted_in_double(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model).double()


class Doubled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight, self.bias)


class Subclass(Tensor):
    pass


def with_subclass_weight(layer: Any) -> None:
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.data.as_subclass(Subclass), requires_grad=False)


def replace_forward(module: nn.Module) -> None:
    inner = module.forward
    module.forward = lambda x: inner(x) + 1.0  # type: ignore[method-assign]


SHIFT = lambda module, args, out: out + 1.0  # noqa: E731
OBSTACLES: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "forward hook on the base": (lambda layer: layer.base_layer.register_forward_hook(SHIFT), "added", "a hook"),
    "pre-forward hook on the base": (
        lambda layer: layer.base_layer.register_forward_pre_hook(lambda m, a: (a[0] + 1.0,)), "added", "a hook"
    ),
    "backward hook on the base": (
        lambda layer: layer.base_layer.register_full_backward_hook(lambda m, i, o: (2 * i[0],)), "added", "a hook"
    ),
    "pre-backward hook on the base": (
        lambda layer: layer.base_layer.register_full_backward_pre_hook(lambda m, o: (2 * o[0],)), "added", "a hook"
    ),
    "replaced forward of the base": (lambda layer: replace_forward(layer.base_layer), "added", "was replaced"),
    "weight of the base is a subclass": (with_subclass_weight, "added", "is a Subclass"),
    "weight of the base is trained": (lambda layer: layer.base_layer.weight.requires_grad_(), "added", "is trained"),
    "hook on lora_A": (lambda layer: layer.lora_A["default"].register_forward_hook(SHIFT), "plain", "on lora_A"),
    "hook on lora_B": (lambda layer: layer.lora_B["default"].register_forward_hook(SHIFT), "plain", "on lora_B"),
    "hook on lora_dropout": (
        lambda layer: layer.lora_dropout["default"].register_forward_hook(SHIFT), "plain", "on lora_dropout"
    ),
    "replaced forward of lora_A": (lambda layer: replace_forward(layer.lora_A["default"]), "plain", "was replaced"),
    "another dropout": (lambda layer: layer.lora_dropout.update({"default": nn.Tanh()}), "plain", "is a Tanh"),
}  # fmt: skip


@pytest.mark.parametrize("case", OBSTACLES)
def test_what_hangs_on_a_module_still_runs(case, spy):
    """The same output and input gradient as calling the modules gives; a fused op would leave something out."""
    change, expected, why = OBSTACLES[case]
    model = adapted()
    change(layer_of(model))
    assert path(model)[0] == expected
    assert why in path(model)[1]
    grads = []
    for forward in (model, lambda x: by_modules(model, x)):
        x = torch.linspace(-1, 1, 72).view(3, 24).requires_grad_()
        out = forward(x)
        out.square().sum().backward()
        grads.append((out.detach(), x.grad))
    wrapped = type(out) is not Tensor  # a subclass of Tensor comes out of the base: only it knows how to add
    assert spy.calls == ([] if expected == "plain" or wrapped else ["lora_add"])
    for ours, eager in zip(*grads, strict=True):
        torch.testing.assert_close(ours, eager)


def test_subclass_of_linear(spy):
    model = adapted(net=Net(linear=Doubled))
    x = torch.randn(3, 24)
    assert path(model) == ("added", "the base layer is a Doubled, not exactly torch.nn.Linear")
    torch.testing.assert_close(model(x), by_modules(model, x))
    assert spy.calls == ["lora_add"]


def test_global_hook(spy):
    model = adapted()
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        model(torch.randn(3, 24))
        assert path(model)[0] == "plain"
    finally:
        handle.remove()
    layer = layer_of(model)
    assert {layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]} <= set(seen)
    assert spy.calls == []
    model(torch.randn(3, 24))
    assert spy.calls == ["lora_linear"]  # the decision is made anew at every forward


def test_lora_bias_and_switched_off_casting_take_the_modules(spy):
    model = adapted(lora_bias=True)
    assert path(model) == ("plain", "lora_bias is set")
    x = torch.randn(3, 24)
    torch.testing.assert_close(model(x), by_modules(model, x))
    model = adapted()
    layer_of(model).lora_A["default"] = nn.Linear(24, layer_of(model).r["default"])  # PEFT makes none with a bias
    assert path(model) == ("plain", "lora_A has a bias")
    torch.testing.assert_close(model(x), by_modules(model, x))
    model = adapted()
    layer_of(model).cast_input_dtype_enabled = False
    assert path(model) == ("plain", "input dtype casting is switched off")
    assert spy.calls == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_several_adapters(dtype, dropout, spy):
    """Fused into one op without dropout; with it, one mask each, and one rounding at the end."""
    model = adapted(dtype, lora_dropout=dropout)
    model.add_adapter("second", fastpeft.LoraConfig(r=7, target_modules=["linear"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    model.train()
    x = torch.randn(6, 24).to(dtype)
    out = model(x)
    assert out.dtype == dtype
    assert spy.calls == (["lora_add"] * 2 if dropout else ["lora_linear"])
    expected = ("added", "several adapters with dropout take a mask each") if dropout else ("fused", "")
    assert path(model) == expected
    model.eval()
    assert_as_close_as_torch("out", model(x), by_modules(model, x), by_modules(adapted_in_double(model), x.double()))


def test_dropout_only_in_training(spy):
    model = adapted(lora_dropout=0.5)
    x = torch.randn(64, 24)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    assert spy.calls == ["lora_linear"] * 4


def test_other_input_dtypes_give_torchs_own_error():
    with pytest.raises(RuntimeError, match="same dtype"):
        adapted()(torch.randn(3, 24).double())


def test_bf16_adapters_over_an_fp32_base():
    """PEFT casts the input to the adapters' dtype; so does the op."""
    model = adapted()
    layer = layer_of(model)
    layer.lora_A.to(torch.bfloat16)
    layer.lora_B.to(torch.bfloat16)
    x = torch.randn(3, 24)
    assert path(model)[0] == "added"
    exact = by_modules(adapted_in_double(model), x.double())
    assert_as_close_as_torch("out", model(x), by_modules(model, x), exact)


def test_adapters_of_two_dtypes(spy):
    model = adapted(torch.bfloat16)
    second = fastpeft.LoraConfig(r=7, target_modules=["linear"], init_lora_weights=False)
    model.add_adapter("second", second, autocast_adapter_dtype=False)
    model.base_model.set_adapter(["default", "second"])
    x = torch.randn(6, 24).bfloat16()
    exact = by_modules(adapted_in_double(model), x.double())
    assert_as_close_as_torch("out", model(x), by_modules(model, x), exact)
    assert path(model) == ("added", "the adapters differ in dtype")
    assert spy.calls == ["lora_add"] * 2


def test_autocast_over_a_float64_base_with_fp32_adapters(spy):
    """Autocast casts the adapters and not the base: the op that owns both is not for such a mixture."""
    model = adapted(torch.float64)
    layer = layer_of(model)
    layer.lora_A.float()
    layer.lora_B.float()
    x = torch.randn(3, 24, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, eager = model(x), by_modules(model, x)
    assert ours.dtype == torch.float64
    assert_as_close_as_torch("out", ours, eager, by_modules(adapted_in_double(model), x), torch.bfloat16)
    assert spy.calls == ["lora_add"]


def test_forward_mode_derivatives_take_the_modules():
    model = adapted().eval()
    x, tangent = torch.randn(2, 3, 24).unbind()
    with torch.autograd.forward_ad.dual_level():
        out = model(torch.autograd.forward_ad.make_dual(x, tangent))
        ours = torch.autograd.forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(ours, model(x + tangent) - model(x))  # an affine layer


def test_replaced_forward_of_the_class_linear(monkeypatch):
    model = adapted()
    x = torch.randn(3, 24)
    before = model(x)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * F.linear(x, self.weight, self.bias))
    assert path(model) == ("plain", "the forward of torch.nn.Linear was replaced")
    torch.testing.assert_close(model(x), by_modules(model, x))
    assert not torch.equal(model(x), before)


def test_functional_transforms_and_portable_graphs():
    """vmap, torch.func.grad, jit tracing and export see the modules, which they know how to handle."""
    model = adapted().eval()
    x = torch.randn(4, 3, 24)
    torch.testing.assert_close(torch.vmap(model)(x), model(x))
    grad = torch.func.grad(lambda v: model(v).sum())(x)
    torch.testing.assert_close(grad, torch.autograd.functional.jacobian(lambda v: model(v).sum(), x))
    traced = torch.jit.trace(model, (x,), check_trace=False)
    torch.testing.assert_close(traced(x), model(x))
    exported = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), model(x))
    assert not any("fastpeft" in str(node.target) for node in exported.graph.nodes)


def test_explain_merged_disabled_and_inactive():
    model = adapted()
    assert str(fastpeft.explain(model)).splitlines()[-1] == "1 fused"
    with model.disable_adapter():
        assert path(model) == ("base", "adapters are disabled")
    model.merge_adapter()
    assert path(model) == ("base", "merged into the base weight")
    assert str(fastpeft.explain(nn.Linear(2, 2))) == "no adapter layers"


def test_backend_is_part_of_the_explanation():
    model = adapted()
    assert fastpeft.explain(model)[0].backend == "torch"
    with fastpeft.backend("triton"):
        assert fastpeft.explain(model)[0].backend == "triton"
