"""One LoRA layer: numbers, scaling, rows of different adapters, what it refuses."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from lora_layers import DTYPES, KINDS, K, N, R, assert_same_numbers, config_of, input_of, lora, reference_of
from numerics import assert_as_close_as_torch
from torch import nn

from fastpeft.tuners.lora.layer import Embedding, Linear, LoraLayer


@pytest.mark.parametrize("adapter_dtype", ["fp32", "as the base"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients(kind, dtype, adapter_dtype):
    layer = lora(kind, dtype, dtype if adapter_dtype == "as the base" else torch.float32)
    assert_same_numbers(layer, reference_of(layer, kind), input_of(kind, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_output_and_gradients_with_adapter_bias(kind, dtype):
    layer = lora(kind, dtype, lora_bias=True)
    assert_same_numbers(layer, reference_of(layer, kind, lora_bias=True), input_of(kind, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_of_two_adapters(kind, dtype):
    layer = lora(kind, dtype)
    layer.update_layer("other", 3, lora_alpha=3, config=config_of())
    layer.set_adapter(["other", "default"])
    assert_same_numbers(layer, reference_of(layer, kind), input_of(kind, dtype))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(kind, autocast):
    layer = lora(kind)
    theirs = reference_of(layer, kind)
    x = input_of(kind)
    with torch.autocast("cpu", dtype=autocast):
        ours, eager = layer(x), theirs(x)
    assert ours.dtype == eager.dtype
    exact = copy.deepcopy(theirs).double()(x.double() if x.is_floating_point() else x)
    assert_as_close_as_torch("out", ours, eager, exact)


def test_no_rows():
    layer = lora("linear")
    assert layer(torch.empty(0, K)).shape == (0, N)


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_and_without_active_adapter_is_the_base_bit_by_bit(kind):
    layer = lora(kind, torch.bfloat16)
    x = input_of(kind, torch.bfloat16)
    base = layer.base_layer(x)
    assert not torch.equal(layer(x), base)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    layer.set_adapter([])
    assert torch.equal(layer(x), base)
    layer.set_adapter("elsewhere")  # active on other layers of the model, not here
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("init", [True, "gaussian"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_initialised_adapter_changes_nothing(kind, init):
    layer = lora(kind, init_lora_weights=init)
    x = input_of(kind)
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=1e-6)
    factors = [p for name, p in layer.named_parameters() if "base_layer" not in name]
    assert sum(bool((p == 0).all()) for p in factors) == 1


def test_initialisation_statistics():
    """A uniform in ±1/√K, or normal of deviation 1/r: what arXiv:2106.09685 and nn.Linear use."""
    for init in (True, "gaussian"):
        torch.manual_seed(0)
        base = nn.Linear(4096, 8)
        A = (
            Linear(base, "default", config_of(init_lora_weights=init), r=16, lora_alpha=16)
            .lora_A["default"]
            .weight.detach()
        )
        if init is True:
            assert A.abs().max() <= 1 / math.sqrt(4096)
            assert A.std() == pytest.approx(1 / math.sqrt(3 * 4096), rel=0.02)
        else:
            assert A.std() == pytest.approx(1 / 16, rel=0.02)


def test_initialisation_with_adapter_bias():
    layer = lora("linear", lora_bias=True, init_lora_weights=True)
    assert torch.equal(layer.lora_B["default"].bias, torch.zeros(N))


# Dropout.


def test_dropout_scales_and_drops_the_adapters_input_in_training_only():
    torch.manual_seed(0)
    layer = Linear(nn.Linear(64, 64, bias=False), "default", config_of(lora_dropout=0.25), r=64, lora_alpha=64)
    layer.base_layer.weight.data.zero_()
    layer.lora_A["default"].weight.data.copy_(torch.eye(64))
    layer.lora_B["default"].weight.data.copy_(torch.eye(64))
    x = torch.ones(512, 64)
    assert torch.equal(layer.eval()(x), x)
    out = layer.train()(x)
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (out == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(out, layer(x))


def test_no_dropout_on_ids():
    layer = lora("embedding", lora_dropout=0.9).train()
    x = input_of("embedding")
    assert torch.equal(layer(x), layer(x))


# Scaling.


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("rslora", [False, True])
def test_scaling(kind, rslora):
    layer = lora(kind, use_rslora=rslora)
    initial = 3 / (math.sqrt(R) if rslora else R)
    assert layer.scaling == {"default": pytest.approx(initial)}
    layer.scale_layer(2)
    layer.scale_layer(3)
    assert layer.scaling["default"] == pytest.approx(6 * initial)
    layer.unscale_layer(3)
    assert layer.scaling["default"] == pytest.approx(2 * initial)
    layer.set_scale("default", 5)
    assert layer.scaling["default"] == pytest.approx(5 * initial)
    layer.unscale_layer()
    assert layer.scaling["default"] == pytest.approx(initial)
    layer.set_scale("elsewhere", 5)
    assert list(layer.scaling) == ["default"]


def test_only_active_adapters_are_scaled():
    layer = lora("linear")
    layer.update_layer("other", 3, lora_alpha=3, config=config_of())
    layer.scale_layer(2)
    assert layer.scaling == {"default": pytest.approx(2 * 3 / R), "other": pytest.approx(1.0)}


# Embeddings.


@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0), torch.tensor([3.0])], ids=["float", "scalar", "one entry"])
def test_an_embedding_that_scales_its_output_scales_the_adapter_too(scale):
    class ScaledEmbedding(nn.Embedding):
        def __init__(self):
            super().__init__(K, N)
            self.embed_scale = scale

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    layer = Embedding(ScaledEmbedding(), "default", config_of(), r=R, lora_alpha=3)
    x = input_of("embedding")
    expected = (layer.base_layer.weight + layer.get_delta_weight("default"))[x] * 3
    torch.testing.assert_close(layer(x), expected)
    layer.get_base_layer().embed_scale = torch.ones(N)
    with pytest.raises(NotImplementedError, match="expected a single number"):
        layer(x)


def test_an_embedding_has_no_bias_to_train():
    with pytest.raises(ValueError, match="Embedding has no bias"):
        lora("embedding", lora_bias=True)


# Rows of different adapters.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_takes_its_own_adapter(kind, dtype):
    layer = lora(kind, dtype).eval()
    layer.update_layer("other", 3, lora_alpha=3, config=config_of())
    x = input_of(kind, dtype, (5, 7))
    names = ["other", "__base__", "default", "elsewhere", "other"]
    out = layer(x, adapter_names=names)
    for row, name in enumerate(names):
        layer.set_adapter(name)
        expected = layer(x)
        assert out.dtype == expected.dtype
        if name in layer.r:
            assert_as_close_as_torch(name, out[row], expected[row], expected[row])
        else:
            assert torch.equal(out[row], expected[row])


def test_rows_of_different_adapters_are_checked():
    layer = lora("linear").eval()
    x = input_of("linear")
    with pytest.raises(ValueError, match="expected 3 names, got 2"):
        layer(x, adapter_names=["default", "default"])
    layer.merge()
    with pytest.raises(ValueError, match=r"while \['default'\] are merged"):
        layer(x, adapter_names=["default"] * 3)


def test_rows_are_plain_when_disabled():
    layer = lora("linear").eval()
    x = input_of("linear")
    layer.enable_adapters(False)
    assert torch.equal(layer(x, adapter_names=["default"] * 3), layer.base_layer(x))


def test_activated_lora_is_not_there_yet():
    with pytest.raises(NotImplementedError, match="alora_offsets"):
        lora("linear")(input_of("linear"), alora_offsets=[1, 2, 3])


# The life of adapters on a layer.


def test_rank_has_to_be_a_positive_number():
    for r in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="positive integer"):
            Linear(nn.Linear(K, N), "default", config_of(), r=r, lora_alpha=3)


def test_update_replaces_an_adapter_and_deleting_removes_all_of_it():
    layer = lora("linear")
    layer.update_layer("default", 3, lora_alpha=9, config=config_of(lora_dropout=0.5))
    assert layer.lora_A["default"].weight.shape == (3, K)
    assert layer.scaling == {"default": 3.0}
    layer.update_layer("other", 2, lora_alpha=3, config=config_of())
    assert layer.active_adapters == ["default"]
    assert not layer.lora_A["other"].weight.requires_grad
    with pytest.warns(UserWarning, match="'other' is active now"):
        layer.delete_adapter("default")
    assert layer.active_adapters == ["other"]
    assert layer.lora_A["other"].weight.requires_grad
    assert layer._all_available_adapter_names() == ["other"]
    assert not any("default" in name for name, _ in layer.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.delete_adapter("other")
    assert layer.active_adapters == []
    assert torch.equal(layer(input_of("linear")), layer.base_layer(input_of("linear")))


def test_adapters_are_created_where_and_how_the_base_computes():
    layer = Linear(nn.Linear(K, N).to(torch.bfloat16), "default", config_of(), r=R, lora_alpha=3)
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    layer = Linear(nn.Linear(K, N, device="meta"), "default", config_of(), r=R, lora_alpha=3)
    assert layer.lora_A["default"].weight.is_meta


def test_input_dtype_casting_can_be_switched_off():
    layer = lora("conv1d")
    x = input_of("conv1d", torch.float64)
    layer.base_layer.double()
    assert layer(x).dtype == torch.float64
    layer.cast_input_dtype_enabled = False
    with pytest.raises(RuntimeError, match=r"(?i)dtype"):
        layer(x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_copies_pickles_and_keeps_no_state_between_forwards(kind):
    layer = lora(kind)
    x = input_of(kind)
    before = {
        name: copy.copy(value) if isinstance(value, dict | list) else value for name, value in vars(layer).items()
    }
    out = layer(x)
    assert vars(layer) == before
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), out)
        other.set_scale("default", 2)
        assert torch.equal(layer(x), out)


def test_names_as_in_reports():
    assert repr(lora("linear")).startswith("lora.Linear(")
    assert repr(lora("embedding")).startswith("lora.Embedding(")
    assert isinstance(lora("conv1d"), LoraLayer)
    assert lora("linear").weight is not None
    assert lora("linear, no bias").bias is None
