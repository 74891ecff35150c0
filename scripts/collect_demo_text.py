"""Collect the texts of the demo from four Debian packages; run once, its output is in fastpeft/demo/data.

    apt-get download r-cran-janeaustenr python3.11-doc dict-devil dict-jargon && apt-get install bible-kjv
    for deb in *.deb; do dpkg-deb -x "$deb" unpacked; done
    python scripts/collect_demo_text.py unpacked

Writes `pretrain.txt.xz` (what the tiny base model reads) and, for the two adapters, `scripture.*.jsonl` and
`jargon.*.jsonl`. Nothing of the adapters' corpora is in the pre-training text. One document in ten, chosen by the hash
of its title and so before any training, goes to `*.heldout.jsonl`.
"""

import gzip
import hashlib
import json
import lzma
import re
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

DATA = Path(__file__).parent.parent / "fastpeft" / "demo" / "data"
AUSTEN = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
PYTHON = "usr/share/doc/python3.11/html/_sources"
BOOKS = {"Gen": ("Genesis", 50), "Ruth": ("Ruth", 4), "1Sam": ("1 Samuel", 31)}  # chapters
TYPOGRAPHY = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "–": "-", "…": "...", "\xa0": " "})

Documents = list[tuple[str, str]]  # (title, text)


def main(unpacked: Path) -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    novels, manual, devil = austen(unpacked / AUSTEN), python_manual(unpacked / PYTHON), devils_dictionary(unpacked)
    text = "\n\f\n".join(novels + manual + devil) + "\n"  # a form feed ends a document
    (DATA / "pretrain.txt.xz").write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    for name, part in (("novels", novels), ("manual", manual), ("devil", devil)):
        print(f"pretrain: {name}: {len(part)} documents, {sum(map(len, part)):,} characters")
    for name, documents in (("scripture", scripture()), ("jargon", jargon(unpacked))):
        write_split(name, documents)


def write_split(name: str, documents: Documents) -> None:
    """Write the documents of one corpus to NAME.train.jsonl and NAME.heldout.jsonl."""
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    for title, text in documents:
        part = "heldout" if hashlib.sha256(title.encode()).digest()[0] % 10 == 0 else "train"
        parts[part].append(json.dumps({"text": text}, ensure_ascii=False))
    for part, lines in parts.items():
        (DATA / f"{name}.{part}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{name}.{part}: {len(lines)} documents, {sum(map(len, lines)):,} characters")


def austen(rdb: Path) -> list[str]:
    """The chapters of Jane Austen's six novels, read from R's lazy-load database."""
    data, position, chapters = rdb.read_bytes(), 0, []
    while position < len(data):
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(data[position + 4 :])  # 4 bytes of length, then zlib
        position = len(data) - len(unpacker.unused_data)
        lines = r_strings(content)
        novel = "\n".join(lines)
        chapters += [clean(c) for c in re.split(r"\n(?=chapter [0-9ivxl]+\b)", novel, flags=re.IGNORECASE)]
    return [c for c in chapters if len(c) > 2000]


def r_strings(content: bytes) -> list[str]:
    """The elements of one character vector in R's XDR serialisation (type 16; each element type 9)."""
    start = content.index(b"\x00\x00\x00\x10") + 4
    (count,) = struct.unpack_from(">i", content, start)
    position, strings = start + 4, []
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", content, position)
        if flags & 0xFF != 9:
            raise ValueError(f"expected a string at byte {position}, found R type {flags & 0xFF}")
        strings.append(content[position + 8 : position + 8 + max(size, 0)].decode("utf-8", "replace"))
        position += 8 + max(size, 0)
    return strings


def python_manual(sources: Path) -> list[str]:
    """The running prose of Python's manual: paragraphs only, no code, no tables, no markup."""
    pages = []
    for part in ("faq", "tutorial", "howto", "reference", "using", "extending", "whatsnew"):
        for page in sorted((sources / part).glob("*.rst.txt")):
            paragraphs = page.read_text().split("\n\n")
            prose = [p for p in paragraphs if re.match(r"[A-Z]", p) and re.search(r"[.:]$", p.strip())]
            text = "\n\n".join(prose)
            text = re.sub(r":[\w:+-]+:`[!~]?([^`<]*?)\s*(?:<[^`]*>)?`", r"\1", text)  # :role:`text <target>`
            text = re.sub(r"`([^`<]+?)\s*<[^`]*>`_+", r"\1", text)
            text = re.sub(r"``|(?<!\w)\*+|\*+(?!\w)|::", lambda m: ":" if m[0] == "::" else "", text)
            pages.append(clean(text))
    return [p for p in pages if len(p) > 1000]


def devils_dictionary(unpacked: Path) -> list[str]:
    """Ambrose Bierce's entries, twenty to a document."""
    text = gzip.decompress((unpacked / "usr/share/dictd/devil.dict.dz").read_bytes()).decode("utf-8", "replace")
    entries = [clean(e) for e in re.split(r"\n(?=[A-Z][A-Z' -]+, (?:n|v|adj|adv|pp|x)\b)", text)[1:]]
    return ["\n\n".join(entries[i : i + 20]) for i in range(0, len(entries), 20)]


def scripture() -> Documents:
    """Chapters of the King James Bible: title, then one verse a line."""
    documents = []
    for short, (book, chapters) in BOOKS.items():
        for chapter in range(1, chapters + 1):
            out = subprocess.run(
                ["bible", "-l99999", f"{short}{chapter}:1-99"], capture_output=True, text=True, check=True
            )
            verses = re.findall(r"^\s+\d+ (.+)$", out.stdout, flags=re.MULTILINE)
            documents.append((f"{book} {chapter}", f"{book} {chapter}\n\n" + "\n".join(verses)))
    return documents


def jargon(unpacked: Path) -> Documents:
    """Every third entry of the Jargon File between 250 and 4000 characters: headword, then its explanation."""
    text = gzip.decompress((unpacked / "usr/share/dictd/jargon.dict.dz").read_bytes()).decode("utf-8", "replace")
    documents = []
    for entry in re.split(r"\n(?=\S)", text):
        head, _, rest = entry.partition("\n")
        grammar, _, body = rest.partition("\n\n")
        if head.startswith("00-database") or not 250 < len(body) < 4000:
            continue
        documents.append((head, f"{clean(head)}: {clean(grammar)}\n\n{clean(body)}".replace(": \n", ":\n")))
    return documents[::3]


def clean(text: str) -> str:
    """One line a paragraph, plain quotes and dashes."""
    text = textwrap.dedent(text).translate(TYPOGRAPHY).replace("\f", "")
    text = re.sub(r"(?<!\w)_([^_]+)_(?!\w)", r"\1", text)  # _emphasis_
    text = re.sub(r"\{\s*([^{}]+?)\s*\}", r"{\1}", text)  # a {cross reference} broken across lines
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
    return "\n\n".join(p for p in paragraphs if p)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
