"""fastpeft inspect."""

from typing import Annotated, Any

import typer

from fastpeft.cli.errors import CommandError

SHOWN = 8  # differences and rows that a terminal gets before "and N more"


def inspect(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder.")],
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="Also say whether the adapter fits this model.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="One row a layer, not one a kind of layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is in an adapter: method, targets, ranks, size, norms; and whether it fits a base.

    With --base the exit code is 1 when it does not fit.

    \b
    Examples:
      fastpeft inspect my-adapter
      fastpeft inspect my-adapter --base ./llama
      fastpeft inspect my-adapter --layers --json
    """
    from fastpeft.cli.models import resolve_base
    from fastpeft.cli.report import describe, fit, group

    if base:
        base = resolve_base(base)
    report = describe(adapter)
    if not layers:
        report["layers"] = group(report["layers"])
    if base:
        report["base"] = base
        report["misfits"], report["notes"] = fit(adapter, base)
    if as_json:
        import json

        print(json.dumps(report, indent=1))
    else:
        show(report)
    if report.get("misfits"):
        first = report["misfits"][0] + (f", and {more} more" if (more := len(report["misfits"]) - 1) else "")
        raise CommandError(f"{adapter} does not fit {base}: {first}", code=1)


def show(report: dict[str, Any]) -> None:
    from rich.table import Table

    from fastpeft.cli.console import make_console

    console = make_console()
    console.print(
        f"[bold]{report['adapter']}[/bold]: {report['method']}, task {report['task'] or 'not named'}", highlight=False
    )
    console.print(f"base: {report['named_base'] or 'not named'}", highlight=False)
    console.print(
        f"{report['parameters']:,} parameters in {report['tensors']} tensors, {report['dtype']}, "
        f"{report['bytes'] / 1e6:,.2f} MB on disk", highlight=False,
    )  # fmt: skip
    for key, value in report["options"].items():
        console.print(f"{key}: {value}", highlight=False, markup=False)
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "count", "shape", "rank", "scaling", "parameters", "update norm"):
        table.add_column(name, justify="left" if name == "layer" else "right", overflow="fold")
    for row in report["layers"]:
        table.add_row(
            row["layer"], str(row["count"]), " x ".join(map(str, row["shape"])), str(row["rank"] or ""),
            "" if row["scaling"] is None else f"{row['scaling']:g}", f"{row['parameters']:,}", f"{row['norm']:.4g}",
        )  # fmt: skip
    console.print(table)
    for line in report["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {line}", highlight=False)
    for line in report.get("notes", ()):
        console.print(f"note: {line}", highlight=False, markup=False)
    if "misfits" in report:
        if not report["misfits"]:
            console.print(f"[green]fits[/green] {report['base']}", highlight=False)
        else:
            console.print(f"[red]does not fit[/red] {report['base']}:", highlight=False)
            for line in report["misfits"][:SHOWN]:
                console.print(f"  {line}", highlight=False, markup=False)
            if len(report["misfits"]) > SHOWN:
                console.print(f"  and {len(report['misfits']) - SHOWN} more")
