"""The README's example of serving runs as it stands."""

import re
import warnings
from importlib.resources import files
from pathlib import Path

import torch

from fastpeft import LoraConfig, get_peft_model


def test_the_example_of_the_readme(tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    base = Path(str(files("fastpeft.demo") / "data" / "base"))
    (tmp_path / "my-model").symlink_to(base, target_is_directory=True)
    for name in ("math", "chat"):
        config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / "adapters" / name)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = re.search(r"## Serving.*?```python\n(.*?)```", readme, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    starts = [line.split(" ")[0] for line in printed.splitlines() if line.startswith(("math ", "chat ", "None "))]
    assert starts == ["math", "chat", "None"]
