"""`sana`, and `python -m sana_cli`, which torchrun needs. Signals have their exit codes from the first moment on."""

import os
import signal

from sana_cli.openmp import ask_for_short_waits


def main() -> None:
    """Run the command line. Until it is imported, and can say more, a signal ends the process at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _frame: os._exit(128 + number))
    ask_for_short_waits(os.environ)  # before anything loads torch; worker processes inherit it
    from sana_cli.cli import run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
