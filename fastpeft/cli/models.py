"""Base models, tokenizers and adapters from what the person typed."""

import json
import os
from pathlib import Path
from typing import Any

from fastpeft.cli.errors import CommandError, one_line

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "auto": "auto"}


def quiet_libraries() -> None:
    """Keep the libraries' own bars and advice off the terminal: the commands show their own progress."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore", FutureWarning)  # of one library to another
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def resolve_base(name: str) -> str:
    """The model folder as an absolute path, so that an adapter finds its base from anywhere; or the hub id as it is.

    Raises:
        CommandError: a folder that is none, holds no model, or holds an adapter.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise CommandError(f"{name} is a file: give the model's folder, the one with config.json")
    if path.is_dir():
        if (path / "config.json").exists():
            return str(path.resolve())
        from fastpeft.adapter_files import find_config

        if find_config(path):
            raise CommandError(f"{name} holds an adapter, not a model: give the folder of its base model here")
        raise CommandError(f"{name} holds no model: a model folder has a config.json")
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or not name.strip():
        raise CommandError(f"no folder {name!r}: give an existing model folder, or a hub id such as owner/model")
    return name


def load_tokenizer(base: str, revision: str | None = None) -> Any:
    from transformers import AutoTokenizer

    quiet_libraries()
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision)
    except Exception as error:
        raise _cannot_load("tokenizer", base, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_of(adapter: str, base: str) -> Any:
    """The tokenizer that was saved with the adapter, which may have tokens of its own; else the base's."""
    folder = Path(adapter).expanduser()
    return load_tokenizer(str(folder) if (folder / "tokenizer_config.json").is_file() else base)


def make_room(base_model: Any, tokenizer: Any) -> Any:
    """The base with embeddings for every token of an adapter's tokenizer, as AutoPeftModelForCausalLM makes them."""
    if len(tokenizer) > base_model.get_input_embeddings().weight.shape[0]:
        base_model.resize_token_embeddings(len(tokenizer))
    return base_model


def load_base(base: str, dtype: str = "auto", device: str = "auto", revision: str | None = None) -> Any:
    """The causal language model, in evaluation mode, on its device.

    Args:
        dtype: a key of DTYPES; "auto" keeps what the file has.
        device: "auto" (the first GPU, else the CPU), or any torch device name.
    """
    import torch
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    place = resolve_device(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype], revision=revision)
    except Exception as error:
        raise _cannot_load("model", base, error) from error
    if any(p.is_meta for p in model.parameters()):
        raise CommandError(f"the weights in {base} are incomplete: fetch the model again", code=1)
    return model.eval().to(torch.device(place))


def resolve_device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise CommandError(f"no device is called {device!r}: use auto, cpu, cuda or cuda:1") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise CommandError("torch sees no CUDA device here: use --device cpu, or leave the option out")
    try:
        if kind == "meta":  # knows shapes, computes nothing
            raise RuntimeError("it holds no numbers")
        torch.ones(1, device=device).cpu()
    except Exception as error:  # a device that is not there fails in as many ways as there are kinds
        raise CommandError(
            f"--device {device} cannot be used here ({one_line(error, 80)}): use --device cpu, or leave the option out"
        ) from error
    return device


def _cannot_load(what: str, base: str, error: Exception) -> CommandError:
    if Path(base).is_dir():
        return CommandError(f"cannot load the {what} in {base}: {type(error).__name__}: {one_line(error, 250)}", code=1)
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    why = "HF_HUB_OFFLINE is set" if offline else one_line(error, 160)
    return CommandError(
        f"{base!r} is no folder here and could not be fetched from the hub ({why}): give a model folder, "
        "or check the id and the network",
        code=1,
    )


def adapter_config(adapter: str) -> dict[str, Any]:
    """The config of a local adapter folder, as it is: the one that the library reads with the weights there.

    Raises:
        CommandError: no such folder, no adapter in it, or a config that is not JSON.
    """
    from fastpeft.adapter_files import find_config, find_weights

    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        raise CommandError(f"no adapter folder {adapter!r}: give the folder that `fastpeft train` wrote")
    file = find_config(folder)
    if file is None:
        kind = "a whole model, not an adapter" if (folder / "config.json").exists() else "no adapter_config.json"
        raise CommandError(f"{adapter} holds {kind}: give the folder with adapter_config.json in it")
    if find_weights(folder) is None:
        raise CommandError(f"{adapter} has a config but no weights (adapter_model.safetensors): train or copy it again")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CommandError(f"{file} is not JSON ({one_line(error)}): copy the adapter again") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise CommandError(f"{file} is no adapter config: it names no peft_type")
    return config


def check_task(adapter: str) -> None:
    """Raise CommandError for an adapter that is not of a causal language model: its own head would be left out."""
    from fastpeft.model_tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as CLASSES

    task = adapter_config(adapter).get("task_type") or "CAUSAL_LM"
    if task in CLASSES and task != "CAUSAL_LM":
        raise CommandError(
            f"{adapter} is for the task {task}, and this command is for CAUSAL_LM only: load it in Python, with "
            f"fastpeft.Auto{CLASSES[task].__name__}.from_pretrained({adapter!r})"
        )


def base_of(adapter: str, base: str | None) -> str:
    """The base to use: what was asked for, else what the adapter's config names."""
    named = base or adapter_config(adapter).get("base_model_name_or_path")
    if not named:
        raise CommandError(f"{adapter} does not say which base it belongs to: name it with --base")
    try:
        return resolve_base(named)
    except CommandError as error:
        if base:
            raise
        raise CommandError(f"{adapter} names the base {named!r}, which is not here: name it with --base") from error


def load_adapter(
    base_model: Any,
    adapter: str,
    name: str = "default",
    advice: str = "copy the tokenizer it was trained with beside it if that has more tokens than the base",
) -> Any:
    """The base with the adapter on it under a name (a PeftModel). For advice see `cannot_use`."""
    from fastpeft import PeftModel

    adapter_config(adapter)
    try:
        return PeftModel.from_pretrained(base_model, adapter, adapter_name=name)
    except Exception as error:
        raise cannot_use(adapter, error, advice) from error


def cannot_use(adapter: str, error: Exception, advice: str) -> CommandError:
    """An adapter that does not go onto the base; advice takes the place of an argument that no command has."""
    text = one_line(error, 600).replace("pass ignore_mismatched_sizes=True", advice)
    return CommandError(f"the adapter in {adapter} cannot be used: {text}", code=1)
