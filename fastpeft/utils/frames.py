"""Whether a call is still running: modules call no hook of ours after a KeyboardInterrupt, not even `always_call`."""

from types import FrameType


def has_ended(frame: FrameType) -> bool:
    """Whether the call of a plain function has returned or raised; drops its variables then."""
    try:
        frame.clear()
    except RuntimeError:  # it is executing
        return False
    return True
