"""The README.md that is saved beside an adapter: what the model hub shows and searches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import fastpeft

if TYPE_CHECKING:
    from fastpeft.peft_model import PeftModel

FRAMEWORK_HEADING = "### Framework versions"
TRAINING_HEADING = "## Training procedure"
QUANTIZATION_LINE = "The base model was quantized during training:"


def write_model_card(model: PeftModel, directory: str | os.PathLike[str]) -> None:
    """Write README.md into `directory`, or bring the one there up to date; text that is there stays."""
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(directory) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    card.data["library_name"] = "peft"  # the file format: what loads the adapter from the hub
    tags = sorted(_tags(model))
    if tags:
        card.data["tags"] = tags
    if not card.data.pipeline_tag and model.active_peft_config.task_type == "CAUSAL_LM":
        card.data.pipeline_tag = "text-generation"
    config = getattr(model, "config", None)
    if name := getattr(config, "_name_or_path", None):
        card.data["base_model"] = name

    lines = card.text.splitlines()
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and QUANTIZATION_LINE not in lines:
        settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
        _add_under(lines, TRAINING_HEADING, [QUANTIZATION_LINE, "", *(f"- {key}: {settings[key]}" for key in settings)])
    version = f"- fastpeft {fastpeft.__version__}"
    if version not in lines:
        _add_under(lines, FRAMEWORK_HEADING, [version])
    card.text = "\n".join(lines)
    card.save(path)


def _tags(model: PeftModel) -> set[str]:
    from transformers import PreTrainedModel

    base = model.get_base_model()
    method = str(getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type))
    tags = {*(getattr(base, "model_tags", None) or ()), method.lower()}
    if isinstance(base, PreTrainedModel):
        tags.add("transformers")
    if name := getattr(base, "name_or_path", None):
        tags.add(f"base_model:adapter:{name}")
    return tags


def _add_under(lines: list[str], heading: str, text: list[str]) -> None:
    """Insert text below a heading and its empty line; a heading that is not there comes at the end."""
    if heading not in lines:
        lines += [heading, ""]
    at = lines.index(heading) + 1
    while at < len(lines) and not lines[at]:
        at += 1
    lines[at:at] = text
