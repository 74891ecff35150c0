"""The limits are kernels' budgets over a device's ceilings."""

import pytest
from bench_cases import CEILINGS

from fastpeft.benchmark import environment, prediction, recount, roofline


def test_the_limit_is_kernels_budget():
    """At M = 8192, r = 16, K = N = 4096 in bf16 the frozen base takes 696 us on an H200, the adapters 47 us."""
    h200 = roofline.known("NVIDIA H200")
    sizes = {"M": 8192, "K": 4096, "widths": [4096], "r": 16, "dtype": "bf16"}
    predicted = roofline.predict(roofline.lora_work(**sizes, dropout=0.0), h200)
    assert predicted["base_seconds"] == pytest.approx(696e-6, rel=1e-3)
    assert predicted["seconds"] - predicted["base_seconds"] == pytest.approx(47e-6, rel=0.01)
    MK = 8192 * 4096
    plain, dropped = (roofline.lora_work(**sizes, dropout=p) for p in (0.0, 0.1))
    assert plain.adapter_bytes == 6 * MK  # 4MK + 2MN
    assert dropped.adapter_bytes - plain.adapter_bytes == 3 * MK / 8


def test_the_predicted_time_is_what_was_counted():
    """tests/kernels/test_budget.py holds `prediction.predict` to the counter."""
    h200 = roofline.known("NVIDIA H200")
    sizes = {"M": 8192, "K": 4096, "widths": [4096, 1024], "r": 16, "dropout": 0.1}
    work = roofline.lora_work(**sizes, dtype="bf16")
    figures = roofline.predict(work, h200)
    forward, backward = prediction.predict(*sizes.values())
    assert figures["kernel_bytes"] == (forward + backward).total
    ours = figures["predicted_seconds"] - figures["base_seconds"]
    assert ours == pytest.approx((forward + backward).total / h200.bytes_per_s)
    assert figures["predicted_seconds"] > figures["seconds"]  # C operands
    assert roofline.predict(work + work, h200)["kernel_bytes"] == 2 * figures["kernel_bytes"]
    assert roofline.lora_work(**sizes, dtype="bf16", backward=False).kernel_bytes == forward.total


@pytest.mark.parametrize("change", [{"r": 64}, {"dtype": "fp32"}, {"widths": [8] * 4}], ids=str)
def test_what_was_not_counted_is_not_predicted(change):
    sizes = {"M": 8192, "K": 4096, "widths": [4096], "r": 16, "dropout": 0.1, "dtype": "bf16"}
    counted, other = roofline.lora_work(**sizes), roofline.lora_work(**sizes | change)
    assert counted.kernel_bytes is not None
    assert other.kernel_bytes is None
    assert "predicted_seconds" not in roofline.predict(counted, CEILINGS, on_gpu=False)
    if other.dtype == counted.dtype:
        assert (counted + other).kernel_bytes is None


def test_coefficients_are_those_of_a_linear_function():
    terms = [(800, 100), (1600, 200), (800, 500)]
    seed = 16
    assert recount._solve(terms, [1700 + seed, 3400 + seed, 2100 + seed]) == [2.0, 1.0]
    with pytest.raises(RuntimeError, match="no linear function"):
        recount._solve(terms, [1700, 4400, 2100])


def test_a_group_reads_its_input_once_each_way():
    alone = [roofline.lora_work(8, 16, [N], 2, dtype="bf16", dropout=0.0) for N in (16, 4)]
    together = roofline.lora_work(8, 16, [16, 4], 2, dtype="bf16", dropout=0.0)
    both = alone[0] + alone[1]
    assert both.adapter_bytes - together.adapter_bytes == 2 * 2 * 8 * 16
    assert (both.base_flops, both.adapter_flops) == (together.base_flops, together.adapter_flops)


@pytest.mark.parametrize(("bytes", "flops", "seconds"), [(2e10, 1e9, 2.0), (1e9, 4e11, 2.0), (0, 0, 0)])
def test_roofline_is_the_slower_of_memory_and_arithmetic(bytes, flops, seconds):
    assert roofline.roofline_seconds(bytes, flops, CEILINGS, "bf16") == seconds


def test_a_dtype_without_a_rate_has_no_limit():
    work = roofline.lora_work(8, 16, [16], 2, dtype="fp32", dropout=0.0)
    assert roofline.predict(work, roofline.known("H200")) is None


def test_this_cpus_ceilings_are_measured():
    ceilings = roofline.ceilings_of("cpu")
    assert ceilings.bytes_per_s > 1e8
    assert set(ceilings.flops_per_s) == {"fp32", "bf16"}
    assert min(ceilings.flops_per_s.values()) > 1e8
    assert ceilings.device == environment.cpu()["model"]
