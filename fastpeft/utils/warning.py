"""Warnings that a program may want to filter by name."""


class PeftWarning(UserWarning):
    """A configuration that works but is likely not what was meant."""
