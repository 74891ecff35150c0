"""What is wrong with one adapter or one request is an error of that request. The others go on."""

import pytest
import serving_cases as cases
import torch
from serving_cases import PROMPT, WAIT, check_others_go_on

from fastpeft.serving import (
    AdapterLoadError,
    AdapterTooLargeError,
    RequestFailedError,
    UnknownAdapterError,
)


def test_an_adapter_larger_than_the_budget(tmp_path, maker, good, answer):
    big = maker.save(tmp_path / "big", 1, cases.LORA_KINDS[4])  # with a head of its own
    limit = 2 * good.joinpath("adapter_model.safetensors").stat().st_size
    assert big.joinpath("adapter_model.safetensors").stat().st_size > limit
    with cases.engine(slots=2, cpu_bytes=limit) as engine:
        engine.add_adapter("good", good)
        engine.add_adapter("big", big)

        def use():
            for get in (engine.submit(PROMPT, "big").result, engine.prefetch("big").result):
                with pytest.raises(AdapterTooLargeError, match=f"adapter 'big' has .* may hold {limit}.*cpu_bytes"):
                    get(WAIT)

        check_others_go_on(engine, answer, use)
        config, weights = maker.weights(1, cases.LORA_KINDS[4])
        with pytest.raises(AdapterTooLargeError, match="adapter 'given' has"):
            engine.add_adapter("given", weights, config)
        assert set(engine.adapters()) == {"good", "big"}


@pytest.mark.parametrize("name", ["nobody", "x" * 10_000, "", "../..", "\0", 7], ids=repr)
def test_unknown_names(engine, answer, name):
    def use():
        with pytest.raises(UnknownAdapterError, match=r"no adapter .*registered are 'good'") as info:
            engine.submit(PROMPT, name)
        assert len(str(info.value)) < 300

    check_others_go_on(engine, answer, use)
    for method in (engine.pin, engine.prefetch, engine.remove_adapter, engine.unpin):
        with pytest.raises(UnknownAdapterError):
            method(name)


def test_a_name_that_is_too_long(engine, good):
    with pytest.raises(UnknownAdapterError, match=r"1 to 256 characters, got .*\(10002 characters\)") as info:
        engine.add_adapter("x" * 10_000, good)
    assert len(str(info.value)) < 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": []}, "input_ids must be the tokens of one prompt"),
        ({"input_ids": "hello"}, "input_ids must be the tokens of one prompt"),
        ({"input_ids": None}, "input_ids must be the tokens of one prompt"),
        ({"input_ids": [1.5]}, "integers; got 1.5"),
        ({"input_ids": [[1, 2], [3, 4]]}, "integers; got"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, "integers; got"),
        ({"input_ids": [cases.VOCAB]}, "token 97 is not in the model's vocabulary of 97"),
        ({"input_ids": [-1]}, "token -1 is not in the model's vocabulary"),
        ({"input_ids": PROMPT, "max_new_tokens": 0}, "max_new_tokens must be a positive integer"),
        ({"input_ids": PROMPT, "max_new_tokens": 2.0}, "max_new_tokens must be a positive integer"),
        ({"input_ids": [5] * 100, "max_new_tokens": 29}, "more than the 128 tokens that the model has positions for"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_served(engine, answer, arguments, message):
    """Each of them would end the generation of all others, were it let through."""

    def use():
        with pytest.raises(ValueError, match=message):
            engine.submit(adapter="good", **arguments)

    check_others_go_on(engine, answer, use)


def test_a_request_larger_than_the_cache(good):
    with cases.engine(continuous_batching_config=cases.batching_config(num_blocks=8)) as engine:
        engine.add_adapter("good", good)
        with pytest.raises(ValueError, match="more than the 32 tokens that the cache keeps of one request"):
            engine.submit([5] * 25, "good", max_new_tokens=8)
        handles = [engine.submit([5] * 24, "good", max_new_tokens=8, eos_token_id=-1) for _ in range(3)]
        assert len({tuple(handle.result(WAIT)) for handle in handles}) == 1, "one at a time, in turn"


def test_length_has_to_be_said(good):
    with cases.engine() as engine:
        engine._limits._max_new_tokens = None
        with pytest.raises(ValueError, match="pass max_new_tokens"):
            engine.submit(PROMPT)


def test_weights_in_memory_that_are_not_finite(engine, maker):
    config, weights = maker.weights(1, cases.LORA_KINDS[0])
    weights[key := next(iter(weights))][0, 0] = float("inf")
    with pytest.raises(ValueError, match=f"{key} has values that are NaN or infinite"):
        engine.add_adapter("bad", weights, config)
    assert list(engine.adapters()) == ["good"]


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_an_adapter_that_overflows_fails_alone(maker, good, dtype, options):
    """Its weights are finite, and what the layers make of them is not. That must neither reach the others nor stay."""
    config, weights = maker.weights(3, cases.LORA_KINDS[0])
    huge = {key: torch.full_like(value, 3e38) * value.sign() for key, value in weights.items()}
    other = [9, 10, 11, 12, 13, 14]
    work = [(PROMPT, "good"), (other, "good"), (PROMPT, None), (other, None)]

    def engine():
        engine = cases.engine(cases.tiny_base(dtype))
        engine._generation_config.update(**options)
        engine.add_adapter("good", good)
        return engine

    with engine() as fresh:
        wanted = [fresh.submit(prompt, name).result(WAIT) for prompt, name in work]
    with engine() as beside:
        beside.add_adapter("huge", huge, config)
        beside.pin("huge").result(WAIT), beside.pin("good").result(WAIT)
        for _ in range(2):  # the second time from the cache
            bad, answers = [], []
            for prompt, name in work:
                bad.append(beside.submit(prompt, "huge"))
                answers.append(beside.submit(prompt, name))
            assert [handle.result(WAIT) for handle in answers] == wanted
            for handle in bad:
                with pytest.raises(RequestFailedError, match="adapter 'huge': its values overflow"):
                    handle.result(WAIT)
                assert handle.tokens() == []


def test_another_method_is_refused_when_it_is_registered(tmp_path, maker, good, answer):
    """Whichever is asked for first: what was registered first is served."""
    kind = {"method": "ia3", "target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}
    other = maker.save(tmp_path / "ia3", 1, kind)
    with cases.engine() as engine:
        engine.add_adapter("first", other)
        engine.replace_adapter("first", good)  # nothing else is there yet
        with pytest.raises(AdapterLoadError, match=r"'ia3' is of the method IA3, and this engine serves LORA"):
            engine.add_adapter("ia3", other)
        with pytest.raises(AdapterLoadError, match="is of the method IA3"):
            engine.add_adapter("ia3", *reversed(maker.weights(1, kind)))
        assert engine.submit(PROMPT, "first").result(WAIT) == answer
        with pytest.raises(AdapterLoadError, match="is of the method IA3"):
            engine.replace_adapter("first", other)
        assert engine.submit(PROMPT, "first").result(WAIT) == answer
        assert list(engine.adapters()) == ["first"]
