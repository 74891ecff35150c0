"""The demo's results as one picture."""

import textwrap
from pathlib import Path
from typing import Any

from fastpeft.demo import CORPORA

COLOURS = {"base": "#7b8087", "scripture": "#c0562f", "jargon": "#2a6fb0", "fastpeft": "#2f7d4f", "peft": "#9aa0a6"}


def draw(results: dict[str, Any], file: Path) -> Path | None:
    """Write the picture; None where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return None
    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = plt.figure(figsize=(13, 8), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12))
    figure.suptitle("One small Llama, two LoRA adapters: each learns to write like its own corpus", fontsize=16)
    grid = figure.add_gridspec(2, 3, width_ratios=[1.5, 1.3, 1], height_ratios=[1.3, 1])
    draw_losses(figure.add_subplot(grid[0, 0]), results["losses"])
    draw_curves(figure.add_subplot(grid[0, 1]), results["curves"], results["losses"]["base"])
    draw_comparison(figure.add_subplot(grid[0, 2]), results["comparison"])
    draw_texts(figure.add_subplot(grid[1, :]), results["texts"])
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file


def draw_losses(axes: Any, losses: dict[str, dict[str, float]]) -> None:
    labels = {"base": "base model", **{name: f"+ {name} adapter" for name in CORPORA}}
    for offset, (model, label) in enumerate(labels.items()):
        places = [i + (offset - 1) * 0.27 for i in range(len(CORPORA))]
        values = [losses[model][name] for name in CORPORA]
        bars = axes.bar(places, values, 0.25, label=label, color=COLOURS[model])
        axes.bar_label(bars, fmt="%.2f", fontsize=9)
    axes.set_xticks(range(len(CORPORA)), [f"{name} documents" for name in CORPORA])
    axes.set_ylim(0, 1.3 * max(max(row.values()) for row in losses.values()))
    axes.set(ylabel="nats a token, lower is better", title="Loss on held-out documents")
    axes.legend(fontsize=8.5, loc="upper center", ncols=3, columnspacing=0.9, handlelength=1, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def draw_curves(axes: Any, curves: dict[str, dict[str, list]], base: dict[str, float]) -> None:
    for name in CORPORA:
        colour = COLOURS[name]
        if curves[name]["loss"]:
            axes.plot(*zip(*curves[name]["loss"], strict=True), color=colour, alpha=0.35, linewidth=1)
        held = [[0, base[name]], *curves[name]["eval_loss"]]
        axes.plot(*zip(*held, strict=True), "o-", color=colour, markersize=4)
        axes.annotate(name, held[-1], (6, 0), textcoords="offset points", color=colour, va="center", weight="bold")
    axes.set_xlim(right=1.3 * max(curves[name]["eval_loss"][-1][0] for name in CORPORA))  # room for the names
    axes.set(xlabel="training step", ylabel="nats a token", title="While training")
    axes.plot([], [], "o-", color="#555", markersize=4, label="held-out documents")
    axes.plot([], [], color="#555", alpha=0.35, linewidth=1, label="training rows")
    axes.legend(fontsize=8.5, loc="upper right", frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_comparison(axes: Any, comparison: dict[str, Any] | None) -> None:
    if comparison is None:
        axes.axis("off")
        axes.text(0.5, 0.5, "reference PEFT is not\ninstalled: no comparison", ha="center", va="center")
        return
    kinds = {"step_seconds": ("step time", 1e3, "ms"), "saved_bytes": ("kept for\nbackward", 1e-6, "MB")}
    for place, (key, (_, factor, unit)) in enumerate(kinds.items()):
        values = comparison[key]
        for offset, name in ((-0.2, "peft"), (0.2, "fastpeft")):
            bar = axes.bar(place + offset, values[name] / values["peft"], 0.37, color=COLOURS[name])
            axes.bar_label(bar, [f"{values[name] * factor:.0f} {unit}"], fontsize=9)
    axes.set_xticks(range(len(kinds)), [label for label, *_ in kinds.values()])
    axes.set(title="One training step", ylabel="share of reference PEFT", ylim=(0, 1.3))
    handles = [axes.containers[1], axes.containers[0]]
    axes.legend(
        handles, ["fastpeft", f"PEFT {comparison['version']}"], fontsize=9, loc="upper center", ncols=2, frameon=False
    )
    axes.spines[["top", "right"]].set_visible(False)


def draw_texts(axes: Any, texts: list[dict[str, str]]) -> None:
    """Three columns, one a model; the prompt in front of what the model adds."""
    axes.axis("off")
    axes.set_title("What each writes after the same two prompts", loc="left")
    models = ["base", *CORPORA]
    for column, model in enumerate(models):
        left = column / len(models)
        label = "base model" if model == "base" else f"+ {model} adapter"
        axes.text(left, 0.98, label, color=COLOURS[model], weight="bold", fontsize=11, va="top")
        parts = [
            textwrap.shorten(row["prompt"] + row["text"], 230, placeholder=" ...")
            for row in texts
            if row["model"] == model
        ]
        body = "\n\n".join(textwrap.fill(part, 52) for part in parts).replace("$", r"\$")
        axes.text(left, 0.88, body, fontsize=10, va="top", family="serif", linespacing=1.25)
