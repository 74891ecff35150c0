"""For pytest-benchmark's own records: the layer, the small Llama's training step, and what each keeps for backward.

pytest bench --benchmark-only --benchmark-json=FILE
"""

import pytest

from fastpeft.benchmark import layer, model

LAYERS = list(layer.layer_cases(quick=False, device="cpu"))
MODELS = list(model.model_cases(quick=False, device="cpu"))
SAVED = [*layer.saved_cases(quick=False, device="cpu"), *model.saved_model_cases(quick=False, device="cpu")]


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_layer_step(case, compare):
    compare.time(case, rounds=40 if case.M <= 512 else 12)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_model_step(case, compare):
    compare.time(case, rounds=9)


@pytest.mark.parametrize("case", SAVED, ids=lambda case: f"{case.suite}-{case.name}")
def test_saved_bytes(case, compare):
    compare.count(case)
