"""The counter of bytes and launches, on kernels and operators whose traffic is known."""

import pytest
import torch
import triton
import triton.language as tl

from fastpeft.benchmark.traffic import counting
from fastpeft_kernels.dispatch import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter")


@triton.jit
def _scale_kernel(x_ptr, y_ptr, scale_ptr, total_ptr, n, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride, mask=offs < n, other=0.0)
    scale = tl.load(scale_ptr)
    again = tl.load(scale_ptr + offs * 0, mask=offs < n, other=0.0)  # one element, however many lanes ask for it
    inside = (offs < n) & (tl.program_id(1) == 0)  # in the interpreter an integer, not a bool
    tl.store(y_ptr + offs, (x * scale * again).to(y_ptr.dtype.element_ty), mask=inside)
    tl.atomic_add(total_ptr, tl.sum(x))


def run_scale(x, y, scale, total, block=16):
    _scale_kernel[(triton.cdiv(len(y), block),)](x, y, scale, total, len(y), x.stride(0), BLOCK=block)


def test_kernel_by_argument():
    x, y = torch.arange(40.0), torch.empty(40, dtype=torch.float16)
    with counting() as traffic:
        run_scale(x, y, torch.tensor([2.0]), torch.zeros(1))
    assert torch.equal(y, (4 * x).half())  # counting changes no result
    kernel = traffic.launches[-1]
    assert kernel.name == "_scale_kernel"
    assert kernel.reads == {"x_ptr": 40 * 4, "scale_ptr": 3 * 2 * 4, "total_ptr": 3 * 4}  # 3 programs
    assert kernel.writes == {"y_ptr": 40 * 2, "total_ptr": 3 * 4}


def test_one_tensor_as_two_arguments():
    """The argument that a pointer came from counts, not the memory that it points to."""
    x = torch.ones(32)
    with counting() as traffic:
        run_scale(x, x, x, x)
    assert traffic.launches[0].reads == {"x_ptr": 128, "scale_ptr": 16, "total_ptr": 8}
    assert traffic.launches[0].writes == {"y_ptr": 128, "total_ptr": 8}


def test_strides_and_offsets_into_a_storage():
    storage = torch.ones(100)
    with counting() as traffic:
        run_scale(storage[10::3], torch.empty(30), storage[5:6], torch.zeros(1))
    assert traffic.launches[-1].reads["x_ptr"] == 30 * 4


def test_nothing_is_left_behind():
    with pytest.raises(triton.runtime.errors.InterpreterError), counting() as traffic:
        run_scale(torch.ones(4), torch.ones(4), torch.ones(1), torch.zeros(1), block=3)  # no power of two
    seen = len(traffic.launches)
    run_scale(torch.ones(4), torch.ones(4), torch.ones(1), torch.zeros(1))
    torch.ones(4).add_(1)
    assert len(traffic.launches) == seen


def test_operators():
    x, y = torch.ones(8, 16), torch.ones(8, 16, dtype=torch.bfloat16)
    with counting() as traffic:
        x.view(16, 8).t()  # no work
        torch.empty(1000)  # none either
        x.add_(y)
        x.sum(0)
        y.copy_(x)
        x[:, :1].expand(8, 16).to(torch.float64)
    assert [launch.name for launch in traffic.launches] == ["aten.add_", "aten.sum", "aten.copy_", "aten._to_copy"]
    add, total, copy, cast = traffic.launches
    assert (add.reads.total(), add.writes.total()) == (128 * 6, 128 * 4)
    assert (total.reads.total(), total.writes.total()) == (128 * 4, 16 * 4)
    assert (copy.reads.total(), copy.writes.total()) == (128 * 4, 128 * 2)
    assert (cast.reads.total(), cast.writes.total()) == (8 * 4, 128 * 8)  # an expanded column is read once


def test_base_products_count_their_c_operand_alone():
    x, W, out, bias = torch.ones(8, 16), torch.ones(4, 16), torch.zeros(8, 4), torch.zeros(4)
    with counting(W) as traffic:
        out.addmm_(x, W.t())
        x @ W.t()
        torch.addmm(bias, x, W.t())
        x @ x.t()  # not the base's
    assert [launch.is_base for launch in traffic.launches] == [True, True, True, False]
    assert traffic.c_reads == 8 * 4 * 4
    assert traffic.bytes() == traffic.c_reads + 2 * 8 * 16 * 4 + 8 * 8 * 4


def test_cached_arguments_count_once_a_launch():
    with counting(cached={"scale_ptr"}) as traffic:
        for _ in range(2):
            run_scale(torch.ones(40), torch.ones(40), torch.tensor([2.0]), torch.zeros(1))
    assert [launch.reads["scale_ptr"] for launch in traffic.launches if launch.name == "_scale_kernel"] == [4, 4]


def test_backward_is_counted():
    x = torch.ones(8, 16, requires_grad=True)
    y = x * 2
    with counting() as traffic:
        y.backward(torch.ones(8, 16))
    assert traffic.bytes() >= 2 * 8 * 16 * 4


def test_predicted_time_is_bytes_over_bandwidth():
    with counting() as traffic:
        torch.ones(1000).add_(1)
    assert traffic.seconds(4.3e12) == pytest.approx(traffic.bytes() / 4.3e12)
    assert traffic.bytes() > 0
