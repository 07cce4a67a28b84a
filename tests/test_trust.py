"""What a sceptic would try: ways in, ways out, and everything that can fail around a run."""

import ast
import getpass
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SMALL, process_environment, small_config
from PIL import Image

from sana_cli.commands.embed import EmbedOptions, embed
from sana_cli.commands.sample import SampleOptions, sample
from sana_cli.commands.train import TrainOptions, train
from sana_cli.config.keys import Config
from sana_cli.dataset import layout
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.model import SanaTransformer
from sana_cli.runtime import files
from sana_cli.sampling import pictures
from sana_cli.weights import checkpoint

Sana = Callable[..., subprocess.CompletedProcess[str]]
SOURCES = sorted((REPOSITORY / "sana_cli").rglob("*.py"))

# --- no ways in -------------------------------------------------------------------------------------------------------


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Each call by its dotted name, as it is written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_source_can_run_what_it_reads(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {"pickle", "cPickle", "dill", "shelve", "marshal", "joblib", "cloudpickle", "subprocess"} & imported
    loads = 0
    for name, call in calls(tree):
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "input"), f"{name} in {path}"
        assert not re.fullmatch(r"yaml\.(load|load_all|full_load|unsafe_load)|(np|numpy|joblib|marshal|pickle)\.loads?", name), (
            name
        )
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        assert "shell" not in given
        remote = given.get("trust_remote_code")
        assert remote is None or (isinstance(remote, ast.Constant) and remote.value is False), f"{path}:{call.lineno}"
        if name == "torch.load":
            loads += 1
            safe = given["weights_only"]
            assert isinstance(safe, ast.Constant)
            assert safe.value is True
    assert loads == (1 if path.name == "pickles.py" else 0)


def test_the_network_is_reached_by_the_hub_alone() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "") or ""]
            for name in names if isinstance(node, ast.Import | ast.ImportFrom) else []:
                assert name.split(".")[0] not in ("requests", "httpx", "urllib", "http", "aiohttp", "ftplib"), f"{path}: {name}"


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/passwd", "a/../../b", "a\\b", "C:x", "a\0b", "", ".", "a//b"])
def test_no_list_of_files_leads_out_of_its_folder(name: str, config: Config, tmp_path: Path) -> None:
    index = files.read_sealed_json(config.data.dir / layout.INDEX)
    index["images"][0]["file"] = name
    files.write_sealed_json(config.data.dir / layout.INDEX, {key: value for key, value in index.items() if key != "sha256"})
    with pytest.raises(SanaError, match=r"images\.0\.file: must be the name of a file in"):
        Dataset(config.data.dir)
    folder = tmp_path / "step-000001"
    folder.mkdir()
    files.write_sealed_json(folder / checkpoint.MANIFEST, {"files": {name: {"bytes": 1, "sha256": ""}}})
    with pytest.raises(SanaError, match="must be the name of a file"):
        list(checkpoint.verify(folder))


# --- no ways out ------------------------------------------------------------------------------------------------------

CANARY = "hf_CANARYcanaryCANARYcanary1234567890"


def test_nothing_leaves_and_no_secret_stays(sana: Sana, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL + "run: {dir: runs/small, device: cpu}\n")
    secrets = {"HF_TOKEN": CANARY, "HUGGING_FACE_HUB_TOKEN": CANARY, "HF_HUB_OFFLINE": ""}
    told = []
    for arguments in (
        ("embed", "--config", "small.yaml", "--limit", "50"),
        ("train", "--config", "small.yaml"),
        ("sample", "4 two", "--trajectory", "four.gif"),
        ("sample", "4", "--separate", "single"),
        ("inspect", "runs/small", "--verify"),
        ("inspect", "--env"),
        ("train", "--config", "small.yaml", "--set", "train.lr=x"),
        ("sample", "4", "--checkpoint", "nowhere"),
    ):
        answer = sana(*arguments, **secrets)
        assert answer.returncode == (2 if "train.lr=x" in arguments else 1 if "nowhere" in arguments else 0), answer.stderr
        told.append(answer.stdout + answer.stderr)
    assert not (tmp_path / "site" / "attempts").exists(), "a connection was tried"
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "site" not in path.parts]
    assert len(written) > 20
    private = [CANARY, CANARY[3:20], str(tmp_path)]
    private += [name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 4]  # a short one is in any file
    for secret in private:
        assert not [path for path in written if secret.encode() in path.read_bytes()], secret
    assert CANARY not in "".join(told)
    assert "token         set" in told[5]


def test_a_crash_tells_no_secret(tmp_path: Path) -> None:
    script = "from sana_cli import cli\ndef broken(*a): token = 'hf_secret'; raise RuntimeError('bug')\ncli._config = broken\ncli.app(['embed'])"
    answer = subprocess.run(
        [sys.executable, "-c", script], env=process_environment(tmp_path) | {"HF_TOKEN": CANARY}, capture_output=True, text=True
    )
    assert answer.returncode == 1
    assert "RuntimeError" in answer.stderr
    assert "hf_secret'" not in answer.stderr.replace("token = 'hf_secret'; raise", "")  # the line is shown, its variables are not
    assert CANARY not in answer.stderr


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, or a skip where none can be had."""
    place = tmp_path / "small-disk"
    place.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True).returncode
    ):
        pytest.skip("no tmpfs can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=False)


def test_a_full_disk_leaves_what_was_whole(config: Config, full_disk: Path) -> None:
    run = full_disk / "run"
    cut = ("train.steps=60", "train.save_every=1", "train.keep=50", "train.sample_every=60")
    longer = small_config(config.data.dir.parent, f"run.dir={run}", *cut)
    with pytest.raises(SanaError, match="the disk is full") as caught:
        for _ in train(TrainOptions(longer)):
            pass
    assert "what was whole still is" in str(caught.value)
    folder, skipped = checkpoint.newest_step(run, hashes=True)
    assert folder is not None
    assert skipped == []
    assert checkpoint.load_transformer(folder)
    with pytest.raises(SanaError, match="the disk is full|needs at least"):
        for _ in embed(EmbedOptions(config, out=full_disk / "data", limit=20_000)):
            pass
    assert not (full_disk / "data").exists()
    _fill(full_disk)
    with pytest.raises(SanaError, match="the disk is full"):
        for _ in sample(SampleOptions(("4",) * 64, folder, device="cpu", out=full_disk / "grid.png")):
            pass
    assert not list(full_disk.glob("grid*"))


def _fill(place: Path) -> None:
    with (place / "fill").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            pass


def test_a_killed_sample_leaves_pictures_whole(config: Config, tmp_path: Path) -> None:
    *_, trained = train(TrainOptions(config))
    grid, film = tmp_path / "o.png", tmp_path / "o.gif"
    arguments = ["sample", *["4 two six one nine seven"] * 20, "--checkpoint", str(trained.checkpoint), "--steps", "20"]
    command = [sys.executable, "-m", "sana_cli", *arguments, "--out", str(grid), "--trajectory", str(film)]
    inside = 0
    for partial in ("o.png.partial", "o.gif.partial", "o.gif.partial"):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=process_environment(tmp_path), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while process.poll() is None and not (tmp_path / partial).exists():
            pass
        process.kill()
        process.wait()
        inside += (tmp_path / partial).exists()
        for path in (grid, film):
            if path.exists():
                with Image.open(path) as image:
                    image.seek(getattr(image, "n_frames", 1) - 1)
                    image.load()
    assert inside, "a kill was to hit a file being written"
    assert (
        subprocess.run(command, cwd=tmp_path, env=process_environment(tmp_path), capture_output=True, check=False).returncode == 0
    )
    assert not list(tmp_path.glob("*.partial"))


def test_files_that_vanish_are_one_message(config: Config) -> None:
    steps = train(TrainOptions(config))
    next(steps)
    shutil.rmtree(config.data.dir)  # memory-mapped: training goes on with what it has
    for _ in steps:
        pass
    with pytest.raises(SanaError, match="no dataset in"):
        next(iter(train(TrainOptions(config))))
    folder = checkpoint.newest_step(config.run.dir)[0]
    assert folder is not None
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(SanaError, match=r"config\.json is missing"):
        checkpoint.find_checkpoint(folder)


def test_two_processes_do_not_write_one_run_or_dataset(config: Config, sana: Sana, tmp_path: Path) -> None:
    steps = train(TrainOptions(config))
    next(steps), next(steps)  # has begun to write
    holder = rf"is being written by process {os.getpid()}"
    with pytest.raises(SanaError, match=holder):
        next(iter(train(TrainOptions(config, resume="auto"))))
    steps.close()
    assert not list(config.run.dir.parent.glob(".*.lock"))
    *_, done = train(TrainOptions(config, resume="auto"))
    assert done.steps == 4

    again = EmbedOptions(config, out=tmp_path / "other", limit=20)
    embedding = embed(again)
    next(embedding)
    with pytest.raises(SanaError, match=holder):
        next(iter(embed(again)))
    for _ in embedding:
        pass
    assert len(Dataset(tmp_path / "other")) == 20


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom sana_cli import files\n"
        f"with files.locked(Path({str(tmp_path / 'run')!r})): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=process_environment(tmp_path))
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    for _ in range(2):
        with pytest.raises(SanaError, match=f"written by process {other.pid}"), files.locked(tmp_path / "run"):
            pass
    with pytest.raises(SanaError, match=f"written by process {other.pid}"):
        files.check_unlocked(tmp_path / "run")
    other.send_signal(signal.SIGKILL)
    other.communicate()
    files.check_unlocked(tmp_path / "run")
    with files.locked(tmp_path / "run"):
        assert list(tmp_path.glob(".run.lock"))
    assert not list(tmp_path.glob(".run.lock"))


def test_sampling_halves_its_batches_when_memory_runs_out(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, summary = train(TrainOptions(config))
    prompts = SampleOptions(("4 two six one nine seven three",), summary.checkpoint, device="cpu")
    *_, plain = sample(prompts)
    forward, sizes = SanaTransformer.forward, []

    def small_device(self: SanaTransformer, hidden_states: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        sizes.append(len(hidden_states))
        if len(hidden_states) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, hidden_states, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(SanaTransformer, "forward", small_device)
    *_, halved = sample(prompts)
    assert torch.equal(halved.pixels, plain.pixels)
    assert max(sizes) == 14  # seven images, two branches
    assert sizes[-1] <= 4

    def none_fits(self: SanaTransformer, *_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(SanaTransformer, "forward", none_fits)
    with pytest.raises(SanaError, match="no room on cpu to draw a single image of 1 x 16 x 16"):
        for _ in sample(prompts):
            pass


def test_the_clock_may_jump(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(time, "time", lambda: 0.0)  # monotonic clocks alone tell durations
    *_, summary = train(TrainOptions(config))
    assert 0 < summary.seconds < 600
    for step in checkpoint.steps(config.run.dir):  # files from the future
        os.utime(step / checkpoint.MANIFEST, (4e9, 4e9))
    assert checkpoint.find_checkpoint(config.run.dir).name == "step-000004"


def test_two_hundred_flipped_bits_of_a_checkpoint_are_found(config: Config) -> None:
    """Of a dataset, `test_data_store.py` shows it."""
    *_, summary = train(TrainOptions(config))
    chance, paths = random.Random(0), sorted(path for path in summary.checkpoint.rglob("*") if path.is_file())
    for _ in range(200):
        path = chance.choice(paths)
        whole = path.read_bytes()
        at = chance.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << chance.randrange(8))]) + whole[at + 1 :])
        with pytest.raises(SanaError, match=path.name):
            list(checkpoint.verify(summary.checkpoint, hashes=True))
        path.write_bytes(whole)
    assert len(list(checkpoint.verify(summary.checkpoint, hashes=True))) == len(paths)


# --- pleasure ---------------------------------------------------------------------------------------------------------


def test_quiet_says_nothing_but_results_and_errors(sana: Sana, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL + "run: {dir: runs/small, device: cpu}\n")
    embedded = sana("embed", "--config", "small.yaml", "--limit", "50", "--quiet")
    assert (embedded.returncode, embedded.stderr) == (0, "")
    trained = sana("train", "--config", "small.yaml", "-q")
    assert (trained.stdout, trained.stderr) == ("runs/small/checkpoints/step-000004\n", "")
    drawn = sana("sample", "4", "-q")
    assert (drawn.stdout, drawn.stderr) == ("runs/small/sample-step-000004.png\n", "")
    assert sana("train", "--config", "small.yaml", "-q").stderr.startswith("error: runs/small has checkpoints already")


def test_the_schema_is_that_of_the_configs(sana: Sana) -> None:
    import jsonschema
    import yaml

    schema = json.loads(sana("inspect", "--schema").stdout)
    for path in (REPOSITORY / "configs").glob("*.yaml"):
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"train": {"lrr": 1}}, schema)


def test_pictures_speak_other_tools_language(config: Config, tmp_path: Path) -> None:
    *_, summary = train(TrainOptions(config))
    for _ in sample(SampleOptions(("4 two",), summary.checkpoint, device="cpu", out=tmp_path / "o.png")):
        pass
    text = Image.open(tmp_path / "o.png").text["parameters"]
    assert text.splitlines()[:2] == ["4", "two"]
    assert "Steps: 2, Sampler: dpm++, CFG scale: 2.5, Seed: 0, Model: run/step-000004" in text
    assert pictures.read_record(tmp_path / "o.png")["settings"]["steps"] == 2
    weights = summary.checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"Model hash: {digest[:10]}" in text
    assert pictures.read_record(tmp_path / "o.png")["weights_sha256"] == digest
    raw = hashlib.sha256((summary.checkpoint / "training" / "raw.safetensors").read_bytes()).hexdigest()
    assert checkpoint.weights_sha256(summary.checkpoint, "raw") == raw != digest
    assert checkpoint.weights_sha256(weights.parent) is None
    metadata = files.read_metadata(weights)
    assert metadata["modelspec.architecture"] == "sana"
    assert metadata["modelspec.title"] == "run step-000004"


def test_the_card_shows_the_newest_grid(config: Config) -> None:
    """Steps are saved before they are drawn: step 4's card has the grid of step 2, and step 2's none, as step 0 had learned nothing."""
    cut = small_config(config.data.dir.parent, "train.save_every=2", "train.sample_every=2", "train.keep=2")
    *_, summary = train(TrainOptions(cut))
    first, last = checkpoint.steps(summary.run)
    assert not (first / "samples.png").exists()
    assert "![" not in (first / "README.md").read_text()
    assert (last / "samples.png").read_bytes() == (summary.run / "samples" / "step-000002.png").read_bytes()
    assert "![Samples at step 2, by prompt](samples.png)" in (last / "README.md").read_text()
    assert "samples.png" in list(checkpoint.verify(last, hashes=True))
