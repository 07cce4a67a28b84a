"""The one error that a user can cause. It knows nothing of terminals: `cli.py` turns it into a message and an exit code."""

from collections.abc import Sequence

MOST_LISTED = 10  # problems that a message lists


def listed(problems: Sequence[str]) -> list[str]:
    """Lines of a message for some problems, indented; of very many, the first."""
    more = [f"... and {len(problems) - MOST_LISTED} more"] if len(problems) > MOST_LISTED else []
    return [f"  {line}" for line in (*problems[:MOST_LISTED], *more)]


def one_line(text: str) -> str:
    """Text that others wrote, such as a key or a file's name, as one line that no terminal obeys: odd characters are spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class SanaError(Exception):
    """A mistake or a mishap that the user can do something about.

    The text says what is wrong, where, and what to do next, one line for each. `exit_code` is 1 where a command could
    not do its work and 2 where it was asked wrongly (usage or config).
    """

    process: int | None = None  # which of several processes raised it, once they are connected
    told = False  # another process tells the user

    def __init__(self, *lines: str, exit_code: int = 1) -> None:
        super().__init__("\n".join(lines))
        self.exit_code = exit_code


class Interrupted(SanaError):  # noqa: N818 (it is no error)
    """The user or the system asked the command to stop (SIGINT: 130, SIGTERM: 143)."""
