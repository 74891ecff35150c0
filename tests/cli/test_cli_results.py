"""The lines of a prompts file as batches, and the file of their results, without a model."""

import subprocess
import sys

import pytest

from fastpeft.cli.errors import CommandError
from fastpeft.cli.requests import SAMPLING, Request, cut_batches
from fastpeft.cli.results import Results

DEFAULTS = {"max_new_tokens": 6, "temperature": 0.0, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.0}


def test_batches_hold_lines_that_sample_alike_and_fit_together():
    def requests(*changes):
        return [Request(i, "", "a", DEFAULTS | change) for i, change in enumerate(changes)]

    assert set(SAMPLING) == set(DEFAULTS)
    lines = requests({}, {"max_new_tokens": 2}, {"temperature": 1.0}, {"temperature": 1.0}, {})
    assert [list(b) for b in cut_batches(lines, [3] * 5, 8, None)] == [[0, 1], [2, 3], [4]]
    assert [list(b) for b in cut_batches(lines[:2] * 2, [3] * 4, 3, None)] == [[0, 1, 2], [3]]
    long = requests({"max_new_tokens": 90}, {"max_new_tokens": 10}, {"max_new_tokens": 10})
    # the second would be written on for 90 tokens after its 80
    assert [list(b) for b in cut_batches(long, [5, 80, 2], 8, 100)] == [[0], [1, 2]]
    assert list(cut_batches([], [], 3, None)) == []


def test_a_run_whose_file_another_one_writes_to_stops(tmp_path):
    request = Request(1, "Once", "a", DEFAULTS)
    results = Results(tmp_path / "out", {}, False, [request])
    with results.open():
        results.write([request.result("é")])
        with (tmp_path / "out").open("a") as other:
            other.write("theirs")
        with pytest.raises(CommandError, match="is another one writing to it"):
            results.write([request.result("x")])
    assert (tmp_path / "out").read_text().endswith("theirs")


HOLD = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_file_that_another_process_has_is_left_alone(tmp_path):
    """Whether that is found at first, or when the model is loaded; and no longer than the process lives."""
    output, request = tmp_path / "out", Request(1, "Once", "a", DEFAULTS)

    def results():
        return Results(output, {}, True, [request])

    with results().open():
        pass
    waiting = results()
    with subprocess.Popen([sys.executable, "-c", HOLD, output], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        said = f"{output} is being written to by another run: wait for its end"
        with pytest.raises(CommandError, match=said):
            results()
        with pytest.raises(CommandError, match=said), waiting.open():
            pytest.fail("it has no lock")
        other.kill()
    with waiting.open():
        waiting.write([request.result("x")])
    assert len(output.read_text().splitlines()) == 1
