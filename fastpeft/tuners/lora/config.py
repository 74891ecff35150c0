"""LoraConfig: every field of PEFT 0.21's, with its default and its checks."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fastpeft.config import PeftConfig, PeftConfigMixin, as_module_names
from fastpeft.utils.peft_types import PeftType

# Declared, read from files and written to files, but not built: a value away from the default raises.
_NOT_BUILT = {
    "megatron_config": "LoRA on Megatron's parallel linears",
    "megatron_core": "LoRA on Megatron's parallel linears",
    "trainable_token_indices": "training single rows of an embedding",
    "loftq_config": "LoftQ initialisation",
    "eva_config": "EVA initialisation",
    "corda_config": "CorDA initialisation",
    "lora_ga_config": "LoRA-GA initialisation",
    "velora_config": "VeLoRA",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "qalora_group_size": "QA-LoRA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "ensure_weight_tying": "tying the adapters of tied layers",
}
_INITS_NOT_BUILT = re.compile(r"eva|olora|pissa(_niter_\d+)?|corda|loftq|orthogonal|mica|lora_ga")


@dataclass
class LoraRuntimeConfig:
    """What concerns the running program and not the adapter; never saved.

    Args:
        ephemeral_gpu_offload: move offloaded weights to the GPU for DoRA's initialisation; not built yet.
    """

    ephemeral_gpu_offload: bool = field(default=False)


@dataclass
class LoraConfig(PeftConfig):
    """The config of a LoRA adapter (arXiv:2106.09685).

    Fields that are not described here belong to features of reference PEFT that are not built yet. They stand in files
    at their defaults, and raise NotImplementedError when set.

    Args:
        r: rank.
        target_modules: modules to adapt: names (each matches itself and any path that ends in it), a regular expression
            for the whole path, "all-linear", or None for the defaults of the model family.
        exclude_modules: modules to leave out, as names or as a regular expression.
        lora_alpha: the delta is scaled by lora_alpha / r.
        lora_dropout: probability, in [0, 1), of dropping an input of lora_A in training.
        fan_in_fan_out: the base layer stores its weight as (in, out), as transformers' Conv1D does.
        bias: which biases of the base model train: "none", "all", or "lora_only" for those of adapted layers.
        use_rslora: scale by lora_alpha / sqrt(r) instead (arXiv:2312.03732).
        modules_to_save: modules to train in full and save with the adapter, such as a new classifier head.
        init_lora_weights: True: lora_A Kaiming-uniform, lora_B zero. "gaussian": lora_A normal with deviation 1/r,
            lora_B zero. False: both random, so that the adapter is no identity; for tests.
        layers_to_transform: index or indices of the layers to adapt; needs `target_modules` by name.
        layers_pattern: name(s) of the list that holds the layers, such as "layers" or "h"; needs `layers_to_transform`.
        rank_pattern: names or regular expressions to ranks other than `r`.
        alpha_pattern: names or regular expressions to alphas other than `lora_alpha`.
        lora_bias: give lora_B a bias.
        use_dora: train the length of each row of the weight apart from its direction (DoRA, arXiv:2402.09353).

    Raises:
        ValueError: a value that cannot work, or two fields that exclude one another.
        TypeError: a value of the wrong kind.
        NotImplementedError: a feature that is not built yet.
    """

    r: int = field(default=8)
    target_modules: list[str] | set[str] | str | None = field(default=None)
    exclude_modules: list[str] | set[str] | str | None = field(default=None)
    lora_alpha: int | float = field(default=8)
    lora_dropout: float = field(default=0.0)
    fan_in_fan_out: bool = field(default=False)
    bias: Literal["none", "all", "lora_only"] = field(default="none")
    use_rslora: bool = field(default=False)
    modules_to_save: list[str] | None = field(default=None)
    init_lora_weights: bool | str | None = field(default=True)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] | None = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = field(default=None)
    megatron_core: str | None = field(default="megatron.core")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(default=None)
    loftq_config: dict[str, Any] | None = field(default_factory=dict)
    eva_config: dict[str, Any] | None = field(default=None)
    corda_config: dict[str, Any] | None = field(default=None)
    lora_ga_config: dict[str, Any] | None = field(default=None)
    use_dora: bool = field(default=False)
    velora_config: dict[str, Any] | None = field(default=None)
    alora_invocation_tokens: list[int] | None = field(default=None)
    use_qalora: bool = field(default=False)
    qalora_group_size: int = field(default=16)
    monteclora_config: dict[str, Any] | None = field(default=None)
    layer_replication: list[tuple[int, int]] | None = field(default=None)
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = field(default=False)
    target_parameters: list[str] | None = field(default=None)
    use_bdlora: dict[str, Any] | None = field(default=None)
    arrow_config: dict[str, Any] | None = field(default=None)
    kasa_config: dict[str, Any] | None = field(default=None)
    ensure_weight_tying: bool = field(default=False)

    # How factors start is past once they are trained: no initialisation that is built touches the base weight.
    _bookkeeping: ClassVar[frozenset[str]] = PeftConfigMixin._bookkeeping | {"lora_dropout", "init_lora_weights"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        self.target_modules = as_module_names("target_modules", self.target_modules)
        self.exclude_modules = as_module_names("exclude_modules", self.exclude_modules)
        self.check()

    def check(self) -> None:
        """Raise for values that cannot work or are not built yet; again when the config is used, it may have changed.

        Works on a config of reference PEFT as well: `LoraConfig.check(config)`.
        """
        LoraConfig._check_not_built(self)
        LoraConfig._check_numbers(self)
        LoraConfig._check_choices(self)
        LoraConfig._check_layer_selection(self)
        LoraConfig._check_expressions(self)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["runtime_config"]
        return values

    def _check_not_built(self) -> None:
        for f in dataclasses.fields(self):
            if f.name in _NOT_BUILT and getattr(self, f.name) != _default(f):
                raise NotImplementedError(
                    f"{f.name}={getattr(self, f.name)!r}: {_NOT_BUILT[f.name]} is not supported yet. Leave {f.name} at "
                    f"its default ({_default(f)!r}), or use reference PEFT for this adapter"
                )
        if self.runtime_config.ephemeral_gpu_offload:
            raise NotImplementedError(
                "ephemeral_gpu_offload=True is not supported yet: DoRA starts where its weights are; leave it False"
            )
        if isinstance(self.init_lora_weights, str) and _INITS_NOT_BUILT.fullmatch(self.init_lora_weights):
            raise NotImplementedError(
                f"init_lora_weights={self.init_lora_weights!r} is not supported yet: use True, False or 'gaussian'"
            )

    def _check_numbers(self) -> None:
        ranks: Mapping[str, Any] = {"r": self.r} | _entries("rank_pattern", self.rank_pattern)
        for name, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank <= 0:
                raise ValueError(f"{name} must be a positive integer, the rank of lora_A and lora_B; got {rank!r}")
        alphas: Mapping[str, Any] = {"lora_alpha": self.lora_alpha} | _entries("alpha_pattern", self.alpha_pattern)
        for name, alpha in alphas.items():
            if not isinstance(alpha, numbers.Real) or not math.isfinite(alpha):
                raise ValueError(f"{name} must be a finite number, the delta's scale times the rank; got {alpha!r}")
        if not isinstance(self.lora_dropout, numbers.Real) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be a probability in [0, 1); got {self.lora_dropout!r}")

    def _check_choices(self) -> None:
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only'; got {self.bias!r}")
        init = self.init_lora_weights
        if isinstance(init, str) and init.lower() != "gaussian":
            raise ValueError(f"init_lora_weights must be True, False or 'gaussian'; got {init!r}")
        if self.lora_bias and init not in (True, False):
            raise ValueError(f"lora_bias=True needs init_lora_weights=True or False; got {init!r}")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias=True cannot be used with use_dora=True: leave one of them False")

    def _check_layer_selection(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} cannot be used when target_modules is a str ({self.target_modules!r}): select the "
                        "layers in the expression itself, or give target_modules as a list of names"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform: which of those layers")
        layers = self.layers_to_transform
        chosen = layers if isinstance(layers, Collection) else [] if layers is None else [layers]
        if not all(isinstance(number, numbers.Integral) for number in chosen):
            raise TypeError(f"layers_to_transform must be a layer's number or a list of them; got {layers!r}")

    def _check_expressions(self) -> None:
        """What is read as a regular expression is one: deep in, the error would name no field."""
        expressions = [(f"rank_pattern[{key!r}]", rf"(.*\.)?({key})$") for key in self.rank_pattern or {}]
        expressions += [(f"alpha_pattern[{key!r}]", rf"(.*\.)?({key})$") for key in self.alpha_pattern or {}]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), str):
                expressions.append((f"{name}={value!r}", value))
        for name, expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{name} is no regular expression: {error.msg}") from error


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _entries(name: str, pattern: Any) -> dict[str, Any]:
    if not isinstance(pattern, (Mapping, type(None))):
        raise TypeError(f"{name} must map module names to numbers; got {pattern!r}")
    return {f"{name}[{key!r}]": value for key, value in (pattern or {}).items()}
