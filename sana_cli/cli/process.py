"""The process around a command: messages for mistakes, exit codes, signals, broken streams.

It knows no command. `sana_cli.interrupts` has the signal handlers, `sana_cli.console` the
words.
"""

import importlib.util
import io
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import typer

from sana_cli.errors import Interrupted, SanaError, one_line
from sana_cli.interrupts import Asked, end_at_once, handling, raise_asked, word_for
from sana_cli.runtime import openmp
from sana_cli.runtime.launch import launch

if TYPE_CHECKING:
    from sana_cli import console as console
else:

    def _when_used(name: str) -> Any:
        """A module that is executed on the first use of an attribute."""
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.find_spec(name)
        spec.loader = importlib.util.LazyLoader(spec.loader)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    console = _when_used("sana_cli.console")


def run(app: typer.Typer) -> None:
    """Run the command line and exit. A stdout that cannot be written is one message too."""
    code: Any = 0
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # as for the C locale
        app(prog_name="sana")
    except SystemExit as end:
        code = end.code
    except SanaError as problem:  # from --version
        code = console.error(problem).exit_code
    except OSError as problem:  # from --help; what commands print is written by `console`
        if problem.errno not in console.CANNOT_WRITE:
            raise
        console.silence(sys.stdout)
        code = console.error(console.not_written(problem)).exit_code
    try:
        sys.stdout.flush()
    except OSError as problem:
        console.silence(sys.stdout)
        closed = isinstance(problem, BrokenPipeError)  # by its reader
        code = code or (1 if closed else console.error(console.not_written(problem)).exit_code)
    sys.exit(code)


@contextmanager
def user_errors(
    context: typer.Context, quiet: bool = False, distributed: bool = False
) -> Iterator[ExitStack]:
    """Turn a user's mistake into one message and an exit code.

    SIGTERM and a closed terminal end a command as Ctrl-C does. Messages name settings as Python
    does; here each becomes the flag that the command has for it.

    Args:
        context: of the command.
        quiet: print only errors to stderr.
        distributed: the command may be one of several processes. Only rank 0 prints then.

    Yields:
        A stack for what lasts as long as the command.
    """
    with handling(end_at_once):  # nothing could report an exception while the console loads
        console.begin(quiet)
    with handling(raise_asked):
        try:
            with ExitStack() as work:
                if distributed:
                    console.speak_as(launch())
                yield work
        except SanaError as problem:
            raise typer.Exit(console.error(problem, _flags(context)).exit_code) from None
        except (Asked, KeyboardInterrupt) as asked:
            number = asked.number if isinstance(asked, Asked) else signal.SIGINT
            console.error(Interrupted(word_for(number)))
            raise typer.Exit(128 + number) from None
        except BrokenPipeError:  # the reader of stdout closed it
            console.silence(sys.stdout)
            raise typer.Exit(1) from None
        except OSError as problem:  # an impossible name, or a folder without permission
            if problem.filename is None:
                raise
            error = SanaError(f"{one_line(str(problem.filename))[:200]}: {problem.strerror}")
            raise typer.Exit(console.error(error).exit_code) from None


def _flags(context: typer.Context) -> dict[str, str]:
    """The flag of each setting of a command, such as --negative-prompt of negative_prompt."""
    return {
        parameter.name: flag for parameter in context.command.params for flag in parameter.opts
        if parameter.name and flag.startswith("--")
    }  # fmt: skip


def load_torch(work: ExitStack) -> None:
    """Import torch, and keep its threads from spinning for as long as `work` lasts.

    An exception that a signal raises while torch's C++ loads would abort the process. Until it
    is loaded a signal ends the process at once.
    """
    with handling(end_at_once):
        import torch  # noqa: F401
    work.enter_context(openmp.watch())
