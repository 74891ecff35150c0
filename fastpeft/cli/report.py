"""What is in an adapter folder, and whether it fits a base: the facts behind `fastpeft inspect`."""

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any
from warnings import catch_warnings

from fastpeft.cli.errors import CommandError, one_line
from fastpeft.cli.models import adapter_config

# The two halves of one low-rank update, by the name of their tensors; the product B A has the shape of the weight.
HALVES = re.compile(r"^(?P<layer>.*)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(?:\.weight)?$")
PREFIX = "base_model.model."
VECTOR = ".ia3_l"  # what the name of an IA3 vector ends in
QUIET = (
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save",
    "feedforward_modules",
)  # fmt: skip


def describe(adapter: str) -> dict[str, Any]:
    """Facts about one adapter folder, as plain JSON values.

    Raises:
        CommandError: no adapter there, or weights that cannot be read; a NaN among them is such a reason.
    """
    from fastpeft.adapter_files import find_weights

    config = adapter_config(adapter)
    weights, file = read_weights(adapter), find_weights(Path(adapter).expanduser())
    rows = low_rank_rows(weights, config)
    rows += [plain_row(name, value) for name, value in weights.items() if not HALVES.match(name)]
    options = {key: config[key] for key in ("target_modules", *QUIET) if config.get(key)}
    options |= {key: True for key in ("use_rslora", "use_dora", "lora_bias") if config.get(key)}
    if config.get("bias", "none") != "none":
        options["bias"] = config["bias"]
    warnings = []
    if rows and all(row["norm"] == 0 for row in rows):
        warnings.append("every update is zero: the adapter changes nothing yet")
    return {
        "adapter": adapter,
        "method": config["peft_type"],
        "task": config.get("task_type"),
        "named_base": config.get("base_model_name_or_path"),
        "parameters": sum(value.numel() for value in weights.values()),
        "tensors": len(weights),
        "dtype": ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in weights.values()})),
        "bytes": 0 if file is None else file.stat().st_size,
        "options": options,
        "layers": rows,
        "warnings": warnings,
    }


def read_weights(adapter: str) -> dict[str, Any]:
    """Every tensor of the folder's weights file, on the CPU."""
    from fastpeft import load_peft_weights

    try:
        return load_peft_weights(str(Path(adapter).expanduser()), device="cpu")
    except Exception as error:
        raise CommandError(f"the weights in {adapter} cannot be read: {one_line(error)}", code=1) from error


def low_rank_rows(weights: dict[str, Any], config: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a LoRA layer: shape (N, K) of the update, rank, scaling and norm."""
    halves: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in weights.items():
        if match := HALVES.match(name):
            halves[match["layer"]][match["half"]] = value
    rows = []
    for name, pair in halves.items():
        layer = name.removeprefix(PREFIX)
        if set(pair) != {"A", "B"}:
            raise CommandError(f"{layer} has only one half of its update: the weights file is damaged", code=1)
        A, B = pair["A"].double().flatten(1), pair["B"].double().flatten(1)  # (r, K), (N, r)
        scaling = scaling_of(layer, A.shape[0], config)
        rows.append(
            {
                "layer": layer,
                "count": 1,
                "shape": [B.shape[0], A.shape[1]],
                "rank": A.shape[0],
                "scaling": scaling,
                "parameters": A.numel() + B.numel(),
                "norm": abs(scaling) * product_norm(B, A),
            }
        )
    return rows


def product_norm(B: Any, A: Any) -> float:
    """Frobenius norm of B A from two (r, r) products: the sum over (BᵀB) ∘ (A Aᵀ)."""
    return math.sqrt(max(0.0, ((B.T @ B) * (A @ A.T)).sum().item()))


def scaling_of(layer: str, rank: int, config: dict[str, Any]) -> float:
    alpha = config.get("lora_alpha") or rank
    for key, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", layer):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def plain_row(name: str, value: Any) -> dict[str, Any]:
    """One row a tensor that is no half of a low-rank update. The update of an IA3 vector is its distance from one."""
    update = value.double() - 1 if name.endswith(VECTOR) else value.double()
    return {
        "layer": name.removeprefix(PREFIX).removesuffix(VECTOR), "count": 1, "shape": list(value.shape), "rank": None,
        "scaling": None, "parameters": value.numel(), "norm": update.norm().item(),
    }  # fmt: skip


def group(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers that differ only in their number become one row: count, sum of parameters, root sum of squared norms."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", row["layer"])
        groups[(name, tuple(row["shape"]), row["rank"], row["scaling"])].append(row)
    return [
        parts[0] | {
            "layer": name, "count": len(parts), "parameters": sum(p["parameters"] for p in parts),
            "norm": math.sqrt(sum(p["norm"] ** 2 for p in parts)),
        }
        for (name, *_), parts in groups.items()
    ]  # fmt: skip


def fit(adapter: str, base: str) -> tuple[list[str], list[str]]:
    """Whether the adapter goes onto the base. No weights are loaded.

    Returns:
        Why it does not, one reason a line, empty when it fits; and notes on what says nothing of that.
    """
    import torch

    from fastpeft import PeftConfig, get_peft_model, get_peft_model_state_dict

    weights = read_weights(adapter)
    try:
        config = PeftConfig.from_pretrained(adapter)
    except Exception as error:
        raise CommandError(f"the config in {adapter} cannot be used: {one_line(error)}", code=1) from error
    model = empty_base(base, adapter_config(adapter).get("task_type"))
    notes = make_room_for(adapter, model)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    new = new_parts(model)
    try:
        with (
            torch.device("meta"),
            catch_warnings(action="ignore"),
        ):  # another base than the config names is the question
            model = get_peft_model(model, config)
        expected = {k: tuple(v.shape) for k, v in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    except NotImplementedError as error:
        raise CommandError(f"cannot tell whether {adapter} fits: {one_line(error)}", code=1) from error
    except Exception as error:
        return [one_line(error)], []
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in found.keys() - expected.keys():  # embeddings saved whole stand under their own name in the base
        plain = name.removeprefix(PREFIX)
        if plain in own:
            expected[name] = own[plain]
    heads = {name for name in found.keys() & expected.keys() if name.removeprefix(PREFIX).partition(".")[0] in new}
    for name in sorted(heads):
        if found[name][1:] == expected[name][1:]:  # the rows of a fresh head are but the default number of labels
            expected[name] = found[name]
            notes.append(f"{name} {found[name]}: the adapter brings this head itself, the base has none to compare")
    reasons = [
        f"{name}: the adapter has {found[name]}, the base needs {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    reasons += [f"{name}: in the adapter, no such layer in the base" for name in found if name not in expected]
    reasons += [
        f"{name}: a layer of the base that the adapter has no weights for" for name in expected if name not in found
    ]
    return [reason.replace(PREFIX, "") for reason in reasons], [note.replace(PREFIX, "") for note in notes]


def make_room_for(adapter: str, model: Any) -> list[str]:
    """Embeddings for the tokens of the adapter's tokenizer, as generate and merge make them; says so."""
    import torch

    from fastpeft.cli.models import tokenizer_of

    folder, embedding = Path(adapter).expanduser(), model.get_input_embeddings()
    if not (folder / "tokenizer_config.json").is_file() or embedding is None:
        return []
    rows, tokens = len(embedding.weight), len(tokenizer_of(adapter, str(folder)))
    if tokens <= rows:
        return []
    with torch.device("meta"):
        model.resize_token_embeddings(tokens, mean_resizing=False)
    return [f"its tokenizer has {tokens} tokens: the base's embeddings grow to these, from {rows}"]


def new_parts(model: Any) -> set[str]:
    """The parts of a task's model that a base saved for another task does not have: its head."""
    if type(model).__name__ in (model.config.architectures or ()):
        return set()
    known = (model.base_model, model.get_output_embeddings())  # the rows of a head for words are the vocabulary
    return {name for name, part in model.named_children() if all(part is not other for other in known)}


def empty_base(base: str, task: str | None) -> Any:
    """The base as its config describes it, on the meta device: shapes and no memory."""
    import torch
    import transformers

    from fastpeft.cli.models import quiet_libraries

    quiet_libraries()
    auto = {
        "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
        "SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification",
        "QUESTION_ANS": "AutoModelForQuestionAnswering", "FEATURE_EXTRACTION": "AutoModel",
    }.get(task or "", "AutoModelForCausalLM")  # fmt: skip
    try:
        config = transformers.AutoConfig.from_pretrained(base)
        with torch.device("meta"):
            return getattr(transformers, auto).from_config(config)
    except Exception as error:
        raise CommandError(f"cannot read the model in {base}: {one_line(error)}", code=1) from error
