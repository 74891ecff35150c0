"""Every kernel in every tile configuration, compiled for GPUs that are not here.

It spills nothing, fits shared memory, and runs on the matrix units where it should.
"""

import importlib
import pkgutil
import re
from collections import defaultdict
from itertools import count

import pytest
from compile_cost import COMPILED_AS, Compiler, discover

from fastpeft_kernels import gpu

CASES = discover("fastpeft_kernels.gpu")
TARGETS = list(dict.fromkeys(COMPILED_AS.values()))
MIX = re.compile(r"-(?:(?:bf16|fp16|fp32)-)?(?:bf16|fp16|fp32)(?=-|$)")  # in a case's name: the dtypes it is for
BOTH_BF16 = "-bf16-bf16"


def tile_of(key: str) -> object:
    """All that makes a case but its dtypes: kernel, blocks and flags, warps, stages, what is not aligned."""
    case = CASES[key]
    numbers = frozenset((name, value) for name, value in case.constexprs.items() if isinstance(value, int))
    return case.fn, numbers, case.num_warps, case.num_stages, case.unaligned


def by_tile(keys: list[str]) -> list[list[str]]:
    """The cases of each tile of each kernel."""
    found = defaultdict(list)
    for key in keys:
        found[tile_of(key)].append(key)
    return list(found.values())


def mix(key: str) -> str:
    found = MIX.search(key)
    return found[0] if found else ""


def on_each_target() -> list[tuple[str, int]]:
    """Every tile on every target that chooses it, in each mix of dtypes. bf16 throughout takes the products that bf16
    beside fp32 takes, fewer of them: beside such a case it is compiled for one target, in turn, so that each tile and
    each target still meets it."""
    turn = count()
    found = []
    for keys in by_tile(list(CASES)):
        leader = any(mix(key) == "-bf16-fp32" for key in keys)
        for key in keys:
            everywhere = [t for t in TARGETS if CASES[key].chosen_for(t)]
            once = leader and mix(key) == BOTH_BF16 and len(everywhere) > 1
            found += [(key, t) for t in ([everywhere[next(turn) % len(everywhere)]] if once else everywhere)]
    return found


def with_every_mix(some: list[str], of: list[str]) -> list[str]:
    """Some of the cases, and for each mix of dtypes of a kernel that is not among them the first case that has it."""
    seen = {(CASES[key].fn, mix(key)) for key in some}
    chosen = set(some)
    for key in of:
        if (CASES[key].fn, mix(key)) not in seen:
            seen.add((CASES[key].fn, mix(key)))
            chosen.add(key)
    return [key for key in of if key in chosen]


def where_we_measure() -> list[tuple[str, int]]:
    """Every tile on 9.0 in bf16 beside fp32, or what it has instead, and in one of the two mixes that take tf32, in
    turn; each kernel in each mix. The pinned Triton compiles the others."""
    turn = count()
    of = [key for key, case in CASES.items() if case.chosen_for(90)]
    some = []
    for keys in by_tile(of):
        tf32 = [key for key in keys if mix(key) in ("-fp16-fp32", "-fp32-fp32")]
        some += [tf32[next(turn) % len(tf32)]] if tf32 else []
        some += [key for key in keys if key not in tf32 and mix(key) != BOTH_BF16]
    return [(key, 90) for key in with_every_mix(some, of)]


def for_any_gpu() -> list[str]:
    """Every tile in one of its mixes, in turn, and each kernel in each mix: what only must compile, whatever it
    costs."""
    turn = count()
    of = [key for key, case in CASES.items() if case.capabilities is None]
    return with_every_mix([keys[next(turn) % len(keys)] for keys in by_tile(of)], of)


def judged(cases: list[tuple[str, int]]) -> list[object]:
    """(case, target, capabilities), as pytest parameters with readable ids: a case is compiled once for each target,
    and judged for every capability that runs that code and for which the launcher can choose it."""
    found = []
    for key, target in cases:
        capabilities = [c for c, code in COMPILED_AS.items() if code == target and CASES[key].chosen_for(c)]
        found.append(pytest.param(key, target, capabilities, id=f"{key}-sm{target}"))
    return found


@pytest.mark.parametrize("compiler", ["pinned"], indirect=True, ids="triton-{}".format)
@pytest.mark.parametrize(("key", "target", "capabilities"), judged(on_each_target()))
def test_compiles_lean(compiler: Compiler, key: str, target: int, capabilities: list[int]) -> None:
    """8.6 and 8.9 run the code of 8.0 with less shared memory."""
    check(compiler, key, target, capabilities)


@pytest.mark.parametrize("compiler", ["3.6"], indirect=True, ids="triton-{}".format)
@pytest.mark.parametrize(("key", "target", "capabilities"), judged(where_we_measure()))
def test_compiles_lean_where_we_measure(compiler: Compiler, key: str, target: int, capabilities: list[int]) -> None:
    """The Triton and the GPU of bench/gpu.sh; every target with this Triton too would take three minutes more."""
    check(compiler, key, target, capabilities)


def check(compiler: Compiler, key: str, target: int, capabilities: list[int]) -> None:
    cost = compiler.compile(key, f"cuda:{target}")
    assert cost is not None
    assert {c: found for c in capabilities if (found := cost.complaints(CASES[key], c))} == {}, cost


@pytest.mark.parametrize("compiler", ["pinned"], indirect=True, ids="triton-{}".format)
@pytest.mark.parametrize("key", for_any_gpu())
def test_compiles_for_amd(compiler: Compiler, key: str) -> None:
    """Nothing here is tuned for gfx942; what is chosen for any GPU must at least compile."""
    compiler.compile(key, "hip:gfx942")


def test_every_kernel_is_compiled():
    """A kernel that no compile case names would be checked by nothing here."""
    compiled = {CASES[key].fn for key, _ in on_each_target()}
    kernels = {
        f"{info.name}.{name}": value
        for info in pkgutil.iter_modules(gpu.__path__)
        for name, value in vars(importlib.import_module(f"{gpu.__name__}.{info.name}")).items()
        if name.endswith("_kernel")
    }
    assert kernels
    assert [name for name, kernel in kernels.items() if kernel not in compiled] == []


def test_no_tile_and_no_mix_of_dtypes_is_left_out():
    """What is compiled stands for what is not: each tile meets each target and each mix of dtypes."""
    chosen = [(key, t) for key, case in CASES.items() for t in TARGETS if case.chosen_for(t)]
    compiled = on_each_target()
    assert {key for key, _ in compiled} == set(CASES)
    assert {(key, t) for key, t in chosen if mix(key) != BOTH_BF16} <= set(compiled)
    assert {(tile_of(key), t) for key, t in compiled} == {(tile_of(key), t) for key, t in chosen}
    everywhere = [key for key, case in CASES.items() if case.capabilities is None]
    at_90 = [key for key, t in chosen if t == 90]
    for found, of in (([key for key, _ in where_we_measure()], at_90), (for_any_gpu(), everywhere)):
        assert {tile_of(key) for key in found} == {tile_of(key) for key in of}
        assert {(CASES[key].fn, mix(key)) for key in found} == {(CASES[key].fn, mix(key)) for key in of}
