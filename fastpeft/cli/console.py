"""The terminal of the commands."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def make_console() -> "Console":
    """A console for results and progress, on stdout."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # into a file or a pipe: nothing is cut
    return console
