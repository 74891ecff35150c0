"""The lines of `fastpeft generate --prompts FILE.jsonl`: read, checked, and cut into batches."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fastpeft.cli.errors import CommandError, one_line

BASE = "__base__"  # a line that takes no adapter
Choice = str | dict[str, float]  # an adapter's name, BASE, or a weight for each of several

# What a line may say about sampling, and what its value may be. The commands' options hold where it says nothing.
SAMPLING: dict[str, tuple[type | tuple[type, ...], float, float, str]] = {
    "max_new_tokens": (int, 1, math.inf, "a whole number from 1"),
    "temperature": ((int, float), 0.0, math.inf, "a number from 0"),
    "top_p": ((int, float), 0.01, 1.0, "a number from 0.01 to 1"),
    "top_k": (int, 0, math.inf, "a whole number from 0"),
    "repetition_penalty": ((int, float), 0.01, math.inf, "a number from 0.01"),
}
KEYS = ("prompt", "adapter", "id", *SAMPLING)


@dataclass(frozen=True)
class Request:
    """One line.

    Attributes:
        line: its number in the file, from 1.
        sampling: a value for every key of SAMPLING.
        named: whether it has an id, which its result repeats.
    """

    line: int
    prompt: str
    adapter: Choice
    sampling: dict[str, Any]
    id: Any = None
    named: bool = False

    def result(self, completion: str) -> dict[str, Any]:
        """The line of the output."""
        return {
            **({"id": self.id} if self.named else {}),
            "prompt": self.prompt,
            "adapter": self.adapter,
            "completion": completion,
        }


def parse_adapters(options: Sequence[str]) -> dict[str, str]:
    """Name -> folder, of the values of --adapter NAME=FOLDER.

    Raises:
        CommandError: one that is not of this form, or a name twice.
    """
    adapters: dict[str, str] = {}
    for option in options:
        name, separator, folder = option.partition("=")
        if not (name and separator and folder):
            raise CommandError(f"--adapter {_short(option)}: expected NAME=FOLDER, such as --adapter law=./law-adapter")
        if name == BASE:
            raise CommandError(f"--adapter {option}: {BASE} means no adapter in the prompts file; choose another name")
        if name in adapters:
            raise CommandError(f"--adapter {_short(name)} is there twice: give each adapter a name of its own")
        adapters[name] = folder
    return adapters


def read_requests(file: Path, adapters: Sequence[str], sampling: Mapping[str, Any]) -> list[Request]:
    """All lines of a prompts file. Empty lines are passed over.

    Args:
        adapters: the names that lines may give.
        sampling: what holds where a line says nothing: a value for every key of SAMPLING.

    Raises:
        CommandError: no such file, no line in it, or one that cannot be used; with its number.
    """
    if not file.is_file():
        raise CommandError(f'no prompts file at {file}: give a .jsonl file with lines such as {{"prompt": "Once"}}')
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may hold other separators
    except UnicodeDecodeError as error:
        raise CommandError(f"{file} is not UTF-8 text: write one JSON object a line") from error
    requests = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                requests.append(_request(number, line, adapters, sampling))
            except _BadLine as error:
                raise CommandError(f"{file}, line {number}: {error}") from None
    if not requests:
        raise CommandError(f'{file} holds no prompt: write lines such as {{"prompt": "Once", "adapter": "a"}}')
    return requests


class _BadLine(ValueError):
    pass


def _request(number: int, line: str, adapters: Sequence[str], sampling: Mapping[str, Any]) -> Request:
    try:
        found = json.loads(line)
        json.dumps(found, ensure_ascii=False).encode()  # as its result will be written
    except UnicodeEncodeError:
        raise _BadLine(
            "it has half of a surrogate pair (\\ud800 to \\udfff), which is no text; write whole characters"
        ) from None
    except (ValueError, RecursionError) as error:
        raise _BadLine(f"not JSON ({one_line(error, 80)}); write one object a line") from None
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise _BadLine('expected a JSON object with "prompt", a text')
    unknown = [key for key in found if key not in KEYS]
    if unknown:
        raise _BadLine(f"no key is called {_short(unknown[0])}; there are {', '.join(KEYS)}")
    chosen = dict(sampling)
    for key, (*_, text) in SAMPLING.items():
        if key in found:
            if not fits(key, found[key]):
                raise _BadLine(f"{key} must be {text}, got {_short(found[key])}")
            chosen[key] = found[key]
    try:
        json.dumps(found.get("id"), allow_nan=False)
    except ValueError:  # its result could not be told from another: NaN differs from itself
        raise _BadLine(
            f'"id" must be JSON, which NaN and Infinity are not, got {_short(found["id"])}; write it in quotes'
        ) from None
    choice = _choice(found, adapters)
    return Request(number, found["prompt"], choice, chosen, found.get("id"), "id" in found)


def fits(key: str, value: Any) -> bool:
    """Whether a key of SAMPLING may have this value."""
    kind, low, high, _ = SAMPLING[key]
    return isinstance(value, kind) and _finite(value) and low <= cast(float, value) <= high


def _finite(value: Any) -> bool:
    """Whether it is a number that a float can hold; JSON's whole numbers know no bound."""
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def _choice(found: dict[str, Any], adapters: Sequence[str]) -> Choice:
    """The adapter of a line, or the weights of several; the only one there is where it names none."""
    if "adapter" not in found:
        if len(adapters) == 1:
            return adapters[0]
        raise _BadLine(f'it does not say which adapter it takes; add "adapter": one of {_listed(adapters)}')
    choice = found["adapter"]
    weights = {choice: 1.0} if isinstance(choice, str) else choice
    if not isinstance(weights, dict) or not weights:
        raise _BadLine(f'"adapter" must be a name, or weights such as {{"a": 0.7, "b": 0.3}}, got {_short(choice)}')
    for name, weight in weights.items():
        if name not in adapters and name != BASE:  # which adds nothing to a row of weights
            raise _BadLine(f"no adapter {_short(name)}; there are {_listed(adapters)}, given with --adapter")
        if not _finite(weight):
            raise _BadLine(f"the weight of adapter {name!r} must be a finite number, got {_short(weight)}")
    return choice if isinstance(choice, str) else {name: float(weight) for name, weight in choice.items()}


def _listed(adapters: Sequence[str]) -> str:
    shown = ", ".join(_short(name) for name in adapters[:8])
    return f"{shown} ... ({len(adapters)})" if len(adapters) > 8 else f"{shown} or {BASE}"


def _short(value: Any) -> str:
    """A value of the file or of the command line, fit for one line of a message."""
    text = value if isinstance(value, str) else json.dumps(value)
    return repr(text if len(text) <= 60 else f"{text[:57]}...") if isinstance(value, str) else text[:60]


def check_lengths(file: Path, requests: Sequence[Request], lengths: Sequence[int], limit: int | None) -> None:
    """Raise CommandError for the first line that has no token, or with its completion more than the model reads."""
    for request, length in zip(requests, lengths, strict=True):
        if not length:
            raise CommandError(
                f"{file}, line {request.line}: no token to go on from, for the tokenizer has none for the beginning "
                "of a text; write a prompt"
            )
        new = request.sampling["max_new_tokens"]
        if limit and length + new > limit:
            raise CommandError(
                f"{file}, line {request.line}: the model reads {limit} tokens: {length} of the prompt and "
                f"max_new_tokens {new} are more; shorten one of them"
            )


def cut_batches(requests: Sequence[Request], lengths: Sequence[int], size: int, limit: int | None) -> Iterator[range]:
    """Places of the requests of each batch, in order: at most `size` that sample alike and fit the model together.

    A batch goes on for as long as the line that wants most, from the end of its longest prompt. The batches depend on
    the file alone, so that a run which goes on later makes the same ones.
    """
    start, longest, most = 0, 0, 0
    for place, (request, length) in enumerate(zip(requests, lengths, strict=True)):
        new = request.sampling["max_new_tokens"]
        fits = not limit or max(longest, length) + max(most, new) <= limit
        if place > start and (place - start == size or not fits or not _alike(requests[start], request)):
            yield range(start, place)
            start, longest, most = place, 0, 0
        longest, most = max(longest, length), max(most, new)
    if start < len(requests):
        yield range(start, len(requests))


def _alike(first: Request, second: Request) -> bool:
    return all(first.sampling[key] == second.sampling[key] for key in SAMPLING if key != "max_new_tokens")
