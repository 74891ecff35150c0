"""The options of `fastpeft train`: name, limits, help text, and the panel of --help in which they stand."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

DATA, LORA, RUN, FILES = "Data", "LoRA", "Training", "Checkpoints and results"

MAX_SEED = 2**32 - 1  # NumPy's


def option(text: str, panel: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **limits)


Precision = Literal["auto", "bf16", "fp16", "fp32"]

Base = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or hub id.")]
Data = Annotated[
    list[Path],
    option("Text to learn: .txt, .jsonl, a folder of these, or a `datasets` folder. Repeatable.", DATA, "--data", "-d"),
]
EvalData = Annotated[
    list[Path] | None, option("Text to measure on, same formats; else see --eval-fraction.", DATA, "--eval-data")
]
EvalFraction = Annotated[
    float, option("Share of the documents kept out of training to measure on; 0 for none.", DATA, min=0.0, max=0.9)
]
TextField = Annotated[
    str, option('Key or column of the text; rows with "prompt" and "completion" work too.', DATA, "--field")
]
BlockSize = Annotated[int, option("Tokens in a training row.", DATA, min=2)]
Pack = Annotated[bool, option("Put short documents end to end in one row.", DATA)]
Revision = Annotated[str | None, option("Branch, tag or commit of a hub model.", DATA)]
Rank = Annotated[int, option("Rank of the update.", LORA, "--rank", "-r", min=1)]
Alpha = Annotated[int | None, option("Scale: the update counts alpha / rank. Default: twice the rank.", LORA)]
Dropout = Annotated[float, option("Dropout before the update.", LORA, min=0.0, max=0.99)]
TargetModules = Annotated[
    str, option("Layers to adapt: all-linear, or names with commas, or re:PATTERN.", LORA, "--target-modules", "-t")
]
ExcludeModules = Annotated[str | None, option("Layers to leave out: names with commas, or re:PATTERN.", LORA)]
Layers = Annotated[str | None, option("Only these layer numbers, such as 0-3,8.", LORA)]
LayersPattern = Annotated[str | None, option("Name of the list that --layers counts in, such as h.", LORA)]
ModulesToSave = Annotated[str | None, option("Modules to train in full and keep with the adapter, with commas.", LORA)]
RankPattern = Annotated[str | None, option('Ranks of some layers, as JSON: {"q_proj": 32}.', LORA)]
AlphaPattern = Annotated[str | None, option('Alphas of some layers, as JSON: {"q_proj": 64}.', LORA)]
Bias = Annotated[Literal["none", "all", "lora_only"], option("Which biases of the base to train.", LORA)]
LoraBias = Annotated[bool, option("Give the update a bias of its own.", LORA, "--lora-bias")]
Rslora = Annotated[bool, option("Scale by alpha / sqrt(rank).", LORA, "--rslora")]
Dora = Annotated[bool, option("DoRA: train the length of each weight row as well.", LORA, "--dora")]
Init = Annotated[
    Literal["default", "gaussian", "none"],
    option("How the update starts: default and gaussian change nothing at first, none is random.", LORA),
]
Epochs = Annotated[float, option("Passes over the data.", RUN, min=0.0)]
MaxSteps = Annotated[int | None, option("Stop after so many steps instead.", RUN, min=1)]
BatchSize = Annotated[int, option("Rows a step.", RUN, "--batch-size", "-b", min=1)]
Accumulation = Annotated[int, option("Batches added up for one step.", RUN, min=1)]
LearningRate = Annotated[float, option("Peak learning rate.", RUN, "--learning-rate", "--lr", min=0.0)]
Schedule = Annotated[
    Literal["linear", "cosine", "constant", "constant_with_warmup"], option("How the rate falls.", RUN)
]
Warmup = Annotated[float, option("Share of the steps in which the rate rises.", RUN, min=0.0, max=1.0)]
WeightDecay = Annotated[float, option("Weight decay.", RUN, min=0.0)]
MaxGradNorm = Annotated[float, option("Clip the gradient to this norm; 0 for never.", RUN, min=0.0)]
Optimizer = Annotated[str, option("A Trainer optimizer: adamw_torch, adafactor, sgd ...", RUN)]
Dtype = Annotated[Precision, option("Precision of the frozen base; the adapter trains in fp32.", RUN)]
Autocast = Annotated[Literal["none", "bf16", "fp16"], option("Mixed precision.", RUN)]
Device = Annotated[str, option("auto, cpu, cuda, cuda:1 ...", RUN)]
GradientCheckpointing = Annotated[bool, option("Less memory, more time.", RUN, "--gradient-checkpointing")]
Seed = Annotated[int, option("Seed of weights, order and dropout.", RUN, min=0, max=MAX_SEED)]
Output = Annotated[Path, option("Folder for the adapter and everything about the run.", FILES, "--output", "-o")]
LogSteps = Annotated[int, option("Steps between two losses.", FILES, min=1)]
EvalSteps = Annotated[int, option("Steps between two evaluations; 0: once an epoch.", FILES, min=0)]
SaveSteps = Annotated[int, option("Steps between two checkpoints; 0: once an epoch.", FILES, min=0)]
KeepCheckpoints = Annotated[int, option("Checkpoints to keep.", FILES, min=1)]
LoadBest = Annotated[
    bool, option("Keep the adapter of the lowest held-out loss, not the last one.", FILES, "--load-best")
]
Resume = Annotated[bool, option("Go on from the last checkpoint in --output.", FILES, "--resume")]
Overwrite = Annotated[bool, option("Replace an earlier run in --output.", FILES, "--overwrite")]
