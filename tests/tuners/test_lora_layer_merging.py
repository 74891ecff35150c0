"""One LoRA layer: merging and unmerging."""

import copy

import pytest
import torch
from lora_layers import DTYPES, KINDS, K, N, R, config_of, input_of, lora, reference_of
from numerics import assert_as_close_as_torch

from fastpeft.utils.warning import PeftWarning


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weight_and_back(kind, dtype, safe):
    layer = lora(kind, dtype, lora_bias=kind in ("linear", "conv1d"))
    layer.update_layer("other", 3, lora_alpha=3, config=config_of(lora_bias=kind in ("linear", "conv1d")))
    theirs = reference_of(layer, kind, lora_bias=kind in ("linear", "conv1d"))
    exact = copy.deepcopy(theirs).double()
    x = input_of(kind, dtype)
    layer.set_adapter(["default", "other"])
    unmerged = layer(x)
    for each in (layer, theirs, exact):
        each.merge(safe_merge=safe, adapter_names=["default", "other"])
    assert layer.merged_adapters == ["default", "other"]
    for name in ("weight", "bias") if getattr(layer.base_layer, "bias", None) is not None else ("weight",):
        assert_as_close_as_torch(name, *(getattr(each.base_layer, name) for each in (layer, theirs, exact)))
    torch.testing.assert_close(layer(x), unmerged, rtol=3e-2, atol=2e-1 if dtype != torch.float32 else 1e-5)
    for each in (layer, theirs, exact):
        each.unmerge()
    assert layer.merged_adapters == []
    for name in ("weight", "bias") if getattr(layer.base_layer, "bias", None) is not None else ("weight",):
        assert_as_close_as_torch(name, *(getattr(each.base_layer, name) for each in (layer, theirs, exact)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_delta_weight_has_the_adapters_dtype_and_the_weights_layout(dtype):
    for kind, shape in (("linear", (N, K)), ("conv1d", (K, N)), ("embedding", (K, N))):
        layer = lora(kind, dtype, dtype)
        delta = layer.get_delta_weight("default")
        assert delta.dtype == dtype
        assert delta.shape == shape
        assert torch.equal(delta, reference_of(layer, kind).get_delta_weight("default")) or dtype != torch.float32


def test_16_bit_adapters_are_multiplied_in_fp32_before_they_are_merged():
    layer = lora("linear", torch.float32, torch.bfloat16)
    A, B = (factor.float() for factor in layer.base.factors(layer, "default"))
    expected = layer.base_layer.weight + B @ A * layer.scaling["default"]
    layer.merge()
    torch.testing.assert_close(layer.base_layer.weight, expected)


def test_a_scale_that_changes_while_merged_does_not_spoil_the_base():
    layer = lora("linear", lora_bias=True)
    weight, bias = layer.base_layer.weight.clone(), layer.base_layer.bias.clone()
    layer.merge()
    layer.set_scale("default", 5.0)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, weight)
    torch.testing.assert_close(layer.base_layer.bias, bias)
    assert layer.scaling["default"] == 5.0 * 3 / R


def test_merging_keeps_the_storage_that_tied_weights_share():
    layer = lora("linear, no bias")
    tied = layer.base_layer.weight.data
    layer.merge(safe_merge=True)
    assert tied.data_ptr() == layer.base_layer.weight.data_ptr()
    assert torch.equal(tied, layer.base_layer.weight)


def test_disabling_a_merged_adapter_unmerges_it_at_the_next_forward():
    layer = lora("linear")
    x = input_of("linear")
    base = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), base)
    assert not layer.merged


def broken(layer, adapter):
    layer.lora_B[adapter].weight.data[1, 1] = float("nan")
    return layer


def test_safe_merge_stores_nothing_if_anything_is_not_finite():
    layer = lora("linear")
    layer.update_layer("other", 3, lora_alpha=3, config=config_of())
    broken(layer, "other")
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="'other' would put NaN or infinity"):
        layer.merge(safe_merge=True, adapter_names=["default", "other"])
    assert torch.equal(layer.base_layer.weight, before)
    assert layer.merged_adapters == []
    layer.merge(safe_merge=False, adapter_names=["other"])
    assert layer.base_layer.weight.isnan().any()


def test_an_adapter_bias_needs_a_base_bias_to_merge_into():
    with pytest.warns(PeftWarning, match="cannot be merged"):
        layer = lora("linear, no bias", lora_bias=True)
    before = layer.base_layer.weight.clone()
    with pytest.raises(RuntimeError, match="the base layer has none"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, before)


def test_merging_what_is_merged_and_unmerging_what_is_not():
    layer = lora("linear")
    with pytest.warns(UserWarning, match="nothing to do"):
        layer.unmerge()
    layer.merge()
    weight = layer.base_layer.weight.clone()
    with pytest.warns(UserWarning, match="merged already"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, weight)
    layer.update_layer("other", 3, lora_alpha=3, config=config_of())
    with pytest.warns(UserWarning, match="on top of them"):
        layer.merge(adapter_names=["default", "other"])
    assert layer.merged_adapters == ["default", "other"]
    with pytest.raises(TypeError, match="list of names"):
        layer.merge(adapter_names="default")
    with pytest.raises(ValueError, match="is merged; unmerge it"):
        layer.update_layer("default", 3, lora_alpha=3, config=config_of())


def test_an_adapter_without_weights_is_not_merged():
    layer = lora("linear")
    layer.lora_A["default"].to("meta")
    with pytest.raises(ValueError, match="no weights yet"):
        layer.merge()
