"""Documents, blocks and padding."""

import json

import pytest

from fastpeft.cli.data import IGNORED, Document, PadRight, hold_out, make_blocks, read_documents
from fastpeft.cli.errors import CommandError
from fastpeft.cli.generate import read_prompts


class Words:
    """A tokenizer: a word is its length."""

    eos_token_id = 0

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def test_packing_keeps_every_token_in_order():
    documents = [Document("a bb ccc"), Document("dddd"), Document("eeeee ffffff")]
    rows = make_blocks(documents, Words(), size=4)
    assert [row["input_ids"] for row in rows] == [[1, 2, 3, 0], [4, 0, 5, 6]]
    assert all(row["labels"] == row["input_ids"] for row in rows)  # the lone last 0 has no target of its own


def test_without_packing_a_document_starts_its_row():
    rows = make_blocks([Document("a bb ccc"), Document("dddd")], Words(), size=8, pack=False)
    assert [row["input_ids"] for row in rows] == [[1, 2, 3, 0], [4, 0]]


def test_the_prompt_is_read_and_not_learnt():
    (row,) = make_blocks([Document("ccc", prompt="a bb")], Words(), size=8)
    assert row == {"input_ids": [1, 2, 3, 0], "labels": [IGNORED, IGNORED, 3, 0]}


def test_padding():
    batch = PadRight(9)([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4, 5], "labels": [3, 4, 5]}])
    assert batch["input_ids"].tolist() == [[1, 2, 9], [3, 4, 5]]
    assert batch["labels"].tolist() == [[1, 2, IGNORED], [3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(("count", "fraction", "held"), [(20, 0.1, 2), (3, 0.05, 1), (10, 0.0, 0), (2, 0.9, 1)])
def test_hold_out_parts_the_documents(count, fraction, held):
    documents = [Document(str(i)) for i in range(count)]
    train, evaluation = hold_out(documents, fraction)
    assert len(evaluation) == held
    assert sorted(int(d.text) for d in train + evaluation) == list(range(count))


def test_hold_out_of_one_document_takes_its_tail():
    text = "\n\n".join(f"paragraph {i}" for i in range(10))
    train, evaluation = hold_out([Document(text)], 0.2)
    assert evaluation[0].text == "paragraph 8\n\nparagraph 9"
    assert train[0].text + "\n\n" + evaluation[0].text == text


def test_text_files_are_cut_at_form_feeds(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n\f\n\f\ntwo\n")
    assert [d.text for d in read_documents(file)] == ["one", "two"]


SEPARATED = "a\u2028b\u2029c\u0085d"  # to str.splitlines these end lines, but not to JSON


def test_only_newlines_end_a_line(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [{"prompt": SEPARATED, "completion": SEPARATED}, {"prompt": "e", "completion": "f"}]
    file.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert read_documents(file) == [Document(SEPARATED, prompt=SEPARATED), Document("f", prompt="e")]
    assert read_prompts(file) == [SEPARATED, "e"]
    text = tmp_path / "a.txt"
    text.write_bytes(f"{SEPARATED}\x0bz\r\n\ne\n".encode())
    assert read_prompts(text) == [f"{SEPARATED}\x0bz", "e"]
    assert read_documents(text) == [Document(f"{SEPARATED}\x0bz\n\ne")]


def test_a_bad_line_of_prompts_has_its_number_in_the_file(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('\n{"prompt": "one"}\n\nno\n')
    with pytest.raises(CommandError, match="line 4"):
        read_prompts(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", '{"words": "x"}', 'no text under "text"'),
        ("a.jsonl", "[1, 2]", "found list"),
        ("a.jsonl", '{"text": "  "}', "holds no text"),
        ("a.jsonl", "", "holds no text"),
        ("a.txt", "", "holds no text"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b"\xff\xfe", "not UTF-8"),
        ("a.csv", "x", "cannot tell"),
    ],
)
def test_unusable_data_is_named(name, content, message, tmp_path):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CommandError, match=message) as caught:
        read_documents(file)
    assert str(file) in str(caught.value)


def test_a_dataset_without_a_train_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"test": part}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(CommandError, match="no split `train`"):
        read_documents(tmp_path / "d")
    datasets.DatasetDict({"train": part}).save_to_disk(str(tmp_path / "e"))
    assert read_documents(tmp_path / "e") == [Document("a")]


def test_a_folder_is_read_whole(tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "two"}))
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.csv").write_text("left out")
    assert [d.text for d in read_documents(tmp_path)] == ["one", "two"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CommandError, match=r"no \.txt and no \.jsonl"):
        read_documents(tmp_path / "empty")
