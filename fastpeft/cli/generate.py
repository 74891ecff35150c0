"""fastpeft generate."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastpeft.cli.errors import CommandError
from fastpeft.cli.train_options import MAX_SEED, Precision

SAMPLING, BATCH = "Sampling", "Many adapters"
LINES = 16  # of --prompts at a time


def generate(
    adapter: Annotated[
        str | None, typer.Argument(metavar="[ADAPTER]", help="Adapter folder; many of them: --adapter.")
    ] = None,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to go on from.")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts-file", "-f", help='Prompts from a file: one a line, or .jsonl with "prompt".'),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="Base model folder or hub id; default: the one the adapter names."),
    ] = None,
    no_adapter: Annotated[
        bool, typer.Option("--no-adapter", help="Switch the adapter off: what the base alone says.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens to add.", rich_help_panel=SAMPLING)
    ] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token every time.", rich_help_panel=SAMPLING)
    ] = 0.8,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.01, max=1.0, help="Choose among the likeliest tokens of this mass.", rich_help_panel=SAMPLING
        ),
    ] = 0.95,
    top_k: Annotated[
        int, typer.Option(min=0, help="Choose among so many tokens; 0 for no limit.", rich_help_panel=SAMPLING)
    ] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(min=0.01, help="Above 1: avoid what was said.", rich_help_panel=SAMPLING)
    ] = 1.0,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Texts a prompt.", rich_help_panel=SAMPLING)] = 1,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, help="Same seed, same text.", rich_help_panel=SAMPLING)
    ] = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Print words as they come; the default.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help='Also write .jsonl rows of "prompt" and "completion".')
    ] = None,
    dtype: Annotated[Precision, typer.Option(help="Precision of the base.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="NAME=FOLDER",
            help="An adapter for --prompts. Repeatable.",
            rich_help_panel=BATCH,
        ),
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE.jsonl",
            help="Lines with a prompt and its adapter; see above.",
            rich_help_panel=BATCH,
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help=f"Lines at a time; default: {LINES}.", rich_help_panel=BATCH)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in --output after its last whole line.", rich_help_panel=BATCH)
    ] = False,
) -> None:
    """Write text with a base model and an adapter, or the lines of a file with many adapters in one batch.

    \b
    Examples:
      fastpeft generate my-adapter "And it came to pass"
      fastpeft generate my-adapter --prompts-file prompts.txt --temperature 0 --output texts.jsonl
      fastpeft generate my-adapter "Once" --base ./llama --samples 3 --seed 1
      fastpeft generate my-adapter "Once" --no-adapter
      fastpeft generate --adapter a=./law --adapter b=./code --prompts file.jsonl --output out.jsonl

    \b
    A line of --prompts, with any of the last six keys left out:
      {"prompt": "Once", "adapter": "a", "id": 7, "max_new_tokens": 64,
       "temperature": 0.0, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.0}
    "adapter" may also be "__base__", for none, or weights: {"a": 0.7, "b": 0.3}. Results come in the lines' order.
    """
    choices: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
        "repetition_penalty": repetition_penalty,
    }  # fmt: skip
    check_sampling(choices)
    if adapters or requests:
        refused = {
            adapter or "": adapter, "the prompts in quotes": prompts, "--prompts-file": prompts_file,
            "--no-adapter": no_adapter, "--samples": samples > 1,
        }  # fmt: skip
        folders, lines = check_many(adapters, requests, [option for option, given in refused.items() if given])
        if stream is not None:
            raise CommandError("--stream and --no-stream cannot be used with --prompts: lines come in batches")
        from fastpeft.cli.batch import BatchSettings, generate_batch

        size = batch_size or LINES
        generate_batch(BatchSettings(folders, lines, output, base, size, choices, seed, resume, dtype, device))
        return
    if adapter is None:
        raise CommandError("no adapter: give its folder, or many of them with --adapter NAME=FOLDER and --prompts")
    if resume or batch_size:
        raise CommandError(f"{'--resume' if resume else '--batch-size'} goes with --prompts: leave it out")
    texts = [*(prompts or []), *(read_prompts(prompts_file) if prompts_file else [])]
    if not texts:
        raise CommandError("no prompt: give one in quotes, or a file with --prompts-file")
    if output and output.exists():
        raise CommandError(f"{output} exists: give another file with --output")
    from fastpeft.cli.models import base_of, check_task, load_adapter, load_base, make_room, tokenizer_of

    check_task(adapter)
    where = base_of(adapter, base)
    tokenizer = tokenizer_of(adapter, where)
    model = load_adapter(make_room(load_base(where, dtype, device), tokenizer), adapter)
    rows, streams = [], stream is not False
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    for number, prompt in enumerate(text for text in texts for _ in range(samples)):
        if number:
            print()
        completion = complete(model, tokenizer, prompt, sampling(**choices), stream=streams, adapter=not no_adapter)
        rows.append({"prompt": prompt, "completion": completion})
        if not streams:
            print(prompt + completion)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("x", encoding="utf-8") as file:  # not over one that came meanwhile
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def check_sampling(choices: dict[str, Any]) -> None:
    """Raise CommandError for a value that a line of --prompts may not have either."""
    from fastpeft.cli import requests

    for key, value in choices.items():
        if not requests.fits(key, value):
            option = f"--{key.replace('_', '-')}"
            raise CommandError(f"{option} must be {requests.SAMPLING[key][-1]}, got {value}")


def check_many(adapters: list[str] | None, requests: Path | None, refused: list[str]) -> tuple[list[str], Path]:
    """--adapter and --prompts, which both must be there, and nothing that says the same in another way.

    Raises:
        CommandError: with what to leave out or to give.
    """
    if not adapters or not requests:
        raise CommandError("--adapter NAME=FOLDER and --prompts FILE.jsonl go together: give both")
    if refused:
        raise CommandError(
            f"{refused[0]} cannot be used with --prompts: name adapters with --adapter NAME=FOLDER, and write prompts "
            f"into {requests}"
        )
    return adapters, requests


def read_prompts(file: Path) -> list[str]:
    """One prompt a line; in a .jsonl file under "prompt"."""
    if not file.is_file():
        raise CommandError(f"no prompts file at {file}: give a .txt file with one prompt a line, or a .jsonl file")
    try:
        text = file.read_text(encoding="utf-8").split("\n")  # not splitlines: a prompt may hold other separators
    except UnicodeDecodeError as error:
        raise CommandError(f"{file} is not UTF-8 text (byte {error.start}): convert it first") from error
    lines = {number: line for number, line in enumerate(text, start=1) if line.strip()}
    if not lines:
        raise CommandError(f"{file} holds no prompt: write one a line")
    if file.suffix != ".jsonl":
        return [*lines.values()]
    prompts = []
    for number, line in lines.items():
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            prompt = None
        if not isinstance(prompt, str):
            raise CommandError(f'{file}, line {number}: expected a JSON object with "prompt", a text')
        prompts.append(prompt)
    return prompts


def sampling(
    max_new_tokens: int, temperature: float, top_p: float, top_k: int, repetition_penalty: float
) -> dict[str, Any]:
    """The arguments of generate(); temperature 0 is greedy, and then the other choices have nothing to choose from."""
    choices: dict[str, Any] = {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
    if temperature == 0:
        return choices | {"do_sample": False}
    return choices | {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}


def complete(
    model: Any, tokenizer: Any, prompt: str, choices: dict[str, Any], stream: bool = False, adapter: bool = True
) -> str:
    """What the model adds to the prompt."""
    from contextlib import nullcontext

    import torch
    from transformers import TextStreamer

    inputs = tokenizer(prompt or tokenizer.bos_token or "", return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    limit = getattr(model.config, "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1]
    if not length:
        raise CommandError("the prompt has no token to go on from: write some text")
    if limit and length + choices["max_new_tokens"] > limit:
        raise CommandError(
            f"the model reads {limit} tokens: {length} of the prompt and --max-new-tokens {choices['max_new_tokens']} "
            "are more; shorten one of them"
        )
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    with torch.no_grad(), nullcontext() if adapter else model.disable_adapter():
        ids = model.generate(**inputs, **choices, streamer=streamer, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True)
