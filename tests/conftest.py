"""What every test gets: a device, fixed seeds, a clean environment, and kernels that run without a GPU.

`TRITON_INTERPRET` must be set before a kernel is defined, so it is set here, first of all, on machines without a GPU.
Compile tests need it unset: they run in processes of their own (compile_cost.py).
"""

import os

os.environ.pop("FASTPEFT_BACKEND", None)
os.environ.pop("FASTPEFT_PRODUCT", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network that is not there
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

hypothesis.settings.register_profile("fastpeft", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("fastpeft")


@pytest.hookimpl(tryfirst=True)  # before pytest applies `-m gpu`
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped without one; with one, every test that takes `device` counts as a GPU test."""
    for item in items:
        if HAS_GPU and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def device() -> str:
    """Where a test that runs anywhere puts its tensors: "cuda" where there is one, else "cpu"."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts from the same seeds and no path named in the environment; switches of torch are put back."""
    monkeypatch.delenv("FASTPEFT_BACKEND", raising=False)
    monkeypatch.delenv("FASTPEFT_PRODUCT", raising=False)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def ops_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers leave no input to torch's own gradients, however small: tests of the ops need no large shapes."""
    from fastpeft_kernels import dispatch  # when asked for: tests of what an import brings along come first

    monkeypatch.setattr(dispatch, "MOST_ELEMENTS", 0)


@pytest.fixture(params=["torch's gradients", "ops"])
def either_path(request: pytest.FixtureRequest) -> None:
    """Once as small inputs go, once as large ones do."""
    if request.param == "ops":
        request.getfixturevalue("ops_for_few")
