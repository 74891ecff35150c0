"""bench/gpu.sh: without a GPU it says so and stops; with a Python that pretends to have one, its steps run in order."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench" / "gpu.sh"
PRETENDER = """#!/usr/bin/env bash
case "$*" in
  *is_available*) echo pretended-gpu ;;
  *"import xdist"*) exit 1 ;;
  "-m pip"*) exit 1 ;;
  "-m pytest"*) echo "pytest $* on $PYTHONPATH"; exit "$PYTEST_STATUS" ;;
  bench/gpu.py*) echo "$*" >"$LOG" ;;
esac
"""


def run_script(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    result = run_script(str(tmp_path), PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0
    assert result.stdout.strip().endswith("nothing was tested or measured.")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("pytest_status", "status"), [("0", 0), ("1", 1)])
def test_tests_come_first_and_their_failure_is_the_scripts(tmp_path, pytest_status, status):
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(PRETENDER)
    python.chmod(0o755)
    result = run_script(PYTHON=str(python), OUT=str(tmp_path / "out"), PYTEST_STATUS=pytest_status, LOG=str(log))
    assert result.returncode == status, result.stderr
    (tests,) = (tmp_path / "out" / "pretended-gpu").glob("*-tests.txt")
    assert "-m gpu" in tests.read_text()
    assert f"{ROOT}:{ROOT}/kernels" in tests.read_text()  # pip could not install: the checkout itself is used
    benches = log.read_text().split()  # measured even where a test failed
    assert benches[benches.index("--out") + 1] == str(tests.parent)
    assert tests.name.startswith(benches[benches.index("--stem") + 1])
    assert 200 < int(benches[benches.index("--deadline") + 1]) < 540


def test_benches_run_on_a_cpu_too(tmp_path):
    command = [sys.executable, ROOT / "bench" / "gpu.py", "--device", "cpu", "--suites", "saved", "--quick"]
    result = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    assert {entry["suite"] for entry in record["results"]} == {"saved"}
    assert "### saved" in result.stdout


def bench_gpu(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "bench" / "gpu.py", "--device", "cpu", "--out", tmp_path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_suite_without_a_case_is_refused_where_it_is_named_alone(tmp_path):
    """bench/gpu.sh names none: peers is among its suites whether Liger and Unsloth are installed or not."""
    named = bench_gpu(tmp_path, "--suites", "saved", "peers", "--quick")
    assert named.returncode == 1
    assert named.stderr.count("\n") == 1
    assert named.stderr.startswith("nothing was measured: peers needs a CUDA device")
    assert not list(tmp_path.iterdir())
    not_named = bench_gpu(tmp_path, "--quick", "--deadline", "-1")  # no case is begun
    assert "### layer" in not_named.stdout
    assert "peers" not in not_named.stdout + not_named.stderr


@pytest.mark.parametrize("script", ["bench/gpu.sh", ".ci/run"])
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", ROOT / script], check=True)
