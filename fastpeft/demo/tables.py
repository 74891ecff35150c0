"""The demo's results as tables."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastpeft.demo import CORPORA


def print_texts(console: Console, texts: list[dict[str, str]]) -> None:
    """One table a prompt, so that the three styles stand one below the other."""
    table = Table(title="Same prompt, same random numbers", title_justify="left", show_lines=True)
    table.add_column("model")
    table.add_column("text", ratio=1)
    for row in texts:
        text = Text(row["prompt"], style="bold") + Text(row["text"], style="not bold")
        table.add_row(row["model"], text)
    console.print(table)


def print_losses(console: Console, losses: dict[str, dict[str, float]], bar: float) -> None:
    """Held-out loss of every model on every corpus, and what the corpus's own adapter gains."""
    table = Table(title="Loss on documents held out before training (nats a token)", title_justify="left")
    table.add_column("model")
    for name in CORPORA:
        table.add_column(name, justify="right")
    for model, row in losses.items():
        cells = [Text(f"{row[name]:.3f}", style="bold green" if model == name else "") for name in CORPORA]
        table.add_row(model, *cells)
    table.add_section()
    for other in ("base", "the other adapter"):
        gains = [losses[_other(name) if other != "base" else "base"][name] - losses[name][name] for name in CORPORA]
        cells = [Text(f"{-gain:+.3f}", style="green" if gain >= bar else "bold red") for gain in gains]
        table.add_row(f"own adapter against {other}", *cells)
    console.print(table)


def _other(name: str) -> str:
    return next(c for c in CORPORA if c != name)


def print_comparison(console: Console, comparison: dict[str, Any] | None) -> None:
    """A training step of both libraries; nothing when reference PEFT is not installed."""
    if comparison is None:
        console.print("reference PEFT is not installed (pip install peft): no comparison", highlight=False)
        return
    rows, length = comparison["batch"]
    table = Table(title=f"One training step, {rows} x {length} tokens, LoRA dropout 0.1", title_justify="left")
    table.add_column("")
    for head in ("fastpeft", f"reference PEFT {comparison['version']}", "ratio"):
        table.add_column(head, justify="right")
    step, kept = comparison["step_seconds"], comparison["saved_bytes"]
    table.add_row(
        "time", f"{step['fastpeft'] * 1e3:.0f} ms", f"{step['peft'] * 1e3:.0f} ms",
        f"{comparison['ratio']:.2f} x as fast",
    )  # fmt: skip
    table.add_row(
        "kept for backward", f"{kept['fastpeft'] / 1e6:.1f} MB", f"{kept['peft'] / 1e6:.1f} MB",
        f"{kept['peft'] / kept['fastpeft']:.2f} x less",
    )  # fmt: skip
    console.print(table)
