"""What can go wrong for one request, and for the engine."""

import copy
from typing import TypeVar

from fastpeft.utils.error import PeftError

Error = TypeVar("Error", bound=BaseException)


class ServingError(PeftError, RuntimeError):
    """Base class of what requests and engines raise."""


class UnknownAdapterError(ServingError, ValueError):
    """No adapter of that name is registered, or it cannot be a name."""


class AdapterLoadError(ServingError):
    """The adapter's files are missing or damaged, or do not fit the model. Only its own requests fail."""


class AdapterTooLargeError(AdapterLoadError):
    """The adapter does not fit the budget of a tier even alone."""


class RequestFailedError(ServingError):
    """The request ran, and transformers reported an error for it."""


class RequestCancelledError(ServingError):
    """The request was cancelled."""


class EngineStoppedError(ServingError):
    """The engine was stopped, or its generation loop has died."""


def fresh(error: Error) -> Error:
    """An exception to raise: one object raised by many would collect the frames, and so the locals, of all of them."""
    copied = copy.copy(error)
    copied.__cause__ = error.__cause__
    return copied
