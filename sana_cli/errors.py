"""The one error that a user can cause. `cli/` turns it into a message and an exit code."""

from collections.abc import Sequence

MOST_LISTED = 10  # problems that a message lists


def listed(problems: Sequence[str]) -> list[str]:
    """Indented lines of a message for some problems, at most the first ten."""
    more = [f"... and {len(problems) - MOST_LISTED} more"] if len(problems) > MOST_LISTED else []
    return [f"  {line}" for line in (*problems[:MOST_LISTED], *more)]


def one_line(text: str) -> str:
    """Escape unprintable characters in foreign text, such as a file name: one harmless line."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its type if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class SanaError(Exception):
    """A mistake or a failure that the user can do something about.

    The text says what is wrong, where, and what to do next, one line for each. It names a
    setting as Python does, in backticks: "`guidance_scale`: ...". The command line prints its
    flag, --guidance-scale, if the command has it.

    `exit_code` is 1 if a command could not do its work and 2 for wrong usage or a wrong config.
    """

    process: int | None = None  # which of several processes raised it, once they are connected
    silent = False  # another process says it

    def __init__(self, *lines: str, exit_code: int = 1) -> None:
        super().__init__("\n".join(lines))
        self.exit_code = exit_code


class Interrupted(SanaError):  # noqa: N818 (not an error)
    """A signal stopped the command (exit code 130 for SIGINT, 143 for SIGTERM)."""
