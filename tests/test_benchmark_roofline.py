"""The limits are kernels' budgets over a device's ceilings."""

import pytest
from bench_cases import CEILINGS

from fastpeft.benchmark import environment, roofline


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
