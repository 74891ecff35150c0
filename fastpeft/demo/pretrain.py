"""Pre-train the demo's base model, from scratch, on a CPU.

    python -m fastpeft.demo.pretrain OUTPUT [--minutes 20]

Reads data/pretrain.txt.xz (novels, a manual, a dictionary of satire: see data/README.md), learns a byte-level BPE
vocabulary from it, trains a small Llama and saves both in bf16. The step count follows from the time budget, which is
measured over the first steps, so that a slower machine gets a shorter schedule and not a broken one.
"""

import argparse
import hashlib
import json
import lzma
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastpeft.demo import DATA

VOCABULARY = 3072
WINDOW, BATCH = 256, 8  # tokens, windows a step
WARMUP, PROBE = 30, 12  # steps; the probe measures the speed
END = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    train, heldout = documents()
    tokenizer = make_tokenizer(train)
    model = make_model(tokenizer)
    log = fit(model, windows(tokenizer, train), windows(tokenizer, heldout), arguments.minutes * 60)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    (arguments.output / "pretraining.json").write_text(json.dumps(log, indent=1) + "\n")


def documents() -> tuple[list[str], list[str]]:
    """The pre-training documents, and one in fifty to measure the loss on."""
    texts = lzma.decompress((DATA / "pretrain.txt.xz").read_bytes()).decode().split("\n\f\n")
    held = [hashlib.sha256(text.encode()).digest()[0] % 50 == 0 for text in texts]
    return [t for t, h in zip(texts, held, strict=True) if not h], [t for t, h in zip(texts, held, strict=True) if h]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte has a token: no text is unknown
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=1024
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def windows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All documents end to end, cut into rows: (rows, WINDOW) int64."""
    ids = [token for row in tokenizer(texts, verbose=False)["input_ids"] for token in [*row, tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


def batches(rows: Tensor) -> Iterator[Tensor]:
    """Batches in a new random order every pass, for ever: (BATCH, WINDOW)."""
    while True:
        for chosen in torch.randperm(len(rows)).split(BATCH):
            yield rows[chosen]


def fit(model: LlamaForCausalLM, rows: Tensor, heldout: Tensor, seconds: float) -> dict:
    """Train for about `seconds`; returns what the log file holds."""
    # Muon (orthogonalised momentum) for the matrices: fewer tokens for the same loss, and tokens are what a CPU lacks
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {rows.numel():,} tokens", flush=True)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / WARMUP)) for o in optimizers]
    total, start, step, last = None, time.monotonic(), 0, 0.0
    for batch in batches(rows):
        if step == PROBE:
            total = max(2 * WARMUP, int(seconds / (time.monotonic() - start) * PROBE))
            schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate(total), step) for o in optimizers]
        loss = cross_entropy(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        model.zero_grad()
        step, last = step + 1, loss.item()
        if step % 25 == 0:
            print(f"step {step}/{total}: loss {last:.3f}, {time.monotonic() - start:.0f} s", flush=True)
        if step == total:
            break
    with torch.no_grad():
        held = torch.stack([cross_entropy(model, part) for part in heldout.split(BATCH)]).mean().item()
    print(f"held-out loss {held:.3f}, {math.exp(held):.1f} perplexity a token", flush=True)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": rows.numel(),
        "tokens_seen": step * BATCH * WINDOW,
        "steps": step,
        "seconds": round(time.monotonic() - start),
        "last_batch_loss": round(last, 4),
        "heldout_loss": round(held, 4),
    }


def rate(total: int):
    """Share of the peak learning rate at a step: warm-up, then a straight line to a twentieth."""
    return lambda step: min((step + 1) / WARMUP, max(0.05, 1 - 0.95 * step / total))


def cross_entropy(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=rows, labels=rows).loss


if __name__ == "__main__":
    main()
