"""fastpeft demo."""

from pathlib import Path
from typing import Annotated

import typer

from fastpeft.cli.errors import CommandError


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the adapters, the table and the picture.")
    ] = Path("demo-out"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each adapter.")] = 150,
    compare: Annotated[bool, typer.Option(help="Measure against reference PEFT too, where it is installed.")] = True,
) -> None:
    """The main job on an embedded tiny model: two corpora, two adapters, losses, texts, speed.

    A few minutes on two CPU cores, no network. The exit code is 1 when an adapter does not beat the base and the
    other adapter by 0.2 nats a token on the held-out documents of its own corpus.

    \b
    Examples:
      fastpeft demo
      fastpeft demo --output /tmp/out --steps 100 --no-compare
    """
    from fastpeft.demo.run import run

    if output.is_file():
        raise CommandError(f"{output} is a file: give another --output folder")
    missed = run(output, steps=steps, compare=compare)
    if missed:
        raise CommandError("; ".join(missed), code=1)
