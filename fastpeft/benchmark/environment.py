"""On what a figure was measured: no figure is worth keeping without it."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("fastpeft", "torch", "triton", "transformers", "peft", "accelerate", "numpy")
# What decides how fast small and mixed-precision products run; the rest of a CPU's long list says nothing here.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve", "i8mm")
MATRIX_FLAGS = {"amx_bf16", "bf16"}


def describe(threads: int | None = None) -> dict[str, Any]:
    """The machine, the versions and the commit, as one JSON-ready record."""
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in PACKAGES},
        "cpu": cpu(),
        "threads": threads or torch.get_num_threads(),
        "gpu": gpu(),
    }
    return record


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """Model name, cores, and the instruction sets that matter.

    `bf16_matrix`: bf16 has matrix instructions (AMX, ARM's BFMMLA); `bf16_dot`: dot products at least (AVX-512).
    """
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass  # not Linux: the platform's own name has to do
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "bf16_matrix": bool(flags & MATRIX_FLAGS),
        "bf16_dot": bool(flags & {"avx512_bf16", *MATRIX_FLAGS}),
    }


def gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "model": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def commit() -> str | None:
    """The commit that this package is checked out at, "-dirty" when files differ from it; None outside a checkout."""
    here = Path(__file__).resolve()
    try:
        _git(
            "ls-files", "--error-unmatch", here.name, cwd=here.parent
        )  # else: a copy inside somebody else's repository
        return _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*", cwd=here.parent)
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
