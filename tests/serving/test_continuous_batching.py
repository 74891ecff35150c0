"""Each request of transformers' continuous batching takes its own adapter, and its own cached blocks."""

import re
import threading
from typing import Any

import pytest
import serving_cases as cases
import torch
from transformers import CompileConfig, ContinuousBatchingConfig

from fastpeft import PeftModel, Routing
from fastpeft.integrations import continuous_batching
from fastpeft.integrations.continuous_batching import RequestRouter, config_for_adapters, manager_with_adapters
from fastpeft.tuners.lora import repeated_batch

KINDS = {
    "one": cases.LORA_KINDS[0],
    "two": cases.LORA_KINDS[1],
    "head": cases.LORA_KINDS[4],
    "dora": cases.LORA_KINDS[3],
    "ends": cases.ENDS,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root, maker = tmp_path_factory.mktemp("adapters"), cases.AdapterMaker()
    return {name: maker.save(root / name, seed, kind) for seed, (name, kind) in enumerate(KINDS.items())}


@pytest.fixture
def model(folders) -> PeftModel:
    model = PeftModel.from_pretrained(cases.tiny_base(), folders["one"], adapter_name="one")
    for name in ("two", "head", "dora"):
        model.load_adapter(folders[name], name)
    return model


def run(model, requests, keys=None, bind=True, config=None, padded=False, **generation):
    """What one manager answers to (prompt, adapter) pairs, in turn if there are `keys`; and what was shared."""
    config = config or cases.batching_config()
    manager, router = manager_with_adapters(model.get_base_model(), cases.generation_config(**generation), config)
    manager.warmup()
    manager.batch_processor.model_runner.pad_inputs = padded
    shared = {}
    search = manager.batch_processor.cache.search_prefix_match

    def noting(request_id, prompt_ids):
        shared[request_id] = search(request_id, prompt_ids)
        return shared[request_id]

    manager.batch_processor.cache.search_prefix_match = noting
    manager.start()
    answers = {}
    try:
        for i, (prompt, adapter) in enumerate(requests):
            if bind:
                key = keys[i] if keys else "" if adapter is None else str(adapter)
                router.bind(f"r{i}", adapter, key)
            manager.add_request(prompt, request_id=f"r{i}")
            if keys:  # one after the other, so that a later one finds the blocks of an earlier one
                answers |= collect(manager, 1)
        wanted = len(requests) * generation.get("num_return_sequences", 1)
        answers |= collect(manager, wanted - len(answers))
    finally:
        manager.stop()
    return answers, shared


def collect(manager, count):
    answers = {}
    while len(answers) < count:
        output = manager.get_result(timeout=5)
        assert output is not None, manager.background_thread_status.fatal_error
        assert output.error is None, output.error
        answers[output.request_id] = output.generated_tokens
    return answers


def by_generate(model, prompt, adapter, **generation):
    """The same by plain generate, a row of its own."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=cases.generation_config(**generation),
        adapter_names=[adapter],
    )
    return out[0, len(prompt) :].tolist()


ADAPTERS = ["one", "two", None, "head", {"one": 0.7, "two": 0.3}, "dora", "__base__"]


@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 7}, {"scheduler_type": "prefill_first"}], ids=str)
def test_each_request_takes_its_adapter(model, options):
    prompts = cases.prompts(28, shared=6)
    requests = [(prompt, ADAPTERS[i % len(ADAPTERS)]) for i, prompt in enumerate(prompts)]
    answers, shared = run(model, requests, config=cases.batching_config(**options))
    for i, (prompt, adapter) in enumerate(requests):
        assert answers[f"r{i}"] == by_generate(model, prompt, adapter), (i, adapter)
    assert any(shared.values())  # else it proves nothing of the cache


def test_embeddings_and_heads_with_low_rank(folders):
    """The layers at both ends: ids come in, and only some tokens reach the head."""
    model = PeftModel.from_pretrained(cases.tiny_base(), folders["one"], adapter_name="one")
    model.load_adapter(folders["ends"], "two")
    requests = [(prompt, ADAPTERS[i % 3]) for i, prompt in enumerate(cases.prompts(9, shared=6))]
    answers, _ = run(model, requests, config=cases.batching_config(max_batch_tokens=8))
    for i, (prompt, adapter) in enumerate(requests):
        assert answers[f"r{i}"] == by_generate(model, prompt, adapter), (i, adapter)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_windows_of_attention(folders, attention):
    """Layers of another kind keep their cache otherwise, and share no blocks."""
    model = PeftModel.from_pretrained(cases.tiny_base(sliding_window=8), folders["one"], adapter_name="one")
    model.load_adapter(folders["two"], "two")
    requests = [(prompt, ADAPTERS[i % 3]) for i, prompt in enumerate(cases.prompts(9, shared=6))]
    model.get_base_model().set_attn_implementation(attention)
    answers, shared = run(model, requests)
    assert not any(shared.values())
    for i, (prompt, adapter) in enumerate(requests):
        assert answers[f"r{i}"] == by_generate(model, prompt, adapter), (i, adapter)


def test_transformers_alone_mixes_up_the_blocks_of_adapters(model):
    """Why there is a router: the cache of a manager without one gives an adapter the keys and values of another."""
    prompt = cases.prompts(1, shared=12)[0]
    manager = model.get_base_model().init_continuous_batching(
        cases.generation_config(), config_for_adapters(cases.batching_config())
    )
    manager.start()
    try:
        model.set_adapter("one")
        manager.add_request(prompt)
        assert list(collect(manager, 1).values()) == [by_generate(model, prompt, "one")]
        with manager.pause():
            model.set_adapter("two")
        manager.add_request(prompt)
        assert list(collect(manager, 1).values()) != [by_generate(model, prompt, "two")]
    finally:
        manager.stop()


def test_blocks_are_shared_by_equal_keys_only(model):
    prompt = cases.prompts(1, shared=12)[0]
    requests = [(prompt, adapter) for adapter in ("one", "two", None, "one", "two", None, "one")]
    keys = ["one 1", "two 1", "", "one 1", "two 1", "", "one 2"]
    answers, shared = run(model, requests, keys=keys)
    for i, (prompt, adapter) in enumerate(requests):
        assert answers[f"r{i}"] == by_generate(model, prompt, adapter), (i, adapter)
    assert [shared[f"r{i}"] > 0 for i in range(7)] == [False, False, False, True, True, True, False]


def test_a_request_that_was_not_bound_takes_no_adapter_and_no_blocks(model):
    model.set_adapter("one")  # which a routing overrules
    prompt = cases.prompts(1, shared=12)[0]
    answers, shared = run(model, [(prompt, None)] * 3, bind=False)
    assert list(answers.values()) == [by_generate(model, prompt, None)] * 3
    assert not any(shared.values())


def test_forked_sequences_take_the_adapter_of_their_request(model):
    requests = [(prompt, ("one", "two")[i % 2]) for i, prompt in enumerate(cases.prompts(6))]
    answers, _ = run(model, requests, num_return_sequences=3, do_sample=True, top_k=1)
    for i, (prompt, adapter) in enumerate(requests):
        want = by_generate(model, prompt, adapter)
        assert [answers[f"r{i}{child}"] for child in ("", "__child#0", "__child#1")] == [want] * 3


def test_padding_takes_no_adapter(model):
    """As graphs and compiled forwards pad it: to multiples of 16 tokens, and to as many sequences."""
    config = cases.batching_config(q_padding_interval_size=16, kv_padding_interval_size=64, max_batch_tokens=32)
    requests = [(prompt, ADAPTERS[i % 4]) for i, prompt in enumerate(cases.prompts(12))]
    answers, _ = run(model, requests, config=config, padded=True)
    for i, (prompt, adapter) in enumerate(requests):
        assert answers[f"r{i}"] == by_generate(model, prompt, adapter)


def test_rows_of_a_padded_batch():
    """Three requests in 8 tokens of 12; the first and the last get a token, the other is a part of its prompt."""
    batch = continuous_batching._Batch(["one", None, "two"], [1, 2, 5], [0, 7])
    data = {"input_ids": torch.zeros(1, 12, dtype=torch.long), "logits_indices": torch.zeros(4), "logits_to_keep": 0}
    routing = Routing.by_token(**batch.route(data))
    tables = routing.tables((1, 12), ("one", "two"), torch.device("cpu"))
    assert (tables.starts.tolist(), tables.rows[0, :6].tolist()) == ([[0, 1, 6]], [0, 3, 4, 5, 6, 7])
    head = routing.tables((1, 4), ("one", "two"), torch.device("cpu"))  # tokens 0 and 7, and token 0 twice for nobody
    assert (head.starts.tolist(), head.rows[0].tolist()) == ([[0, 3, 4]], [0, 2, 3, 1])


def test_a_prompts_part_of_one_token_does_not_swap_the_heads():
    """As many tokens reach the head as there are, in another order: the selection is left out."""
    batch = continuous_batching._Batch(["one", "two"], [1, 1], [1])
    data = {"input_ids": torch.zeros(1, 2, dtype=torch.long), "logits_indices": torch.zeros(2), "logits_to_keep": 0}
    routing = Routing.by_token(**batch.route(data))
    assert "logits_to_keep" not in data
    assert routing.tables((1, 2), ("one", "two"), torch.device("cpu")).rows.tolist() == [[0, 1]]


def test_layers_remember_the_batch_that_decodes(model, monkeypatch):
    """Step after step it is the same routing, until a request has ended."""
    routings, remembered = [], []
    make, add = Routing.by_token, repeated_batch._Found.add_to
    monkeypatch.setattr(
        continuous_batching.Routing, "by_token", lambda **route: routings.append(route) or make(**route)
    )
    monkeypatch.setattr(repeated_batch._Found, "add_to", lambda *args: remembered.append(args) or add(*args))
    requests = [(prompt, ("one", "two")[i % 2]) for i, prompt in enumerate(cases.prompts(4))]
    answers, _ = run(model, requests, max_new_tokens=16, eos_token_id=-1)
    for i, (prompt, adapter) in enumerate(requests):
        assert answers[f"r{i}"] == by_generate(model, prompt, adapter, max_new_tokens=16, eos_token_id=-1)
    assert len(routings) < 16  # of 16 forwards at least
    assert remembered


def test_weights_are_those_of_the_time_they_were_bound(model):
    _, router = manager_with_adapters(model.get_base_model(), cases.generation_config(), cases.batching_config())
    weights = {"one": 0.5}
    router.bind("r0", weights, "")
    weights["one"] = 2.0
    assert router.binding("r0") == ({"one": 0.5}, "")


def test_heads_of_their_own_with_parts_of_one_token(model):
    requests = [(prompt, ("head", None, "one")[i % 3]) for i, prompt in enumerate(cases.prompts(9))]
    answers, _ = run(model, requests, config=cases.batching_config(max_batch_tokens=4))
    for i, (prompt, adapter) in enumerate(requests):
        assert answers[f"r{i}"] == by_generate(model, prompt, adapter), (i, adapter)


def test_a_cancelled_request_is_reported_and_forgotten(model):
    manager = model.get_base_model().init_continuous_batching(
        cases.generation_config(max_new_tokens=100, eos_token_id=-1), config_for_adapters(cases.batching_config())
    )
    gone, cancelled = threading.Event(), []

    def on_cancelled(request_id):
        cancelled.append(request_id)
        gone.set()

    router = RequestRouter(manager, on_cancelled)
    manager.start()
    try:
        router.bind("long", "one", "one")
        manager.add_request(cases.prompts(1)[0], request_id="long")
        manager.cancel_request("long")
        assert gone.wait(10)
        router.release("long")
        assert (cancelled, router.binding("long")) == (["long"], None)
    finally:
        manager.stop()


# ---- what is refused ----


COMPILE = CompileConfig(backend="eager")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_cuda_graph", True),
        ("use_cuda_graph", (True, False)),
        ("varlen_compile_config", COMPILE),
        ("decode_compile_config", COMPILE),
        ("default_compile_level", 1),
    ],
    ids=str,
)
def test_what_would_freeze_a_routing_is_refused(model, option, value):
    assert config_for_adapters(ContinuousBatchingConfig()).use_cuda_graph is False
    with pytest.raises(ValueError, match=f"{option}=.* cannot be used with an adapter per request"):
        config_for_adapters(ContinuousBatchingConfig(**{option: value}))

    manager = model.get_base_model().init_continuous_batching(cases.generation_config(), cases.batching_config())
    setattr(manager.continuous_batching_config, option, value)
    with pytest.raises(ValueError, match=f"{option}=.* cannot be used with an adapter per request"):
        RequestRouter(manager)


def test_a_manager_that_has_run_is_refused_and_a_router_is_made_once(model):
    manager = model.get_base_model().init_continuous_batching(cases.generation_config(), cases.batching_config())
    router = RequestRouter(manager, on_cancelled=print)
    assert RequestRouter(manager) is router
    assert router.on_cancelled is print
    other = model.get_base_model().init_continuous_batching(cases.generation_config(), cases.batching_config())
    other.warmup()
    with pytest.raises(ValueError, match="make the RequestRouter before its warmup or start"):
        RequestRouter(other)


@pytest.mark.parametrize(
    ("entry", "lacks"),
    [
        (("scheduler", "Scheduler", "no_such_method", ()), "scheduler.Scheduler.no_such_method"),
        (("no_such_module", "A", "b", ()), "no_such_module.A.b"),
        (
            ("cache", "PagedAttentionCache", "search_prefix_match", ("tokens",)),
            "cache.PagedAttentionCache.search_prefix_match(tokens), which takes (request_id, prompt_ids)",
        ),
    ],
    ids=["method", "module", "parameters"],
)
def test_an_unknown_transformers_is_refused(monkeypatch, model, entry, lacks):
    monkeypatch.setattr(continuous_batching, "_USED", (*continuous_batching._USED, entry))
    manager = model.get_base_model().init_continuous_batching(cases.generation_config(), cases.batching_config())
    create = manager._create_batch_processor
    with pytest.raises(ImportError, match=re.escape(lacks)) as info:
        RequestRouter(manager)
    assert "were written for transformers 5.23" in str(info.value)
    assert manager._create_batch_processor == create


def test_routing_is_what_the_layers_follow(model):
    """The stand of the whole: without the routing, the active adapter answers."""
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7, 8]])
        model.set_adapter("one")
        active = model(input_ids=ids).logits
        routed = model(input_ids=ids, adapter_names=Routing.by_token(["one", "two"], [2, 2])).logits
    assert torch.allclose(active[0, :2], routed[0, :2])
    assert not torch.allclose(active[0, 2:], routed[0, 2:])


def test_a_refused_manager_leaves_the_attention_as_it_was(model, monkeypatch):
    base = model.get_base_model()
    base.set_attn_implementation("eager")  # which a manager replaces by one that knows pages
    monkeypatch.setattr(continuous_batching, "RequestRouter", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        manager_with_adapters(base, cases.generation_config(), cases.batching_config())
    assert base.config._attn_implementation == "eager"
