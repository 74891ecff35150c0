"""The picture of the limit: on the left FLOP/s under the roof of the device, on the right time over the limit."""

from typing import Any

from matplotlib.ticker import LogLocator, StrMethodFormatter

from fastpeft.benchmark.libraries import FROZEN
from fastpeft.benchmark.plots import colours_of

ROOFS = ("-", "--", ":")


def draw(record: dict[str, Any]) -> tuple[str, Any] | None:
    """Title and figure of a report's record, or None: no ceilings, or no measured case that has a limit."""
    ceilings = record["environment"].get("ceilings")
    results = [
        result for result in record["results"]
        if result["roofline"] and not result["error"]
        and any("seconds" in contender for contender in result["contenders"].values())
    ]  # fmt: skip
    if not ceilings or not results:
        return None
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(n for r in results for n, c in r["contenders"].items() if "seconds" in c))
    colours = colours_of(names)
    height = max(5.5, 2.2 + 0.2 * len(results))
    figure, (roof, bars) = plt.subplots(1, 2, figsize=(14, height), layout="constrained", width_ratios=(1, 1.15))
    _draw_roof(roof, ceilings, results, colours)
    _draw_shares(bars, [result for result in results if result["suite"] != "scaling"] or results, colours)
    bars.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=5, frameon=False, fontsize=8)
    return f"Measured against the limit of {ceilings['device']} ({ceilings['source']})", figure


def _work(result: dict[str, Any], name: str) -> tuple[float, float]:
    """FLOP and predicted seconds of a contender: the frozen base has none of the adapters' work."""
    roofline = result["roofline"]
    return roofline["flops"], roofline["base_seconds" if name == FROZEN else "seconds"]


def _draw_roof(axes: Any, ceilings: dict[str, Any], results: list[dict[str, Any]], colours: dict[str, str]) -> None:
    intensity = [result["roofline"]["flops"] / result["roofline"]["bytes"] for result in results]
    ridges = [rate / ceilings["bytes_per_s"] for rate in ceilings["flops_per_s"].values()]
    low, high = min(intensity + ridges) / 3, max(intensity + ridges) * 3
    steps = [low * (high / low) ** (step / 200) for step in range(201)]
    for style, (dtype, rate) in zip(ROOFS, ceilings["flops_per_s"].items(), strict=False):
        roof = [min(rate, step * ceilings["bytes_per_s"]) / 1e9 for step in steps]
        label = f"roof: {ceilings['bytes_per_s'] / 1e9:.0f} GB/s, {rate / 1e9:,.0f} GFLOP/s {dtype}"
        axes.plot(steps, roof, style, color="#333", linewidth=1.4, label=label)
    for name, colour in colours.items():
        if name == FROZEN:
            continue  # it does less work than the case's figure says
        found = [
            (at, r) for at, r in zip(intensity, results, strict=True) if "seconds" in r["contenders"].get(name, {})
        ]
        reached = [r["roofline"]["flops"] / r["contenders"][name]["seconds"]["median"] / 1e9 for _, r in found]
        axes.plot([at for at, _ in found], reached, "o", color=colour, markersize=4.5, alpha=0.8, label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP a byte (least traffic)", ylabel="GFLOP/s", xlim=(low, high),
    )  # fmt: skip
    for each in (axes.xaxis, axes.yaxis):
        each.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        each.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.minorticks_off()
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_shares(axes: Any, results: list[dict[str, Any]], colours: dict[str, str]) -> None:
    """One row for each case, one point for each contender: how many times the limit's time it takes."""
    longest = 1.0
    for row, result in enumerate(results):
        axes.axhline(row, color="#ddd", linewidth=0.7, zorder=0)
        for name, contender in result["contenders"].items():
            if "seconds" not in contender:
                continue
            limit = _work(result, name)[1]
            median, q1, q3 = (contender["seconds"][key] / limit for key in ("median", "q1", "q3"))
            axes.plot([q1, q3], [row, row], color=colours[name], linewidth=1.2)
            axes.plot(median, row, "o", color=colours[name], markersize=5)
            longest = max(longest, q3)
    for name, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=name)
    axes.axvline(1.0, color="#c0392b", linewidth=1.2, linestyle="--", label="the limit")
    axes.set_yticks(
        range(len(results)), [f"{r['suite']} {r['case']}".replace("$", r"\$") for r in results], fontsize=7.5
    )
    axes.set(
        ylim=(len(results) - 0.4, -0.6), xlim=(0.8, longest * 1.15), xscale="log",
        xlabel="measured / least possible time (median, quartiles), lower is better",
    )  # fmt: skip
    ticks = [tick for tick in (1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100) if tick <= longest * 1.15]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right", "left"]].set_visible(False)
