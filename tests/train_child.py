"""A training run in a process of its own, for tests that kill it, resume it, or hide reference PEFT from it.

    python train_child.py FOLDER STEP [--hide-peft]

Writes {step: loss} to FOLDER/losses.json after each step, and what it found at the end to FOLDER/result.json.
A first process is killed after STEP and leaves its losses in FOLDER/killed.json; a second one goes on from its last
checkpoint. Both are forks of one that did nothing but import what they need, which takes longer than they do.
"""

import argparse
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import traceback
from pathlib import Path

STEPS, SAVE_EVERY = 8, 3


class PeftHider(importlib.abc.MetaPathFinder):
    """Makes the package `peft` one that cannot be found."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "peft":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return


def hide_peft():
    """What a machine without reference PEFT looks like to this process: no module, no distribution."""
    import importlib.metadata as metadata

    sys.meta_path.insert(0, PeftHider())
    find_spec, distribution = importlib.util.find_spec, metadata.distribution

    def find_spec_without_peft(name, package=None):
        return None if name.partition(".")[0] == "peft" else find_spec(name, package)

    def distribution_without_peft(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return distribution(name)

    importlib.util.find_spec = find_spec_without_peft
    metadata.distribution = distribution_without_peft


def make_trainer(folder, **overrides):
    """A Trainer on a tiny Llama with adapters and dropout; every run of it computes the same."""
    import torch
    from models import batch, tiny_llama
    from transformers import Trainer, TrainingArguments, set_seed
    from transformers.utils import is_peft_available

    from fastpeft import LoraConfig, get_peft_model
    from fastpeft.integrations.transformers import AdapterTrainerMixin

    class AdapterTrainer(AdapterTrainerMixin, Trainer):
        pass

    set_seed(0)
    config = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    rows = batch("llama", rows=24, length=12, seed=1)
    data = [{key: value[i] for key, value in rows.items()} for i in range(24)]
    options = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.03,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": SAVE_EVERY,
        "save_steps": SAVE_EVERY,
        "save_total_limit": 5,
        "load_best_model_at_end": True,
        "greater_is_better": True,  # so that the best checkpoint is not the last one, and loading it shows
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(**options | overrides)
    trainer_class = Trainer if is_peft_available() else AdapterTrainer
    return trainer_class(model=model, args=arguments, train_dataset=data, eval_dataset=data[:8])


def record_losses(trainer, kill_after=None):
    """Keep the loss of every step in losses.json; kill the process the hard way after one of them."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" not in (logs or {}):
                return
            path = Path(args.output_dir) / "losses.json"
            path.parent.mkdir(exist_ok=True)
            losses = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(losses | {str(state.global_step): logs["loss"]}))
            if state.global_step == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

    trainer.add_callback(Recorder())
    return trainer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hide-peft", action="store_true")
    parser.add_argument("kill_after", type=int)
    options = parser.parse_args()
    if options.hide_peft:
        hide_peft()
    import models  # noqa: F401
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401

    import fastpeft.integrations.transformers  # noqa: F401

    assert in_a_fork(train, options.folder, options.kill_after) == -signal.SIGKILL
    (options.folder / "losses.json").rename(options.folder / "killed.json")
    assert in_a_fork(train, options.folder, resume=True) == 0


def in_a_fork(action, *arguments, **options):
    """The exit code of a process that starts as this one is."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action(*arguments, **options)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(folder, kill_after=None, resume=False):
    trainer = record_losses(make_trainer(folder), kill_after)
    trainer.train(resume_from_checkpoint=resume or None)
    final = trainer.evaluate()["eval_loss"]
    result = {
        "eval_loss": final,
        "evaluations": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "best": trainer.state.best_metric,
        "trainer": type(trainer).__name__,
        "peft_imported": "peft" in sys.modules,
        "model": type(trainer.model).__name__,
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main()
