"""Compile kernels for GPUs that are not here and read what they cost: registers, spills, shared memory, instructions.

Compiling needs Triton's interpreter switched off and, for a second Triton version, another module search path. Both
are settings of a whole process, so a `Compiler` keeps one helper process for each version: this file, run as a script.
It takes one request a line (JSON) on standard input and answers with one line.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The most shared memory that one block may have, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY_COLUMNS = 512  # of 10.0, for all accumulators of one block; other targets have none
# The matrix instruction of a full-size dot, in PTX (HMMA, HGMMA, UTC*MMA of the machine). 8.x has one for any size.
MATRIX_OP = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}
# 8.6 and 8.9 run the same instructions as 8.0; what they lack is shared memory.
COMPILED_AS = {80: 80, 86: 80, 89: 80, 90: 90, 100: 100}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one compiled kernel takes. Bytes and registers are per block and per thread."""

    registers: int
    stack: int  # bytes; not zero means that registers were spilled
    shared: int  # bytes
    matrix: int  # warp-group matrix instructions, or the target's own where it has one kind only
    warp_matrix: int  # mma.sync: right for dots of fewer than 64 rows
    bulk_copies: int  # by the bulk copy engine, into shared memory
    tensor_memory: int = 0  # columns
    overlapped: int = 0  # of a pipelined case on 9.0: warp-group matrix instructions after another one without a wait

    def complaints(self, case: Any, capability: int) -> list[str]:
        """What is wrong with `case` compiled for `capability`; empty when nothing is."""
        found = []
        if self.stack:
            found.append(f"spills: {self.stack} bytes of stack")
        if self.shared > SHARED_LIMIT[capability]:
            found.append(f"needs {self.shared} bytes of shared memory, sm_{capability} has {SHARED_LIMIT[capability]}")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"needs {self.tensor_memory} columns of tensor memory, there are {TENSOR_MEMORY_COLUMNS}")
        if case.pipelined and not self.bulk_copies:
            found.append("no cp.async.bulk: loads do not go through the bulk copy engine")
        if case.pipelined and capability == 90 and not self.overlapped:
            found.append("serialised: a wait after each HGMMA, `ptxas -v` on the PTX tells why")
        if case.uses_matrix and not (self.matrix or (case.dot_rows < 64 and self.warp_matrix)):
            found.append(
                f"no {MATRIX_OP[COMPILED_AS[capability]]} (found {self.warp_matrix} mma.sync): not on the matrix units"
            )
        return found


def discover(package: str) -> dict[str, Any]:
    """All compile cases of the modules in `package`: "module/case name" -> CompileCase."""
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package}.{info.name}")
        for case in module.compile_cases():
            key = f"{info.name}/{case.name}"
            if key in found:
                raise ValueError(f"two compile cases of {package} are called {key}; names must be unique in a module")
            found[key] = case
    return found


class Compiler:
    """A process that compiles the cases of one package with one Triton version."""

    def __init__(self, package: str, triton_path: Path | None = None, search_path: list[str] | None = None) -> None:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        path = [*([str(triton_path)] if triton_path else []), *(search_path or []), *sys.path]
        env["PYTHONPATH"] = os.pathsep.join(p for p in path if p)
        env["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-P", __file__, package]
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.triton_version: str = self._read()["triton"]
        except RuntimeError:
            self.close()
            raise

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the compile process ended with status {self._process.wait()}; its error is above")
        return json.loads(line)

    def compile(self, key: str, target: str) -> Cost | None:
        """Compile case `key` for "cuda:90" or "hip:gfx942". Returns its cost; None for targets whose code is not read.

        Raises:
            RuntimeError: it does not compile; the message is the compiler's.
        """
        assert self._process.stdin is not None
        print(json.dumps({"case": key, "target": target}), file=self._process.stdin, flush=True)
        answer = self._read()
        if "error" in answer:
            raise RuntimeError(
                f"{key} does not compile for {target} with Triton {self.triton_version}:\n{answer['error']}"
            )
        return Cost(**answer["cost"]) if answer["cost"] else None

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=30)


# What follows runs in the compile process.


def _compile(case: Any, target: str) -> dict[str, int] | None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind, arch = target.split(":")
    gpu = GPUTarget("cuda", int(arch), 32) if kind == "cuda" else GPUTarget("hip", arch, 64)
    # Kernels may ask triton.language.target_info which GPU they are for; it asks the driver, which there is none of.
    triton.runtime.driver.set_active(types.SimpleNamespace(get_current_target=lambda: gpu))
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, type_) in enumerate(case.signature.items())
        if type_ != "constexpr" and not re.match(r"fp|bf|tensordesc", type_) and name not in case.unaligned
    }
    compiled = triton.compile(
        ASTSource(case.fn, dict(case.signature), dict(case.constexprs), attrs),
        target=gpu,
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    if kind != "cuda":
        return None
    usage = _cuobjdump(compiled.asm["cubin"], "-res-usage")
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, f"cuobjdump reports no resources:\n{usage}"
    is_overlapped = case.pipelined and int(arch) == 90  # disassembling takes as long as compiling
    count = lambda op: len(re.findall(rf"\b{op}\b", compiled.asm["ptx"]))  # noqa: E731
    return {
        "registers": int(match[1]),
        "stack": int(match[2]),
        "shared": compiled.metadata.shared,
        "matrix": count(MATRIX_OP[int(arch)]),
        "warp_matrix": count(r"mma\.sync"),
        "bulk_copies": count(r"cp\.async\.bulk\.tensor\.\w+\.shared::"),
        "overlapped": _overlapped(_cuobjdump(compiled.asm["cubin"], "-sass")) if is_overlapped else 0,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
    }


def _overlapped(sass: str) -> int:
    return len(re.findall(r"HGMMA(?=(?:(?!DEPBAR)[^;]*;)+?[^;]*HGMMA)", sass))


def _cuobjdump(cubin: bytes, flag: str) -> str:
    """What the tool that Triton carries says of a compiled kernel."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from; a compiler's outer error tells the place, the innermost the reason."""
    while error is not None:
        yield error
        error = error.__cause__


def _requests() -> Iterator[dict[str, str]]:
    for line in sys.stdin:
        yield json.loads(line)


def _serve(package: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the compilers print must not mix with the answers
    import triton

    cases = discover(package)
    print(json.dumps({"triton": triton.__version__}), file=answers)
    for request in _requests():
        try:
            answer: dict[str, Any] = {"cost": _compile(cases[request["case"]], request["target"])}
        except Exception as error:  # any failure of the compiler is the answer
            answer = {"error": "\n".join(f"{type(e).__name__}: {e}" for e in _causes(error))}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        _serve(sys.argv[1])
