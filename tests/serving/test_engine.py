"""The engine: submit, stream, cancel; adapters that come, change and go while requests run."""

import asyncio
import gc
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import serving_cases as cases
import torch

from fastpeft import PeftModel, get_peft_model
from fastpeft.checkpoint import get_peft_model_state_dict
from fastpeft.serving import (
    Engine,
    EngineStoppedError,
    RequestCancelledError,
    ServingError,
    UnknownAdapterError,
)

WAIT = 60  # seconds after which a test gives up
LONG = {"max_new_tokens": 100, "eos_token_id": -1}


@pytest.fixture(scope="module")
def maker():
    return cases.AdapterMaker()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, maker):
    """Ten adapters of five kinds."""
    root = tmp_path_factory.mktemp("adapters")
    return [maker.save(root / f"a{i}", i, cases.LORA_KINDS[i % 5]) for i in range(10)]


@pytest.fixture(scope="module")
def alone(folders):
    """What the adapters of (adapter, prompt) pairs answer alone, each pair asked once; None is the base."""
    oracle, known = cases.Alone(), {}

    def answers(*work):
        new = {(adapter, tuple(prompt)) for adapter, prompt in work} - known.keys()
        for adapter in {adapter for adapter, _ in new}:
            prompts = [prompt for other, prompt in new if other == adapter]
            found = oracle.answers(None if adapter is None else folders[adapter], [[*prompt] for prompt in prompts])
            known.update({(adapter, prompt): answer for prompt, answer in zip(prompts, found, strict=True)})
        return [known[adapter, tuple(prompt)] for adapter, prompt in work]

    return answers


@pytest.fixture
def engine(folders):
    with cases.no_threads_left(), cases.engine(slots=3) as engine:
        for i, folder in enumerate(folders):
            engine.add_adapter(f"a{i}", folder)
        yield engine


# ---- requests ----


def test_result_and_tokens(engine, alone):
    prompt = cases.prompts(1)[0]
    handle = engine.submit(prompt, "a1", stream=False)
    assert [handle.result(WAIT)] == alone((1, prompt))
    assert (handle.done(), handle.cancelled(), handle.exception(), handle.adapter) == (True, False, None, "a1")
    assert handle.version == engine.adapters()["a1"]
    base = engine.submit(torch.tensor([prompt]))
    assert ([base.result(WAIT)], base.version) == (alone((None, prompt)), None)


def test_tokens_come_one_by_one(engine, alone):
    prompt = cases.prompts(1)[0]
    with cases.held(engine) as allow:
        handle = engine.submit(prompt, "a2", **LONG)
        allow(1)
        first = next(iter(handle))
        assert not handle.done(), "the rest is not there yet"
    seen = list(handle)  # from the start again
    assert (seen[0], len(seen), seen) == (first, 100, handle.result(WAIT))
    assert seen[: cases.NEW_TOKENS] == engine.submit(prompt, "a2", eos_token_id=-1).result(WAIT)


def test_from_asyncio(engine, alone):
    prompts = cases.prompts(6)

    async def stream(prompt, adapter):
        return [token async for token in engine.submit(prompt, f"a{adapter}")]

    async def everything():
        streamed = [stream(prompt, i) for i, prompt in enumerate(prompts)]
        return await asyncio.gather(*streamed, engine.submit(prompts[0], stream=False), engine.submit(prompts[1], "a1"))

    answers = asyncio.run(asyncio.wait_for(everything(), WAIT))
    assert answers == alone(*enumerate(prompts), (None, prompts[0]), (1, prompts[1]))


def test_errors_reach_asyncio(engine):
    async def cancelled():
        handle = engine.submit(cases.prompts(1)[0], "a0", **LONG)
        tokens = []

        async def read():
            async for token in handle:
                tokens.append(token)
                handle.cancel()

        with pytest.raises(RequestCancelledError):
            await read()
        with pytest.raises(RequestCancelledError):
            await handle
        return tokens

    assert 1 <= len(asyncio.run(asyncio.wait_for(cancelled(), WAIT))) < 100


def test_from_many_threads(engine, alone):
    work = [(i % 10, prompt) for i, prompt in enumerate(cases.prompts(40, seed=3))]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda w: engine.submit(w[1], f"a{w[0]}").result(WAIT), work))
    assert answers == alone(*work)


def test_more_adapters_than_slots(engine, alone):
    work = [(i * 7 % 10, prompt) for i, prompt in enumerate(cases.prompts(30, seed=4, shared=8))]
    handles = [engine.submit(prompt, f"a{adapter}") for adapter, prompt in work]
    assert [handle.result(WAIT) for handle in handles] == alone(*work)
    status = engine.status()
    assert len(status.resident) == 3
    assert status.loads >= 10
    assert (status.running, status.waiting) == (0, 0)


def test_cancel(engine, alone):
    prompt = cases.prompts(1)[0]
    engine.pin("a1").result(WAIT), engine.pin("a2").result(WAIT)
    with cases.held(engine) as allow:
        running = engine.submit(prompt, "a0", **LONG)
        allow(3)
        next(iter(running))
        waiting = engine.submit(prompt, "a3", **LONG)  # for the slot of a0
        assert waiting.cancel()
        assert running.cancel()
        assert not running.cancel(), "it was cancelled before"
    for handle in (running, waiting):
        with pytest.raises(RequestCancelledError, match="was cancelled"):
            handle.result(WAIT)
    assert 1 <= len(running.tokens()) < 100
    assert [engine.submit(prompt, "a4").result(WAIT)] == alone((4, prompt))  # the slot of a0 is free again
    done = engine.submit(prompt)
    done.result(WAIT)
    assert not done.cancel()


def test_timeout_leaves_the_request_alone(engine):
    handle = engine.submit(cases.prompts(1)[0], "a0", **LONG)
    with pytest.raises(TimeoutError, match=r"has not ended after 0\.0 s; it goes on"):
        handle.result(0.0)
    assert len(handle.result(WAIT)) == 100


# ---- adapters ----


def test_replacing_while_requests_run(folders, maker, alone):
    """Every answer is wholly of the version that the handle names, and nothing is lost."""
    prompt = cases.prompts(1, shared=8)[0]
    with cases.engine(slots=2) as engine:
        source = {engine.add_adapter("x", folders[0]): 0}
        engine.add_adapter("other", folders[3])
        handles = []
        for turn in range(1, 9):
            new = [engine.submit(prompt, "x") for _ in range(4)] + [engine.submit(prompt, "other")]
            handles += new
            if turn % 2:
                next(iter(new[0]))  # it runs now, and others of them may; else they wait, and take what comes
            number = turn % 5
            if turn % 2:
                source[engine.replace_adapter("x", folders[number])] = number
            else:
                config, weights = maker.weights(number, cases.LORA_KINDS[number % 5])
                source[engine.replace_adapter("x", weights, config)] = number
        handles.append(engine.submit(prompt, "x"))
        answers = [handle.result(WAIT) for handle in handles]
        numbers = [source[handle.version] if handle.adapter == "x" else 3 for handle in handles]
        assert answers == alone(*((number, prompt) for number in numbers))
        assert handles[-1].version == engine.adapters()["x"]
        assert len({handle.version for handle in handles if handle.adapter == "x"}) >= 5  # odd turns, and the end


def test_a_running_request_keeps_its_version(folders, alone):
    prompt = cases.prompts(1)[0]
    with cases.engine(slots=2) as engine:
        engine.add_adapter("x", folders[0])
        with cases.held(engine) as allow:
            old = engine.submit(prompt, "x", **LONG)
            allow(3)
            next(iter(old))
            engine.replace_adapter("x", folders[1])
            new = engine.submit(prompt, "x")
            while engine.status().running < 2:
                time.sleep(0.01)
            while not new.done():  # a few steps of the hundred that the old one takes
                allow(1)
                time.sleep(0.1)
            assert not old.done(), "both versions are resident"
            answer = new.result(WAIT)
        want_old, want_new = alone((0, prompt), (1, prompt))
        assert (old.result(WAIT)[: len(want_old)], answer) == (want_old, want_new)
        assert old.version < new.version
        assert engine.status().resident == {"x": new.version}, "the old version left with its last request"


def test_removing_while_requests_wait(folders, alone):
    prompt = cases.prompts(1)[0]
    with cases.engine(slots=1) as engine:
        engine.add_adapter("x", folders[0])
        engine.add_adapter("y", folders[1])
        blocker = engine.submit(prompt, "x", **LONG)
        next(iter(blocker))
        waiting = [engine.submit(prompt, "y") for _ in range(3)]
        engine.remove_adapter("y")
        with pytest.raises(UnknownAdapterError, match="no adapter 'y'; registered are 'x'"):
            engine.submit(prompt, "y")
        assert [handle.result(WAIT) for handle in waiting] == alone((1, prompt)) * 3
        assert engine.status().resident == {}
        assert engine.status().on_cpu == ["x"]
        assert [engine.submit(prompt, "x").result(WAIT)] == alone((0, prompt))


def test_pinned_adapters_stay_resident(engine, folders):
    prompt = cases.prompts(1)[0]
    engine.pin("a7").result(WAIT)
    engine.pin("a7").result(WAIT)
    for i in range(7):
        engine.submit(prompt, f"a{i}").result(WAIT)
    assert "a7" in engine.status().resident
    new = engine.replace_adapter("a7", folders[1])
    engine.pin("a7").result(WAIT)
    assert engine.status().resident["a7"] == new
    engine.unpin("a7")
    for i in range(3):
        engine.submit(prompt, f"a{i}").result(WAIT)
    assert "a7" not in engine.status().resident


def test_all_slots_pinned(engine):
    prompt = cases.prompts(1)[0]
    for name in ("a0", "a1", "a2"):
        engine.pin(name).result(WAIT)
    with pytest.raises(ServingError, match="all 3 slots are pinned, by 'a0', 'a1', 'a2'"):
        engine.pin("a3")
    with pytest.raises(ServingError, match="adapter 'a3' cannot become resident: all slots are pinned"):
        engine.submit(prompt, "a3").result(WAIT)
    engine.submit(prompt, "a1").result(WAIT)
    engine.unpin("a1")
    engine.submit(prompt, "a3").result(WAIT)


def test_prefetch_and_the_cpu_budget(tmp_path, maker):
    folders = [maker.save(tmp_path / str(i), i, cases.LORA_KINDS[0]) for i in range(6)]
    limit = 3 * folders[0].joinpath("adapter_model.safetensors").stat().st_size
    with cases.engine(slots=1, cpu_bytes=limit) as engine:
        for i, folder in enumerate(folders):
            engine.add_adapter(str(i), folder)
        for i in (0, 1, 2, 0, 3, 4):
            engine.prefetch(str(i)).result(WAIT)
        assert engine.status().on_cpu == ["0", "3", "4"], "the least recently used have left"
        for handle in [engine.submit(prompt, str(i % 6)) for i, prompt in enumerate(cases.prompts(20))]:
            handle.result(WAIT)
            assert engine.status().cpu_bytes <= limit


def test_vectors(tmp_path, maker):
    """IA3, with a model that has adapters of its own, which take no part."""
    kind = {"method": "ia3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    folders = [maker.save(tmp_path / str(i), i, kind) for i in range(3)]
    model = PeftModel.from_pretrained(cases.tiny_base(), folders[0], adapter_name="own")
    oracle, prompts = cases.Alone(), cases.prompts(12)
    with cases.engine(model, slots=2) as engine:
        for i, folder in enumerate(folders):
            engine.add_adapter(str(i), folder)
        handles = [engine.submit(prompt, str(i % 3)) for i, prompt in enumerate(prompts)]
        bare = engine.submit(prompts[0])
        answers = [handle.result(WAIT) for handle in handles]
        assert bare.result(WAIT) == oracle.answers(None, prompts[:1])[0]
    for i, folder in enumerate(folders):
        assert answers[i::3] == oracle.answers(folder, prompts[i::3])
    assert list(model.peft_config) == ["own"]


def test_embeddings_that_were_saved_with_an_adapter(tmp_path):
    model = get_peft_model(cases.tiny_base(), cases.lora_config(cases.ENDS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "embedding_A" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    prompts = cases.prompts(3)
    with cases.engine() as engine:
        engine.add_adapter("disk", tmp_path)
        engine.add_adapter("memory", get_peft_model_state_dict(model), model.peft_config["default"])
        for name in ("disk", "memory"):
            answers = [handle.result(WAIT) for handle in [engine.submit(prompt, name) for prompt in prompts]]
            assert answers == cases.Alone().answers(tmp_path, prompts)
        assert "base_layer" not in str([v.tensors.keys() for v in engine._cpu._held.values()])


# ---- life ----


def test_the_model_is_given_back(folders):
    base = cases.tiny_base()
    attention = base.config._attn_implementation
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
    engine = cases.engine(base, slots=2)
    engine.add_adapter("x", folders[0])
    for _ in range(2):  # it can be started again
        with engine:
            engine.submit([5, 6, 7], "x").result(WAIT)
        assert [name for name, _ in base.named_modules() if "lora" in name] == []
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, before)
    assert base.config._attn_implementation == attention


def test_stopping(folders):
    engine = cases.engine(slots=1)
    engine.add_adapter("x", folders[0])
    engine.add_adapter("y", folders[1])
    with pytest.raises(EngineStoppedError, match="not started"):
        engine.submit([5], "x")
    engine.start()
    with pytest.raises(ServingError, match="running already"):
        engine.start()
    drained = [engine.submit([5, 6], name) for name in "xyx"]
    engine.stop()
    assert all(len(handle.result(0)) > 0 for handle in drained)
    engine.stop()
    with pytest.raises(EngineStoppedError, match="was stopped; start"):
        engine.submit([5], "x")
    engine.start()
    handles = [engine.submit([5, 6], name, **LONG) for name in "xyx"]
    next(iter(handles[0]))
    engine.stop(drain=False)
    for handle in handles:
        with pytest.raises(EngineStoppedError, match="stopped before this request had ended"):
            handle.result(0)


def test_an_error_in_the_block_does_not_wait(folders):
    engine, handles = cases.engine(slots=1), []

    def interrupted():
        with engine:
            engine.add_adapter("x", folders[0])
            handles.append(engine.submit([5, 6], "x", **LONG))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert isinstance(handles[0].exception(0), EngineStoppedError)


def test_a_generation_that_dies_tells_everybody(folders, monkeypatch):
    """An error in the model itself, such as memory that is not there, ends the loop of transformers."""
    engine = cases.engine(slots=1)
    engine.add_adapter("x", folders[0])
    engine.add_adapter("y", folders[1])
    with engine:
        running = engine.submit([5, 6], "x", **LONG)
        next(iter(running))
        waiting = engine.submit([5, 6], "y")

        def fail(*args, **kwargs):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(engine._model_slots.base_model.model, "forward", fail)
        for handle in (running, waiting):
            assert "out of memory" in str(handle.exception(WAIT))
        with pytest.raises(EngineStoppedError, match=r"generation has ended.*out of memory"):
            engine.submit([5, 6], "x")


def test_arguments():
    with pytest.raises(ValueError, match="cpu_bytes must be None or a number of bytes, got -1"):
        cases.engine(cpu_bytes=-1)
    with pytest.raises(ValueError, match="number of slots"):
        cases.engine(slots=0)
    sampled = cases.generation_config(do_sample=True, num_return_sequences=2)
    with pytest.raises(ValueError, match="num_return_sequences=2: an engine gives one answer a request"):
        Engine(cases.tiny_base(), generation_config=sampled)


def test_nothing_is_left_of_what_was_served(folders, maker):
    """Requests, versions and loads come and go; the tensors and bytes held stay the same, and no thread is left."""
    rng = random.Random(0)
    prompts = cases.prompts(5)
    config, weights = maker.weights(0, cases.LORA_KINDS[0])

    def held():
        gc.collect()
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_meta]
        return len(tensors), sum(t.nbytes for t in tensors)

    limit = sum(folder.joinpath("adapter_model.safetensors").stat().st_size for folder in folders[:3]) * 2
    counts = []
    with cases.no_threads_left(), cases.engine(slots=2, cpu_bytes=limit) as engine:
        for i in (0, 1, 2):
            engine.add_adapter(f"a{i}", folders[i])
        engine.add_adapter("x", weights, config)
        for turn in range(60):
            name = rng.choice(["a0", "a1", "a2", "x"])
            handle = engine.submit(rng.choice(prompts), name)
            if turn % 3 == 0:
                engine.replace_adapter("x", weights, config)
            if turn % 7 == 0:
                handle.cancel()
            handle.exception(WAIT)
            if turn in (29, 59):
                for last in ("x", "a0", "a1"):  # to the same content
                    engine.submit(prompts[0], last).result(WAIT)
                handle = None
                counts.append(held())
    assert counts[0] == counts[1]


def test_serving_beside_an_adapter_of_another_model(folders):
    """Two engines of two models in one process know nothing of each other."""
    with cases.engine(slots=1) as one, cases.engine(slots=1) as two:
        one.add_adapter("x", folders[0])
        two.add_adapter("x", folders[1])
        first, second = one.submit([5, 6, 7], "x"), two.submit([5, 6, 7], "x")
        assert first.result(WAIT) != second.result(WAIT)
