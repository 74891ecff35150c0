"""The measuring code measures what it says: order of runs, ratios, bytes, records. No test here asserts a speed."""

import json
import sys
from types import SimpleNamespace

import peft
import pytest
import torch
from bench_cases import CEILINGS, ITSELF, ONCE, TINY_LLAMA, tiny
from torch import nn

from fastpeft import benchmark
from fastpeft.benchmark import environment, gpu, host, ia3, joint, layer, libraries, model, records, routed, scaling
from fastpeft.benchmark.cases import Result, measure
from fastpeft.benchmark.libraries import FROZEN, OURS, REFERENCE
from fastpeft.benchmark.memory import saved_bytes
from fastpeft.benchmark.report import Report
from fastpeft.benchmark.timing import Spread, Timing, interleave


class Ticking:
    """A clock on which each step takes the time it is told."""

    def __init__(self, **seconds: list[float]) -> None:
        self.log: list[str] = []
        self.seconds = {name: iter(values) for name, values in seconds.items()}
        self.steps = {name: lambda name=name: self.log.append(name) for name in seconds}

    def __call__(self, step) -> float:
        step()
        return next(self.seconds[self.log[-1]])


def test_steps_run_in_turn_within_every_round():
    clock = Ticking(a=[1.0] * 3, b=[2.0] * 3)
    interleave(clock.steps, clock=clock, budget_s=0, warmup=1, min_rounds=3, max_rounds=3)
    assert clock.log == ["a", "b"] * 4  # one round to warm up, three measured


@pytest.mark.parametrize(("budget", "rounds"), [(0, 2), (8.9, 3), (9.1, 4), (1e9, 5)])
def test_rounds_fill_the_budget_within_their_bounds(budget, rounds):
    clock = Ticking(a=[1.0] * 9, b=[2.0] * 9)
    timing = interleave(clock.steps, clock=clock, budget_s=budget, warmup=0, min_rounds=2, max_rounds=5)
    assert timing.rounds == rounds


def test_speedup_is_the_median_of_ratios_within_rounds():
    # The machine is ten times slower in the last round. Medians taken apart would say 2 / 1.
    timing = Timing({"ours": [1.0, 1.0, 10.0], "theirs": [1.5, 2.0, 30.0]})
    assert timing.speedup("ours", "theirs") == Spread(median=2.0, q1=1.75, q3=2.5, min=1.5)
    assert timing.speedup("theirs", "ours").median == 0.5


def test_spread_of_one_value_is_that_value():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 3.0)


def test_garbage_collection_waits_and_comes_back():
    import gc

    seen = []
    interleave(
        {"a": lambda: seen.append(gc.isenabled())}, clock=benchmark.wall_clock, budget_s=0, warmup=0, min_rounds=1
    )
    assert seen == [False]
    assert gc.isenabled()


def test_saved_bytes_count_each_storage_once_and_in_full():
    x = torch.randn(8, 16, requires_grad=True)

    def forward():
        y = x * 2  # 512 bytes, saved twice below, once as a view of half of it
        return (y * y).sum() + (y[:4] * y[:4]).sum()

    saved = saved_bytes(forward, inputs=[x])
    assert saved.own == 8 * 16 * 4
    assert saved.count == 1


def test_saved_bytes_tell_inputs_parameters_and_copies_apart():
    linear = nn.Linear(16, 4, bias=False)
    x = torch.randn(8, 16)
    by_reference = saved_bytes(lambda: linear(x), inputs=[x], parameters=linear.parameters())
    assert (by_reference.own, by_reference.by_reference) == (0, x.numel() * 4)
    copied = saved_bytes(lambda: linear(x * 1), inputs=[x], parameters=linear.parameters())
    assert (copied.own, copied.by_reference) == (x.numel() * 4, 0)
    view = saved_bytes(lambda: linear(x[:4]), inputs=[x], parameters=linear.parameters())
    assert view.by_reference == x.numel() * 4  # the view keeps all of x


def test_saved_bytes_do_not_mistake_a_freed_address_for_the_same_storage():
    x = torch.randn(64, 64, requires_grad=True)
    steps = 6

    def forward():
        total = 0
        for _ in range(steps):
            y = x + 1
            total = total + (y * y).sum()  # saves y; each y is a storage of its own
        return total

    assert saved_bytes(forward, inputs=[x]).count == steps


def test_layer_of_reference_peft_keeps_what_the_tables_say():
    """bf16 base, fp32 adapters on a CPU: 4MK without dropout (x in fp32), 8MK with it, and S."""
    for dropout, bytes_per_element in ((0.0, 4), (0.1, 8)):
        case = layer.SavedCase(M=64, K=128, N=32, r=4, dtype="bf16", dropout=dropout)
        saved = case.facts({REFERENCE: peft})[REFERENCE]["saved"]
        assert saved["own"] == bytes_per_element * 64 * 128 + 4 * 64 * 4


def test_contenders_start_from_the_same_numbers():
    case = layer.LayerCase(M=8, K=16, N=12, r=4, dtype="fp32", dropout=0.0)
    first, second = case.layers(ITSELF).values()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert libraries.adapter_weights(first)["lora_B"].abs().min() > 0  # zeros would hide lora_A's gradient


def test_gradient_error_is_rounding_for_a_right_layer_and_large_for_a_wrong_one():
    case = layer.LayerCase(M=32, K=48, N=24, r=4, dtype="bf16", dropout=0.0)
    facts = case.facts(ITSELF)
    assert facts[OURS] == facts[REFERENCE]
    assert 0 < facts[OURS]["gradient_error"]["lora_A"] < 1e-5

    wrong = case.layers({REFERENCE: peft})[REFERENCE]
    wrong.register_forward_pre_hook(lambda module, args: (args[0] * 1.01,))
    assert case._errors(wrong)["lora_A"] == pytest.approx(0.01, rel=0.1)


def test_ia3_layers_of_reference_peft_keep_what_the_tables_say():
    """bf16 base, fp32 vector: the input in fp32 (4MK), the base's output as it is (2MN), and a copy of the vector."""
    for feedforward, kept in ((True, 4 * 16 * 32 + 4 * 32), (False, 2 * 16 * 24 + 4 * 24)):
        facts = ia3.IA3Case(M=16, K=32, N=24, dtype="bf16", feedforward=feedforward).facts(ITSELF)
        assert facts[REFERENCE]["saved"]["own"] == kept
        assert facts[ia3.FROZEN]["saved"]["own"] == 0
        assert facts[OURS] == facts[REFERENCE]
        assert 0 < facts[OURS]["gradient_error"]["ia3_l"] < 1e-2


def test_a_step_of_training_moves_the_adapters_alone():
    case = model.ModelCase(dtype="fp32", dropout=0.0, batch=2, tokens=8, r=4, size=TINY_LLAMA)
    wrapped = case.model(peft)
    before = {name: p.clone() for name, p in wrapped.named_parameters()}
    case._step(wrapped)()
    moved = {name for name, p in wrapped.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert len(moved) == 2 * 7  # all seven linears of the layer


COUNTED = ("saved", "saved-model", "llama-saved")  # suites without a time


ELSEWHERE = (
    "own-gemm",
    "punica",
    "vllm-lora",
    "routed-groups",
    "peers",
    "peak",
    "first-step",
    "compiled-model",
)  # suites that have tests of their own below


@pytest.mark.parametrize("suite", [suite for suite in benchmark.SUITES if suite not in ELSEWHERE])
def test_every_suite_runs_in_tiny_shapes_with_what_is_installed(suite, monkeypatch):
    cases = list(benchmark.SUITES[suite](True, "cpu"))
    assert len({case.name for case in cases}) == len(cases)
    for kind in (
        gpu.FusedLinearCase, scaling.ScalingCase, host.HostLayerCase, routed.RoutedGenerateCase, joint.JointCase
    ):  # fmt: skip
        monkeypatch.setattr(kind, "effort", None)  # two rounds do, instead of what the case asks for
    for case in dict.fromkeys(map(tiny, cases[:6])):  # cases that differ in shape alone are the same one when `tiny`
        result = measure(case, benchmark.available(), ONCE, CEILINGS)
        assert result.error is None, f"{case.name}: {result.error}"
        assert {OURS, REFERENCE} <= set(result.contenders)
        if suite not in COUNTED:
            assert all(contender["seconds"]["median"] > 0 for contender in result.contenders.values())
            assert OURS in result.speedup[case.baselines[0]]
            assert result.floor[OURS]["median"] > 0
            assert not {FROZEN} & set(result.floor | result.speedup[case.baselines[0]])
        assert bool(result.roofline) == (case.work() is not None)


def test_a_contender_that_no_graph_can_capture_is_timed_and_named(monkeypatch):
    def capture(step, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(gpu, "graph_replay", capture)
    case = tiny(gpu.FusedLinearCase(size=32, M=16, backward=True))
    assert {"torch-no-graph", f"{OURS}-no-graph"} <= set(case.steps(benchmark.available()))


def test_a_failing_case_becomes_its_result():
    broken = SimpleNamespace(LoraConfig=peft.LoraConfig)  # no get_peft_model
    case = layer.LayerCase(M=4, K=8, N=8, r=2, dtype="fp32", dropout=0.0)
    result = measure(case, {OURS: broken}, ONCE)
    assert "get_peft_model" in result.error


def run_tiny(monkeypatch, tmp_path=None, **more) -> Report:
    cases = {"layer": lambda quick, device: map(tiny, layer.layer_cases(True, device))}
    monkeypatch.setattr(benchmark, "SUITES", cases)
    return benchmark.run(["layer"], libraries=ITSELF, effort=ONCE, out_dir=tmp_path, **more)


def test_run_writes_a_record_that_reads_back(monkeypatch, tmp_path):
    lines = []
    report = run_tiny(monkeypatch, tmp_path, progress=lines.append)
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record == report.to_dict()
    assert record["schema"] == 2
    assert records.read(tmp_path / "bench.json") == record  # what is written passes the check of what is read
    assert len(lines) == len(record["results"]) == 2
    for result in record["results"]:
        assert set(result) == {"suite", "case", "params", "contenders", "speedup", "floor", "roofline", "error"}
        assert result["error"] is None
        assert set(result["contenders"]) == {FROZEN, OURS, REFERENCE}
        assert set(result["contenders"][OURS]["seconds"]) == {"median", "q1", "q3", "min"}
        assert set(result["speedup"][REFERENCE]) == {OURS}
        assert set(result["floor"]) == {OURS, REFERENCE}
        assert 0 < result["roofline"]["base_seconds"] < result["roofline"]["seconds"]
        assert result["params"]["device"] == "cpu"
    assert {"date", "commit", "cpu", "gpu", "versions", "threads", "python"} <= set(record["environment"])


def test_a_run_that_is_stopped_leaves_what_it_measured(monkeypatch, tmp_path):
    lines = []

    def stop_at_the_second(line):
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tiny(monkeypatch, tmp_path, progress=stop_at_the_second)
    record = records.read(tmp_path / "bench.json")
    assert [f"[1/2] layer {result['case']}" for result in record["results"]] == lines[:1]
    assert lines[0].split()[-1] in (tmp_path / "bench.md").read_text()


def test_table_has_a_row_for_each_contender_and_its_machine(monkeypatch):
    report = run_tiny(monkeypatch)
    table = report.to_markdown()
    assert report.environment["cpu"]["model"] in table
    assert table.count(f"**{OURS}**") == 2
    assert "x peft" in table
    assert "gradient error lora A" in table


def test_table_shows_errors():
    report = Report(environment.describe(), [Result("layer", "odd", {}, error="ValueError: no")])
    assert "ValueError: no" in report.to_markdown()
    assert report.errors == report.results


def test_cases_past_the_deadline_are_named_not_dropped(monkeypatch):
    report = run_tiny(monkeypatch, deadline_s=-1.0)
    assert [result.error for result in report.results] == ["not run: it would pass the limit of -1 s"] * 2


def test_unknown_suite_is_refused():
    with pytest.raises(ValueError, match="no suite speed; there are layer, groups, "):
        benchmark.run(["speed"])


def test_threads_are_put_back(monkeypatch):
    before = torch.get_num_threads()
    with benchmark.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_no_reference_where_peft_is_another_name_for_us(monkeypatch):
    import fastpeft

    assert list(benchmark.available()) == [OURS, REFERENCE]
    monkeypatch.setitem(sys.modules, "peft", fastpeft)
    assert list(benchmark.available()) == [OURS]


def test_environment_names_cpu_versions_and_bf16_units():
    record = environment.describe(threads=1)
    assert record["cpu"]["model"]
    assert (
        record["cpu"]["bf16_dot"]
        >= record["cpu"]["bf16_matrix"]
        == bool({"amx_bf16", "bf16"} & {*record["cpu"]["flags"]})
    )
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert record["threads"] == 1
    json.dumps(record)


def test_floor_is_the_contenders_time_over_the_frozen_bases():
    result = Result("layer", "a", {})
    result.add_timing(Timing({FROZEN: [1.0, 1.0], OURS: [1.25, 1.25], REFERENCE: [2.0, 2.0]}), (REFERENCE,))
    assert {name: ratio["median"] for name, ratio in result.floor.items()} == {OURS: 1.25, REFERENCE: 2.0}
    assert result.speedup == {REFERENCE: {OURS: Spread.of([1.6]).to_dict()}}


class Fails(layer.LayerCase):
    """A layer case in which the contenders named `failing` raise in their first step."""

    failing = ("unsloth",)

    def steps(self, found):
        def fail():
            raise TypeError("cannot do that\nand more")

        return {**super().steps(found), **dict.fromkeys(self.failing, fail)}


def test_a_peer_that_fails_is_named_and_the_others_are_compared(monkeypatch):
    case = Fails(M=4, K=8, N=8, r=2, dtype="fp32", dropout=0.0)
    result = measure(case, ITSELF, ONCE)
    assert result.error is None
    assert result.contenders["unsloth"] == {"failed": "TypeError: cannot do that"}
    assert set(result.speedup[REFERENCE]) == {OURS}
    monkeypatch.setattr(Fails, "failing", (OURS,))
    assert measure(case, ITSELF, ONCE).error == "TypeError: cannot do that"


def test_a_case_that_takes_long_is_not_begun_shortly_before_the_deadline(monkeypatch):
    monkeypatch.setattr(layer.LayerCase, "reserve_s", 60.0)
    assert all("not run" in result.error for result in run_tiny(monkeypatch, deadline_s=30.0).results)
    assert not run_tiny(monkeypatch, deadline_s=90.0).errors
