"""The base product of our own: right to the bit it promises, taken where it is named and nowhere else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lora_operands import known_mask
from numerics import assert_as_close_as_torch
from test_lora import leaves, linear_inputs, operands, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft_kernels import backend, lora_linear, product, tiles
from fastpeft_kernels.gpu import linear as gpu
from fastpeft_kernels.gpu import lora as gpu_lora
from fastpeft_kernels.masks import apply_mask, draw_mask
from fastpeft_kernels.tiles import LINEAR_TILES, linear_tile, linear_tiles, product_of, sum_class

SHAPES = [(1, 8, 8, 1), (130, 72, 264, 16), (67, 200, 136, 20), (5, 64, 40, 32)]  # M, K, N, r: no multiples of tiles
DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]


@pytest.fixture(autouse=True)
def _where_it_runs(device):
    if gpu._arch(torch.ones(1, device=device).device) not in LINEAR_TILES:
        pytest.skip("this GPU has no own product")


def parts(shape: tuple[int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype], device: str) -> tuple[Any, ...]:
    """x, W, bias, S, B."""
    (M, K, N, r), (wide, narrow) = shape, dtypes
    make = lambda *size, dtype, factor=1.0: (torch.randn(*size, device=device) * factor).to(dtype)  # noqa: E731
    return (
        make(M, K, dtype=wide), make(N, K, dtype=wide, factor=K**-0.5), make(N, dtype=wide),
        make(M, r, dtype=narrow), make(N, r, dtype=narrow),
    )  # fmt: skip


def eager(x: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, B: Tensor, mask: Tensor | None = None) -> Tensor:
    low = F.linear(S, B)
    return (F.linear(x, W, bias) + (low if mask is None else apply_mask(low, mask))).to(x.dtype)


def check(x: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, B: Tensor, mask: Tensor | None = None, **tile: Any):
    assert gpu.obstacle(x, W, S) is None
    ours = gpu.linear(x, W, bias, S, B, mask, **tile)
    exact = eager(*(t if t is None else t.double() for t in (x, W, bias, S, B)), mask)
    expected = eager(x, W, bias, S, B, mask)
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    assert_as_close_as_torch("out", ours, expected, exact)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("orientation", ["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_as_close_to_fp64_as_torch(shape, dtypes, orientation, masked, device):
    """W's rows contiguous as in the forward, its columns as for dx."""
    x, W, bias, S, B = parts(shape, dtypes, device)
    mask = draw_mask(shape[0], shape[2], 0.4, torch.device(device)) if masked else None
    check(x, W if orientation == "rows" else W.t().contiguous().t(), None if masked else bias, S, B, mask)


@pytest.mark.parametrize("r", [33, 64])
def test_ranks_of_several_blocks(r, device):
    x, W, bias, S, B = parts((70, 64, 136, r), DTYPES[0], device)
    check(x, W, bias, S, B, draw_mask(70, 136, 0.4, torch.device(device)))


@pytest.mark.parametrize("tile", LINEAR_TILES[9], ids="{0.BLOCK_M}x{0.BLOCK_N}".format)
def test_many_tiles_in_groups(tile, device):
    """More tiles than processors, in the interpreter, and a last group of rows that is not full."""
    x, W, bias, S, B = parts((1160, 16, 520, 4), DTYPES[0], device)
    check(x, W, bias, S, B, tile=tile)


def test_strides(device):
    """Rows apart from each other, any strides of what the bulk copy engine does not load."""
    x, W, bias, S, B = parts((33, 40, 48, 8), DTYPES[0], device)
    wide = torch.zeros(33, 64, dtype=x.dtype, device=device)
    wide[:, 16:56] = x
    S, B = S.t().contiguous().t(), B.repeat_interleave(2, dim=-1)[:, ::2]
    check(wide[:, 16:56], W, bias.repeat_interleave(3)[::3], S, B)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients(dtypes, p, device):
    """lora_linear with both of its base products our own, against eager torch with the same mask."""
    t = operands((130, 72, 264, 16), dtypes, device)
    keep = known_mask(t["x"], 0.4, "triton") / 0.6 if p else 1.0
    inputs = linear_inputs(t)

    def masked(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        low = F.linear(F.linear((x.to(A.dtype) * keep).to(A.dtype), A), B)
        return (F.linear(x, W, bias) + low * scaling).to(x.dtype)

    with backend("triton"), product("own"):
        ours = run(lora_linear, (*leaves(inputs)[:-1], 0.7, p), t["dout"])
    exact = run(masked, leaves(inputs, torch.float64), t["dout"])
    for key, value in run(masked, leaves(inputs), t["dout"]).items():
        allowed = value.double() + (2e-5 * exact[key].abs().max() if p else 0)  # 1 - p is rounded to 2^-16
        assert_as_close_as_torch(key, ours[key], allowed, exact[key], dtype=value.dtype)


def test_no_rows(device):
    t = operands((0, 40, 48, 8), DTYPES[0], device)
    with backend("triton"), product("own"):
        ours = run(lora_linear, leaves(linear_inputs(t)), t["dout"])
    assert ours["out"].shape == (0, 48)
    assert ours["grad 0"].shape == (0, 40)
    assert not ours["grad 4"].any()


def test_same_bits_on_every_run(device):
    inputs = parts((300, 72, 264, 16), DTYPES[0], device)
    assert torch.equal(gpu.linear(*inputs), gpu.linear(*inputs))


class Operators(TorchDispatchMode):
    """The torch operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def products_of(t: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often forward and backward of lora_linear call each product."""
    calls = {"own": 0, "C operand": 0}

    def counted(name: str, fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            calls[name] += 1
            return fn(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, Operators() as seen, backend("triton"):
        patch.setattr(gpu_lora, "linear", counted("own", gpu_lora.linear))
        patch.setattr(gpu_lora, "expand_planes", counted("C operand", gpu_lora.expand_planes))
        patch.setattr(gpu_lora, "input_pass", counted("C operand", gpu_lora.input_pass))
        run(lora_linear, leaves(linear_inputs(t)), t["dout"])
    assert ("addmm_" in seen.names) == (calls["C operand"] > 0)
    return calls


def test_who_computes_the_product(device, monkeypatch):
    t = operands((16, 40, 48, 8), DTYPES[0], device)
    own, library = {"own": 2, "C operand": 0}, {"own": 0, "C operand": 2}
    assert products_of(t, monkeypatch) == library  # nothing was measured: the table says so everywhere
    with product("own"):
        assert products_of(t, monkeypatch) == own
    every = dict.fromkeys(("few rows", "short", "medium", "long"), "own")
    monkeypatch.setattr(tiles, "PRODUCTS", {9: every, 10: every})
    assert products_of(t, monkeypatch) == own
    with product("library"):
        assert products_of(t, monkeypatch) == library
    unaligned = operands((16, 40, 44, 8), DTYPES[0], device)
    assert products_of(unaligned, monkeypatch) == library  # falls back in silence
    expanded = t | {"dout": t["dout"][:1, :1].expand(16, 48)}
    assert products_of(expanded, monkeypatch) == {"own": 1, "C operand": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda t: t["x"].float(), "W": lambda t: t["W"].float()}, "x in bfloat16 or float16, got torch.float32"),
        ({"A": lambda t: t["A"].repeat(9, 1), "B": lambda t: t["B"].repeat(1, 9)}, "no tile of it takes rank 72"),
        ({"x": lambda t: t["x"].t().contiguous().t()}, r"rows of x must be contiguous .* got strides \(1, 16\)"),
        ({"x": lambda t: t["x"][:1].expand(16, 40)}, r"rows of x must be contiguous .* got strides \(0, 1\)"),
        ({"x": lambda t: t["x"].flatten().repeat(2)[1:641].view(16, 40)}, "rows of x must be 16-byte aligned"),
        ({"W": lambda t: t["W"].repeat(1, 2)[:, 1:41]}, "rows of W must be 16-byte aligned"),
        ({"W": lambda t: t["W"].repeat_interleave(2, 1)[:, ::2]}, "rows of W must be contiguous"),
        ({"W": lambda t: t["W"][:44], "B": lambda t: t["B"][:44]}, "a multiple of 8 columns, got 44"),
    ],
    ids=["dtype", "rank", "columns", "expanded", "address", "W", "W-strides", "N"],
)
def test_says_why_it_cannot(change, message, device):
    t = {key: value.detach() for key, value in operands((16, 40, 48, 8), DTYPES[0], device).items()}
    t |= {key: make(t) for key, make in change.items()}
    with backend("triton"), product("own"), pytest.raises(RuntimeError, match=message):
        lora_linear(t["x"], t["W"], None, t["A"], t["B"], 0.7)


def test_other_gpus_have_no_own_product(device, monkeypatch):
    x, W, _, S, _ = parts((16, 40, 48, 8), DTYPES[0], device)
    monkeypatch.setattr(gpu, "_arch", lambda device: 0)
    assert "it needs an NVIDIA GPU of compute capability 9.x and 10.x" in gpu.obstacle(x, W, S)


def test_table_of_products():
    assert product_of(8, 8192, 4096) == "library"
    assert [sum_class(8192, K) for K in (1024, 2048, 4096, 8192, 14336)] == ["short"] * 2 + ["medium"] * 2 + ["long"]
    assert sum_class(1, 4096) == "few rows"
    assert set(tiles.PRODUCTS) == set(LINEAR_TILES)


def test_tile_is_the_widest_that_keeps_every_processor_busy():
    wide, narrow = LINEAR_TILES[9]
    assert linear_tiles(9, 16, tf32=False) == (wide, narrow)
    assert linear_tiles(9, 64, tf32=False) == (narrow,)
    assert linear_tiles(9, 64, tf32=True) == ()  # tf32 parts take more registers
    assert linear_tiles(9, 65, tf32=False) == linear_tiles(8, 16, tf32=False) == ()
    assert linear_tile((wide, narrow), 8192, 4096, processors=132) == wide
    assert linear_tile((wide, narrow), 512, 4096, processors=132) == narrow
    assert linear_tile((wide, narrow), 1, 8, processors=132) == narrow
