"""transformers collects garbage whenever a manager stops: then the test session itself need not be looked through."""

import gc
from collections.abc import Iterator

import pytest

from fastpeft.integrations.continuous_batching import check_transformers


@pytest.fixture(autouse=True, scope="module")
def _known_transformers() -> None:
    """Nothing of this can run with a transformers whose continuous batching is another."""
    try:
        check_transformers()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="module")
def _leave_the_session_to_itself() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
