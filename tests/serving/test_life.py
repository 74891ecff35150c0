"""Callbacks, cancelling and stopping, while other threads of the engine are in the midst of something."""

import threading
from concurrent.futures import Future

import pytest
import serving_cases as cases
from serving_cases import PROMPT, WAIT

from fastpeft.serving import AdapterLoadError, EngineStoppedError, RequestCancelledError
from fastpeft.serving import registry as registry_module


@pytest.fixture
def slow_reads(monkeypatch):
    """(set when an adapter is being read, what it waits for before it goes on)."""
    reading, go_on = threading.Event(), threading.Event()
    read = registry_module.read_adapter

    def read_slowly(path, limit):
        reading.set()
        assert go_on.wait(WAIT)
        return read(path, limit)

    monkeypatch.setattr(registry_module, "read_adapter", read_slowly)
    return reading, go_on


def test_callbacks_that_fail_or_call_back(engine, answer, tmp_path, maker):
    """A future's callback may ask the engine for more, wait for it, and must not end it."""
    engine.add_adapter("x", maker.save(tmp_path, 0, cases.LORA_KINDS[0]))
    answers = []

    def ask_for_more(future: "Future[None]") -> None:
        answers.append(engine.submit(PROMPT, "x").result(WAIT))
        raise RuntimeError("of a callback")

    futures = engine.prefetch("x"), engine.pin("x")
    for future in futures:
        future.add_done_callback(ask_for_more)
    assert engine.submit(PROMPT, "x").result(WAIT) == answer
    done = engine.prefetch("x")  # settled at once
    assert done.done()
    last = engine.pin("x")
    last.result(WAIT)  # settled after those before it
    assert answers == [answer] * 2


def test_a_callback_replaces_what_is_admitted_with_it(engine, good, answer):
    engine.add_adapter("x", good)
    engine.pin("x").result(WAIT), engine.pin("good").result(WAIT)
    replaced = threading.Event()

    def replace(future: "Future[None]") -> None:
        engine.replace_adapter("good", good)
        replaced.set()

    with engine._changed:  # so that both are admitted at once
        engine.pin("x").add_done_callback(replace)
        other = engine.pin("good")
    other.result(WAIT)
    assert replaced.wait(WAIT)
    assert engine.submit(PROMPT, "good").result(WAIT) == answer


def test_an_engine_that_is_stopped_in_a_callback(engine):
    stopped = threading.Event()
    engine.pin("good").add_done_callback(lambda future: (engine.stop(), stopped.set()))
    assert stopped.wait(WAIT)
    with pytest.raises(EngineStoppedError, match="was stopped"):
        engine.submit(PROMPT)


def test_cancelling_a_request_that_has_just_ended(engine, answer, monkeypatch):
    """Its answer is there: it is not thrown away."""
    handle = engine.submit(PROMPT, "good", stream=False)
    finish, cancelling = handle._finish, []

    def slow_finish(error=None):
        cancelling.append(threading.Thread(target=handle.cancel))
        cancelling[0].start()
        cancelling[0].join(0.2)
        finish(error)

    monkeypatch.setattr(handle, "_finish", slow_finish)
    assert handle.result(WAIT) == answer
    cancelling[0].join(WAIT)
    assert handle.result(WAIT) == answer


def test_futures_when_the_engine_stops(good, tmp_path, maker, slow_reads):
    reading, go_on = slow_reads
    engine = cases.engine()
    for name in ("read", "waits", "pinned"):
        engine.add_adapter(name, good)
    early = engine.prefetch("read")
    with cases.no_threads_left():
        engine.start()
        assert reading.wait(WAIT), "what was asked for before the start"
        futures = [early, engine.prefetch("waits"), engine.pin("pinned")]
        stopping = threading.Thread(target=engine.stop)
        stopping.start()
        for future in futures:
            with pytest.raises(EngineStoppedError, match="was stopped"):
                future.result(WAIT)
        go_on.set()
        stopping.join(WAIT)


def test_errors_do_not_collect_the_frames_of_all_who_see_them(engine, tmp_path, maker):
    folder = maker.save(tmp_path / "broken", 1, cases.LORA_KINDS[0])
    (folder / "adapter_model.safetensors").write_bytes(b"")
    engine.add_adapter("broken", folder)
    handles = [engine.submit(PROMPT, "broken") for _ in range(3)] * 2
    errors = []
    for handle in handles:
        with pytest.raises(AdapterLoadError, match="'broken' cannot be served") as caught:
            handle.result(WAIT)
        errors.append(caught.value)
    assert len(set(map(id, errors))) == 6
    assert all(error.__cause__ is not None for error in errors)
    assert all(handle.exception().__traceback__ is None for handle in handles)


def test_cancelled_futures(engine, answer, tmp_path, maker):
    """The caller may lose interest in a future. That must not end the thread that would set it."""
    engine.add_adapter("x", maker.save(tmp_path, 0, cases.LORA_KINDS[0]))
    engine.prefetch("x").cancel()
    engine.pin("x").cancel()
    assert engine.submit(PROMPT, "x").result(WAIT) == answer


def test_cancelling_while_the_adapter_is_read(engine, answer, tmp_path, maker, monkeypatch, slow_reads):
    folder = maker.save(tmp_path / "slow", 1, cases.LORA_KINDS[0])
    engine.add_adapter("slow", folder)
    reading, go_on = slow_reads
    handle = engine.submit(PROMPT, "slow")
    assert reading.wait(WAIT)
    assert handle.cancel()
    engine.remove_adapter("slow")
    go_on.set()
    with pytest.raises(RequestCancelledError):
        handle.result(WAIT)
    monkeypatch.undo()
    assert engine.submit(PROMPT, "good").result(WAIT) == answer
    assert engine.status().on_cpu == ["good"]


def test_a_disk_that_hangs_holds_up_nobody_else(engine, good, answer, tmp_path, maker, monkeypatch):
    slow = maker.save(tmp_path / "slow", 1, cases.LORA_KINDS[0])
    engine.add_adapter("slow", slow)
    looking, go_on = threading.Event(), threading.Event()
    look = registry_module.file_identity

    def look_slowly(folder):
        if folder == slow:
            looking.set()
            assert go_on.wait(WAIT)
        return look(folder)

    engine.pin("good").result(WAIT)
    monkeypatch.setattr(registry_module, "file_identity", look_slowly)
    handle = engine.submit(PROMPT, "slow")
    assert looking.wait(WAIT)
    assert engine.submit(PROMPT, "good").result(WAIT) == answer
    assert engine.status().waiting == 1
    go_on.set()
    assert handle.result(WAIT)


def test_a_stop_that_waits_can_be_hurried(good, slow_reads):
    engine = cases.engine().start()
    engine.add_adapter("good", good)
    started, go_on = slow_reads
    handle = engine.submit(PROMPT, "good")
    assert started.wait(WAIT)
    waiting = threading.Thread(target=engine.stop)
    waiting.start()
    hurried = threading.Thread(target=engine.stop, kwargs={"drain": False})
    hurried.start()
    with pytest.raises(EngineStoppedError, match="before this request had ended"):
        handle.result(WAIT)
    go_on.set()
    for thread in (waiting, hurried):
        thread.join(WAIT)
        assert not thread.is_alive()
