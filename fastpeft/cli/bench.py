"""fastpeft bench."""

from pathlib import Path
from typing import Annotated

import typer

from fastpeft.cli.errors import CommandError


def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SUITE]...", help="layer, saved, dora, model, saved-model; on a GPU also the larger tables."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer cases, measured briefly: a look, not a figure.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for bench.json and bench.md.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads on the CPU.")] = 1,
    limit: Annotated[float | None, typer.Option(min=1.0, help="Begin no case after so many seconds.")] = None,
) -> None:
    """Measure this machine, in turn with reference PEFT where it is installed.

    \b
    Suites:
      layer        one LoRA linear, forward and backward
      saved        bytes it keeps for backward
      dora         one DoRA linear, beside a LoRA one
      model        a training step of a small Llama
      saved-model  bytes that step keeps

    \b
    Examples:
      fastpeft bench --quick
      fastpeft bench layer model --output bench-out
      fastpeft bench --device cuda
    """
    from rich.markdown import Markdown

    from fastpeft.benchmark import DEFAULT_SUITES, SUITES, run
    from fastpeft.cli.console import make_console
    from fastpeft.cli.models import quiet_libraries, resolve_device

    if unknown := [name for name in suites or () if name not in SUITES]:
        raise CommandError(f"no suite is called {', '.join(unknown)}: choose from {', '.join(SUITES)}")
    if output and output.is_file():
        raise CommandError(f"{output} is a file: give another --output folder")
    quiet_libraries()
    console = make_console()
    report = run(
        suites or DEFAULT_SUITES, quick=quick, out_dir=output, device=resolve_device(device), threads=threads,
        deadline_s=limit, progress=lambda line: console.print(line, style="dim", markup=False, highlight=False),
    )  # fmt: skip
    console.print(Markdown(report.to_markdown()))
    if output:
        console.print(f"written: {output / 'bench.json'}, {output / 'bench.md'}", highlight=False)
    if report.errors:
        first = report.errors[0]
        raise CommandError(
            f"{len(report.errors)} cases failed; the first: {first.suite} {first.case}: {first.error}", code=1
        )
