"""Record what an 80-column terminal shows of the four commands, as SVG, and what a file gets.

    python benchmarks/terminal.py docs

Each command runs in a pseudo-terminal, in an empty folder; an emulator (pyte) keeps the screen.
`train` is shown half way and at its end.
"""

# mypy: disable-error-code="import-not-found,import-untyped"

import argparse
import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

COLUMNS, LINES = 80, 60
COMMANDS = {
    "embed": ["embed"],
    "train": ["train", "--set", "train.steps=300"],
    "sample": ["sample", "4 two 4 six"],
    "inspect": ["inspect", "runs/quickstart"],
}


def colour(name: str) -> str:
    """Rich's name for a colour of the emulator, which may be hexadecimal."""
    if name == "default":
        return ""
    return (
        f"#{name}"
        if re.fullmatch(r"[0-9a-f]{6}", name)
        else name.replace("bright", "bright_").replace("brown", "yellow")
    )


def picture(screen: pyte.Screen) -> Text:
    """The screen's lines with their colours, without empty lines at the end."""
    text = Text()
    used = max((y for y, line in enumerate(screen.display) if line.strip()), default=0)
    for y in range(used + 1):
        for x in range(COLUMNS):
            cell = screen.buffer[y][x]
            text.append(cell.data, style=f"{'bold ' if cell.bold else ''}{colour(cell.fg)}".strip())
        text.append("\n")
    return text


def save(text: Text, command: str, path: Path) -> None:
    """Write an SVG that loads no fonts."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text(f"$ {command}", style="bold"))
    console.print(text, end="")
    svg = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title=""), flags=re.DOTALL)
    path.write_text(svg, encoding="utf-8")


def watch(arguments: list[str], folder: Path, at: Callable[[str], bool]) -> tuple[Text | None, Text]:
    """Run a command in a terminal; its screen when `at` accepts the text, and at the end."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream, half = pyte.ByteStream(screen), None
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sana_cli", *arguments],
        cwd=folder,
        stdin=other,
        stdout=other,
        stderr=other,
        env=environment,
    )
    os.close(other)
    while process.poll() is None or select.select([main], [], [], 0)[0]:
        if select.select([main], [], [], 0.1)[0]:
            try:
                stream.feed(os.read(main, 65536))
            except OSError:  # the other end is closed
                break
            if half is None and at("\n".join(screen.display)):
                half = picture(screen)
    assert process.wait() == 0, screen.display
    return half, picture(screen)


def main() -> None:
    """Run all four in a terminal, then into a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out.absolute()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        for name, arguments in COMMANDS.items():
            line = " ".join(["sana", *(f'"{word}"' if " " in word else word for word in arguments)])
            half, end = watch(
                arguments, Path(first), lambda text: bool(re.search(r"(15\d|1[6-9]\d)/300", text))
            )
            save(end, line, out / f"terminal-{name}.svg")
            if half is not None:
                save(half, line, out / f"terminal-{name}-half-way.svg")
        piped = out / "terminal-piped.txt"
        with piped.open("w", encoding="utf-8") as file:
            for arguments in COMMANDS.values():
                file.write(f"$ sana {' '.join(arguments)} > log 2>&1; cat log\n")
                file.flush()
                command = [sys.executable, "-m", "sana_cli", *arguments]
                subprocess.run(
                    command,
                    cwd=second,
                    check=True,
                    stdout=file,
                    stderr=file,
                    env=os.environ | {"HF_HUB_OFFLINE": "1"},
                )


if __name__ == "__main__":
    main()
