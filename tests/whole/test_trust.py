"""Attacks and leaks that a sceptic would look for."""

import ast
import getpass
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import REPOSITORY, SMALL, Sana, invoke, process_environment

from sana_cli.config.keys import Config
from sana_cli.dataset import layout
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.runtime import files
from sana_cli.weights import checkpoint

SOURCES = sorted((REPOSITORY / "sana_cli").rglob("*.py"))

# --- attacks ------------------------------------------------------------------------------------------------


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Each call with its dotted name as written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def imported(tree: ast.AST) -> set[str]:
    """The modules that a source file imports."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


UNSAFE = {"pickle", "cPickle", "dill", "shelve", "marshal", "joblib", "cloudpickle", "subprocess"}
RUNNING = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "input")
LOADING = r"yaml\.(load|load_all|full_load|unsafe_load)|(np|numpy|joblib|marshal|pickle)\.loads?"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_source_can_run_what_it_reads(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not UNSAFE & imported(tree)
    loads = 0
    for name, call in calls(tree):
        assert name not in RUNNING, f"{name} in {path}"
        assert not re.fullmatch(LOADING, name), name
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        assert "shell" not in given
        remote = given.get("trust_remote_code")
        assert remote is None or (isinstance(remote, ast.Constant) and remote.value is False), (
            f"{path}:{call.lineno}"
        )
        if name == "torch.load":
            loads += 1
            safe = given["weights_only"]
            assert isinstance(safe, ast.Constant)
            assert safe.value is True
    assert loads == (1 if path.name == "pickles.py" else 0)


def test_the_network_is_reached_by_the_hub_alone() -> None:
    clients = {"requests", "httpx", "urllib", "http", "aiohttp", "ftplib"}
    for path in SOURCES:
        assert not clients & {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}, path


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/passwd", "a/../../b", "a\\b", "C:x", "a\0b", "", ".", "a//b"]
)
def test_no_list_of_files_leads_out_of_its_folder(name: str, config: Config, tmp_path: Path) -> None:
    index = files.read_sealed_json(config.data.dir / layout.INDEX)
    index["images"][0]["file"] = name
    files.write_sealed_json(
        config.data.dir / layout.INDEX, {key: value for key, value in index.items() if key != "sha256"}
    )
    with pytest.raises(SanaError, match=r"images\.0\.file: must be the name of a file in"):
        Dataset(config.data.dir)
    folder = tmp_path / "step-000001"
    folder.mkdir()
    files.write_sealed_json(folder / checkpoint.MANIFEST, {"files": {name: {"bytes": 1, "sha256": ""}}})
    with pytest.raises(SanaError, match="must be the name of a file"):
        list(checkpoint.verify(folder))


# --- leaks --------------------------------------------------------------------------------------------------

CANARY = "hf_CANARYcanaryCANARYcanary1234567890"
SECRETS = {"HF_TOKEN": CANARY, "HUGGING_FACE_HUB_TOKEN": CANARY, "HF_HUB_OFFLINE": ""}


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The addresses that this process tries to reach, with a token and without offline mode."""
    tried: list[object] = []

    def refuse(*address: object, **_: object) -> None:
        tried.append(address)
        raise RuntimeError("a socket was opened")

    for place, name in (
        (socket.socket, "connect"),
        (socket.socket, "connect_ex"),
        (socket, "getaddrinfo"),
        (socket, "create_connection"),
    ):
        monkeypatch.setattr(place, name, refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for key, value in SECRETS.items():
        monkeypatch.setenv(key, value)
    return tried


def test_nothing_leaves_and_no_secret_stays(
    sana: Sana, connections: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In three real processes; commands that write no weights run in this one."""
    (tmp_path / "small.yaml").write_text(SMALL + "run: {dir: runs/small, device: cpu}\n")
    output = ""
    for arguments in (
        ("embed", "--config", "small.yaml", "--limit", "50"),
        ("train", "--config", "small.yaml"),
        ("sample", "4 two", "--trajectory", "four.gif"),
    ):
        answer = sana(*arguments, **SECRETS)
        assert answer.returncode == 0, answer.stderr
        output += answer.stdout + answer.stderr
    assert not (tmp_path / "site" / "attempts").exists(), "a connection was tried"
    monkeypatch.chdir(tmp_path)
    for code, *words in (
        (0, "sample", "4", "--separate", "single"),
        (0, "inspect", "runs/small", "--verify"),
        (2, "train", "--config", "small.yaml", "--set", "optim.lr=x"),
        (1, "sample", "4", "--checkpoint", "nowhere"),
    ):
        here = invoke(*map(str, words))
        assert here.exit_code == code, here.output
        output += here.output
    environment = invoke("inspect", "--env").output
    assert "token         set" in environment
    assert CANARY not in output + environment
    assert connections == []
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "site" not in path.parts]
    assert len(written) > 20
    private = [CANARY, CANARY[3:20], str(tmp_path)]
    private += [
        name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 4
    ]  # any file may contain a short name
    for secret in private:
        assert not [path for path in written if secret.encode() in path.read_bytes()], secret


def test_a_crash_tells_no_secret(tmp_path: Path) -> None:
    script = (
        "from sana_cli import cli\nfrom sana_cli.cli.options import ConfigOptions\n"
        "def broken(*a): token = 'hf_secret'; raise RuntimeError('bug')\n"
        "ConfigOptions.load = broken\ncli.app(['embed'])"
    )
    environment = process_environment(tmp_path) | {"HF_TOKEN": CANARY}
    command = [sys.executable, "-c", script]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert "RuntimeError" in answer.stderr
    # the source line is shown, its variables are not
    assert "hf_secret'" not in answer.stderr.replace("token = 'hf_secret'; raise", "")
    assert CANARY not in answer.stderr
