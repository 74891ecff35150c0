"""Documents from files, and blocks of tokens from documents."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpeft.cli.errors import CommandError, one_line

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # the label that cross entropy leaves out


@dataclass(frozen=True)
class Document:
    """One text to learn; of a prompt only the context counts, not the loss."""

    text: str
    prompt: str = ""


def read_documents(path: Path, field: str = "text") -> list[Document]:
    """Read every document of one file or folder.

    Args:
        path: a .txt file (form feeds part documents, else the file is one), a .jsonl file (`field`, or "prompt" and
            "completion"), a folder of such files, or a folder written by `datasets`' save_to_disk.
        field: the key, or the column, that holds the text.

    Raises:
        CommandError: nothing there, nothing in it, or a line that cannot be read; names file and line.
    """
    if not path.exists():
        raise CommandError(f"no data at {path}: give a .txt or .jsonl file, or a folder of them")
    if path.is_dir():
        documents = _read_folder(path, field)
    elif path.suffix in (".jsonl", ".json", ".ndjson"):
        documents = _read_json_lines(path, field)
    elif path.suffix in (".txt", ".text", ".md"):
        documents = _read_text(path)
    else:
        raise CommandError(f"cannot tell what {path} holds: data files end in .txt, .md or .jsonl")
    documents = [d for d in documents if d.text.strip()]
    if not documents:
        raise CommandError(f"{path} holds no text: give a file with at least one non-empty document")
    return documents


def _read_folder(path: Path, field: str) -> list[Document]:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _read_dataset(path, field)
    files = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".jsonl"))
    if not files:
        raise CommandError(f"no .txt and no .jsonl file under {path}, and `datasets` did not write it")
    return [document for file in files for document in read_documents(file, field)]


def _read_text(path: Path) -> list[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    return [Document(part.strip("\n")) for part in text.split("\f")]


def _read_json_lines(path: Path, field: str) -> list[Document]:
    documents = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may hold other separators
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                hint = "one JSON object a line is expected, such as " + json.dumps({field: "..."})
                raise CommandError(f"{path}, line {number} is not JSON ({error}): {hint}") from error
            documents.append(_document(row, field, f"{path}, line {number}"))
    return documents


def _read_dataset(path: Path, field: str) -> list[Document]:
    try:
        import datasets
    except ImportError as error:
        raise CommandError(f"{path} was written by `datasets`, which is not installed: pip install datasets") from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise CommandError(f"`datasets` cannot read {path}: {one_line(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise CommandError(f"{path} has no split `train`, only {sorted(loaded)}: give the folder of one split")
        loaded = loaded["train"]
    return [_document(row, field, f"{path}, row {number}") for number, row in enumerate(loaded)]


def _document(row: Any, field: str, where: str) -> Document:
    if isinstance(row, dict):
        if isinstance(row.get(field), str):
            return Document(row[field])
        if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            return Document(row["completion"], row["prompt"])
    found = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise CommandError(
        f'{where}: no text under "{field}", and no "prompt" with "completion"; found {found}. Name the key with --field'
    )


def hold_out(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Part the documents into training and evaluation, every 1/fraction-th to evaluation; a lone one gives its tail."""
    if fraction <= 0:
        return list(documents), []
    if len(documents) == 1:
        paragraphs = documents[0].text.split("\n\n")
        count = max(1, round(len(paragraphs) * fraction))
        if documents[0].prompt or len(paragraphs) < 2:
            return list(documents), []
        head, tail = "\n\n".join(paragraphs[:-count]), "\n\n".join(paragraphs[-count:])
        return [Document(head)], [Document(tail)]
    every = max(2, round(1 / fraction))
    chosen = set(range(every - 1, len(documents), every)) or {len(documents) - 1}
    return (
        [d for i, d in enumerate(documents) if i not in chosen],
        [d for i, d in enumerate(documents) if i in chosen],
    )


def make_blocks(
    documents: Sequence[Document], tokenizer: Any, size: int, pack: bool = True
) -> list[dict[str, list[int]]]:
    """Tokenise, and cut into rows of at most `size` tokens: {"input_ids", "labels"}.

    Args:
        pack: put documents end to end, each closed by the end-of-text token, so that every row but the last is full;
            otherwise a document starts its own row.
    """
    rows: list[dict[str, list[int]]] = []
    ids: list[int] = []
    labels: list[int] = []

    def flush() -> None:
        for start in range(0, len(ids), size):
            row = {"input_ids": ids[start : start + size], "labels": labels[start : start + size]}
            if any(label != IGNORED for label in row["labels"][1:]):  # a row without a target teaches nothing
                rows.append(row)
        ids.clear()
        labels.clear()

    for document in documents:
        prompt, text = _tokens(document, tokenizer)
        ids += prompt + text
        labels += [IGNORED] * len(prompt) + text
        if not pack:
            flush()
    flush()
    return rows


def _tokens(document: Document, tokenizer: Any) -> tuple[list[int], list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not document.prompt:
        return [], [*tokenizer(document.text, verbose=False)["input_ids"], *end]
    prompt = tokenizer(document.prompt, verbose=False)["input_ids"]
    text = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    return prompt, [*text, *end]


@dataclass(frozen=True)
class PadRight:
    """Collate rows of unequal length: input_ids, attention_mask and labels, each (rows, longest) int64."""

    padding: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> "dict[str, Tensor]":
        import torch

        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, value: int) -> "Tensor":
            return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

        batch = {"input_ids": padded("input_ids", self.padding), "labels": padded("labels", IGNORED)}
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(longest)[None, :] < lengths[:, None]).long()
        return batch
