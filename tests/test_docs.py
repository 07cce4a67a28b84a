"""What README and docs say, run: every command line is one, every mistake is answered so, every key and file is there."""

import re
import shlex
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, SMALL, embedded
from safetensors.torch import save_file
from typer.testing import CliRunner

from sana_cli.cli import app
from sana_cli.commands.train import TrainOptions, train
from sana_cli.config.file import parse_config
from sana_cli.config.keys import Config
from sana_cli.runtime import device

README = (REPOSITORY / "README.md").read_text()
MISTAKES = REPOSITORY / "docs" / "mistakes.md"
MINE = "train:\n  steps: 500\n  lrr: 1e-3\nmodel:\n  patch_size: 5\n"  # a config with mistakes
COMMANDS = ("embed", "train", "sample", "eval", "inspect")


def consoles(text: str) -> list[tuple[str, str]]:
    """The `$ ...` lines of console blocks, each with what is shown below it."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, _, shown = part.replace("\\\n", " ").partition("\n")
            found.append((line, shown.strip()))
    return found


def words(line: str) -> list[list[str]]:
    """The `sana` commands in a shell line."""
    found = []
    for part in re.split(r"&&|;|\|(?!\|)", line):
        command = shlex.split(part.partition(" > ")[0], comments=True)
        if command[0] == "sana":
            found.append(command[1:])
        elif "sana_cli" in command:  # after python -m, or torchrun's options
            found.append(command[command.index("sana_cli") + 1 :])
    return found


@pytest.fixture(scope="session")
def helps() -> dict[str, str]:
    return {command: CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout for command in COMMANDS}


HEADERS = [
    line for p in sorted((REPOSITORY / "configs").glob("*.yaml")) for line in re.findall(r"^#   (sana .*)", p.read_text(), re.M)
]
ALL = [command for line in (*(line for line, _ in consoles(README)), *HEADERS) for command in words(line)]


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_every_command_line_has_options_that_exist(command: list[str], helps: dict[str, str]) -> None:
    assert command[0] in COMMANDS or command[0].startswith("--")
    for word in command[1:]:
        if word.startswith("-"):
            assert re.search(rf"(^|[\s,]){re.escape(word.split('=')[0])}\b", helps[command[0]]), (
                f"sana {command[0]} has no {word}"
            )
    overrides = [command[at + 1] for at, word in enumerate(command) if word == "--set"]
    for override in overrides:
        section, _, key = override.partition("=")[0].partition(".")
        assert key in Config.model_fields[section].annotation.model_fields, override  # type: ignore[union-attr]


def test_every_option_is_described(helps: dict[str, str]) -> None:
    import inspect

    from sana_cli import cli

    for command in (cli.embed, cli.train, cli.sample, cli.evaluate, cli.inspect):
        for name, parameter in inspect.signature(command).parameters.items():
            info = parameter.annotation.__metadata__[0]
            assert info.help, f"{command.__name__}: {name}"


def test_keys_targets_and_files_that_are_named_are_there() -> None:
    for path in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"):
        text = path.read_text()
        for section, key in re.findall(r"`(data|text|model|train|sample|run)\.(?!py\b)(\w+)", text):
            assert key in Config.model_fields[section].annotation.model_fields, f"{path.name}: {section}.{key}"  # type: ignore[union-attr]
        targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        for target in re.findall(r"`?make ([a-z]+)`", text):
            assert target in targets, f"{path.name}: make {target}"
        for name in re.findall(r"`((?:benchmarks|configs|docs|examples|tests)/[\w./-]*)`", text) + re.findall(
            r"\]\(((?!http)[^)#]+)\)", text
        ):
            assert (REPOSITORY / name).exists(), f"{path.name}: {name}"
    tree = README.split("sana_cli/\n")[1].split("```")[0]
    named = set(re.findall(r"([\w/]+\.py|\w+/)", " ".join(line.split("  ")[1] for line in tree.splitlines())))
    there = {
        p.name + "/" * p.is_dir()
        for p in (REPOSITORY / "sana_cli").iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert there - {"__init__.py", "__main__.py"} <= named | {p.split("/")[-1] for p in named}, (
        "a module that the README's tree leaves out"
    )
    assert {name for name in named if "/" not in name.rstrip("/")} <= there


def figures_aside(line: str) -> str:
    return re.sub(r"\d[\d,.:]*\d|\d", "#", line)


def without_bf16(shown: str) -> str:
    """What README shows of a processor with bf16 arithmetic, as one without it has it."""
    told = shown.replace("bf16 (cpu has native bf16)", "fp32 (cpu lacks native bf16)")
    return re.sub(r"^(precision +)bf16$", r"\1fp32", told, flags=re.MULTILINE)


def same_text(told: str, shown: str, told_apart: Callable[[str], str]) -> None:
    """What was printed is what is shown, where `...` stands for any number of lines."""
    kept = (line.rstrip() for line in told.strip().splitlines() if not re.match(r"[\w ]+ [\d,]+/[\d,]+", line))
    lines = [told_apart(line) for line in kept]  # of a terminal's bar, a file has lines
    wanted = [told_apart(line.rstrip()) for line in shown.splitlines()]
    if "..." not in wanted:
        assert lines == wanted
        return
    cut = wanted.index("...")
    assert lines[:cut] == wanted[:cut]
    assert lines[-len(wanted[cut + 1 :]) :] == wanted[cut + 1 :]


@pytest.mark.parametrize("native", [True, False])
def test_the_session_of_the_readme_prints_what_it_shows(native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its order, on all of MNIST, on either kind of processor; training stops after two steps, so its figures are put aside."""
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: native)
    shown = {line: text if native else without_bf16(text) for line, text in consoles(README)}
    monkeypatch.chdir(tmp_path)

    def told(line: str, *more: str) -> str:
        (command,) = words(line)
        env = {"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"}
        return CliRunner().invoke(app, [*command, *more], prog_name="sana", env=env).output

    def measured(*starts: str) -> Callable[[str], str]:
        """Figures of these lines are of the machine, or of the moment."""
        return lambda line: figures_aside(line).replace("GB", "MB") if line.startswith(starts) else line

    same_text(told("sana inspect"), shown["sana inspect"], str)
    same_text(told("sana embed"), shown["sana embed"], measured("time"))
    few = ("--set", "train.steps=2")
    same_text(told("sana train --dry-run"), shown["sana train --dry-run"], measured("memory", "disk"))
    same_text(told("sana train", *few), shown["sana train"], figures_aside)
    sampled = 'sana sample "4 two 4 six"'
    same_text(told(sampled), shown[sampled], figures_aside)
    inspected = "sana inspect runs/quickstart/sample-step-003000.png"
    drawn = told(inspected.replace("003000", "000002"))
    same_text(drawn, shown[inspected], lambda line: re.sub(r"(step-)\d+|[0-9a-f]{64}", r"\1", line))
    (tmp_path / "mine.yaml").write_text(MINE)
    same_text(told("sana train --config mine.yaml"), shown["sana train --config mine.yaml"], str)


def test_the_changelog_keeps_its_form() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds


@pytest.fixture(scope="module")
def somebodys_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("folder"))


def prepare(folder: Path) -> Path:
    """A folder in which things can go wrong: a small dataset and run of grey digits, a config with typos, photos that are none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small = parse_config(SMALL, "small.yaml", ["run.dir=runs/small", "run.device=cpu"])
        embedded(small)
        for _ in train(TrainOptions(small)):
            pass
    (folder / "small.yaml").write_text(yaml.safe_dump(small.to_dict()))
    (folder / "mine.yaml").write_text(MINE)
    (folder / "photos").mkdir()
    (folder / "photos" / "notes.txt").write_text("no picture")
    save_file({"bert.weight": torch.zeros(2)}, folder / "bert.safetensors")
    return folder


def answer(command: list[str]) -> str:
    """What a user sees on stderr of a command that fails."""
    told = CliRunner().invoke(app, command, prog_name="sana", env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})
    assert told.exit_code, command
    assert "Traceback" not in told.output
    return told.stderr.strip()


@pytest.mark.parametrize(("line", "shown"), consoles(MISTAKES.read_text()))
def test_each_mistake_is_answered_as_the_docs_say(
    line: str, shown: str, somebodys_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = re.search(r"^typer==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    if shown.startswith("Usage:") and pinned is not None and pinned[1] != metadata.version("typer"):
        pytest.skip("other versions of typer put it in other words")
    monkeypatch.chdir(somebodys_folder)
    monkeypatch.setenv("HF_HOME", str(somebodys_folder / "hub"))
    (command,) = words(line)
    told = answer(command)
    assert "\n".join(text.rstrip() for text in told.splitlines()) == shown
