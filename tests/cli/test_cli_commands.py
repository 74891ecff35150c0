"""fastpeft generate, merge and inspect on a trained adapter."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fastpeft import IA3Config, PeftModel, get_peft_model
from fastpeft.cli.report import product_norm
from fastpeft.demo import BASE


@pytest.fixture(scope="module")
def narrow_base(tmp_path_factory):
    """A Llama of other widths than the demo's base."""
    folder = tmp_path_factory.mktemp("narrow")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_generate_streams_and_not_the_same_text(cli, adapter):
    options = ("--max-new-tokens", 8, "--seed", 3)
    streamed = cli("generate", adapter, "The hacker", *options)
    at_once = cli("generate", adapter, "The hacker", *options, "--no-stream")
    assert streamed.code == at_once.code == 0, streamed.err
    assert streamed.out.startswith("The hacker")
    assert streamed.out.split() == at_once.out.split()
    assert cli("generate", adapter, "The hacker", "--max-new-tokens", 8, "--seed", 4).out != streamed.out


def test_generate_without_adapter_is_the_base(cli, adapter):
    from transformers import AutoTokenizer

    answer = cli("generate", adapter, "The king", "--no-adapter", "--temperature", 0, "-n", 8, "--no-stream")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    ids = base.generate(**tokenizer("The king", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert answer.out.strip() == tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert cli("generate", adapter, "The king", "--temperature", 0, "-n", 8, "--no-stream").out != answer.out


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_generate_from_a_file_to_a_file(suffix, cli, adapter, tmp_path):
    prompts = ["One day", "The program"]
    lines = prompts if suffix == ".txt" else [json.dumps({"prompt": p}) for p in prompts]
    (tmp_path / f"p{suffix}").write_text("\n".join(lines))
    output = tmp_path / "texts.jsonl"
    answer = cli(
        "generate", adapter, "--prompts-file", tmp_path / f"p{suffix}", "--output", output, "--samples", 2, "-n", 4
    )
    assert answer.code == 0, answer.err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["One day", "One day", "The program", "The program"]
    assert all(row["prompt"] + row["completion"] in answer.out for row in rows)


def test_merged_model_has_the_adapters_logits(cli, adapter, tmp_path):
    answer = cli("merge", adapter, tmp_path / "merged", "--dtype", "fp32")
    assert answer.code == 0, answer.err
    ids = torch.arange(10, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, str(adapter)).eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (merged - plain).abs().max() > 0.01, "the adapter is too small for this test to say anything"
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    again = cli("merge", adapter, tmp_path / "merged")
    assert again.code == 2
    assert "not empty" in again.err


def test_merge_refuses_nan(cli, adapter, copy_of, tmp_path):
    damaged = copy_of(adapter)
    weights = load_file(damaged / "adapter_model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, damaged / "adapter_model.safetensors", {"format": "pt"})
    answer = cli("merge", damaged, tmp_path / "merged")
    assert answer.code == 1
    assert not (tmp_path / "merged").exists()


def test_inspect_counts_ranks_and_norms(cli, adapter):
    answer = cli("inspect", adapter, "--json", "--layers")
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    weights = load_file(adapter / "adapter_model.safetensors")
    assert report["parameters"] == sum(w.numel() for w in weights.values())
    assert report["tensors"] == len(weights) == 2 * len(report["layers"])
    row = next(r for r in report["layers"] if r["layer"] == "model.layers.0.mlp.up_proj")
    A, B = (weights[f"base_model.model.{row['layer']}.lora_{half}.weight"] for half in "AB")
    assert (row["rank"], row["scaling"], row["shape"]) == (4, 2.0, [512, 192])
    assert row["norm"] == pytest.approx(2 * (B.double() @ A.double()).norm().item(), rel=1e-9)
    assert report["warnings"] == []

    grouped = json.loads(cli("inspect", adapter, "--json").out)["layers"]
    assert len(grouped) == 7
    assert sum(r["parameters"] for r in grouped) == report["parameters"]


def test_inspect_of_ia3_counts_how_far_the_vectors_are_from_one(cli, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(BASE)
    model = get_peft_model(base, IA3Config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "new")
    report = json.loads(cli("inspect", tmp_path / "new", "--base", BASE, "--json", "--layers").out)
    assert report["method"] == "IA3"
    assert report["misfits"] == []
    assert report["options"]["feedforward_modules"] == ["down_proj"]
    assert report["warnings"] == ["every update is zero: the adapter changes nothing yet"]
    vectors = {name: p for name, p in model.named_parameters() if "down_proj.ia3_l" in name}
    next(iter(vectors.values())).data[0, :4] = 2.0
    model.save_pretrained(tmp_path / "trained")
    report = json.loads(cli("inspect", tmp_path / "trained", "--json", "--layers").out)
    row = next(r for r in report["layers"] if r["layer"] == "model.layers.0.mlp.down_proj")
    assert row["norm"] == 2.0
    assert row["shape"] == [1, base.config.intermediate_size]


def test_product_norm_without_the_product():
    A, B = torch.randn(3, 50, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    assert product_norm(B, A) == pytest.approx((B @ A).norm().item(), rel=1e-12)


def test_inspect_says_that_it_fits(cli, adapter):
    answer = cli("inspect", adapter, "--base", BASE)
    assert answer.code == 0, answer.err
    assert f"fits {BASE.resolve()}" in answer.out
    assert "LORA, task CAUSAL_LM" in answer.out
    assert "model.layers.*.self_attn.q_proj" in answer.out


def test_inspect_says_that_it_does_not_fit(cli, adapter, narrow_base):
    answer = cli("inspect", adapter, "--base", narrow_base)
    assert answer.code == 1
    assert f"does not fit {narrow_base}" in answer.err
    assert len(answer.err.splitlines()) == 1
    assert "the adapter has (4, 192), the base needs (4, 32)" in answer.out


def test_inspect_names_missing_and_surplus_weights(cli, adapter, copy_of):
    damaged = copy_of(adapter)
    weights = load_file(damaged / "adapter_model.safetensors")
    weights["base_model.model.model.layers.0.nowhere.lora_A.weight"] = torch.ones(4, 4)
    weights["base_model.model.model.layers.0.nowhere.lora_B.weight"] = torch.ones(4, 4)
    for half in "AB":
        del weights[f"base_model.model.model.layers.0.mlp.up_proj.lora_{half}.weight"]
    save_file(weights, damaged / "adapter_model.safetensors", {"format": "pt"})
    answer = cli("inspect", damaged, "--base", BASE)
    assert answer.code == 1
    assert "model.layers.0.nowhere.lora_A.weight: in the adapter, no such layer in the base" in answer.out
    assert "model.layers.0.mlp.up_proj.lora_A.weight: a layer of the base" in answer.out


def test_inspect_tells_of_nan_and_of_zero(cli, adapter, copy_of):
    damaged = copy_of(adapter)
    weights = load_file(damaged / "adapter_model.safetensors")
    name = next(iter(weights))
    weights[name][0, 0] = float("nan")
    save_file(weights, damaged / "adapter_model.safetensors", {"format": "pt"})
    answer = cli("inspect", damaged)
    assert answer.code == 1
    assert "NaN" in answer.err
    save_file({k: torch.zeros_like(v) for k, v in weights.items()}, damaged / "adapter_model.safetensors")
    assert "changes nothing yet" in cli("inspect", damaged).out


def test_an_adapter_whose_base_moved(cli, adapter, copy_of, tmp_path):
    moved = copy_of(adapter, base_model_name_or_path=str(tmp_path / "gone"))
    answer = cli("generate", moved, "Hello")
    assert answer.code == 2
    assert "name it with --base" in answer.err
    assert cli("generate", moved, "Hello", "--base", BASE, "-n", 2).code == 0
    shutil.rmtree(moved)


def test_bench_prints_and_writes_its_table(cli, tmp_path):
    answer = cli("bench", "saved", "--quick", "--output", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "fastpeft" in answer.out
    results = json.loads((tmp_path / "out" / "bench.json").read_text())["results"]
    assert results
    assert all(result["suite"] == "saved" and not result["error"] for result in results)
    assert (tmp_path / "out" / "bench.md").exists()
