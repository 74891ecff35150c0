"""Suites "routed" and "routed-generate": each row of a batch takes its own adapter, `adapter_names=[...]`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.benchmark.cases import DTYPES, Case, Effort, Libraries
from fastpeft.benchmark.libraries import FROZEN, REFERENCE, frozen_linear, randomise_adapters
from fastpeft.benchmark.model import LlamaSize
from fastpeft.benchmark.timing import Step

ROWS = 64  # of every batch; a row is one sequence
LINEARS = 4  # one after the other: what a batch costs once, such as sorting its rows, is shared as in a model


@dataclass(frozen=True)
class RoutedCase(Case):
    """One LoRA linear out of a chain: frozen (N, N) bases in `dtype`, fp32 adapters, spread evenly over 64 rows.

    x is (64, tokens, N): one token a row as in decoding, or a prompt. Every contender is called as
    `model(x, adapter_names=[...])`, the frozen base without the names. Times are those of one linear.
    """

    suite: ClassVar[str] = "routed"
    repeats: ClassVar[int] = LINEARS

    adapters: int
    dtype: str
    tokens: int = 1
    N: int = 1024
    r: int = 16

    @property
    def name(self) -> str:
        phase = "decode" if self.tokens == 1 else f"prefill{self.tokens}"
        return f"{self.dtype}-{phase}-A{self.adapters}"

    @property
    def names(self) -> list[str]:
        return names_of_rows(self.adapters)

    def base(self) -> nn.Module:
        dtype = DTYPES[self.dtype]
        return nn.Sequential(*(frozen_linear(self.N, self.N, dtype, self.device, seed) for seed in range(LINEARS)))

    def model(self, library: ModuleType) -> Any:
        return many_adapters(library, self.base(), self.adapters, r=self.r, targets=[str(i) for i in range(LINEARS)])

    def batch(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn((ROWS, self.tokens, self.N), generator=generator)
        return x.to(self.device, DTYPES[self.dtype])

    def steps(self, found: Libraries) -> dict[str, Step]:
        x, names, frozen = self.batch(), self.names, self.base()

        def step_of(model: Any) -> Step:
            return torch.no_grad()(lambda: model(x, adapter_names=names))

        models = {name: step_of(self.model(library)) for name, library in found.items()}
        return {FROZEN: torch.no_grad()(lambda: frozen(x)), **models}

    def facts(self, found: Libraries) -> dict[str, dict[str, Any]]:
        """Relative error of the whole chain, in the Frobenius norm, against float64."""
        facts = {}
        with torch.no_grad():
            for name, library in found.items():
                model = self.model(library)
                exact = self._exact(model)
                error = model(self.batch(), adapter_names=self.names).double() - exact
                facts[name] = {"output_error": float(error.norm() / exact.norm())}
        return facts

    def _exact(self, model: Any) -> Tensor:
        x = self.batch().double()
        for layer in model.base_model.model:
            A, B = (
                torch.stack([factors[name].weight.double() for name in self.names])
                for factors in (layer.lora_A, layer.lora_B)
            )  # (ROWS, r, N), (ROWS, N, r)
            scaling = layer.scaling[self.names[0]]
            x = x @ layer.get_base_layer().weight.double().T + scaling * (x @ A.mT) @ B.mT
        return x


@dataclass(frozen=True)
class RoutedGenerateCase(Case):
    """`generate` of the small Llama, greedy, with its cache: `rows` prompts of `prompt` tokens, `new` tokens each.

    Base in `dtype`, fp32 adapters on every linear, spread evenly over the rows. The base alone generates without them,
    its weights not marked as frozen: torch multiplies a frozen head row by row after the prompt, which is no floor.
    """

    suite: ClassVar[str] = "routed-generate"
    effort: ClassVar[Effort | None] = Effort(budget_s=15.0, warmup=1, min_rounds=5, max_rounds=20)

    adapters: int
    dtype: str
    rows: int = ROWS
    prompt: int = 16
    new: int = 16
    r: int = 16
    size: LlamaSize = field(default_factory=LlamaSize)

    @property
    def name(self) -> str:
        return f"{self.dtype}-A{self.adapters}-{self.rows}rows"

    def base(self) -> nn.Module:
        return self.size.build(DTYPES[self.dtype], self.device).eval()

    def model(self, library: ModuleType) -> Any:
        return many_adapters(library, self.base(), self.adapters, r=self.r)

    def generate(self, model: Any, **names: Any) -> Tensor:
        """(rows, prompt + new) token ids; no row ends before the others."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, self.size.vocabulary, (self.rows, self.prompt), generator=generator).to(self.device)
        tokens: Tensor = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, pad_token_id=0,
            max_new_tokens=self.new, min_new_tokens=self.new, **names,
        )  # fmt: skip
        return tokens

    def steps(self, found: Libraries) -> dict[str, Step]:
        names = names_of_rows(self.adapters, self.rows)
        models = {name: self.model(library) for name, library in found.items()}
        frozen = partial(self.generate, self.base())
        return {
            FROZEN: frozen,
            **{name: partial(self.generate, model, adapter_names=names) for name, model in models.items()},
        }

    def facts(self, found: Libraries) -> dict[str, dict[str, Any]]:
        """Share of the new tokens that are reference PEFT's. Greedy choices between equals part ways by rounding."""
        names = names_of_rows(self.adapters, self.rows)
        tokens = {
            name: self.generate(self.model(library), adapter_names=names)[:, self.prompt :]
            for name, library in found.items()
        }
        if REFERENCE not in tokens:
            return {}
        return {
            name: {"tokens_as_peft": float((its == tokens[REFERENCE]).double().mean())} for name, its in tokens.items()
        }


def names_of_rows(adapters: int, rows: int = ROWS) -> list[str]:
    """The adapter of each row. Neighbours differ: nobody sorts the requests of a server."""
    return [f"adapter_{row % adapters}" for row in range(rows)]


def many_adapters(
    library: ModuleType, base: nn.Module, adapters: int, *, r: int, targets: list[str] | str = "all-linear"
) -> Any:
    """`base` with fp32 LoRA adapters "adapter_0", "adapter_1", ... of random weights, in evaluation mode."""
    config = {"r": r, "lora_alpha": 2 * r, "target_modules": targets}
    model = library.get_peft_model(base, library.LoraConfig(**config), adapter_name="adapter_0")
    for number in range(1, adapters):
        model.add_adapter(f"adapter_{number}", library.LoraConfig(**config))
    randomise_adapters(model)
    return model.eval()


def routed_cases(quick: bool, device: str) -> Iterator[RoutedCase]:
    for dtype in ("bf16",) if quick else ("fp32", "bf16"):
        for tokens in (1, 32):
            for adapters in (4, 16) if quick else (1, 4, 16, 64):
                yield RoutedCase(adapters, dtype, tokens, device=device)


def routed_generate_cases(quick: bool, device: str) -> Iterator[RoutedGenerateCase]:
    for dtype in ("bf16",) if quick else ("fp32", "bf16"):
        for rows in (ROWS,) if quick else (ROWS, 32):
            yield RoutedGenerateCase(32, dtype, rows, new=4 if quick else 16, device=device)
