"""Write docs/configs.md from the fields of `Config`, and docs/cli.md from `--help` (`make docs`).

A test compares the two pages with what this file makes.
"""

import inspect
from pathlib import Path

from typer.testing import CliRunner

from sana_cli.cli import app
from sana_cli.config.document import yaml_value
from sana_cli.config.keys import Config, Section, may_change

DOCS = Path(__file__).parent
PLAIN = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}  # the same help everywhere

CONFIGS = """\
# Config keys

`make docs` writes this page from the descriptions in `sana_cli/config/keys.py`; change them there.

A config file holds the keys that differ from the defaults below. `sana inspect quickstart --yaml` prints every key of a
config as a file to start from. [Training](training.md#configs) says how configs are found and overridden.

"On resume" says whether a key may change when a run is resumed. Three things stay fixed by other means: the dataset is
compared by its hash, the encoder by its fingerprint, and `train.batch_size` x `train.accumulate` must stay the same
product. With another number of processes a step keeps its images.
"""
CLI = """\
# Commands

`make docs` writes this page from `--help`.

Human text goes to stderr, results go to stdout, and `--json` prints one JSON document there. `~` is the home folder in
every path. `sana --install-completion` completes commands, options and their values in your shell.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | could not do it |
| 2 | wrong usage or config |
| 129, 130, 138, 143 | ended by SIGHUP, Ctrl-C, SIGUSR1 or SIGTERM |
"""


def section_table(name: str, section: type[Section]) -> str:
    """The heading, the docstring and the keys of a section of the config."""
    lines = [f"## {name}", "", inspect.getdoc(section) or "", ""]
    lines += ["| key | default | on resume | meaning |", "|---|---|---|---|"]
    for key, value in section().model_dump(mode="json").items():
        meaning = (section.model_fields[key].description or "").replace("|", "\\|")
        resume = "may change" if may_change(name, key) else "fixed"
        lines.append(f"| `{name}.{key}` | `{yaml_value(value)}` | {resume} | {meaning} |")
    return "\n".join(lines) + "\n"


def configs_page() -> str:
    """The text of docs/configs.md."""
    sections = {name: type(getattr(Config(), name)) for name in Config.model_fields}
    return "\n".join([CONFIGS, *(section_table(name, section) for name, section in sections.items())])


def command_help(*command: str) -> str:
    """A heading, and `sana COMMAND --help` at 80 columns."""
    shown = CliRunner().invoke(app, [*command, "--help"], prog_name="sana", env=PLAIN).stdout
    kept = "\n".join(line.rstrip() for line in shown.strip().splitlines())
    return f"## {' '.join(('sana', *command))}\n\n```text\n{kept}\n```\n"


def cli_page() -> str:
    """The text of docs/cli.md."""
    commands = [
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    ]
    return "\n".join([CLI, command_help(), *map(command_help, commands)])


def main() -> None:
    """Write both pages."""
    (DOCS / "configs.md").write_text(configs_page(), encoding="utf-8")
    (DOCS / "cli.md").write_text(cli_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
