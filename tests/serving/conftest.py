"""transformers collects garbage whenever a manager stops: then the test session itself need not be looked through."""

import gc
from collections.abc import Iterator

import pytest
import serving_cases as cases

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


@pytest.fixture(scope="module")
def maker():
    return cases.AdapterMaker()


@pytest.fixture(scope="module")
def good(tmp_path_factory, maker):
    """An adapter that is served whatever happens to others."""
    return maker.save(tmp_path_factory.mktemp("good"), 0, cases.LORA_KINDS[0])


@pytest.fixture(scope="module")
def answer(good):
    """What it says to PROMPT."""
    return cases.Alone().answers(good, [cases.PROMPT])[0]


@pytest.fixture
def engine(good):
    with cases.engine(slots=2) as engine:
        engine.add_adapter("good", good)
        yield engine
