"""The loss of a run as a table and as a picture."""

import csv
from pathlib import Path
from typing import Any

COLUMNS = ("step", "epoch", "tokens", "loss", "eval_loss", "learning_rate", "grad_norm")


def write_curves(log: list[dict[str, Any]], folder: Path) -> Path | None:
    """Write loss.csv, and loss.png where matplotlib is installed; returns the picture's path."""
    with (folder / "loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in log:
            if "loss" in row or "eval_loss" in row:
                writer.writerow(row | {"tokens": row.get("num_input_tokens_seen", "")})
    try:
        import matplotlib as mpl
    except ImportError:
        return None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(row["step"], row[key]) for row in log if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=f"Loss of {folder.name}")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    plt.close(figure)
    return folder / "loss.png"
