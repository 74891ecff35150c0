"""Run the demo: train both adapters, measure, write, print."""

import csv
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastpeft.cli.console import make_console
from fastpeft.cli.data import make_blocks, read_documents
from fastpeft.cli.generate import complete, sampling
from fastpeft.cli.models import load_adapter, load_base, load_tokenizer, quiet_libraries
from fastpeft.cli.output import write_json
from fastpeft.cli.settings import TrainSettings
from fastpeft.cli.training import train
from fastpeft.demo import BASE, CORPORA, corpus
from fastpeft.demo.measure import compare_with_reference, heldout_loss, reference_installed, settle_threads
from fastpeft.demo.picture import draw
from fastpeft.demo.tables import print_comparison, print_losses, print_texts

BAR = 0.2  # nats a token, below the base and below the other adapter
BLOCK = 256  # tokens in a row
MEASURE_SECONDS = 15.0  # of training steps beside reference PEFT
TOKENS = 60  # that each model adds to a prompt
PROMPTS = ("The king said", "A computer is")


def run(output: Path, steps: int = 150, compare: bool = True, console: Console | None = None) -> list[str]:
    """The whole demo; its artefacts go to `output`.

    Returns:
        what fell short of the bar, one line each; empty when all is well.
    """
    console = console or make_console()
    start = time.monotonic()
    quiet_libraries()
    dtype = fast_dtype()
    tokenizer = load_tokenizer(str(BASE))
    rows = {name: heldout_rows(name, tokenizer) for name in CORPORA}
    padding = tokenizer.pad_token_id
    threads = settle_threads(load_base(str(BASE), dtype, "cpu"), rows["scripture"], padding)
    console.print(f"base in {dtype}, {threads} thread(s)", highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    for name in CORPORA:
        console.print(f"[bold]adapter {name}[/bold]: {steps} steps on {corpus(name, 'train').name}", highlight=False)
        train(adapter_settings(name, output, steps, dtype), show=console)

    model = load_both(output, dtype)
    losses = all_losses(model, rows, padding)
    results: dict[str, Any] = {
        "steps": steps,
        "base_dtype": dtype,
        "threads": threads,
        "losses": losses,
        "missed": shortfalls(losses),
        "curves": {name: read_curve(output / f"{name}-adapter" / "loss.csv") for name in CORPORA},
        "texts": all_texts(model, tokenizer),
        "comparison": None,
    }
    if compare and reference_installed():
        console.print("a training step, in turn with reference PEFT ...")
        results["comparison"] = compare_with_reference(
            lambda: load_base(str(BASE), dtype, "cpu"), rows["scripture"], padding, MEASURE_SECONDS
        )
    results["seconds"] = round(time.monotonic() - start, 1)
    write_json(output / "results.json", results)
    picture = draw(results, output / "demo.png")
    with (output / "results.txt").open("w", encoding="utf-8") as file:
        for target in (console, Console(file=file, width=110)):
            print_texts(target, results["texts"])
            print_losses(target, results["losses"], BAR)
            print_comparison(target, results["comparison"])
    made = ["results.txt", "results.json", *([picture.name] if picture else [])]
    console.print(f"{results['seconds']:.0f} s. In {output}: both adapters, {', '.join(made)}", highlight=False)
    if not picture:
        console.print("no picture: matplotlib is not installed (pip install matplotlib)")
    return results["missed"]


def fast_dtype() -> str:
    """bf16 where the CPU multiplies it natively; elsewhere it would be emulated, several times slower than fp32."""
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def adapter_settings(name: str, output: Path, steps: int, dtype: str) -> TrainSettings:
    return TrainSettings(
        base=str(BASE),
        data=[corpus(name, "train")],
        eval_data=[corpus(name, "heldout")],
        output=output / f"{name}-adapter",
        overwrite=True,
        rank=16,
        alpha=32,
        dropout=0.05,
        max_steps=steps,
        batch_size=8,
        block_size=BLOCK,
        learning_rate=2e-3,
        dtype=dtype,
        device="cpu",
        log_steps=max(1, steps // 30),
        eval_steps=max(1, steps // 6),
        save_steps=steps,
        keep_checkpoints=1,
    )


def load_both(output: Path, dtype: str) -> Any:
    """The base with both saved adapters on it, from the files the training wrote."""
    first, second = CORPORA
    model = load_adapter(load_base(str(BASE), dtype, "cpu"), str(output / f"{first}-adapter"), name=first)
    model.load_adapter(str(output / f"{second}-adapter"), adapter_name=second)
    return model.eval()


def heldout_rows(name: str, tokenizer: Any) -> list[dict[str, list[int]]]:
    return make_blocks(read_documents(corpus(name, "heldout")), tokenizer, BLOCK)


@contextmanager
def using(model: Any, adapter: str) -> Iterator[None]:
    """One adapter, or with "base" none."""
    if adapter == "base":
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter)
        yield


def all_losses(model: Any, rows: dict[str, list], padding: int) -> dict[str, dict[str, float]]:
    """Held-out loss by model ("base" and the adapters), by corpus."""
    losses: dict[str, dict[str, float]] = {}
    for adapter in ("base", *CORPORA):
        with using(model, adapter):
            losses[adapter] = {name: heldout_loss(model, rows[name], padding) for name in CORPORA}
    return losses


def all_texts(model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """What each model makes of each prompt, with the same random numbers."""
    texts = []
    choices = sampling(TOKENS, temperature=0.6, top_p=0.9, top_k=0, repetition_penalty=1.1)
    choices["min_new_tokens"] = TOKENS - 10
    for prompt in PROMPTS:
        for adapter in ("base", *CORPORA):
            torch.manual_seed(1)
            with using(model, adapter):
                text = complete(model, tokenizer, prompt, choices)
            texts.append({"prompt": prompt, "model": adapter, "text": text})
    return texts


def shortfalls(losses: dict[str, dict[str, float]]) -> list[str]:
    missed = []
    for name in CORPORA:
        for other in losses.keys() - {name}:
            gain = losses[other][name] - losses[name][name]
            if not gain >= BAR:  # a NaN falls short too
                missed.append(f"adapter {name} is {gain:.3f} nats below {other} on its corpus, not {BAR}")
    return missed


def read_curve(file: Path) -> dict[str, list[list[float]]]:
    """Points [step, loss] of training and of the held-out documents."""
    with file.open(newline="") as lines:
        table = list(csv.DictReader(lines))
    return {key: [[int(row["step"]), float(row[key])] for row in table if row[key]] for key in ("loss", "eval_loss")}
