"""The README's examples of mixed batches and of joint training run as they stand, on the demo's model."""

import re
from pathlib import Path

import pytest
import torch
from joint_runs import PAD, rows

from fastpeft import LoraConfig, PeftModel, get_peft_model
from fastpeft.demo import BASE


@pytest.fixture(scope="module")
def examples():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.split("## Many adapters in one batch")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def base_model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")


def test_mixed_rows(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("law", "code"):
        get_peft_model(base_model(), LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(f"adapters/{name}")
    ids = torch.full((4, 3), 7)
    given = {"PeftModel": PeftModel, "base": base_model(), "batch": {"input_ids": ids, "attention_mask": ids > 0}}
    exec(compile(examples[0], "README.md", "exec"), given)


def test_a_sweep(examples, tmp_path, monkeypatch, capsys):
    (tmp_path / "my-model").symlink_to(BASE, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    assert "max_steps=500" in examples[1]
    short = examples[1].replace("max_steps=500", 'max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True')
    given = {"rows": rows(6, 0), "held_out": rows(2, 1), "collator": PAD}
    exec(compile(short, "README.md", "exec"), given)
    measured = capsys.readouterr().out
    assert len(given["runs"]) == 8
    for name in given["runs"]:
        assert f"eval_{name}_loss" in measured
        assert PeftModel.from_pretrained(base_model(), tmp_path / "adapters" / name).peft_config
