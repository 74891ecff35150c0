"""Everything that `fastpeft train` can be told, with its defaults."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastpeft.cli.errors import CommandError

# A run that goes on from a checkpoint must agree in these: they fix the model, the data and the order of the data.
FIXED_ON_RESUME = (
    "base", "dtype", "rank", "alpha", "dropout", "target_modules", "exclude_modules", "bias", "rslora", "dora",
    "init", "modules_to_save", "layers", "layers_pattern", "rank_pattern", "alpha_pattern", "lora_bias",
    "block_size", "pack", "batch_size", "accumulation", "seed", "optimizer", "eval_fraction",
)  # fmt: skip


@dataclass
class TrainSettings:
    """One training run. Paths are local; None leaves the choice to the library."""

    base: str  # model folder or hub id
    data: list[Path]
    output: Path
    eval_data: list[Path] = field(default_factory=list)
    eval_fraction: float = 0.05  # of the documents, where there is no eval_data
    text_field: str = "text"
    revision: str | None = None

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    bias: str = "none"
    rslora: bool = False
    dora: bool = False
    init: str = "default"
    modules_to_save: list[str] | None = None
    layers: list[int] | None = None
    layers_pattern: str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    lora_bias: bool = False

    epochs: float = 3.0
    max_steps: int = -1  # -1: by epochs
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03  # share of the steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch"
    block_size: int = 512
    pack: bool = True
    dtype: str = "auto"
    autocast: str = "none"  # none, bf16, fp16
    device: str = "auto"
    gradient_checkpointing: bool = False
    seed: int = 42

    log_steps: int = 10
    eval_steps: int = 0  # 0: at the end of every epoch
    save_steps: int = 0  # 0: at the end of every epoch
    keep_checkpoints: int = 2
    load_best: bool = False
    resume: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Refuse options that would do nothing here, or nothing but harm.

        Raises:
            CommandError: names the option and what it needs.
        """
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):  # which the options' limits let through
                raise CommandError(f"--{name.replace('_', '-')} must be a finite number, got {value}")
        if not self.eval_data and self.eval_fraction == 0 and (self.load_best or self.eval_steps):
            name = "--load-best" if self.load_best else "--eval-steps"
            raise CommandError(f"{name} needs something to measure on: give --eval-data, or an --eval-fraction above 0")
        if self.epochs == 0 and self.max_steps < 1:
            raise CommandError("--epochs 0 trains nothing: give more than 0, or --max-steps")
        if self.layers and isinstance(self.target_modules, str):
            raise CommandError("--layers goes with names: give --target-modules too, such as q_proj,v_proj")
        if self.revision and Path(self.base).is_dir():
            raise CommandError("--revision goes with a hub id: a model folder has only what is in it")

    def lora_arguments(self) -> dict[str, Any]:
        """The arguments of LoraConfig."""
        return {
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.target_modules,
            "exclude_modules": self.exclude_modules,
            "bias": self.bias,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "init_lora_weights": {"default": True, "none": False}.get(self.init, self.init),
            "modules_to_save": self.modules_to_save,
            "layers_to_transform": self.layers,
            "layers_pattern": self.layers_pattern,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "lora_bias": self.lora_bias,
        }

    def record(self) -> dict[str, Any]:
        """What the output folder keeps of the settings: plain JSON, with a digest of each data file."""
        plain = json.loads(json.dumps(asdict(self), default=str))
        files = {str(p): _digest(p) for p in (*self.data, *self.eval_data)}
        return {"settings": plain, "data_sha256": files}

    def check_resumable(self, recorded: dict[str, Any]) -> None:
        """Refuse to go on with other settings than the run began with.

        Raises:
            CommandError: names every setting that differs, with both values.
        """
        now, then = self.record(), recorded
        differ = [
            f"{key}: {then['settings'].get(key)!r} then, {now['settings'][key]!r} now"
            for key in FIXED_ON_RESUME
            if then["settings"].get(key) != now["settings"][key]
        ]
        if sorted(then["data_sha256"].values()) != sorted(now["data_sha256"].values()):
            differ.append("the content of the data files")
        if differ:
            raise CommandError(
                f"cannot resume {self.output}: it began with other settings ({'; '.join(differ)}). "
                "Repeat them, or start anew with --overwrite"
            )


def _digest(path: Path) -> str:
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
