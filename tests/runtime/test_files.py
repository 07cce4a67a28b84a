"""Locks: one process writes a folder, and a lock ends with its process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import close, process_environment, trained

from sana_cli.commands.embed import EmbedOptions, embed
from sana_cli.commands.train import TrainOptions, train
from sana_cli.config.keys import Config
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.runtime import files


def test_two_do_not_write_one_run_or_dataset(config: Config, tmp_path: Path) -> None:
    steps = train(TrainOptions(config))
    next(steps), next(steps)  # it has started to write
    holder = rf"is being written by process {os.getpid()}"
    with pytest.raises(SanaError, match=holder):
        next(iter(train(TrainOptions(config, resume="auto"))))
    close(steps)
    assert not list(config.run.dir.parent.glob(".*.lock"))
    assert trained(config, resume="auto").steps == 4

    options = EmbedOptions(config, out=tmp_path / "other", limit=20)
    embedding = embed(options)
    next(embedding)
    with pytest.raises(SanaError, match=holder):
        next(iter(embed(options)))
    list(embedding)
    assert len(Dataset(tmp_path / "other")) == 20


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    script = (
        "import time\nfrom pathlib import Path\nfrom sana_cli.runtime import files\n"
        f"with files.locked(Path({str(tmp_path / 'run')!r})): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=process_environment(tmp_path)
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    for _ in range(2):
        with (
            pytest.raises(SanaError, match=f"written by process {other.pid}"),
            files.locked(tmp_path / "run"),
        ):
            pass
    with pytest.raises(SanaError, match=f"written by process {other.pid}"):
        files.check_unlocked(tmp_path / "run")
    other.send_signal(signal.SIGKILL)
    other.communicate()
    files.check_unlocked(tmp_path / "run")
    with files.locked(tmp_path / "run"):
        assert list(tmp_path.glob(".run.lock"))
    assert not list(tmp_path.glob(".run.lock"))
