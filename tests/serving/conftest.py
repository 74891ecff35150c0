"""transformers collects garbage whenever a manager stops: then the test session itself need not be looked through."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _leave_the_session_to_itself() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
