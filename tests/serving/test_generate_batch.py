"""generate_batch with an adapter per prompt."""

import pytest
import serving_cases as cases
import torch
from transformers import GenerationConfig

from fastpeft import PeftModel
from fastpeft.serving import Engine


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, maker = tmp_path_factory.mktemp("adapters"), cases.AdapterMaker()
    return [maker.save(root / str(i), i, kind) for i, kind in enumerate(cases.LORA_KINDS)]


@pytest.fixture
def model(folders):
    model = PeftModel.from_pretrained(cases.tiny_base(), folders[0], adapter_name="0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, str(i))
    return model


def test_each_prompt_takes_its_adapter(model, folders):
    prompts = cases.prompts(18, shared=8)
    names = [(*"01234", None)[i % 6] for i in range(18)]
    model.train()  # generation is in eval mode all the same
    outputs = model.generate_batch(
        prompts, cases.generation_config(), cases.batching_config(), adapter_names=names, progress_bar=False
    )
    assert [output.prompt_ids for output in outputs.values()] == prompts, "in the order of the prompts"
    oracle = cases.Alone()
    answers = [output.generated_tokens for output in outputs.values()]
    for i in range(6):
        assert answers[i::6] == oracle.answers(folders[i] if i < 5 else None, prompts[i::6]), i


def test_weights_and_base(model):
    prompt = cases.prompts(1)[0]
    rows = [{"0": 0.5, "1": 0.5}, {"0": 1.0}, "0", "__base__", None]
    outputs = model.generate_batch(
        [prompt] * 5, cases.generation_config(), cases.batching_config(), adapter_names=rows, max_new_tokens=4
    )
    mixed, weighted, plain, base, none = (output.generated_tokens for output in outputs.values())
    assert weighted == plain
    assert base == none
    ids = torch.tensor([prompt])
    for adapter, answer in ((rows[0], mixed), ("0", plain), ("__base__", base)):
        config = cases.generation_config(max_new_tokens=4)
        want = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, adapter_names=[adapter]
        )
        assert answer == want[0, len(prompt) :].tolist()


def test_several_answers_to_a_prompt(model):
    prompts = cases.prompts(3)
    config = cases.generation_config(do_sample=True, top_k=1, num_return_sequences=2)
    outputs = model.generate_batch(prompts, config, cases.batching_config(), adapter_names=["0", "1", None])
    answers = [output.generated_tokens for output in outputs.values()]
    assert answers[0::2] == answers[1::2]
    assert len(outputs) == 6


def test_a_manager_that_is_kept_does_not_keep_old_weights(model, folders):
    """The cache outlives the call; an adapter that was changed meanwhile must not find its old blocks."""
    prompt = cases.prompts(1, shared=12)[0]
    options = {"adapter_names": ["0"], "persistent_manager": True}
    config = cases.generation_config(), cases.batching_config()
    [first] = model.generate_batch([prompt], *config, **options).values()
    [again] = model.generate_batch([prompt], *config, **options).values()
    assert first.generated_tokens == again.generated_tokens
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".0." in name and "lora_B" in name:
                parameter.mul_(-1)
    [changed] = model.generate_batch([prompt], *config, **options).values()
    model.get_base_model().destroy_cached_continuous_batching_manager()
    [fresh] = model.generate_batch([prompt], *config, adapter_names=["0"]).values()
    assert changed.generated_tokens == fresh.generated_tokens != first.generated_tokens


def test_without_names_it_is_that_of_transformers(model, folders):
    prompts = cases.prompts(3)
    model.set_adapter("1")
    outputs = model.generate_batch(prompts, cases.generation_config(), cases.batching_config(), max_new_tokens=3)
    answers = [output.generated_tokens for output in outputs.values()]
    assert answers == [answer[:3] for answer in cases.Alone().answers(folders[1], prompts)]


def test_a_manager_that_is_kept_knows_which_adapters_were_active(model):
    prompt = cases.prompts(1, shared=12)[0]
    base = model.get_base_model()

    def answer(**options):
        config = cases.generation_config(eos_token_id=-1), cases.batching_config()
        return [output.generated_tokens for output in model.generate_batch([prompt], *config, **options).values()]

    def everything(**options):
        answers = []
        for active in ("0", "1", ["0", "1"]):
            model.base_model.set_adapter(active)
            answers.append(answer(**options))
        with model.disable_adapter():
            answers.append(answer(**options))
        return answers

    wanted = everything()
    assert wanted[0] != wanted[1]
    base.generate_batch([prompt], cases.generation_config(), cases.batching_config(), persistent_manager=True)
    assert everything() == wanted, "the blocks of a manager that knows no adapters are not used"
    base.generate_batch([prompt], cases.generation_config(), cases.batching_config(), persistent_manager=True)
    assert everything(persistent_manager=True) == wanted
    assert answer(adapter_names=["1"], persistent_manager=True) == wanted[1]
    model.set_adapter("0")
    assert answer() == wanted[0], "also where the kept manager is used once more"
    model.base_model.merge_adapter(["0"])
    with pytest.raises(ValueError, match=r"persistent_manager=True cannot be used while \['0'\] are merged"):
        answer(persistent_manager=True)
    base.destroy_cached_continuous_batching_manager()
    assert answer() == wanted[0]


def test_arguments(model):
    call = {"generation_config": cases.generation_config(), "continuous_batching_config": cases.batching_config()}
    with pytest.raises(ValueError, match=r"one entry a prompt: expected 2, got \['0'\]"):
        model.generate_batch([[5], [6]], adapter_names=["0"], **call)
    with pytest.raises(ValueError, match="one entry a prompt: expected 1, got '0'"):
        model.generate_batch([[5]], adapter_names="0", **call)
    with pytest.raises(ValueError, match=r"no adapter \['nobody'\]"):
        model.generate_batch([[5]], adapter_names=["nobody"], **call)
    with pytest.raises(TypeError, match=r"does not know \['temprature'\]"):
        model.generate_batch([[5]], adapter_names=["0"], temprature=1.0, **call)
    assert model.generate_batch([], adapter_names=[], **call) == {}
    model.base_model.merge_adapter(["0"])
    with pytest.raises(ValueError, match=r"cannot be used while \['0'\] are merged"):
        model.generate_batch([[5]], adapter_names=["1"], **call)


def test_a_generation_that_breaks_down(model, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.get_base_model().model, "forward", fail)
    with pytest.raises(RuntimeError, match=r"broke down .*out of memory"):
        model.generate_batch([[5]], cases.generation_config(), cases.batching_config(), adapter_names=["0"])


IGNORED = {
    "num_beams": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "guidance_scale": 1.5, "min_new_tokens": 3,
    "min_length": 9, "bad_words_ids": [[3]], "stop_strings": ["x"], "sequence_bias": {(3,): -1.0}, "max_time": 1.0,
    "forced_eos_token_id": 2, "prompt_lookup_num_tokens": 2, "output_scores": True, "remove_invalid_values": True,
}  # fmt: skip


@pytest.mark.parametrize("option", IGNORED)
def test_options_that_would_be_ignored(model, option):
    config, batching = cases.generation_config(**{option: IGNORED[option]}), cases.batching_config()
    message = rf"^generation_config has options .* not honour: {option}=.*model\.generate"
    with pytest.raises(ValueError, match=message):
        model.generate_batch([[5, 6]], config, batching, adapter_names=["0"])
    with pytest.raises(ValueError, match=message):
        Engine(cases.tiny_base(), generation_config=config, continuous_batching_config=batching)


def test_options_of_the_models_own_config(model):
    base = cases.tiny_base()
    for own in (base, model.get_base_model()):
        own.generation_config.update(num_beams=2, repetition_penalty=1.3)
    message = "the model's own generation_config has .*: num_beams=2, repetition_penalty=1.3"
    with pytest.raises(ValueError, match=message):
        model.generate_batch([[5, 6]], adapter_names=["0"], max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        Engine(base)
    config = cases.generation_config(max_new_tokens=None, max_length=9)
    with pytest.raises(ValueError, match="max_length=9 is not what continuous batching goes by: pass max_new_tokens"):
        model.generate_batch([[5, 6]], config, adapter_names=["0"])


def test_options_that_ask_for_nothing():
    """As they stand in the generation_config.json of many models."""
    own = {"bos_token_id": 1, "max_length": 4096, "cache_implementation": "hybrid", "temperature": 0.6, "top_k": 20}
    Engine(cases.tiny_base(), generation_config=GenerationConfig(**own, chat_format="x"))
    Engine(cases.tiny_base(), generation_config=GenerationConfig(**GenerationConfig._get_default_generation_params()))


@pytest.mark.parametrize(
    "options",
    [{"top_h": 0.3}, {"min_p": 0.4}, {"typical_p": 0.4}, {"epsilon_cutoff": 0.05}, {"eta_cutoff": 0.05}, {"top_k": 3}],
    ids=repr,
)
def test_filters_of_a_distribution_are_honoured(options):
    """They are called with the last token of each request in place of its text, and give what they give with it."""
    base, scores = cases.tiny_base(), torch.randn(3, cases.VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    [*_, last] = base._get_logits_processor(cases.generation_config(do_sample=True, **options))
    filtered = last(torch.tensor([5, 6, 7]), scores)
    assert torch.equal(filtered, last(torch.ones(3, 4, dtype=torch.long), scores))
    assert 1 <= filtered.isfinite().sum() < filtered.numel()


def test_suppressed_tokens_do_not_come(model):
    prompts, batching = cases.prompts(3), cases.batching_config()
    plain = model.generate_batch(prompts, cases.generation_config(), batching, adapter_names=["0"] * 3)
    seen = sorted({token for output in plain.values() for token in output.generated_tokens} - {2})
    config = cases.generation_config(suppress_tokens=seen, renormalize_logits=True)
    outputs = model.generate_batch(prompts, config, batching, adapter_names=["0"] * 3)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        ids = torch.tensor([prompt])
        want = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, adapter_names=["0"]
        )
        assert output.generated_tokens == want[0, len(prompt) :].tolist()
        assert not set(seen) & set(output.generated_tokens)
