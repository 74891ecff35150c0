"""The demo: a tiny pre-trained base, two small corpora, one adapter each."""

from pathlib import Path

DATA = Path(__file__).parent / "data"
BASE = DATA / "base"  # a Llama of 2.9 M parameters, made by fastpeft.demo.pretrain
CORPORA = ("scripture", "jargon")


def corpus(name: str, part: str) -> Path:
    """The .jsonl file of one corpus; part is "train" or "heldout"."""
    return DATA / f"{name}.{part}.jsonl"
