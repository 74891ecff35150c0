"""A tiny model, adapters for it on disk, and what it answers with one of them alone."""

import copy
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from fastpeft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from fastpeft.checkpoint import get_peft_model_state_dict, save_adapter_files
from fastpeft.serving import Engine

VOCAB = 97
NEW_TOKENS = 6
TARGETS = ["q_proj", "v_proj", "down_proj"]

PROMPT = [5, 6, 7, 8]
WAIT = 60  # seconds after which a test gives up

# Plain LoRA of several ranks and scalings, rsLoRA, DoRA, other targets, and a head of its own.
LORA_KINDS: list[dict[str, Any]] = [
    {"r": 4, "target_modules": TARGETS},
    {"r": 8, "lora_alpha": 4, "target_modules": TARGETS},
    {"r": 3, "use_rslora": True, "target_modules": TARGETS},
    {"r": 4, "use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    {"r": 2, "target_modules": ["o_proj", "gate_proj"], "modules_to_save": ["lm_head"]},
]
ENDS = {"r": 3, "target_modules": ["embed_tokens", "k_proj", "lm_head"]}  # what comes first and what comes last


def tiny_base(dtype: torch.dtype = torch.float64, sliding_window: int | None = None) -> Any:
    """A Llama of 2 layers, or a Mistral whose layers see a window of so many tokens.

    In fp64, so that no two paths of computation can differ in which token is the likeliest.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config_class = LlamaConfig if sliding_window is None else MistralConfig
        config = config_class(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.1,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **({} if sliding_window is None else {"sliding_window": sliding_window}),
        )
        model_class = LlamaForCausalLM if sliding_window is None else MistralForCausalLM
        return model_class(config).to(dtype).eval()


def generation_config(**options: Any) -> GenerationConfig:
    return GenerationConfig(
        **{"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": 2, "pad_token_id": 0} | options
    )


def batching_config(**options: Any) -> ContinuousBatchingConfig:
    """A small cache with pages of 4 tokens, so that prompts of a few tokens share blocks."""
    return ContinuousBatchingConfig(**{"page_size": 4, "num_blocks": 512, "max_batch_tokens": 128} | options)


def engine(base: nn.Module | None = None, slots: int = 4, **options: Any) -> Engine:
    batching = options.pop("continuous_batching_config", None) or batching_config()
    return Engine(
        tiny_base() if base is None else base,
        slots=slots,
        generation_config=generation_config(),
        continuous_batching_config=batching,
        **options,
    )


class AdapterMaker:
    """Makes random adapters of the tiny model, strong enough to change what it says."""

    def __init__(self) -> None:
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def weights(self, seed: int, kind: dict[str, Any]) -> tuple[PeftConfig, dict[str, Tensor]]:
        """The config and the weights of an adapter; equal seeds and kinds give equal ones."""
        config = lora_config(kind)
        key = config.signature()
        if key not in self._shapes:
            model = get_peft_model(tiny_base(), copy.deepcopy(config))
            own = get_peft_model_state_dict(model, save_embedding_layers=False)
            self._shapes[key] = {name: tuple(t.shape) for name, t in own.items()}
        generator = torch.Generator().manual_seed(seed)
        return config, {
            name: torch.randn(shape, generator=generator) * 0.2 + (1.0 if "ia3" in name or "magnitude" in name else 0.0)
            for name, shape in self._shapes[key].items()
        }

    def save(self, folder: Path, seed: int, kind: dict[str, Any]) -> Path:
        save_adapter_files(folder, *self.weights(seed, kind))
        return folder


def lora_config(kind: dict[str, Any]) -> PeftConfig:
    if kind.get("method") == "ia3":
        options = {key: value for key, value in kind.items() if key != "method"}
        return IA3Config(task_type="CAUSAL_LM", **options)
    return LoraConfig(task_type="CAUSAL_LM", **kind)


def prompts(count: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    """Random prompts of 3 to 11 tokens, after `shared` tokens that all of them begin with."""
    rng = random.Random(seed)
    start = [rng.randrange(3, VOCAB) for _ in range(shared)]
    return [start + [rng.randrange(3, VOCAB) for _ in range(rng.randrange(3, 12))] for _ in range(count)]


class Alone:
    """What the model answers with one adapter alone: PEFT's way of loading it, transformers' own engine, no sharing."""

    def __init__(self) -> None:
        self._model: PeftModel | None = None
        self._base = tiny_base()

    def answers(self, folder: Path | None, inputs: Sequence[list[int]]) -> list[list[int]]:
        """One answer a prompt, by the adapter in a folder or by the base model alone."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if folder is None:
                return self._run(tiny_base(), inputs)
            if self._model is None:
                self._model = PeftModel.from_pretrained(self._base, folder, adapter_name="alone")
            else:
                self._model.load_adapter(folder, "alone")
            self._model.set_adapter("alone", inference_mode=True)
            try:
                return self._run(self._model.get_base_model(), inputs)
            finally:
                self._model.delete_adapter("alone")

    @staticmethod
    def _run(base: Any, inputs: Sequence[list[int]]) -> list[list[int]]:
        config = batching_config(allow_block_sharing=False, num_blocks=128)
        manager = base.init_continuous_batching(generation_config(), config)
        manager.start()
        ids, answers = [manager.add_request(tokens) for tokens in inputs], {}
        while len(answers) < len(ids):
            output = manager.get_result(timeout=10)
            assert output is not None
            assert output.error is None
            answers[output.request_id] = output.generated_tokens
        manager.stop(block=False)
        manager.cancel_request("")  # wakes the loop, which else looks ten times a second whether it is to stop
        manager.join(time.perf_counter())
        return [answers[request_id] for request_id in ids]


def check_others_go_on(engine: Engine, answer: list[int], around: Callable[[], None]) -> None:
    """Requests for "good" before, while and after something fails get their answers."""
    before = [engine.submit(PROMPT, "good") for _ in range(3)]
    around()
    after = engine.submit(PROMPT, "good")
    assert [handle.result(WAIT) for handle in (*before, after)] == [answer] * 4
    assert engine.status().waiting == engine.status().running == 0


@contextmanager
def held(engine: Engine) -> Iterator[Callable[[int], None]]:
    """The generation makes no step but those that are allowed: on no machine does a request end too soon.

    Adapters are loaded and requests cancelled meanwhile; what is given allows so many steps more.
    """
    scheduler = engine._manager.batch_processor.scheduler
    has_pending_requests, allowed = scheduler.has_pending_requests, threading.Semaphore(0)
    scheduler.has_pending_requests = lambda: has_pending_requests() and allowed.acquire(blocking=False)
    try:
        yield allowed.release
    finally:
        scheduler.has_pending_requests = has_pending_requests


@contextmanager
def no_threads_left() -> Iterator[None]:
    """Whatever ran inside has ended the engine's threads and that of the generation."""
    yield
    for thread in threading.enumerate():
        if "settle" in thread.name:  # ends by itself
            thread.join(60)
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if "fastpeft" in name or "generation" in name]
