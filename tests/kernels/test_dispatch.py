"""Which path runs: one function decides, and says so when it cannot."""

import os
import subprocess
import sys

import pytest
import torch

from fastpeft_kernels import backend, current_backend, dispatch, dropout
from fastpeft_kernels.dispatch import use_triton


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


@pytest.mark.parametrize(("value", "expected"), [("torch", "torch"), ("", "auto"), ("cuda", None)])
def test_environment(value, expected):
    code = "import fastpeft_kernels; print(fastpeft_kernels.current_backend())"
    env = {**os.environ, "FASTPEFT_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if expected is None:
        assert done.returncode != 0
        assert "FASTPEFT_BACKEND must be one of auto, triton, torch; got 'cuda'" in done.stderr
    else:
        assert done.stdout.strip() == expected
