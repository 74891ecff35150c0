"""Serving many adapters of one model: requests with an adapter each, adapters that come and go meanwhile."""

from fastpeft.serving.engine import Engine, EngineStatus
from fastpeft.serving.errors import (
    AdapterLoadError,
    AdapterTooLargeError,
    EngineStoppedError,
    RequestCancelledError,
    RequestFailedError,
    ServingError,
    UnknownAdapterError,
)
from fastpeft.serving.handle import RequestHandle

__all__ = [
    "AdapterLoadError",
    "AdapterTooLargeError",
    "Engine",
    "EngineStatus",
    "EngineStoppedError",
    "RequestCancelledError",
    "RequestFailedError",
    "RequestHandle",
    "ServingError",
    "UnknownAdapterError",
]
