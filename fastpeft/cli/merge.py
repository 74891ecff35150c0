"""fastpeft merge."""

import re
import shutil
from pathlib import Path
from typing import Annotated

import typer

from fastpeft.cli.errors import CommandError, one_line
from fastpeft.cli.train_options import Precision


def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder for the merged model.")],
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="Base model folder or hub id; default: the one the adapter names."),
    ] = None,
    dtype: Annotated[Precision, typer.Option(help="Precision of the merged weights; auto keeps the base's.")] = "auto",
    safe: Annotated[bool, typer.Option(help="Check every merged weight for NaN and infinity first.")] = True,
    shard_size: Annotated[str, typer.Option(help="Largest weights file.")] = "5GB",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "cpu",
) -> None:
    """Add an adapter into its base: a plain model folder that needs no adapter library.

    \b
    Examples:
      fastpeft merge my-adapter merged-model
      fastpeft merge my-adapter merged-model --base ./llama --dtype bf16
    """
    if output.is_file() or (output.exists() and any(output.iterdir())):
        raise CommandError(f"{output} exists and is not empty: give another folder")
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]B", shard_size, re.IGNORECASE):
        raise CommandError(f"--shard-size takes a number with KB, MB, GB or TB, such as 5GB; got {shard_size!r}")
    from fastpeft.cli.console import make_console
    from fastpeft.cli.models import base_of, check_task, load_adapter, load_base, make_room, tokenizer_of

    check_task(adapter)
    where = base_of(adapter, base)
    tokenizer = tokenizer_of(adapter, where)
    model = load_adapter(make_room(load_base(where, dtype, device), tokenizer), adapter)
    try:
        merged = model.merge_and_unload(safe_merge=safe)
    except ValueError as error:
        raise CommandError(f"{adapter} cannot be merged: {one_line(error)}", code=1) from error
    draft = output.with_name(output.name + ".part")  # written beside and renamed: the folder is whole or not there
    shutil.rmtree(draft, ignore_errors=True)
    merged.save_pretrained(draft, max_shard_size=shard_size)
    tokenizer.save_pretrained(draft)
    draft.replace(output)
    size = sum(file.stat().st_size for file in output.iterdir())
    make_console().print(f"merged model: {output} ({size / 1e6:,.1f} MB)", highlight=False)
