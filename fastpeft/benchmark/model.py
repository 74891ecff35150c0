"""Suites "model" and "saved-model": a training step of a small Llama with LoRA on every linear."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fastpeft.benchmark.cases import DTYPES, Case, Libraries
from fastpeft.benchmark.libraries import FROZEN, OURS, lora_model
from fastpeft.benchmark.memory import saved_bytes
from fastpeft.benchmark.timing import Step
from fastpeft.recompute import recompute_mlp


@dataclass(frozen=True)
class LlamaSize:
    """A Llama configuration; by default the small one that the project's figures are about."""

    layers: int = 8
    hidden: int = 512
    intermediate: int = 1376
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 8192

    def build(self, dtype: torch.dtype, device: str, seed: int = 0) -> nn.Module:
        """The model with random weights, the same for the same seed."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            num_hidden_layers=self.layers, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, vocab_size=self.vocabulary,
            use_cache=False,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = LlamaForCausalLM(config)
        return model.to(device, dtype)


@dataclass(frozen=True)
class ModelCase(Case):
    """One step of training: forward, backward, AdamW. Base in `dtype`, adapters in fp32, under bf16 autocast or not.

    The frozen base runs forward and backward, its embeddings' output wanting a gradient, and has nothing to update.
    """

    suite: ClassVar[str] = "model"

    dtype: str
    dropout: float
    autocast: bool = False
    batch: int = 4
    tokens: int = 256
    r: int = 16
    size: LlamaSize = LlamaSize()

    @property
    def name(self) -> str:
        return f"{self.dtype}{'-autocast' if self.autocast else ''}-p{self.dropout}"

    def base(self) -> nn.Module:
        return self.size.build(DTYPES[self.dtype], self.device)

    def frozen(self) -> nn.Module:
        """The base in training mode, without an adapter; its layers still pass a gradient down."""
        base: Any = self.base().requires_grad_(False).train()
        base.get_input_embeddings().register_forward_hook(lambda module, ids, out: out.requires_grad_())
        return cast(nn.Module, base)

    def model(self, library: ModuleType) -> nn.Module:
        wrapped: nn.Module = lora_model(library, self.base(), r=self.r, dropout=self.dropout)
        return wrapped

    def tokens_of_batch(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, self.tokens)
        return torch.randint(self.size.vocabulary, shape, generator=generator).to(self.device)

    def steps(self, found: Libraries) -> dict[str, Step]:
        models = {FROZEN: self.frozen(), **{name: self.model(library) for name, library in found.items()}}
        return {name: self._step(model) for name, model in models.items()}

    def _step(self, model: nn.Module) -> Step:
        ids = self.tokens_of_batch()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

        def step() -> None:
            with self.casting():
                loss = _loss(model, ids)
            loss.backward()  # type: ignore[no-untyped-call]
            if optimizer:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return step

    def casting(self) -> AbstractContextManager[object]:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16) if self.autocast else nullcontext()

    def facts(self, found: Libraries) -> dict[str, dict[str, Any]]:
        """The first loss with dropout off: contenders that differ here do not run the same model."""
        facts = {}
        ids = self.tokens_of_batch()
        for name, library in found.items():
            with torch.no_grad(), self.casting():
                facts[name] = {"first_loss": float(_loss(self.model(library).eval(), ids))}
        return facts


@dataclass(frozen=True)
class SavedModelCase(ModelCase):
    """What the forward of that step keeps for its backward; ours also under `recompute_mlp`."""

    suite: ClassVar[str] = "saved-model"

    def steps(self, found: Libraries) -> dict[str, Step]:
        return {}

    def facts(self, found: Libraries) -> dict[str, dict[str, Any]]:
        facts = {}
        for name, library in found.items():
            facts[name] = self._kept(self.model(library))
            if name == OURS:
                model = self.model(library)
                recompute_mlp(model)
                facts[f"{name}+recompute"] = self._kept(model)
        return facts

    def _kept(self, model: nn.Module) -> dict[str, Any]:
        ids = self.tokens_of_batch()
        there = [*model.parameters(), *model.buffers()]
        with self.casting():
            saved = saved_bytes(partial(_loss, model, ids), inputs=[ids], parameters=there)
        return {"saved": {**saved.to_dict(), "own_per_token": saved.own / ids.numel()}}


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def model_cases(quick: bool, device: str) -> Iterator[ModelCase]:
    for dtype in ("bf16",) if quick else ("fp32", "bf16"):
        for dropout in (0.0,) if quick else (0.0, 0.1):
            yield ModelCase(dtype=dtype, dropout=dropout, device=device)
    for dropout in () if quick else (0.0, 0.1):
        yield ModelCase(dtype="bf16", dropout=dropout, autocast=True, device=device)


def saved_model_cases(quick: bool, device: str) -> Iterator[SavedModelCase]:
    for case in model_cases(quick, device):
        yield SavedModelCase(dtype=case.dtype, dropout=case.dropout, autocast=case.autocast, device=device)
