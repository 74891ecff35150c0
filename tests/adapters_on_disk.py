"""An adapter of one value, its files, and a process that is killed while it writes them."""

import os
import signal
import sys

import torch

from fastpeft.checkpoint import read_adapter_files, save_adapter_files
from fastpeft.tuners.lora.config import LoraConfig

KEY = "base_model.model.q.lora_A.weight"
FILES = {"adapter_config.json", "adapter_model.safetensors"}


def adapter(value, **options):
    """A config and weights that go together: both tell `value`."""
    return LoraConfig(lora_alpha=value, **options), {KEY: torch.full((2, 3), float(value))}


def value_in(folder):
    """Which adapter a folder holds; fails unless config and weights agree."""
    config, tensors = read_adapter_files(folder)
    assert tensors[KEY].unique().tolist() == [config.lora_alpha]
    return config.lora_alpha


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def write_as_reference_peft(folder, value):
    from safetensors.torch import save_file

    config, tensors = adapter(value)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(config.to_json())
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.listdir", "os.scandir"}


def interrupt(step, how, action):
    """Run `action` in a process of its own and kill it, or fail with an OSError, just before its file operation `step`.

    Returns "killed"; "failed" or "survived" the OSError; "untouched" if the action has fewer steps than that.
    """
    child = os.fork()
    if child == 0:
        left = step

        def count(event, args):
            nonlocal left
            if event in STEPS:
                left -= 1
                if left == -1 and how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if left == -1:
                    raise OSError(28, "no space left on device")

        sys.addaudithook(count)
        code = 1
        try:
            action()
            code = 0 if left >= 0 else 2
        except Exception:  # torch turns an OSError into errors of its own
            code = 3 if left < 0 else 1
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return "killed"
    assert os.WEXITSTATUS(status) != 1, "the save failed by itself"
    return {0: "untouched", 2: "survived", 3: "failed"}[os.WEXITSTATUS(status)]


def weights_of(folder, safe):
    save_adapter_files(folder, *adapter(1), safe_serialization=safe)
    return folder / ("adapter_model.safetensors" if safe else "adapter_model.bin")
