"""fastpeft train."""

import json
import re

from fastpeft.cli import train_options as opt
from fastpeft.cli.errors import CommandError


def train(
    base: opt.Base,
    *,
    data: opt.Data,
    eval_data: opt.EvalData = None,
    eval_fraction: opt.EvalFraction = 0.05,
    text_field: opt.TextField = "text",
    block_size: opt.BlockSize = 512,
    pack: opt.Pack = True,
    revision: opt.Revision = None,
    rank: opt.Rank = 16,
    alpha: opt.Alpha = None,
    dropout: opt.Dropout = 0.0,
    target_modules: opt.TargetModules = "all-linear",
    exclude_modules: opt.ExcludeModules = None,
    layers: opt.Layers = None,
    layers_pattern: opt.LayersPattern = None,
    modules_to_save: opt.ModulesToSave = None,
    rank_pattern: opt.RankPattern = None,
    alpha_pattern: opt.AlphaPattern = None,
    bias: opt.Bias = "none",
    lora_bias: opt.LoraBias = False,
    rslora: opt.Rslora = False,
    dora: opt.Dora = False,
    init: opt.Init = "default",
    epochs: opt.Epochs = 3.0,
    max_steps: opt.MaxSteps = None,
    batch_size: opt.BatchSize = 8,
    accumulation: opt.Accumulation = 1,
    learning_rate: opt.LearningRate = 2e-4,
    schedule: opt.Schedule = "cosine",
    warmup: opt.Warmup = 0.03,
    weight_decay: opt.WeightDecay = 0.0,
    max_grad_norm: opt.MaxGradNorm = 1.0,
    optimizer: opt.Optimizer = "adamw_torch",
    dtype: opt.Dtype = "auto",
    autocast: opt.Autocast = "none",
    device: opt.Device = "auto",
    gradient_checkpointing: opt.GradientCheckpointing = False,
    seed: opt.Seed = 42,
    output: opt.Output,
    log_steps: opt.LogSteps = 10,
    eval_steps: opt.EvalSteps = 0,
    save_steps: opt.SaveSteps = 0,
    keep_checkpoints: opt.KeepCheckpoints = 2,
    load_best: opt.LoadBest = False,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Train a LoRA adapter on a causal language model.

    The output folder gets the adapter in PEFT's format, loss.csv, loss.png, training.json and the checkpoints.

    \b
    Examples:
      fastpeft train ./llama --data notes.txt --output notes-adapter
      fastpeft train ./llama -d train.jsonl --eval-data dev.jsonl -o out -r 32
      fastpeft train ./llama -d train.jsonl -o out -t q_proj,v_proj --lr 1e-4
      fastpeft train ./llama -d train.jsonl -o out --resume
    """
    chosen = locals()
    from fastpeft.cli.console import make_console
    from fastpeft.cli.settings import TrainSettings

    chosen |= {
        "eval_data": eval_data or [],
        "alpha": 2 * rank if alpha is None else alpha,
        "max_steps": max_steps or -1,
        "target_modules": "all-linear" if target_modules == "all-linear" else names(target_modules),
        "exclude_modules": names(exclude_modules),
        "modules_to_save": names(modules_to_save),
        "layers": numbers(layers),
        "rank_pattern": pattern("--rank-pattern", rank_pattern),
        "alpha_pattern": pattern("--alpha-pattern", alpha_pattern),
    }
    from fastpeft.cli.training import train as run

    console = make_console()
    result = run(TrainSettings(**chosen), show=console)
    share = 100 * result.trainable / result.parameters
    held = "" if result.eval_loss is None else f", held-out loss {result.eval_loss:.3f}"
    console.print(
        f"{result.steps} steps in {result.seconds:.0f} s: training loss {result.train_loss:.3f}{held}; "
        f"{result.trainable:,} trained parameters ({share:.2f} %)", highlight=False,
    )  # fmt: skip
    if result.png is None:
        console.print("loss.png was not drawn: matplotlib is not installed (pip install matplotlib)", highlight=False)
    console.print(f"adapter: {output}", highlight=False)


def names(text: str | None) -> list[str] | str | None:
    """ "q_proj,v_proj" -> a list of names; "re:PATTERN" -> the pattern as one string."""
    if text is None:
        return None
    if text.startswith("re:"):
        try:
            return re.compile(text.removeprefix("re:")).pattern
        except re.error as error:
            raise CommandError(f"{text} is no regular expression: {error}") from error
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str | None) -> list[int] | None:
    """ "0-3,8" -> [0, 1, 2, 3, 8], each once."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise CommandError(f"--layers takes numbers and ranges such as 0-3,8; got {text!r}")
        layers = range(int(first), int(last or first) + 1)
        if not layers:  # none at all would mean every layer
            raise CommandError(f"a range of --layers must ascend, as {last}-{first}; got {part.strip()}")
        found += layers
    return list(dict.fromkeys(found))


def pattern(name: str, text: str | None) -> dict[str, int]:
    """A JSON object of layer names and whole numbers."""
    try:
        value = json.loads(text) if text else {}
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(v, int) and v > 0 for v in value.values()):
        example = '{"q_proj": 32}'
        raise CommandError(f"{name} takes a JSON object of names and positive whole numbers, as {example}; got {text}")
    return value
