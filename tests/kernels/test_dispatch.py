"""Which path runs: one function decides, and says so when it cannot."""

import os
import subprocess
import sys

import pytest
import torch

from fastpeft_kernels import backend, current_backend, current_product, dispatch, dropout, lora_linear, product
from fastpeft_kernels.dispatch import FEW_ROWS, inferring_few, use_triton


def test_auto_takes_torch_on_a_cpu():
    assert current_backend() == "auto"
    assert not use_triton(torch.ones(1))


def test_a_block_of_code_and_nothing_more():
    with backend("triton"):
        assert current_backend() == "triton"
        with backend("torch"):
            assert current_backend() == "torch"
        assert current_backend() == "triton"
    assert current_backend() == "auto"


def test_put_back_after_an_error():
    with pytest.raises(KeyError), backend("torch"):
        raise KeyError
    assert current_backend() == "auto"


def test_unknown_name():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch; got 'cuda'"), backend("cuda"):
        pass


def test_triton_demanded_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with backend("triton"), pytest.raises(RuntimeError, match="needs tensors on a GPU, got one on cpu"):
        dropout(torch.ones(2, 2), 0.5)


def test_triton_demanded_without_the_package(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    with backend("triton"), pytest.raises(RuntimeError, match="needs the package triton"):
        dropout(torch.ones(2, 2), 0.5)


def test_double_precision_has_no_kernel():
    with backend("triton"), pytest.raises(RuntimeError, match="float64"):
        dropout(torch.ones(2, 2, dtype=torch.float64), 0.5)


def test_product_of_a_block_of_code():
    assert current_product() == "auto"
    with product("own"):
        with pytest.raises(KeyError, match="library"), product("library"):
            raise KeyError(current_product())
        assert current_product() == "own"
    assert current_product() == "auto"
    with pytest.raises(ValueError, match="product must be one of auto, library, own; got 'cublas'"), product("cublas"):
        pass


def test_own_product_demanded_where_plain_torch_runs():
    x, W, A, B = torch.ones(2, 8, requires_grad=True), torch.ones(8, 8), torch.ones(1, 8), torch.ones(8, 1)
    with product("own"), pytest.raises(RuntimeError, match='product "own" needs the Triton path'):
        lora_linear(x, W, None, A, B, 1.0)
    out = lora_linear(x, W, None, A, B, 1.0)
    with product("own"), pytest.raises(RuntimeError, match='product "own" needs the Triton path'):
        out.sum().backward()


ENVIRONMENT = [
    ("BACKEND", "torch", "torch"),
    ("BACKEND", "", "auto"),
    ("BACKEND", "cuda", "FASTPEFT_BACKEND must be one of auto, triton, torch; got 'cuda'"),
    ("PRODUCT", "own", "own"),
    ("PRODUCT", "", "auto"),
    ("PRODUCT", "cublas", "FASTPEFT_PRODUCT must be one of auto, library, own; got 'cublas'"),
]


# A fork for each value: torch is imported once, the package in each of them.
IMPORTS = """
import os, sys, torch
for setting in sys.argv[1:]:
    if os.fork() == 0:
        name, _, value = setting.partition("=")
        os.environ[f"FASTPEFT_{name}"] = value
        try:
            import fastpeft_kernels
            print(getattr(fastpeft_kernels, f"current_{name.lower()}")(), flush=True)
        except ValueError as error:
            print(error, flush=True)
        os._exit(0)
    os.wait()
"""


def test_environment():
    """Both variables are read when the package is imported."""
    settings = [f"{variable}={value}" for variable, value, _ in ENVIRONMENT]
    command = [sys.executable, "-c", IMPORTS, *settings]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [expected for *_, expected in ENVIRONMENT]


@pytest.mark.parametrize(
    ("backend_name", "product_name", "expected"),
    [
        ("auto", "auto", True),
        ("auto", "library", True),
        ("auto", "own", False),
        ("triton", "auto", False),
        ("torch", "auto", True),
    ],
)
def test_few_rows_on_a_gpu_without_gradients(backend_name, product_name, expected, monkeypatch):
    """As if a GPU were there: kernels for all that the backend allows."""
    monkeypatch.setattr(dispatch, "use_triton", lambda x, other=None: current_backend() != "torch")
    x = torch.randn(FEW_ROWS, 8)
    with backend(backend_name), product(product_name):
        with torch.no_grad():
            assert inferring_few(x) is expected
            assert not inferring_few(torch.randn(FEW_ROWS + 1, 8))
            assert not inferring_few(x, dropout_p=0.1)
        assert not inferring_few(x)
