"""The pages, executed: commands, their output, mistakes; and every key, file and link."""

import ast
import inspect
import re
import runpy
import shlex
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from helpers import REPOSITORY, SMALL, embedded
from safetensors.torch import save_file
from typer.testing import CliRunner

from sana_cli import __version__
from sana_cli.cli import app
from sana_cli.commands.train import TrainOptions, train
from sana_cli.config.file import parse_config
from sana_cli.config.keys import Config
from sana_cli.config.renamed import RENAMED
from sana_cli.runtime import device

PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for folder in (REPOSITORY, REPOSITORY / "docs", REPOSITORY / "benchmarks")
    for path in sorted(folder.glob("*.md"))
}
MISTAKES = PAGES["docs/mistakes.md"]
MINE = "train:\n  steps: 500\n  lrr: 1e-3\nmodel:\n  patch_size: 5\n"  # a config with mistakes
COMMANDS = ("embed", "train", "distill", "sample", "play", "merge", "eval", "inspect")
PINNED_TYPER = re.search(r"^typer==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
OTHER_TYPER = PINNED_TYPER is not None and PINNED_TYPER[1] != metadata.version("typer")


def consoles(text: str) -> list[tuple[str, str]]:
    """The `$ ...` lines of console blocks, each with the output shown below it."""
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
    return {
        command: CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
        for command in COMMANDS
    }


SHOWN = [line for name, page in PAGES.items() if name != "docs/mistakes.md" for line, _ in consoles(page)]
HEADERS = [
    line
    for p in sorted((REPOSITORY / "configs").glob("*.yaml"))
    for line in re.findall(r"^#   (sana .*)", p.read_text(), re.M)
]
EXAMPLES = re.findall(r"^    (sana .*)", PAGES["docs/cli.md"], re.MULTILINE)  # of --help
ALL = [command for line in dict.fromkeys((*SHOWN, *HEADERS, *EXAMPLES)) for command in words(line)]


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
        assert has_key(section, key), override


def test_every_option_is_described(helps: dict[str, str]) -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        for name, parameter in inspect.signature(command.callback).parameters.items():
            if name != "context":
                assert parameter.annotation.__metadata__[0].help, f"{command.callback.__name__}: {name}"


def has_key(section: str, key: str) -> bool:
    return key in type(getattr(Config(), section)).model_fields


@pytest.mark.parametrize("page", PAGES)
def test_keys_and_make_targets_that_are_named_exist(page: str) -> None:
    text = PAGES[page]
    code = "\n".join(re.findall(r"`([^`\n]+)`", text))
    sections = "|".join(Config.model_fields)
    for section, key in re.findall(rf"(?<![\w./])({sections})\.(?!py\b)(\w+)", code):
        assert has_key(section, key), f"{section}.{key}"
    for old, new in RENAMED.items():
        assert not re.search(rf"(?<![\w.]){re.escape(old)}(?!\w)", text), f"{old} is {new} now"
    targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^\$ )make ([a-z]+)", text, re.MULTILINE)) <= {*targets}


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_that_are_named_exist(page: str) -> None:
    """Files by their path in the repository or the package; links with their anchors."""
    for name in re.findall(r"`([^`\n]+)`", PAGES[page]):
        if re.fullmatch(r"(benchmarks|configs|docs|examples|sana_cli|tests)/[\w./-]*|[\w/]+/\w+\.py", name):
            assert any((folder / name).exists() for folder in (REPOSITORY, REPOSITORY / "sana_cli")), name
    for name, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", PAGES[page]):
        path = (REPOSITORY / page).parent / name if name else REPOSITORY / page
        assert path.exists(), name
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{name}#{anchor}"


def test_the_tree_has_every_module() -> None:
    (tree,) = re.findall(r"```\nsana_cli/\n(.*?)```", PAGES["CONTRIBUTING.md"], re.DOTALL)
    listed, package = list[str](), ""
    for line in tree.splitlines():
        indent, name, meaning = re.fullmatch(r"( +)(\S+) +(\S.*)", line).groups()  # type: ignore[union-attr]
        assert len(indent) in (2, 4)
        assert meaning
        package = name if name.endswith("/") else package if len(indent) == 4 else ""
        listed.append(package if name == package else package + name)
    root = REPOSITORY / "sana_cli"
    inside = [path.relative_to(root) for path in root.rglob("*.py")]
    packages = [
        f"{path.parent.as_posix()}/"
        for path in inside
        if path.name == "__init__.py" and path.parent != Path()
    ]
    modules = [path.as_posix() for path in inside if path.name != "__init__.py" or path.parent == Path()]
    assert sorted(listed) == sorted([*packages, *modules])


def test_readme_is_short() -> None:
    assert len(PAGES["README.md"].encode()) <= 10_000


@pytest.mark.parametrize("page", PAGES)
def test_yaml_loads_and_imports_are_there(page: str) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", PAGES[page], re.DOTALL):
        parse_config(block, page)
    for block in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
        imports: list[ast.stmt] = [
            node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        exec(compile(ast.Module(imports, []), page, "exec"), {})


@pytest.mark.parametrize("page", ["configs", "cli"])
def test_pages_from_the_code_are_what_the_code_says(page: str) -> None:
    if page == "cli" and OTHER_TYPER:
        pytest.skip("other versions of typer put it in other words")
    made = runpy.run_path(str(REPOSITORY / "docs" / "generate.py"))
    assert PAGES[f"docs/{page}.md"] == made[f"{page}_page"](), "run `make docs` to update it"


def figures_aside(line: str) -> str:
    return re.sub(r"\d[\d,.:]*\d|\d", "#", line)


def without_bf16(shown: str) -> str:
    """Output of the pages, made with bf16 arithmetic, as a processor without it prints it."""
    text = shown.replace("bf16 (cpu has native bf16)", "fp32 (cpu lacks native bf16)")
    return re.sub(r"^(precision +)bf16$", r"\1fp32", text, flags=re.MULTILINE)


def same_text(printed: str, shown: str, put_aside: Callable[[str], str]) -> None:
    """Assert that the output is as shown, where `...` stands for any number of lines."""
    kept = (
        line.rstrip() for line in printed.strip().splitlines() if not re.match(r"[\w ]+ [\d,]+/[\d,]+", line)
    )
    lines = [put_aside(line) for line in kept]  # without progress lines
    wanted = [put_aside(line.rstrip()) for line in shown.splitlines()]
    if "..." not in wanted:
        assert lines == wanted
        return
    cut = wanted.index("...")
    assert lines[:cut] == wanted[:cut]
    assert lines[-len(wanted[cut + 1 :]) :] == wanted[cut + 1 :]


def measured(*starts: str) -> Callable[[str], str]:
    """Ignore figures in lines with these starts: they depend on the machine or the moment."""
    return lambda line: figures_aside(line).replace("GB", "MB") if line.startswith(starts) else line


def of_its_step(line: str) -> str:
    return re.sub(r"(step-)\d+|[0-9a-f]{64}", r"\1", line)


SESSION: dict[str, Callable[[str], str]] = {  # in this order, with what to ignore in each line
    "sana inspect": str,
    "sana embed": measured("time"),
    "sana train --dry-run": measured("memory", "disk"),
    "sana train": figures_aside,
    'sana sample "4 two 4 six"': figures_aside,
    "sana inspect runs/quickstart/sample-step-002000.png": of_its_step,
    "sana train --config mine.yaml": str,
}


@pytest.mark.parametrize("native", [True, False])
def test_the_session_of_the_pages_prints_what_they_show(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On all of MNIST. Training stops after two steps, so its figures are ignored."""
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: native)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(MINE)
    blocks = [
        block
        for name, page in PAGES.items()
        if name != "docs/mistakes.md"
        for block in consoles(page)
        if block[1]
    ]
    assert {line for line, _ in blocks} == {*SESSION}, "each shown command is in SESSION"
    for line, put_aside in SESSION.items():
        (command,) = words(line.replace("step-002000", "step-000002"))
        few = ("--set", "train.steps=2") if line == "sana train" else ()
        env = {"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"}
        printed = CliRunner().invoke(app, [*command, *few], prog_name="sana", env=env).output
        for text in [text for shown, text in blocks if shown == line]:
            same_text(printed, text if native else without_bf16(text), put_aside)


def test_the_changelog_keeps_its_form() -> None:
    text = PAGES["CHANGELOG.md"]
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d", headings[1])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds


@pytest.fixture(scope="module")
def somebodys_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("folder"))


def prepare(folder: Path) -> Path:
    """A folder for mistakes: a small dataset, its run, a config with typos, text as photos."""
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
    """The stderr of a command that fails."""
    printed = CliRunner().invoke(
        app, command, prog_name="sana", env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
    )
    assert printed.exit_code, command
    assert "Traceback" not in printed.output
    return printed.stderr.strip()


@pytest.mark.parametrize(("line", "shown"), consoles(MISTAKES))
def test_each_mistake_is_answered_as_the_docs_say(
    line: str, shown: str, somebodys_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shown.startswith("Usage:") and OTHER_TYPER:
        pytest.skip("other versions of typer put it in other words")
    monkeypatch.chdir(somebodys_folder)
    monkeypatch.setenv("HF_HOME", str(somebodys_folder / "hub"))
    (command,) = words(line)
    printed = answer(command)
    assert "\n".join(text.rstrip() for text in printed.splitlines()) == shown
