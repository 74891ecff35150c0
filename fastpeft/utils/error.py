"""Exceptions that a program may want to catch by name."""


class PeftError(Exception):
    """Base class of this library's own exceptions."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """The adapter's targets name nothing that is in the model. A ValueError too, for programs that catch that."""
