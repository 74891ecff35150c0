"""Adapters in memory and in slots: what stays, what leaves, and that what is loaded is what was saved."""

import gc
import os
import weakref

import pytest
import serving_cases as cases
import torch
from torch import nn

from fastpeft import LoraConfig, PeftModel, get_peft_model
from fastpeft.checkpoint import AdapterFileError, get_peft_model_state_dict, save_adapter_files
from fastpeft.routing import Routing
from fastpeft.routing_scope import routed
from fastpeft.serving import AdapterTooLargeError, ServingError, UnknownAdapterError
from fastpeft.serving.registry import AdapterRegistry, AdapterVersion, CpuTier, source_of
from fastpeft.serving.slots import AdapterSlots
from fastpeft.serving.weights import AdapterWeights, base_weights_of, read_adapter, without_base_weights

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def maker():
    return cases.AdapterMaker()


def version(number, nbytes, in_memory=False):
    weights = AdapterWeights(LoraConfig(), {"w": torch.zeros(nbytes, dtype=torch.uint8)})
    return AdapterVersion(f"a{number}", number, weights=weights if in_memory else None), weights


# ---- the CPU tier ----


def test_the_least_recently_used_leaves_first():
    tier = CpuTier(300)
    held = [version(i, 100) for i in range(3)]
    for v, weights in held:
        tier.put(v, weights)
    tier.get(held[0][0])
    assert tier.make_room(100)
    assert tier.versions() == [held[2][0], held[0][0]]
    assert tier.nbytes == 200
    assert tier.make_room(300)
    assert (tier.versions(), tier.nbytes) == ([], 0)


def test_what_is_to_be_kept_does_not_leave():
    tier = CpuTier(300)
    held = [version(i, 100) for i in range(3)]
    for v, weights in held:
        tier.put(v, weights)
    assert tier.make_room(100, keep={held[0][0]})
    assert held[0][0] in tier
    assert not tier.make_room(250, keep={held[0][0]})
    assert len(tier.versions()) == 2, "nothing leaves for something that cannot come"


def test_weights_given_in_memory_do_not_leave():
    tier = CpuTier(300)
    given, from_file = version(0, 200, in_memory=True), version(1, 100)
    for v, weights in (given, from_file):
        tier.put(v, weights)
    assert tier.make_room(100)
    assert tier.versions() == [given[0]]
    with pytest.raises(
        AdapterTooLargeError, match=r"150 bytes.* may hold 300, of which adapters given in memory .* 200"
    ):
        tier.check(150, "big")
    tier.check(100, "small")


def test_without_a_limit_everything_stays():
    tier = CpuTier()
    for i in range(9):
        v, weights = version(i, 100)
        assert tier.make_room(100)
        tier.put(v, weights)
    assert tier.nbytes == 900
    tier.check(10**12, "huge")


# ---- names and versions ----


def test_versions_are_never_used_twice(tmp_path):
    registry = AdapterRegistry()
    first = registry.add("a", tmp_path).current
    second = registry.replace("a", tmp_path)[0].current
    registry.remove("a")
    third = registry.add("a", tmp_path).current
    assert len({v.cache_key for v in (first, second, third)}) == 3
    assert first.retired


def test_names(tmp_path):
    registry = AdapterRegistry()
    for name in ("a-b", "a.b", "weight", "日本", " ", "x" * 256):  # no names of modules: slots have names of their own
        registry.add(name, tmp_path)
    with pytest.raises(ServingError, match=r"there is an adapter 'a-b' already; call replace_adapter"):
        registry.add("a-b", tmp_path)
    for name in ("", "x" * 10_000, 3, None):
        with pytest.raises(UnknownAdapterError, match="1 to 256 characters") as info:
            registry.add(name, tmp_path)
        assert len(str(info.value)) < 300
    for name in ("z", "x" * 10_000, 3):
        with pytest.raises(UnknownAdapterError, match=r"no adapter .*; registered are 'a-b', 'a.b'") as info:
            registry.get(name)
        assert len(str(info.value)) < 700


def test_sources(tmp_path, maker):
    with pytest.raises(AdapterFileError, match="there is no such folder"):
        source_of(tmp_path / "nowhere", None)
    with pytest.raises(AdapterFileError, match="the folder holds \\[\\]"):
        source_of(tmp_path, None)
    config, weights = maker.weights(0, cases.LORA_KINDS[0])
    with pytest.raises(ValueError, match="weights in memory need the adapter's config"):
        source_of(weights, None)
    with pytest.raises(ValueError, match="leave out config="):
        source_of(tmp_path, config)
    with pytest.raises(ValueError, match="a dict of tensors"):
        source_of({"w": 3}, config)
    own = source_of(weights, config)
    key = next(iter(weights))
    weights[key].zero_()
    config.lora_alpha = 64
    assert own.tensors[key].any(), "a copy"
    assert own.config.lora_alpha != 64, "a copy"


def test_a_relative_folder_is_the_one_that_was_meant(tmp_path, maker, monkeypatch):
    maker.save(tmp_path / "adapters" / "x", 0, cases.LORA_KINDS[0])
    monkeypatch.chdir(tmp_path)
    folder = source_of("adapters/x", None)
    monkeypatch.chdir("/")
    assert read_adapter(folder).tensors


# ---- reading ----


def test_what_was_read_outlives_its_file(tmp_path, maker):
    """The file is mapped into memory while it is read. Weights that stayed there would be lost with it."""
    folder = maker.save(tmp_path / "a", 0, cases.LORA_KINDS[0])
    weights = read_adapter(folder)
    saved = maker.weights(0, cases.LORA_KINDS[0])[1]
    os.truncate(folder / "adapter_model.safetensors", 100)
    assert weights.tensors.keys() == saved.keys()
    assert all(torch.equal(weights.tensors[key], saved[key]) for key in saved)


def test_a_file_that_was_changed_is_another_version(tmp_path, maker):
    kind = cases.LORA_KINDS[0]
    old = AdapterVersion("a", 1, folder=maker.save(tmp_path / "a", 0, kind))
    old.read(None)
    old.read(None)
    maker.save(tmp_path / "a", 1, kind)
    with pytest.raises(AdapterFileError, match=r"was changed since version 1 of 'a' was first read .* replace_adapter"):
        old.read(None)
    AdapterVersion("a", 2, folder=tmp_path / "a").read(None)


# ---- slots ----


ALL_KINDS = [*cases.LORA_KINDS, {"r": 2, "target_modules": "all-linear", "lora_bias": False}]


def logits(slots, slot):
    model = slots._wrapped
    with torch.no_grad():
        return model(input_ids=IDS, adapter_names=[slots.names[slot]]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_slot_holds_what_was_saved(tmp_path, maker, dtype, wrapped):
    """Every kind after every other, in place and anew, against load_adapter of the same files."""
    want = []
    for seed, kind in enumerate(ALL_KINDS * 2):
        folder = maker.save(tmp_path / str(seed), seed, kind)
        model = PeftModel.from_pretrained(cases.tiny_base(dtype), folder, adapter_name="one")
        with torch.no_grad():
            want.append(model(input_ids=IDS, adapter_names=["one"]).logits)
    base = cases.tiny_base(dtype)
    with torch.no_grad():
        before = base(input_ids=IDS).logits
    own = get_peft_model(base, LoraConfig(target_modules=["k_proj"])).eval() if wrapped else None
    slots = AdapterSlots(own or base, 2)
    for number, slot in [(i, i % 2) for i in (0, 1, 6, 7, 3, 2, 9, 8, 4, 5, 10, 11, 0, 9)]:
        slots.load(slot, read_adapter(tmp_path / str(number)))
        assert torch.equal(logits(slots, slot), want[number]), number
    assert (slots.built, slots.copied) == (8, 6)
    slots.clear(1)
    with pytest.raises(ValueError, match="no adapter"):
        logits(slots, 1)
    slots.close()
    with torch.no_grad():
        assert torch.equal(base(input_ids=IDS).logits, before)
    if own is not None:
        assert list(own.peft_config) == ["default"]
    else:
        assert not any("lora" in name for name, _ in base.named_modules())


def test_slots_of_vectors(tmp_path, maker):
    kind = {"method": "ia3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    slots = AdapterSlots(cases.tiny_base(), 1)
    for seed in (0, 1):
        folder = maker.save(tmp_path / str(seed), seed, kind)
        slots.load(0, read_adapter(folder))
        alone = PeftModel.from_pretrained(cases.tiny_base(), folder, adapter_name="one")
        with torch.no_grad():
            assert torch.equal(logits(slots, 0), alone(input_ids=IDS, adapter_names=["one"]).logits)
    assert (slots.built, slots.copied) == (1, 1)
    with pytest.raises(ValueError, match="all adapters of a model use one method"):
        slots.load(0, read_adapter(maker.save(tmp_path / "lora", 0, cases.LORA_KINDS[0])))
    assert torch.equal(logits(slots, 0), alone(input_ids=IDS, adapter_names=["one"]).logits), "it has what it had"


def test_loading_holds_no_more_than_the_slots(tmp_path, maker):
    """Tensors are counted: 40 loads of four layouts leave as many as 8 loads, and as many bytes."""
    weights = [read_adapter(maker.save(tmp_path / str(i), i, cases.LORA_KINDS[i % 4])) for i in range(8)]
    slots = AdapterSlots(cases.tiny_base(), 3)

    def held():
        gc.collect()
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_meta]
        return len(tensors), sum(t.nbytes for t in tensors)

    counts = []
    for turn in range(40):
        slots.load(turn % 3, weights[turn % 8])
        if turn in (15, 39):  # the same adapters in the same slots: the least common multiple of 3 and 8 is 24
            counts.append(held())
    assert counts[0] == counts[1]
    assert slots.nbytes == sum(weights[t % 8].nbytes for t in (37, 38, 39)) * 2  # fp64 of fp32 files


@pytest.mark.parametrize("change", ["lacks", "has", "shape", "base"])
def test_an_adapter_that_does_not_fit_changes_nothing(maker, change):
    config, good = maker.weights(0, cases.LORA_KINDS[0])
    bad = dict(good)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    match change:
        case "lacks":
            del bad[key]
            message = f"it lacks {key}"
        case "has":
            bad["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = bad[key]
            message = "layers.7.self_attn.q_proj.lora_A.weight, which is no part of the adapter"
        case "shape":
            bad[key] = torch.zeros(4, 48)
            message = r"of shape \(4, 48\), the model \(4, 64\)"
        case "base":  # as save_pretrained writes them for a resized vocabulary: all adapters would get them
            bad["base_model.model.model.embed_tokens.weight"] = torch.zeros(cases.VOCAB, 64)
            message = "embed_tokens.weight, which is no part of the adapter"
    slots = AdapterSlots(cases.tiny_base(), 1)
    slots.load(0, AdapterWeights(config, good))
    embedding = slots.base_model.get_input_embeddings().weight.clone()
    before = logits(slots, 0)
    with pytest.raises(AdapterFileError, match=message):
        slots.load(0, AdapterWeights(config, bad))
    assert torch.equal(logits(slots, 0), before)
    assert torch.equal(slots.base_model.get_input_embeddings().weight, embedding)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_config_that_asks_for_more_than_there_is_costs_nothing(maker, is_first):
    """Its r says how much would be allocated. The file's tensors are compared with it before anything is."""
    slots = AdapterSlots(cases.tiny_base(), 2)
    if not is_first:
        slots.load(1, AdapterWeights(*maker.weights(0, cases.LORA_KINDS[0])))
    config, weights = maker.weights(1, cases.LORA_KINDS[0])
    config.r = 2**45  # a petabyte a layer
    with pytest.raises(ValueError, match=r"does not fit this base model.*of shape \(4, .*the model \(35184372088832,"):
        slots.load(0, AdapterWeights(config, weights))
    slots.load(0, AdapterWeights(*maker.weights(1, cases.LORA_KINDS[0])))


def test_biases_of_the_base_are_refused(tmp_path):
    model = get_peft_model(cases.tiny_base(), LoraConfig(target_modules=["q_proj"], bias="all"))
    save_adapter_files(tmp_path, model.peft_config["default"], get_peft_model_state_dict(model))
    with pytest.raises(ValueError, match=r"trained biases of the base model .bias='all'."):
        AdapterSlots(cases.tiny_base(), 1).load(0, read_adapter(tmp_path))


def test_another_base_is_refused(tmp_path, maker):
    """Names that match nothing, and nothing has changed."""
    base = cases.tiny_base()
    slots = AdapterSlots(base, 1)
    config = LoraConfig(target_modules=["c_attn"])
    with pytest.raises(ValueError, match="matches no layer"):
        slots.load(0, AdapterWeights(config, {"w": torch.zeros(1)}))
    assert not any("lora" in name for name, _ in base.named_modules())
    slots.load(0, read_adapter(maker.save(tmp_path, 0, cases.LORA_KINDS[0])))


@pytest.mark.parametrize("count", [0, -1, 2.0, True])
def test_number_of_slots(count):
    with pytest.raises(ValueError, match="number of slots of at least 1"):
        AdapterSlots(cases.tiny_base(), count)


def test_modules_that_cannot_take_a_mixed_batch_are_refused():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    model = get_peft_model(cases.tiny_base(), config)
    slots = AdapterSlots(cases.tiny_base(), 1)
    with pytest.raises(NotImplementedError, match="modules_to_save has a LlamaRMSNorm"):
        slots.load(0, AdapterWeights(config, get_peft_model_state_dict(model)))


def test_merged_and_disabled_adapters_are_refused():
    model = get_peft_model(cases.tiny_base(), LoraConfig(target_modules=["q_proj"]))
    with model.disable_adapter(), pytest.raises(ValueError, match="q_proj are disabled"):
        AdapterSlots(model, 1)
    model.base_model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj are merged \(default\)"):
        AdapterSlots(model, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrapped", [False, True])
def test_embeddings_that_were_saved_with_an_adapter(tmp_path, dtype, wrapped):
    """PEFT saves those that an adapter targets. Copies of the base's own are left out, others are refused."""
    base = cases.tiny_base(torch.float32)
    model = get_peft_model(base, lora_config := cases.lora_config(cases.ENDS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "embedding_A" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    served = cases.tiny_base(dtype)  # of another precision than the file
    if wrapped:
        served = get_peft_model(served, cases.lora_config(cases.ENDS)).get_base_model()
    read = read_adapter(tmp_path)
    embeddings = [key for key in read.tensors if "base_layer" in key]
    assert len(embeddings) == 2
    weights = without_base_weights(read, base_weights_of(served))
    assert weights.tensors.keys() == read.tensors.keys() - embeddings
    AdapterSlots(cases.tiny_base(dtype), 1).load(0, weights)

    changed = {**read.tensors, embeddings[0]: read.tensors[embeddings[0]] + 1}
    kept = without_base_weights(AdapterWeights(lora_config, changed), base_weights_of(served))
    assert kept.tensors.keys() == read.tensors.keys() - {embeddings[1]}
    with pytest.raises(AdapterFileError, match="which is no part of the adapter"):
        AdapterSlots(cases.tiny_base(dtype), 1).load(0, kept)


def test_a_whole_module_that_equals_the_base_is_kept():
    """It belongs to the adapter, trained or not."""
    config = cases.lora_config(cases.LORA_KINDS[4])
    model = get_peft_model(cases.tiny_base(), config)
    weights = AdapterWeights(config, get_peft_model_state_dict(model))
    assert without_base_weights(weights, base_weights_of(cases.tiny_base())) is weights


def test_closed_slots_let_go_of_their_adapters():
    """Also where the layers of a user's own model have seen a batch of them twice, and so remember it."""
    config, layers = LoraConfig(r=16, target_modules=["0"], init_lora_weights=False), [nn.Linear(32, 48)]
    tensors = get_peft_model_state_dict(get_peft_model(nn.Sequential(*layers), config))
    host = get_peft_model(nn.Sequential(nn.Linear(32, 48)), config).eval()
    slots, layer = AdapterSlots(host, 3), host.get_base_model()[0]
    for slot in range(3):
        slots.load(slot, AdapterWeights(config=config, tensors={key: t.detach().clone() for key, t in tensors.items()}))
    factors = [weakref.ref(layer.lora_A[name].weight) for name in slots.names]
    with torch.no_grad(), routed(Routing.by_row(slots.names)):
        for _ in range(3):
            layer(torch.randn(3, 1, 32))
    slots.close()
    gc.collect()
    assert all(factor() is None for factor in factors)
