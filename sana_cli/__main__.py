"""`sana`, and `python -m sana_cli`, which torchrun needs. Signals have their exit codes from the first moment on."""

import os
import signal
import sys

from sana_cli.runtime.openmp import ask_for_short_waits


def _open_standard_streams() -> None:
    """Let stdin, stdout and stderr lead nowhere where they are closed: else a file that is opened would be taken for them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def main() -> None:
    """Run the command line. Until it is imported, and can say more, a signal ends the process at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _frame: os._exit(128 + number))
    _open_standard_streams()
    ask_for_short_waits(os.environ)  # before anything loads torch; worker processes inherit it
    from sana_cli.cli import run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
