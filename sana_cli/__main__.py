"""`sana`, and `python -m sana_cli`, which torchrun needs.

Signals get their exit codes from the first moment on.
"""

import os
import signal
import sys

from sana_cli.runtime.openmp import ask_for_short_waits


def _open_standard_streams() -> None:
    """Open closed standard streams on the null device, or the next file would become one."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def main() -> None:
    """Run the command line. Until it is imported, a signal ends the process at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _frame: os._exit(128 + number))
    _open_standard_streams()
    ask_for_short_waits(os.environ)  # before anything loads torch; worker processes inherit it
    from sana_cli.cli import app
    from sana_cli.cli.process import run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(app)


if __name__ == "__main__":
    main()
