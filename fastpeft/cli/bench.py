"""fastpeft bench."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastpeft.cli.errors import CommandError

if TYPE_CHECKING:
    from rich.console import Console

    from fastpeft.benchmark import Report


def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SUITE]...", help="What to measure; all that run on any machine when none is named."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer cases, measured briefly: a look, not a figure.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for bench.json, bench.md and the pictures.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads on the CPU.")] = 1,
    limit: Annotated[float | None, typer.Option(min=1.0, help="Begin no case after so many seconds.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--compare",
            metavar="OLD NEW",
            help="Compare two bench.json: times, bytes, errors; exit code 1 if NEW is worse or shares no figure.",
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=10.0, help="With --compare: how much slower is a regression, as a share.")
    ] = 0.05,
    draw: Annotated[
        Path | None,
        typer.Option("--draw", metavar="JSON", help="Draw the pictures of a bench.json that is there already."),
    ] = None,
    predict: Annotated[
        str | None, typer.Option(metavar="GPU", help="Measure nothing: the least possible times on that GPU (H200).")
    ] = None,
) -> None:
    """Measure this machine, in turn with reference PEFT and with the frozen base.

    \b
    Suites for any machine (all of them take some 20 minutes on one CPU core, --quick some 5):
      layer           one LoRA linear, forward and backward
      groups          q/k/v and gate/up: linears that share their input
      ia3             one IA3 linear: its time, and the bytes it keeps
      dora            one DoRA linear, beside a LoRA one
      host            one token without gradients: what Python and dispatch cost
      saved           bytes that a layer keeps for backward
      model           a training step of a small Llama, also under bf16 autocast
      saved-model     bytes that step keeps, ours also with recompute_mlp
      peak            the most bytes that step holds at once
      first-step      its first step in a fresh process
      scaling         the layer over M, r and N
      compiled-model  the step under torch.compile, and how long compiling takes
      routed          each row of a batch its own adapter, of 1 to 64
      routed-generate the same through generate, 32 adapters
      joint           eight adapters trained in one run, against eight runs

    \b
    Suites for a large GPU:
      llama-layer     the linears of a Llama-3-8B layer
      llama-saved     bytes they keep for backward
      fused-linear    LoRAFusion's table; fused-linear-full: every 256 rows
      own-gemm        base products with their low-rank part: the library's, and our kernel
      punica          Punica's table: rows that take one adapter each, of four popularities
      vllm-lora       both ops of such a batch, apart, at vLLM's shapes
      routed-groups   q, k and v of such a batch: one op for all, and one for each
      peers           Liger's and Unsloth's kernels; needs CUDA, and one of them installed

    \b
    Examples:
      fastpeft bench --quick
      fastpeft bench layer model --output bench-out
      fastpeft bench llama-layer groups --device cuda --output bench-out
      fastpeft bench --compare old/bench.json new/bench.json --threshold 0.1
      fastpeft bench --draw bench-out/bench.json
      fastpeft bench llama-layer --predict H200
    """
    from fastpeft.cli.console import make_console

    console = make_console()
    if sum(way is not None for way in (compare, draw, predict)) > 1:
        raise CommandError("--compare, --draw and --predict exclude one another: give one of them")
    if (compare or draw) and suites:
        raise CommandError(f"{'--compare' if compare else '--draw'} measures nothing: leave out {' '.join(suites)}")
    if output and output.is_file():
        raise CommandError(f"{output} is a file: give another --output folder")
    if compare:
        _compare(console, *compare, threshold)
    elif draw:
        _draw(console, draw, output)
    elif predict:
        _predict(console, predict, suites, quick, output)
    else:
        _measure(console, suites, quick, output, device, threads, limit)


def _compare(console: "Console", old: Path, new: Path, threshold: float) -> None:
    from fastpeft.benchmark.compare import compare

    comparison = compare(_read(old), _read(new), threshold)
    for line in comparison.lines():
        console.print(line, markup=False, highlight=False)
    if comparison.exit_code:
        raise typer.Exit(comparison.exit_code)


def _read(file: Path) -> dict:
    from fastpeft.benchmark.records import ReportError, read

    try:
        return read(file)
    except ReportError as error:
        raise CommandError(str(error)) from error


def _draw(console: "Console", file: Path, output: Path | None) -> None:
    from fastpeft.benchmark.plots import draw

    record = _read(file)
    try:
        pictures = draw(record, output or file.parent, file.stem)
    except ImportError as error:
        raise CommandError(str(error), code=1) from error
    if not pictures:
        raise CommandError(f"{file}: no case was measured: there is nothing to draw", code=1)
    console.print(f"written: {', '.join(map(str, pictures))}", highlight=False, markup=False)


def _predict(console: "Console", gpu: str, suites: list[str] | None, quick: bool, output: Path | None) -> None:
    from fastpeft.benchmark import GPU_SUITES, predict
    from fastpeft.benchmark.roofline import KNOWN, known

    ceilings = known(gpu)
    if ceilings is None:
        names = ", ".join(entry.device for entry in KNOWN)
        raise CommandError(f"--predict {gpu}: the limits of that GPU are not known, only those of {names}")
    report = predict(_known_suites(suites) or GPU_SUITES, ceilings, quick=quick)
    if not report.results:
        raise CommandError("none of these suites has a limit to predict: try llama-layer, groups or layer")
    if output:
        report.write(output)
    _show(console, report)
    if output:
        console.print(f"written: {output / 'bench.json'}, {output / 'bench.md'}", highlight=False, markup=False)


def _measure(
    console: "Console", suites: list[str] | None, quick: bool, output: Path | None,
    device: str, threads: int, limit: float | None,
) -> None:  # fmt: skip
    from fastpeft.benchmark import DEFAULT_SUITES, run, without_cases
    from fastpeft.cli.models import quiet_libraries, resolve_device

    suites, device = _known_suites(suites), resolve_device(device)
    if suites and (why := without_cases(suites, quick=quick, device=device)):
        raise CommandError(f"nothing was measured: {'; '.join(why)}", code=1)
    quiet_libraries()
    report = run(
        suites or DEFAULT_SUITES, quick=quick, out_dir=output, device=device, threads=threads,
        deadline_s=limit, progress=lambda line: console.print(line, style="dim", markup=False, highlight=False),
    )  # fmt: skip
    _show(console, report)
    if output:
        written = [output / "bench.json", output / "bench.md", *_pictures(console, report, output)]
        console.print(f"written: {', '.join(map(str, written))}", highlight=False, markup=False)
    if report.errors:
        first = report.errors[0]
        raise CommandError(
            f"{len(report.errors)} cases failed; the first: {first.suite} {first.case}: {first.error}", code=1
        )


def _known_suites(suites: list[str] | None) -> list[str] | None:
    from fastpeft.benchmark import SUITES

    if unknown := [name for name in suites or () if name not in SUITES]:
        raise CommandError(f"no suite is called {', '.join(unknown)}: choose from {', '.join(SUITES)}")
    return suites


def _show(console: "Console", report: "Report") -> None:
    from rich.markdown import Markdown

    console.print(Markdown(report.to_markdown()))


def _pictures(console: "Console", report: "Report", output: Path) -> list[Path]:
    """The pictures; where matplotlib is missing a line that says what to do, since the figures are written already."""
    from fastpeft.benchmark.plots import draw

    try:
        return draw(report.to_dict(), output)
    except ImportError as error:
        console.print(f"no pictures: {error}; then fastpeft bench --draw {output / 'bench.json'}", markup=False)
        return []
