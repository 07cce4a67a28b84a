"""The command line: help without torch, messages, exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, Sana, invoke, process_environment
from typer.testing import CliRunner

from sana_cli import console
from sana_cli.cli import app
from sana_cli.errors import SanaError


@pytest.mark.parametrize(
    "command", [(), ("embed",), ("train",), ("sample",), ("play",), ("inspect",), ("eval",)]
)
def test_help_needs_no_torch(command: tuple[str, ...], tmp_path: Path) -> None:
    script = (
        "import sys\nfrom sana_cli.cli import app\n"
        f"try: app([*{command!r}, '--help'])\nexcept SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'transformers', 'numpy', 'PIL', 'rich', 'starlette', 'uvicorn'} & set(sys.modules), 'heavy imports'"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script],
        env=process_environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "Usage" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_help_has_groups_and_examples_to_copy() -> None:
    shown = CliRunner().invoke(app, ["sample", "--help"], env={"COLUMNS": "80"}).stdout
    assert re.findall(r"^(\w+):$", shown, re.MULTILINE) == [
        "Arguments",
        "Images",
        "Sampling",
        "Files",
        "Model",
        "Options",
    ]
    assert "\n    sana sample '4 two 4 six'\n" in shown


def test_a_message_names_the_flag_of_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    problem = SanaError("`guidance_scale`: too large", "try `solver` euler, or another `other`")
    console.error(problem, {"guidance_scale": "--guidance-scale", "solver": "--solver"})
    assert (
        capsys.readouterr().err
        == "error: --guidance-scale: too large\ntry --solver euler, or another `other`\n"
    )


def test_inspect_alone_lists_the_shipped_configs(sana: Sana) -> None:
    table = sana("inspect").stdout
    assert "220,191,040" in table
    assert "29,948,224" in table
    document = json.loads(sana("inspect", "--json").stdout)
    assert {row["config"]: row["parameters"] for row in document["configs"]}["sana"] == 220_191_040
    assert "220,191,040" in sana("inspect", str(REPOSITORY / "configs" / "sana.yaml")).stdout


MISTAKES = [
    (
        ("train", "--config", "bad.yaml"),
        2,
        "error: bad.yaml:1: unknown key train.lrr; did you mean optim.lr?",
    ),
    (
        ("embed", "--config", "bad.yaml"),
        2,
        "error: bad.yaml:1: unknown key train.lrr; did you mean optim.lr?",
    ),
    (("inspect", "bad.yaml"), 2, "error: bad.yaml:1: unknown key train.lrr; did you mean optim.lr?"),
    (("train", "--config", "quikstart"), 2, "error: no config 'quikstart'; did you mean quickstart?"),
    (
        ("sample", "4", "--checkpoint", "runs"),
        1,
        "error: no checkpoint in runs: it has neither checkpoints/ nor",
    ),
    (("eval",), 1, "error: no dataset in data/quickstart: the judge learns from its images and labels"),
    (("embed", "--set", "text.encoder=./gemma"), 1, "error: text.encoder: no folder ./gemma"),
    (("inspect", "no/such.yaml"), 2, "error: no/such.yaml does not exist"),
    (("train", "--set", "run.device=cuda"), 1, "error: no dataset"),
    (("embed", "--limit", "0"), 2, "Invalid value"),
]
IN_PROCESSES = [
    (("train",), 1, "error: no dataset in data/quickstart"),
    (("trian",), 2, "Did you mean"),
    (
        ("embed", "--set", "text.encoder=google/gemma-2-2b-it"),
        1,
        "error: text.encoder: google/gemma-2-2b-it is not in the local cache",
    ),
]


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES)
def test_mistakes_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("train: {lrr: 1}")
    (tmp_path / "runs").mkdir()
    answer = invoke(*arguments, columns=200)
    assert (answer.exit_code, answer.stdout) == (code, "")
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(("arguments", "code", "message"), IN_PROCESSES)
def test_mistakes_are_one_message_of_a_process(
    sana: Sana, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    answer = sana(*arguments, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert (answer.returncode, answer.stdout) == (code, "")
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_version_and_module(sana: Sana) -> None:
    from sana_cli import __version__

    assert sana("--version").stdout == f"sana {__version__}\n"
