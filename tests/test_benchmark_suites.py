"""Each suite measures what it says: what its contenders are, what a step does, what a process of its own reports."""

import dataclasses
from types import SimpleNamespace

import peft
import pytest
import torch
from bench_cases import ITSELF, ONCE, TINY_LLAMA, tiny

import fastpeft
from fastpeft.benchmark import (
    DEFAULT_SUITES,
    GPU_SUITES,
    compiled,
    fresh,
    groups,
    host,
    joint,
    model,
    peers,
    routed,
    run,
    scaling,
    without_cases,
)
from fastpeft.benchmark.cases import Effort, measure
from fastpeft.benchmark.libraries import FROZEN, OURS, REFERENCE, available


def test_the_frozen_model_passes_a_gradient_down_and_trains_nothing():
    case = model.ModelCase(dtype="fp32", dropout=0.0, batch=2, tokens=8, r=4, size=TINY_LLAMA)
    frozen = case.frozen()
    seen = []
    frozen.model.layers[0].self_attn.q_proj.register_full_backward_hook(lambda module, gin, gout: seen.append(gin[0]))
    case._step(frozen)()
    assert seen[0].abs().sum() > 0
    assert not [name for name, p in frozen.named_parameters() if p.requires_grad or p.grad is not None]


def test_autocast_cases_run_their_products_in_bf16():
    case = model.ModelCase(dtype="fp32", dropout=0.0, autocast=True, batch=2, tokens=8, r=4, size=TINY_LLAMA)
    dtypes = set()
    frozen = case.frozen()
    frozen.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    case._step(frozen)()
    assert dtypes == {torch.bfloat16}
    assert case.name == "fp32-autocast-p0.0"


@pytest.mark.usefixtures("ops_for_few")
def test_bytes_kept_with_recompute_mlp_are_counted_beside_those_without():
    case = tiny(model.SavedModelCase(dtype="bf16", dropout=0.1))
    facts = case.facts(available())
    assert set(facts) == {OURS, f"{OURS}+recompute", REFERENCE}
    own = {name: fact["saved"]["own"] for name, fact in facts.items()}
    wide = case.batch * case.tokens * TINY_LLAMA.intermediate * 2  # of one tensor in bf16; the activation, the product
    assert own[OURS] - own[f"{OURS}+recompute"] == 2 * wide * TINY_LLAMA.layers


def test_group_members_see_one_x_and_its_gradient_is_their_sum():
    case = groups.GroupCase("qkv", M=8, dtype="fp32", dropout=0.0, hidden=16, kv=8, r=2)
    ours, theirs = (module for name, module in case.modules(ITSELF).items() if name != FROZEN)
    x, douts = case.batch()
    assert [tuple(dout.shape) for dout in douts] == [(8, 16), (8, 8), (8, 8)]
    torch.autograd.backward(ours(x), douts)
    alone = []
    for linear, dout in zip(theirs.get_submodule("0").children(), douts, strict=True):
        y, _ = case.batch()
        linear(y).backward(dout)
        alone.append(y.grad)
    torch.testing.assert_close(x.grad, sum(alone))


def test_host_times_are_those_of_one_call():
    case = host.HostLayerCase(M=1, K=8, N=8, dtype="fp32", dropout=0.0, r=2)
    calls = []
    step = {OURS: lambda: calls.extend([0] * case.repeats)}
    fake = dataclasses.make_dataclass("Fake", [], bases=(host.HostLayerCase,), frozen=True)(**vars(case))
    object.__setattr__(fake, "steps", lambda found: step)
    object.__setattr__(fake, "clock", lambda: lambda step: step() or 1.0)
    result = measure(fake, ITSELF, Effort(budget_s=0, warmup=0, min_rounds=2, max_rounds=2))
    assert result.contenders[OURS]["seconds"]["median"] == 1.0 / case.repeats
    assert len(calls) >= 3 * case.repeats


def test_scaling_moves_one_size_at_a_time():
    cases = list(scaling.scaling_cases(False, "cpu"))
    for axis in ("M", "r", "N"):
        along = [case for case in cases if case.axis == axis]
        values = [getattr(case, axis) for case in along]
        assert values == sorted(set(values))
        assert len(values) >= 4
        others = {tuple(getattr(case, size) for size in ("M", "K", "N", "r") if size != axis) for case in along}
        assert len(others) == 1


@pytest.mark.parametrize("adapters", [1, 4, 64])
def test_rows_take_their_adapters_in_turn_and_the_error_is_that_of_the_right_one(adapters):
    case = tiny(routed.RoutedCase(adapters, "fp32", tokens=2))
    assert len(case.names) == routed.ROWS
    assert len(set(case.names)) == adapters
    assert {case.names.count(name) for name in case.names} == {routed.ROWS // adapters}
    for library in (fastpeft, peft):
        model = case.model(library)
        assert not model.training
        right = model(case.batch(), adapter_names=case.names)
        exact = case._exact(model)
        assert (right - exact).norm() < 1e-6 * exact.norm()
        if adapters > 1:
            wrong = model(case.batch(), adapter_names=case.names[::-1])
            assert (wrong - exact).norm() > 0.1 * exact.norm()


def test_generate_over_many_adapters_writes_what_peft_writes():
    case = tiny(routed.RoutedGenerateCase(32, "fp32"))
    found = {OURS: fastpeft, REFERENCE: peft}
    assert case.facts(found) == {name: {"tokens_as_peft": 1.0} for name in found}
    model = case.model(fastpeft)
    tokens = case.generate(model, adapter_names=routed.names_of_rows(32))
    assert tokens.shape == (routed.ROWS, case.prompt + case.new)
    assert not torch.equal(tokens, case.generate(case.base()))


def test_a_sweep_in_one_run_has_the_losses_of_one_run_after_the_other():
    case = tiny(joint.JointCase("fp32", rows=1, tokens=32))
    assert len(case.sweep) == case.adapters
    assert len({tuple(point.values()) for point in joint.JointCase("fp32", 1, 32).sweep.values()}) == 8
    facts = case.facts({OURS: fastpeft, REFERENCE: peft})
    assert facts.keys() == {joint.ALONE, REFERENCE}
    assert all(fact["loss_difference"] < 1e-5 for fact in facts.values())


def test_a_timed_step_of_a_sweep_trains_every_adapter(tmp_path):
    case = tiny(joint.JointCase("fp32", rows=1, tokens=8))
    assert case.steps({OURS: fastpeft, REFERENCE: peft}).keys() == {FROZEN, OURS, joint.ALONE, REFERENCE}
    trainer = case.together(fastpeft, str(tmp_path), timed=True)
    before = {key: p.clone() for key, p in trainer.model.named_parameters() if "lora_B" in key}
    for _ in range(2):
        assert joint._seconds_of_loops([trainer]) > 0
        assert trainer.state.global_step == joint.UPDATES
        after = dict(trainer.model.named_parameters())
        assert all(not torch.equal(after[key], p) for key, p in before.items())
        before = {key: after[key].clone() for key in before}


def test_the_compilers_first_step_is_kept(monkeypatch):
    monkeypatch.setattr(compiled.CompiledModelCase, "effort", None)
    case = tiny(compiled.CompiledModelCase(dtype="fp32", dropout=0.0))
    result = measure(case, ITSELF, ONCE)
    assert result.error is None
    first = {name: contender["first_step"]["seconds"] for name, contender in result.contenders.items()}
    assert first[f"{OURS}-compiled"] > result.contenders[f"{OURS}-compiled"]["seconds"]["median"]
    assert set(first) == {FROZEN, OURS, REFERENCE, f"{OURS}-compiled", f"{REFERENCE}-compiled"}


def test_cpu_peak_is_the_most_that_was_alive_at_once(monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    x = torch.randn(1000, 250)  # a megabyte, there before

    def step() -> None:
        y = x + 1
        z = y + 1  # two at once
        del y
        z = z * 2  # two again

    assert fresh.cpu_peak_bytes(step) == pytest.approx(2 * x.nbytes, rel=0.01)


def test_a_child_that_fails_says_why():
    case = tiny(fresh.FirstStepCase(dtype="fp32", dropout=0.0))
    with pytest.raises(RuntimeError, match=r"no_such_library in a process of its own: ModuleNotFoundError"):
        fresh.run_child("first_step", "no_such_library", case)


def test_fresh_processes_report_the_peak_of_a_step():
    facts = tiny(fresh.PeakCase(dtype="fp32", dropout=0.0)).facts({})
    assert set(facts) == {FROZEN}
    assert facts[FROZEN]["peak"]["bytes"] > 2 * 8 * 64 * 4  # at least the logits: batch x tokens x vocabulary


def test_a_fresh_process_reports_its_first_step():
    case = tiny(fresh.FirstStepCase(dtype="fp32", dropout=0.0))
    step = fresh.run_child("first_step", REFERENCE, case)["first_step"]
    assert step["seconds"] > 0
    assert step["warm_up_seconds"] == pytest.approx(step["seconds"] - step["later_seconds"])


def test_peers_are_listed_where_they_are_installed_and_a_gpu_is_there(monkeypatch):
    assert not list(peers.peer_cases(False, "cpu"))
    installed: set[str] = set()
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name in installed or None)
    assert not list(peers.peer_cases(False, "cuda"))
    installed.add("liger_kernel")
    assert [case.name for case in peers.peer_cases(False, "cuda")] == ["liger-bf16-p0.0"]
    installed.add("unsloth")
    assert [case.name for case in peers.peer_cases(False, "cuda")][-1] == "unsloth-qkv-bf16-p0.0-M8192"


def test_a_suite_without_a_case_here_says_why_and_run_passes_over_it(monkeypatch):
    wanted = "peers needs a CUDA device, and liger_kernel or unsloth: "
    assert without_cases(["saved", "peers"], device="cpu") == [wanted + "the device is cpu"]
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert without_cases(["peers", "saved"], device="cuda") == [wanted + "neither is installed"]
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name == "unsloth" or None)
    assert without_cases(GPU_SUITES, device="cuda") == []
    assert without_cases(DEFAULT_SUITES) == []  # nobody has to name suites
    assert run(["peers"]).results == []


def test_ligers_kernels_go_into_one_model_and_unsloths_get_pefts_layers(monkeypatch):
    """Stand-ins of the two packages, with the signatures that their own code has."""
    patched = []

    def apply_liger_kernel_to_llama(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True,
                                    swiglu=True, model=None):  # fmt: skip
        assert not rope
        patched.append(model)

    def apply_lora_qkv(self, X, inplace=True):
        assert X.ndim == 3
        assert not inplace
        return self.q_proj(X), self.k_proj(X), self.v_proj(X)

    stand_ins = {
        "liger_kernel.transformers": SimpleNamespace(apply_liger_kernel_to_llama=apply_liger_kernel_to_llama),
        "unsloth.kernels": SimpleNamespace(apply_lora_qkv=apply_lora_qkv),
    }
    monkeypatch.setattr(peers.importlib, "import_module", stand_ins.__getitem__)
    liger = peers.LigerCase(dtype="fp32", dropout=0.0, batch=2, tokens=8, r=4, size=TINY_LLAMA)
    result = measure(liger, ITSELF, ONCE)
    assert result.error is None
    assert set(result.speedup[f"{REFERENCE}+liger"]) == {OURS, REFERENCE, f"{OURS}+liger"}
    assert [type(model).__name__ for model in patched] == ["LlamaForCausalLM"] * 2

    unsloth = peers.UnslothCase("qkv", M=8, dtype="fp32", dropout=0.0, hidden=16, kv=8, r=2)
    modules = unsloth.modules(ITSELF)
    x, _ = unsloth.batch()
    for got, wanted in zip(modules["unsloth"](x), modules[REFERENCE](x), strict=True):
        torch.testing.assert_close(got, wanted)
    assert OURS in measure(unsloth, ITSELF, ONCE).speedup["unsloth"]
