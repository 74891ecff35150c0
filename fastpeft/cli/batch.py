"""Offline generation: the lines of a prompts file in batches, each line with an adapter of its own."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpeft.cli.errors import CommandError, one_line
from fastpeft.cli.models import base_of, cannot_use, check_task, load_adapter, load_base, load_tokenizer
from fastpeft.cli.requests import Request, check_lengths, cut_batches, parse_adapters, read_requests
from fastpeft.cli.results import Results, record_of
from fastpeft.cli.train_options import MAX_SEED

if TYPE_CHECKING:
    from torch import Tensor

EVERY_S = 5.0  # between two lines about progress, where there is no terminal for a bar


@dataclass(frozen=True)
class BatchSettings:
    """What `fastpeft generate --adapter ... --prompts FILE` was told."""

    adapters: list[str]  # NAME=FOLDER
    prompts: Path
    output: Path | None
    base: str | None
    batch_size: int
    sampling: dict[str, Any]
    seed: int | None
    resume: bool
    dtype: str
    device: str


def generate_batch(settings: BatchSettings) -> None:
    """Write a result for every line that has none yet, in the order of the lines.

    Raises:
        CommandError: an argument, an adapter, a line or an output that cannot be used; nothing was written then.
    """
    adapters = parse_adapters(settings.adapters)
    requests = read_requests(settings.prompts, list(adapters), settings.sampling)
    where = common_base(adapters, settings.base)
    options = {"batch_size": settings.batch_size, "seed": settings.seed, "dtype": settings.dtype, **settings.sampling}
    record = record_of(settings.prompts, adapters, where, options)
    results = Results(settings.output, record, settings.resume, requests)
    tokenizer = load_tokenizer(where)
    tokens = [tokenizer(r.prompt or tokenizer.bos_token or "")["input_ids"] for r in requests]
    lengths = [len(ids) for ids in tokens]
    limit = longest_text(where)
    check_lengths(settings.prompts, requests, lengths, limit)
    model = load_adapters(load_base(where, settings.dtype, settings.device), adapters)
    with results.open(), BatchProgress(len(requests), results.done) as progress:
        for number, batch in enumerate(cut_batches(requests, lengths, settings.batch_size, limit)):
            if batch.stop <= results.done:
                continue
            if settings.seed is not None:
                from transformers import set_seed

                set_seed((settings.seed + number) % (MAX_SEED + 1))
            rows = [requests[place] for place in batch]
            texts, count = complete_rows(model, tokenizer, rows, [tokens[place] for place in batch])
            done = zip(batch, rows, texts, strict=True)
            results.write([row.result(text) for place, row, text in done if place >= results.done])
            progress.advance(results.done, count)


def common_base(adapters: dict[str, str], base: str | None) -> str:
    """The base to use: what was asked for, else the one that all adapters name.

    Raises:
        CommandError: they name different ones, or one that is not here, or are of another task.
    """
    for folder in adapters.values():
        check_task(folder)
    found = {name: base_of(folder, base) for name, folder in adapters.items()}
    (first, where), *others = found.items()
    for name, its in others:
        if its != where:
            raise CommandError(
                f"adapter {first} is for the base {where} and adapter {name} for {its}: leave one out, or name the "
                "base of both with --base"
            )
    return where


def longest_text(base: str) -> int | None:
    """How many tokens the model reads, by its config; None where that does not say."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base).get_text_config()
    except Exception as error:
        raise CommandError(f"cannot read the config of {base}: {one_line(error, 250)}", code=1) from error
    return getattr(config, "max_position_embeddings", None)


def load_adapters(base_model: Any, adapters: dict[str, str]) -> Any:
    """The base with all adapters on it (a PeftModel), in evaluation mode."""
    advice = "leave it to a call without --prompts if its tokenizer has more tokens than the base"
    (first, folder), *others = adapters.items()
    model = load_adapter(base_model, folder, first, advice)
    for name, folder in others:
        try:
            model.load_adapter(folder, name)
        except Exception as error:
            raise cannot_use(folder, error, advice) from error
    return model.eval()


def complete_rows(
    model: Any, tokenizer: Any, rows: Sequence[Request], prompts: Sequence[list[int]]
) -> tuple[list[str], int]:
    """What the model adds to each prompt with the row's adapter, and how many tokens that is.

    Args:
        rows: requests that sample alike; each gets no more than its own max_new_tokens.
        prompts: their token ids.
    """
    import torch

    from fastpeft.cli.generate import sampling

    longest = max(map(len, prompts))
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # on the left: all go on from the last column
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    wanted = [row.sampling["max_new_tokens"] for row in rows]
    choices = sampling(**{**rows[0].sampling, "max_new_tokens": max(wanted)})
    with torch.no_grad():
        out: Tensor = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **choices,
            adapter_names=[row.adapter for row in rows], pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    new = [out[row, longest : longest + most] for row, most in enumerate(wanted)]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in new]
    fill = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # generate's own rule
    return texts, sum(len(row) if fill is None else int((row != fill).sum()) for row in new)


class BatchProgress:
    """How far a run is, on stderr: a bar on a terminal, else a line every few seconds."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.first, self.done, self.tokens = total, done, done, 0
        self.bar: Any = None

    def __enter__(self) -> "BatchProgress":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console: Console = Console(stderr=True, soft_wrap=True)
        self.start = self.said = time.monotonic()
        if self.done:
            self._say(f"going on after {self.done} of {self.total} prompts")
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]generate"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
                TextColumn("left"), TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.done, speed="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, done: int, tokens: int) -> None:
        """So many prompts are done now; the last batch had so many new tokens."""
        self.done, self.tokens = done, self.tokens + tokens
        seconds = max(time.monotonic() - self.start, 1e-6)
        speed = f"{self.tokens / seconds:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.task, completed=done, speed=speed)
        elif time.monotonic() - self.said > EVERY_S or done == self.total:
            self.said = time.monotonic()
            left = seconds / (done - self.first) * (self.total - done)
            self._say(f"{done}/{self.total} prompts, {speed}, {left:.0f} s left")

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)
