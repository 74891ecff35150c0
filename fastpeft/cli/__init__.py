"""The command line: fastpeft train | generate | merge | inspect | bench | demo.

Nothing heavy is imported before a command runs, so that --help is quick.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fastpeft.cli import bench, demo, generate, inspect, merge, train
from fastpeft.cli.errors import CommandError, one_line

# Typer carries a click of its own or uses the real one, by version; its usage errors have this class in either case.
UsageError: Any = typer.BadParameter.__base__  # type: ignore[assignment]

INTERRUPTED = 130  # by convention: 128 + the signal's number

app = typer.Typer(name="fastpeft", no_args_is_help=True, add_completion=False, rich_markup_mode="rich")
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.command("merge")(merge.merge)
app.command("inspect")(inspect.inspect)
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)


def show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"fastpeft {version('fastpeft')}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (also FASTPEFT_DEBUG=1).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Fine-tune language models with LoRA: PEFT's adapters and files, on fused kernels.

    A first run, from a model folder and a text file to a generated line:

    \b
      fastpeft train ./my-model --data notes.txt --output my-adapter
      fastpeft generate my-adapter "Once upon a time"
    """
    if debug:
        os.environ["FASTPEFT_DEBUG"] = "1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 well, 1 failed, 2 wrong argument, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = next((a for a in arguments if not a.startswith("-")), "")
    name = f"fastpeft {command}" if command in {c.name for c in app.registered_commands} else "fastpeft"
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: complain(name, f"note: {one_line(message)}")  # type: ignore
            code = app(arguments, standalone_mode=False, prog_name="fastpeft") or 0
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code
    except UsageError as error:  # includes the help that is shown when no argument was given
        message = " ".join(error.format_message().split())
        if message:
            complain(name, f"{message.rstrip('.')}; see '{name} --help'")
        return 2
    except CommandError as error:
        reraise_if_debugging(error)
        complain(name, one_line(error, limit=1000))
        return error.code
    except (KeyboardInterrupt, typer.Abort):
        resumable = command == "train" or (_given(arguments, "--prompts") and _given(arguments, "--output", "-o"))
        begun = " if a first step was done" if command == "train" else ""  # before it nothing is on disk
        complain(name, "stopped" + (f"; the same command with --resume goes on{begun}" if resumable else ""))
        return INTERRUPTED
    except Exception as error:
        reraise_if_debugging(error)
        complain(name, f"{type(error).__name__}: {one_line(error)} (--debug before the command shows where)")
        return 1


def _given(arguments: Sequence[str], name: str, short: str | None = None) -> bool:
    """Whether an option with a value is among the arguments, in any of its spellings."""
    spelled = (a == name or a.startswith(f"{name}=") for a in arguments)
    return any(spelled) or (short is not None and any(a.startswith(short) for a in arguments))


def complain(name: str, message: str) -> None:
    print(f"{name}: {message}", file=sys.stderr)


def reraise_if_debugging(error: Exception) -> None:
    if os.environ.get("FASTPEFT_DEBUG", "0") not in ("", "0"):
        raise error
