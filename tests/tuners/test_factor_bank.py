"""Factors are moved together in memory, and nobody can tell but by the speed."""

import copy
import io

import numpy
import pytest
import torch
from accelerate import Accelerator
from models import LAYERS, tiny_llama
from safetensors.torch import load_file, save_model
from torch import nn

from fastpeft import get_peft_model
from fastpeft.routing import Routing
from fastpeft.serving.slots import AdapterSlots
from fastpeft.serving.weights import read_adapter
from fastpeft.tuners.lora import LoraConfig, LoraLayer
from fastpeft.tuners.lora.layer import Linear
from fastpeft_kernels.side_by_side import side_by_side

K, N = 32, 48
NAMES = ["a", "b", "c", "d"]


def note(layer, name):
    """Remember what an adapter is: memory that moves may spoil it."""
    factors = layer.lora_A[name].weight, layer.lora_B[name].weight
    vars(layer).setdefault("noted", {})[name] = [factor.detach().clone() for factor in factors]


def add(layer, name, r=4, settle=True):
    config = LoraConfig(r=r, init_lora_weights=False)
    layer.update_layer(name, r, lora_alpha=8, config=config)
    for module in (layer.lora_A[name], layer.lora_B[name]):
        module.weight.data = torch.randn(module.weight.shape)
    note(layer, name)
    if settle:
        layer.settle_adapters()


def make(settle=True):
    torch.manual_seed(0)
    layer = Linear(nn.Linear(K, N), "a", LoraConfig(r=4), r=4, lora_alpha=8)
    for name in NAMES:
        add(layer, name, settle=settle)
    return layer.eval()


def weights(layer, names=NAMES):
    return [[container[name].weight for name in names] for container in (layer.lora_A, layer.lora_B)]


def run(layer, names=NAMES):
    torch.manual_seed(1)
    x = torch.randn(2 * len(names), 3, K)
    return layer(x, adapter_names=Routing.by_row([*names, *reversed(names)]))


def factors_of(layer):
    As, Bs = weights(layer)
    return [*As, *Bs]


def is_together(layer, names=NAMES):
    found = [side_by_side(factors) for factors in weights(layer, names)]
    return None not in found and found[0].places == found[1].places


def expected(layer, names=NAMES):
    """`run` with what was noted of the adapters, row by row."""
    torch.manual_seed(1)
    x = torch.randn(2 * len(names), 3, K)
    out = layer.base_layer(x)
    for row, name in enumerate([*names, *reversed(names)]):
        A, B = (factor.to(x.dtype) for factor in layer.noted[name])
        out[row] += layer.scaling[name] * (x[row] @ A.T) @ B.T
    return out


@torch.no_grad()
def test_they_are_moved_and_stay_the_same_parameters():
    layer = make(settle=False)
    before, values = factors_of(layer), copy.deepcopy(factors_of(layer))
    assert not is_together(layer)
    layer.settle_adapters()
    assert is_together(layer)
    for own, kept, value in zip(factors_of(layer), before, values, strict=True):
        assert own is kept  # the very Parameters
        assert own.requires_grad == value.requires_grad
        assert torch.equal(own, value)


@torch.no_grad()
def test_one_adapter_stays_where_it_is():
    layer = Linear(nn.Linear(K, N), "a", LoraConfig(r=4), r=4, lora_alpha=8)
    address = layer.lora_A["a"].weight.data_ptr()
    layer.settle_adapters()
    assert layer.lora_A["a"].weight.data_ptr() == address


@torch.no_grad()
def test_a_forward_moves_nothing():
    """Another thread's forward may be reading."""
    layer = make(settle=False)
    addresses = [p.data_ptr() for p in layer.parameters()]
    run(layer)
    assert [p.data_ptr() for p in layer.parameters()] == addresses


@pytest.mark.parametrize("inference", [False, True])
def test_training_goes_on_with_them(inference):
    """Moved between two steps: the optimizer's Parameters are the layer's, and what it writes is what is read."""
    found = []
    for moves in (False, True):
        layer = make(settle=False)
        layer.requires_grad_(True).base_layer.requires_grad_(False)
        optimizer = torch.optim.AdamW(factors_of(layer), lr=0.1)
        for _ in range(3):
            for name in NAMES:
                layer.set_adapter([name])
                layer.set_requires_grad(NAMES)
                layer(torch.ones(2, K)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if moves:
                with torch.inference_mode() if inference else torch.no_grad():
                    layer.settle_adapters()
                assert is_together(layer)
        found.append([factor.detach().clone() for factor in factors_of(layer)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@torch.no_grad()
def test_what_is_written_later_is_read():
    layer = make()
    run(layer)
    for write in (
        lambda p: p.copy_(torch.randn(p.shape)),
        lambda p: p.data.copy_(torch.randn(p.shape)),
        lambda p: setattr(p, "data", torch.randn(p.shape)),
    ):
        write(layer.lora_A["b"].weight)
        write(layer.lora_B["c"].weight)
        note(layer, "b")
        note(layer, "c")
        torch.testing.assert_close(run(layer), expected(layer))


@pytest.mark.parametrize(
    "holder",
    [
        lambda layer: layer.state_dict(),
        lambda layer: [p.data for p in layer.parameters()],
        lambda layer: [p.detach().numpy() for p in layer.parameters()],
        lambda layer: [p.view(-1) for p in layer.parameters()],
        lambda layer: [p.untyped_storage() for p in layer.parameters()],
    ],
    ids=["state-dict", "data", "numpy", "view", "storage"],
)
@torch.no_grad()
def test_what_somebody_has_a_view_of_is_not_moved(holder):
    layer = make(settle=False)
    addresses = [p.data_ptr() for p in layer.parameters()]
    held = holder(layer)
    layer.settle_adapters()
    assert [p.data_ptr() for p in layer.parameters()] == addresses
    was_array = isinstance(held, list) and isinstance(held[0], numpy.ndarray)
    del held
    layer.settle_adapters()
    assert is_together(layer) != was_array  # torch does not say whether an array is still there


@torch.no_grad()
def test_weights_of_a_deleted_adapter_are_their_holders():
    """Its place in memory is not given to another one while anybody has it."""
    layer = make()
    run(layer)
    kept = layer.lora_A["b"].weight
    value = kept.clone()
    layer.delete_adapter("b")
    add(layer, "e")
    names = ["a", "c", "d", "e"]
    torch.testing.assert_close(run(layer, names), expected(layer, names))
    assert torch.equal(kept, value)


@torch.no_grad()
def test_a_place_that_is_free_is_taken_again():
    layer = make()
    run(layer)
    free = layer.lora_A["b"].weight.data_ptr()
    layer.delete_adapter("b")
    add(layer, "e")
    names = ["a", "c", "d", "e"]
    run(layer, names)
    assert layer.lora_A["e"].weight.data_ptr() == free
    assert is_together(layer, names)
    torch.testing.assert_close(run(layer, names), expected(layer, names))


def places(layer):
    return sum(bank.places for bank in layer.factor_bank._banks.values())


@torch.no_grad()
def test_it_grows_and_shrinks_with_the_adapters():
    layer = make()
    names = list(NAMES)
    for number in range(20):
        names.append(f"more_{number}")
        add(layer, names[-1])
        torch.testing.assert_close(run(layer, names), expected(layer, names))
        assert is_together(layer, names)
        assert places(layer) <= 1.25 * len(names)
    while len(names) > 1:
        layer.delete_adapter(names.pop())
        torch.testing.assert_close(run(layer, names), expected(layer, names))
        assert places(layer) <= 2 * len(names)
    assert places(layer) == 0
    assert layer.lora_A["a"].weight.untyped_storage().resizable()  # memory of its own again


@torch.no_grad()
def test_each_rank_and_dtype_has_memory_of_its_own():
    layer = make()
    for name in ("e", "f"):
        add(layer, name, r=7)
    for name in ("g", "h"):
        add(layer, name)
        layer.lora_A[name].to(torch.float64)
        layer.lora_B[name].to(torch.float64)
    layer.settle_adapters()
    names = [*NAMES, "e", "f"]
    torch.testing.assert_close(run(layer, names), expected(layer, names))
    assert is_together(layer)
    assert is_together(layer, ["e", "f"])
    run(layer, [*names, "g", "h"])  # the layer adds those of another dtype by themselves
    assert is_together(layer)


@torch.no_grad()
def test_a_layer_that_is_cast_brings_them_together_again():
    layer = make()
    run(layer)
    layer.to(torch.float64)
    assert layer.lora_A["a"].weight.dtype == torch.float64
    assert is_together(layer)


def test_weights_in_shared_memory_stay_there():
    """Hogwild's processes, and those of a data loader, write where they were told."""
    layer = make(settle=False)
    layer.share_memory()
    assert all(p.is_shared() for p in layer.parameters())
    settled = make()
    settled.share_memory()
    settled.settle_adapters()
    assert all(p.is_shared() for p in settled.parameters())


@torch.no_grad()
def test_copies_have_weights_of_their_own():
    layer = make()
    run(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        torch.testing.assert_close(run(other), run(layer))
        other.lora_A["a"].weight.zero_()
        other.lora_B["b"].weight.zero_()
        other.settle_adapters()
        run(other)
        torch.testing.assert_close(run(layer), expected(layer))


@torch.no_grad()
def test_whoever_saves_them_sees_single_tensors(tmp_path):
    """By their storages, that is, as safetensors and accelerate look for tensors that share one."""
    layer = make()
    assert is_together(layer)
    Accelerator().save_model(layer, tmp_path / "accelerate")
    save_model(layer, tmp_path / "layer.safetensors")
    for file in (tmp_path / "accelerate" / "model.safetensors", tmp_path / "layer.safetensors"):
        saved = load_file(file)
        assert saved.keys() == layer.state_dict().keys()
        for key, value in layer.state_dict().items():
            assert torch.equal(saved[key], value)
    files = {}
    for key, weight in (("moved", layer.lora_A["a"].weight), ("own", layer.lora_A["a"].weight.clone())):
        torch.save(weight, file := io.BytesIO())
        files[key] = len(file.getvalue())
    assert abs(files["moved"] - files["own"]) < layer.lora_A["a"].weight.nbytes


@torch.no_grad()
def test_shared_weights_stay_shared():
    """Two layers with one Parameter: whoever moves it, both read it."""
    one, other = make(), make()
    for name in NAMES:
        other.lora_A[name].weight = one.lora_A[name].weight
        note(other, name)
    one.settle_adapters()
    other.settle_adapters()
    one.lora_A["a"].weight.copy_(torch.randn(4, K))
    for layer in (one, other):
        note(layer, "a")
        torch.testing.assert_close(run(layer), expected(layer))


@torch.no_grad()
def test_memory_of_an_array_stays_the_arrays():
    layer, array = make(settle=False), numpy.ones((4, K), numpy.float32)
    layer.lora_A["a"].weight.data = torch.from_numpy(array)
    layer.settle_adapters()
    array[:] = 2.0
    assert layer.lora_A["a"].weight.eq(2.0).all()
    assert is_together(layer, ["b", "c", "d"])


@torch.no_grad()
def test_adapters_with_the_same_factors():
    """Two names, one Parameter each: rows of both are computed."""
    layer = make()
    layer.lora_A["b"].weight, layer.lora_B["b"].weight = layer.lora_A["a"].weight, layer.lora_B["a"].weight
    note(layer, "b")
    torch.testing.assert_close(run(layer), expected(layer))
    layer.settle_adapters()
    torch.testing.assert_close(run(layer), expected(layer))


@torch.no_grad()
def test_factors_of_odd_sizes_stay_where_torch_aligned_them():
    layer = make(settle=False)
    for name in ("e", "f"):
        add(layer, name, r=3)  # B: 48 rows of 12 bytes
        layer.lora_A[name].weight = nn.Parameter(torch.randn(3, K)[:, : K - 1].contiguous())
    layer.settle_adapters()
    assert is_together(layer)
    assert not is_together(layer, ["e", "f"])


def test_a_default_device_does_not_count():
    layer = make(settle=False)
    with torch.device("meta"):
        layer.settle_adapters()
    assert is_together(layer)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def test_a_models_adapters_lie_together_however_they_came(tmp_path):
    model = get_peft_model(tiny_llama(torch.bfloat16), LoraConfig(target_modules=["q_proj", "up_proj"]), "a")
    model.save_pretrained(tmp_path)
    model.add_adapter("b", LoraConfig(target_modules=["q_proj", "up_proj"]))
    model.load_adapter(tmp_path / "a", "c")
    model.load_adapter(tmp_path / "a", "d")
    model.load_adapter(tmp_path / "a", "mapped", low_cpu_mem_usage=True)  # stays in the memory of the file
    model.load_adapter(tmp_path / "a", "e", autocast_adapter_dtype=False)  # bf16, with nobody
    assert len(layers_of(model)) == 2 * LAYERS
    for layer in layers_of(model):
        assert layer.lora_A["a"].weight.dtype == torch.float32
        assert is_together(layer)


def test_adapters_that_are_served_lie_together(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = tiny_llama()
    slots = AdapterSlots(model, 4)
    for slot in range(4):
        slots.load(slot, read_adapter(tmp_path))
    for layer in layers_of(model):
        assert is_together(layer, slots.names)
    slots.clear(1)
    slots.load(1, read_adapter(tmp_path))
    for layer in layers_of(model):
        assert is_together(layer, slots.names)
