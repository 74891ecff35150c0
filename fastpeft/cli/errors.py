"""How a command ends badly: one line on stderr that says what to do."""


class CommandError(Exception):
    """Something the person at the keyboard can put right; its text is the whole message.

    Args:
        message: what was expected, what came, and the next step; one line.
        code: 2 for a wrong argument (as for a wrong option), 1 for work that failed.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def one_line(error: BaseException, limit: int = 400) -> str:
    """The text of any exception on one line, cut at a word."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " ..."
