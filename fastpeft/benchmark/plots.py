"""A report as pictures that can be read without the text around them: each says where, when and with what it was made.

`<stem>-ratios.png`: how many times as fast we are as each baseline; `-floor.png`: time over the frozen base's;
`-memory.png`: bytes beside reference PEFT's; `-roofline.png`: FLOP/s over intensity, and time over the limit;
`-scaling.png`: one layer over M, r and N. A picture for which a report has no figures is not made.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastpeft.benchmark.libraries import FROZEN, OURS, REFERENCE, is_ours
from fastpeft.benchmark.report import BYTES, machine

INSTALL = "pictures need matplotlib: pip install 'fastpeft[bench]'"
PALETTE = ("#2f7d4f", "#2a6fb0", "#c0562f", "#8a5aa8", "#b08a1e", "#4aa3a3")
FIXED = {OURS: "#2f7d4f", f"{OURS} against {REFERENCE}": "#2f7d4f", REFERENCE: "#9aa0a6", FROZEN: "#3b4045"}
ROW = 0.24  # inches of one bar


def draw(record: dict[str, Any], folder: Path, stem: str = "bench") -> list[Path]:
    """Draw a report's record, as `Report.to_dict` or `records.read` gives it, into `folder`.

    Returns:
        The files that were written, in the order of this module's description.

    Raises:
        ImportError: matplotlib is not installed; the message says what to install.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError(INSTALL) from error
    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, title, figure in figures(record):
        files.append(folder / f"{stem}-{name}.png")
        _save(title, figure, record, files[-1])
    return files


def figures(record: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(name, title, figure) of every picture that the record has figures for, titled and signed."""
    makers: dict[str, Callable[[dict[str, Any]], tuple[str, Any] | None]] = {
        "ratios": _ratios, "floor": _floor, "memory": _memory, "roofline": _roofline, "scaling": _scaling,
    }  # fmt: skip
    for name, make in makers.items():
        if drawn := make(record):
            title, figure = drawn
            where = _lines(machine(record["environment"]), int(figure.get_figwidth() * 13))
            figure.suptitle(title, fontsize=13, weight="bold")
            figure.supxlabel(where, fontsize=7.5, color="#555", x=0.01, ha="left")
            yield name, title, figure


def _save(title: str, figure: Any, record: dict[str, Any], file: Path) -> None:
    """Write the picture; title and machine are in the file's own metadata too."""
    from matplotlib import pyplot as plt

    about = {"Title": title, "Description": machine(record["environment"]), "Software": "fastpeft bench"}
    figure.savefig(file, dpi=120, metadata=about)
    plt.close(figure)


def _lines(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text.replace("$", r"\$"), width))


def _bars(rows: list[tuple[str, dict[str, tuple[float, float, float]]]], *, label: str, one: str, text: str) -> Any:
    """Horizontal bars with quartiles: one group for each row, one colour for each name, a line at 1.

    Args:
        rows: (case, {name: (median, q1, q3)}).
        label: of the axis.
        one: what the line at 1 means.
        text: format of the figure behind each bar.
    """
    from matplotlib import pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    names = list(dict.fromkeys(name for _, bars in rows for name in bars))
    colours = colours_of(names)
    count = sum(len(bars) for _, bars in rows)
    height = 2.0 + ROW * count + 0.12 * len(rows) + 0.2 * math.ceil((len(names) + 1) / 3)
    figure = plt.figure(figsize=(10, height), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.1))
    axes = figure.add_subplot()
    place, ticks, longest = 0.0, [], max(q3 for _, bars in rows for _, _, q3 in bars.values())
    for case, bars in rows:
        start = place
        for name, (median, q1, q3) in bars.items():
            axes.barh(place, median, 0.85, color=colours[name], label=name.replace("$", r"\$"))
            axes.plot([q1, q3], [place, place], color="#222", linewidth=1.1)
            axes.annotate(
                text.format(median), (max(median, q3), place), (5, 0), textcoords="offset points", va="center",
                fontsize=7.5, bbox={"boxstyle": "square,pad=0.05", "color": "white", "alpha": 0.85},
            )  # fmt: skip
            place += 1
        ticks.append(((start + place - 1) / 2, case))
        place += 0.5
    axes.axvline(1.0, color="#c0392b", linewidth=1.2, linestyle="--", label=one)
    axes.set_yticks([at for at, _ in ticks], [case for _, case in ticks], fontsize=8)
    axes.set(xlabel=label, xlim=(0, 1.14 * max(longest, 1.0)), ylim=(place - 0.25, -0.75))
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # each name once
    columns = min(3, len(handles))
    axes.legend(
        handles.values(), handles.keys(), loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=columns, frameon=False,
        fontsize=8,
    )  # fmt: skip
    return figure


def colours_of(names: list[str]) -> dict[str, str]:
    """A colour for each contender: always the same for us, reference PEFT and the frozen base."""
    free = (colour for colour in PALETTE * len(names) if colour not in FIXED.values())
    return {name: FIXED.get(name) or next(free) for name in names}


def _ratios(record: dict[str, Any]) -> tuple[str, Any] | None:
    rows = []
    for result in _listed(record):
        bars = {
            f"{name} against {baseline}": _triple(ratio)
            for baseline, ratios in result["speedup"].items() if not is_ours(baseline)
            for name, ratio in ratios.items() if is_ours(name)
        }  # fmt: skip
        if bars:
            rows.append((_case(result), bars))
    if not rows:
        return None
    figure = _bars(rows, label="times as fast (baseline time / our time; bars: median, lines: quartiles)",
                   one="as fast as the baseline", text="{:.2f} x")  # fmt: skip
    return "Speed against each baseline, higher is better", figure


def _floor(record: dict[str, Any]) -> tuple[str, Any] | None:
    rows = [
        (_case(result), {name: _triple(ratio) for name, ratio in result["floor"].items()})
        for result in _listed(record) if result["floor"]
    ]  # fmt: skip
    if not rows:
        return None
    figure = _bars(rows, label="times the frozen base's time (bars: median, lines: quartiles)",
                   one="the frozen base, without an adapter", text="{:.2f} x")  # fmt: skip
    return "Time over the frozen base's, lower is better", figure


def _memory(record: dict[str, Any]) -> tuple[str, Any] | None:
    rows = []
    for result in _measured(record):
        for key, part in BYTES:
            sizes = {name: c.get(key, {}).get(part) for name, c in result["contenders"].items()}
            theirs = sizes.pop(REFERENCE, None)
            bars = {name: (size / theirs,) * 3 for name, size in sizes.items() if theirs and size is not None}
            if bars:
                rows.append((f"{_case(result)}\n{key} bytes, peft: {theirs / 2**20:.3g} MiB", bars))
    if not rows:
        return None
    figure = _bars(rows, label="bytes over reference PEFT's (saved: kept besides inputs; peak: of a step)",
                   one="reference PEFT", text="{:.2f} x")  # fmt: skip
    return "Memory beside reference PEFT's, lower is better", figure


def _roofline(record: dict[str, Any]) -> tuple[str, Any] | None:
    from fastpeft.benchmark import roofline_plot

    return roofline_plot.draw(record)


def _scaling(record: dict[str, Any]) -> tuple[str, Any] | None:
    """Milliseconds over each axis, and below them times the floor."""
    points = [result for result in _measured(record) if result["suite"] == "scaling" and "axis" in result["params"]]
    axes_names = [axis for axis in ("M", "r", "N") if sum(p["params"]["axis"] == axis for p in points) > 1]
    if not axes_names:
        return None
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    meaning = {"M": "M: rows (tokens)", "r": "r: rank", "N": "N: out_features"}
    figure, grid = plt.subplots(
        2, len(axes_names), figsize=(4.2 * len(axes_names), 7), layout="constrained", squeeze=False, sharex="col"
    )
    names = list(dict.fromkeys(name for point in points for name in point["contenders"]))
    for column, axis in enumerate(axes_names):
        chosen = sorted((p for p in points if p["params"]["axis"] == axis), key=lambda p: p["params"][axis])
        times, floors = grid[0][column], grid[1][column]
        for name, colour in colours_of(names).items():
            _line(times, chosen, axis, name, colour, lambda p, n: p["contenders"].get(n, {}).get("seconds"), 1e3)
            _line(floors, chosen, axis, name, colour, lambda p, n: p["floor"].get(n), 1.0)
        floors.axhline(1.0, color=FIXED[FROZEN], linewidth=1.2, linestyle="--", label="frozen base")
        held = chosen[0]["params"]
        rest = ", ".join(f"{key} = {held[key]}" for key in ("M", "K", "N", "r", "dtype", "dropout") if key != axis)
        times.set_title(rest, fontsize=8.5)
        times.set(xscale="log", yscale="log", ylabel="ms a step (forward + backward)" if column == 0 else "")
        times.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        times.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        times.minorticks_off()
        floors.set(xscale="log", xlabel=meaning[axis], ylabel="times the frozen base" if column == 0 else "")
        values = [p["params"][axis] for p in chosen]
        floors.set_xticks(values, [str(value) for value in values], rotation=45, fontsize=8)
        floors.minorticks_off()
        for each in (times, floors):
            each.grid(alpha=0.25)
            each.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(fontsize=8, frameon=False)
    grid[1][0].legend(fontsize=8, frameon=False)
    return "One LoRA linear over M, r and N (lines: median, bands: quartiles), lower is better", figure


def _line(axes: Any, points: list[dict[str, Any]], axis: str, name: str, colour: str, get: Any, factor: float) -> None:
    found = [(p["params"][axis], get(p, name)) for p in points if get(p, name)]
    if not found:
        return
    x = [value for value, _ in found]
    median, q1, q3 = ([spread[key] * factor for _, spread in found] for key in ("median", "q1", "q3"))
    axes.plot(x, median, "o-", color=colour, markersize=4, linewidth=1.6, label=name)
    axes.fill_between(x, q1, q3, color=colour, alpha=0.2, linewidth=0)


def _measured(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [result for result in record["results"] if not result["error"] and result["contenders"]]


def _listed(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What the lists of bars show: "scaling" has a picture of its own."""
    return [result for result in _measured(record) if result["suite"] != "scaling"]


def _case(result: dict[str, Any]) -> str:
    return f"{result['suite']} {result['case']}".replace("$", r"\$")


def _triple(spread: dict[str, float]) -> tuple[float, float, float]:
    return spread["median"], spread["q1"], spread["q3"]
