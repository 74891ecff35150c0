"""Who takes which adapter: names to numbers, and how a routing reaches the layers."""

import threading

import models
import pytest
import torch
from routed_models import adapted
from torch import nn
from transformers import GenerationConfig

import fastpeft
from fastpeft.routing import Routing, as_routing, check_names
from fastpeft.routing_scope import routed, routing_for

CPU = torch.device("cpu")


def tables(routing, shape, names):
    rows, starts, weights = routing.tables(shape, names, CPU)
    return rows.tolist(), starts.tolist(), None if weights is None else weights.tolist()


# Tables.


def test_rows_are_sorted_by_slot():
    routing = Routing.by_row(["b", "__base__", "a", "b", None])
    assert routing.names == ("b", "a")
    assert tables(routing, (5,), ("b", "a")) == ([[0, 3, 2, 1, 4]], [[0, 2, 3]], None)
    assert tables(routing, (5,), ("a", "b")) == ([[2, 0, 3, 1, 4]], [[0, 1, 3]], None)
    assert tables(routing, (5,), ("a",)) == ([[2, 0, 1, 3, 4]], [[0, 1]], None)  # "b" is not on this layer
    assert tables(routing, (5,), ()) == ([[0, 1, 2, 3, 4]], [[0]], None)


def test_every_token_of_a_row_is_a_row():
    routing = Routing.by_row(["b", "a"])
    assert tables(routing, (2, 3), ("a", "b")) == ([[3, 4, 5, 0, 1, 2]], [[0, 3, 6]], None)
    assert tables(routing, (2, 0), ("a", "b")) == ([[]], [[0, 0, 0]], None)


def test_several_adapters_a_row_take_a_pass_each():
    routing = Routing.by_row([{"a": 0.5, "b": -2.0}, "b", {"a": 0.0}, {"b": 3, "__base__": 1.0}])
    rows, starts, weights = tables(routing, (4,), ("a", "b"))
    assert rows == [[0, 1, 3, 2], [0, 1, 2, 3]]
    assert starts == [[0, 1, 3], [0, 0, 1]]
    assert [weights[0][:3], weights[1][:1]] == [[0.5, 1.0, 3.0], [-2.0]]


def test_packed_sequences():
    routing = Routing.by_token(["a", "__base__", "b", "a"], [2, 1, 0, 3], kept=[1, 2, 5])
    assert tables(routing, (1, 6), ("a", "b")) == ([[0, 1, 3, 4, 5, 2]], [[0, 5, 5]], None)
    assert tables(routing, (6,), ("a", "b")) == tables(routing, (1, 6), ("a", "b"))
    assert tables(routing, (1, 3), ("a", "b")) == ([[0, 2, 1]], [[0, 2, 2]], None)
    with pytest.raises(ValueError, match="batches of 6 tokens or the 3 kept ones, and a layer was called on 5"):
        routing.tables((1, 5), ("a",), CPU)


def test_rows_that_a_generation_repeats():
    routing = Routing.by_row(["a", "b"])
    with pytest.raises(ValueError, match="expected 6 names, got 2"):
        routing.tables((6,), ("a", "b"), CPU)
    assert tables(routing.expanded(3), (6,), ("a", "b")) == ([[0, 1, 2, 3, 4, 5]], [[0, 3, 6]], None)
    assert tables(routing.expanded(3), (2,), ("a", "b")) == ([[0, 1]], [[0, 1, 2]], None)  # an encoder sees them once
    with pytest.raises(ValueError, match="expected 4 names, got 2"):
        routing.expanded(3).tables((4,), ("a",), CPU)


def test_tables_are_made_once_and_forgotten_in_the_end(monkeypatch):
    routing = Routing.by_row(["a"])
    assert routing.tables((1, 7), ("a",), CPU) is routing.tables((1, 7), ("a",), CPU)
    monkeypatch.setattr("fastpeft.routing.MOST_TABLES", 3)
    for length in range(10):
        routing.tables((1, length), ("a",), CPU)
    assert len(routing._contents.kept) <= 3
    with pytest.raises(RuntimeError, match="used for more than 3 shapes"):
        routing.refill(["a"])


def test_a_refill_goes_into_the_same_tensors():
    routing = Routing.by_row(["a", "__base__", {"b": 0.5}], names=("c",))
    assert routing.names == ("c", "a", "b")
    kept = [routing.tables((3,), routing.names, CPU), routing.tables((3, 2), ("b",), CPU)]
    rows = [{"c": 2.0}, "b", "__base__"]
    routing.refill(rows)
    expected = Routing.by_row(rows, names=routing.names)
    for found, (shape, names) in zip(kept, [((3,), routing.names), ((3, 2), ("b",))], strict=True):
        assert found is routing.tables(shape, names, CPU)
        assert all(map(torch.equal, found, expected.tables(shape, names, CPU)))


def test_refills_keep_their_room_and_reach_expansions():
    routing = Routing.by_row([{"a": 0.5, "b": 0.5}, "a"])
    beams = routing.expanded(2)
    kept = beams.tables((4,), ("a", "b"), CPU)
    for rows in (["a", "b"], [{"a": 0.5, "b": 0.25}, "__base__"]):
        routing.refill(rows)
        fresh = Routing.by_row([{"a": 0.5, "b": 0.5}, "a"])
        fresh.refill(rows)
        assert all(map(torch.equal, kept, fresh.expanded(2).tables((4,), ("a", "b"), CPU)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a"], "refilled with 2 rows"),
        (["a", "d"], r"refilled with 2 rows of \('a', 'b'\); got 2 of \['a', 'd'\]"),
        (["a", {"a": 1, "b": 1}], "room for 1 adapters a row, without weights"),
        (["a", {"b": 0.5}], "room for 1 adapters a row, without weights"),
    ],
)
def test_refills_that_do_not_fit_change_nothing(rows, message):
    routing = Routing.by_row(["a", "b"])
    before = tables(routing, (2,), ("a", "b"))
    with pytest.raises(ValueError, match=message):
        routing.refill(rows)
    assert tables(routing, (2,), ("a", "b")) == before


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ("default", TypeError),
        ([1], TypeError),
        ([{"a": float("nan")}], ValueError),
        ([{"a": "b"}], ValueError),
        ([{"a": True}], ValueError),
        ([{1: 1.0}], ValueError),
        ([{"a": 10**400}], ValueError),
        ([{"a": 1e300}], ValueError),
        ({"a", "b"}, TypeError),
        (7, TypeError),
    ],
)
def test_what_is_no_routing(rows, error):
    with pytest.raises(error, match=r"needs one name per row|a row of adapter_names|adapters of a row"):
        as_routing(rows)


@pytest.mark.parametrize("kept", [[2, 1, 0], [-1], [0, 7]], ids=repr)
def test_tokens_that_cannot_be_kept(kept):
    with pytest.raises(ValueError, match="kept must name some of the 3 tokens from 0 on, or all in their order"):
        Routing.by_token(["a", "b"], [1, 2], kept=kept)


@pytest.mark.parametrize("lengths", [[1], [1, -1], [1.5, 1]], ids=repr)
def test_lengths_that_do_not_fit(lengths):
    with pytest.raises(ValueError, match="one whole length of 0 or more for each of the 2 sequences"):
        Routing.by_token(["a", "b"], lengths)


def test_names_are_checked_and_long_ones_are_cut():
    with pytest.raises(ValueError, match="no adapter") as error:
        check_names(Routing.by_row(["x" * 10_000]), {"a"})
    assert len(str(error.value)) < 500
    check_names(Routing.by_row(["a", "__base__"]), {"a"})


# In force.


def test_a_routing_is_in_force_in_its_block_and_thread():
    layer, routing = nn.Linear(2, 2), Routing.by_row(["a"])
    seen = []
    with routed(routing):
        thread = threading.Thread(target=lambda: seen.append(routing_for(layer)))
        thread.start()
        thread.join()
        assert routing_for(layer) is routing
        with routed(None):
            assert routing_for(layer) is None
        assert routing_for(layer) is routing
    assert seen == [None]
    with pytest.raises(RuntimeError, match="boom"), routed(routing):
        raise RuntimeError("boom")
    assert routing_for(layer) is None


def test_models_with_injected_adapters_follow_a_block():
    base, inputs = models.tiny_llama(), models.batch("llama")
    config = fastpeft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = fastpeft.inject_adapter_in_model(config, base, "a").eval()
    alone = model(**inputs).logits
    with routed(Routing.by_row(["a", "__base__", "a"])):
        mixed = model(**inputs).logits
    torch.testing.assert_close(mixed[[0, 2]], alone[[0, 2]])
    assert torch.equal(mixed[1], models.tiny_llama().eval()(**inputs).logits[1])


def test_names_without_an_active_adapter_are_not_ignored():
    model, inputs = adapted().eval(), models.batch("llama")
    names = ["b", "__base__", "a"]
    expected = model(**inputs, adapter_names=names).logits
    model.base_model.set_adapter([])
    assert torch.equal(model(**inputs, adapter_names=names).logits, expected)


def test_other_models_are_not_routed():
    """One that is called inside a mixed batch's forward: a judge, a teacher, an assistant."""
    model, inner, inputs = adapted().eval(), adapted().eval(), models.batch("llama")
    seen = []
    one_row = {key: value[:1] for key, value in inputs.items()}
    hook = lambda *_: seen.append(inner(**one_row).logits)  # noqa: E731
    model.get_base_model().model.norm.register_forward_hook(hook)
    model(**inputs, adapter_names=["b", "__base__", "b"])
    assert torch.equal(seen[0], inner(**one_row).logits)


# Generation.


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=repr)
def test_generation_repeats_rows(family, options):
    task = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}[family]
    model, inputs = adapted(family, task_type=task).eval(), models.batch(family)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    names = ["b", "__base__", "a"]
    torch.manual_seed(3)
    mixed = model.generate(**inputs, adapter_names=names, max_new_tokens=5, **options)
    repeat = len(mixed) // 3
    if "do_sample" not in options:
        for row, name in enumerate(names):
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            if name == "__base__":
                with model.disable_adapter():
                    alone = model.generate(**one, max_new_tokens=5, **options)
            else:
                model.set_adapter(name)
                alone = model.generate(**one, max_new_tokens=5, **options)
            width = alone.shape[1]
            assert torch.equal(mixed[row * repeat : (row + 1) * repeat, :width], alone)
            assert not mixed[row * repeat : (row + 1) * repeat, width:].any()
    else:
        assert repeat == 2
        torch.manual_seed(3)
        ids = {key: value.repeat_interleave(2, 0) for key, value in inputs.items()}
        one_by_one = [name for name in names for _ in range(2)]
        expected = model.generate(**ids, adapter_names=one_by_one, max_new_tokens=5, do_sample=True)
        assert torch.equal(mixed, expected)
    config = GenerationConfig(num_beams=2, max_new_tokens=2)
    assert len(model.generate(**inputs, adapter_names=names, generation_config=config)) == 3
    if family == "llama":  # seq2seq models take keywords only, as in PEFT
        assert len(model.generate(inputs["input_ids"], config, adapter_names=names)) == 3
    model.generation_config.num_beams = 2  # from the config as well
    assert len(model.generate(**inputs, adapter_names=names, max_new_tokens=2)) == 3
    assert len(model.generate(**inputs, adapter_names=names, generation_config=None, max_new_tokens=2)) == 3


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["a", "b"], {"num_beams": 2}),
        (["a", "b"], {"num_beams": 4, "num_return_sequences": 2}),
        (["a", "b"], {"num_beams": 2, "num_return_sequences": 2, "do_sample": True}),
        (["a", "b"], {"generation_config": GenerationConfig(num_beams=2)}),
        (["a", "b", "a"], {"num_return_sequences": 2, "do_sample": True}),
    ],
    ids=repr,
)
@pytest.mark.parametrize("how", ["input_ids", "inputs", "inputs_embeds"])
def test_beams_of_one_prompt_take_one_adapter(names, options, how):
    model, ids = adapted().eval(), models.batch("llama")["input_ids"][:1]
    inputs = {how: model.get_input_embeddings()(ids) if how == "inputs_embeds" else ids}
    calls = []
    handle = model.get_base_model().register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="adapter_names needs one name per prompt: expected 1 names"):
        model.generate(**inputs, adapter_names=names, **options)
    handle.remove()
    assert not calls
    several = {"num_return_sequences": 2, "do_sample": True}
    assert len(model.generate(**inputs, adapter_names=["a", "b"], max_new_tokens=2, **several)) == 2
    explicit = Routing.by_row(["a", "b"])  # its maker knows which rows the model sees
    assert len(model.generate(**inputs, adapter_names=explicit, max_new_tokens=2, num_beams=2)) == 1


def test_prompts_are_counted_where_the_encoder_has_run():
    model, inputs = adapted("t5", task_type="SEQ_2_SEQ_LM").eval(), models.batch("t5")
    encoder = model.get_encoder()
    encoded = encoder(inputs["input_ids"], inputs["attention_mask"])
    options = {"encoder_outputs": encoded, "attention_mask": inputs["attention_mask"], "max_new_tokens": 2}
    with pytest.raises(ValueError, match="expected 3 names, got 6"):
        model.generate(**options, adapter_names=["a", "b", "a"] * 2, num_beams=2)
    assert len(model.generate(**options, adapter_names=["a", "b", "a"], num_beams=2)) == 3


# Compiled.


@pytest.mark.parametrize(("training", "by"), [(False, "aot_eager"), (True, "inductor")])
def test_compiled_models_follow_a_routing_and_its_refills(training, by):
    """One backend that keeps the operators as they are, and one that fuses them."""
    model, inputs = adapted(), models.batch("llama")
    model.set_requires_grad(["a", "b"])
    model.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend=by)
    routing = Routing.by_row(["a", "b", "__base__"])

    def outcome(run):
        model.zero_grad()
        logits = run()
        logits.square().mean().backward()
        trained = [p for p in model.parameters() if p.requires_grad]  # who has no rows may have no gradient, or zeros
        return [logits, *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained)]

    def follow():
        with routed(routing):
            return compiled(**inputs).logits

    turns = [["a", "b", "__base__"], ["a", "a", "a"], ["__base__", "b", "b"], ["b", "a", "a"]]
    for turn, rows in enumerate(
        turns
    ):  # the tables are made in the first turn, and inputs of the graph from the second
        routing.refill(rows)
        with torch._dynamo.config.patch(error_on_recompile=turn > 1):
            found = outcome(follow)
        expected = outcome(lambda rows=rows: model(**inputs, adapter_names=rows).logits)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_compiled_models_take_names():
    model, inputs = adapted(modules_to_save=["lm_head"]).eval(), models.batch("llama")
    torch._dynamo.reset()
    names = ["b", "__base__", "a"]
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True)(**inputs, adapter_names=names).logits
        torch.testing.assert_close(found, model(**inputs, adapter_names=names).logits)
