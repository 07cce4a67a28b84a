"""The full quickstart: a judge reads its digits as prompted. Minutes, by `make quality`.

The judge is that of `sana eval`, trained only on MNIST.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import process_environment


@pytest.mark.quality
def test_quickstart_draws_what_it_is_asked_for(tmp_path: Path) -> None:
    environment = process_environment(tmp_path) | {"OMP_NUM_THREADS": "2"}

    def sana(*arguments: str) -> str:
        command = [sys.executable, "-m", "sana_cli", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    start = time.perf_counter()
    sana("embed")
    sana("train")
    print(f"\nembed and train: {time.perf_counter() - start:.0f} s")
    for options in ((), ("--solver", "euler", "--steps", "20", "--flow-shift", "1", "--guidance-scale", "2")):
        found = json.loads(sana("eval", "--images", "2000", *options, "--json"))
        (result,) = found["results"]
        print(
            f"{options or 'defaults'}: {result['accuracy']['accuracy']:.1%} as prompted, Fréchet distance "
            f"{result['frechet_distance']:.2f}, of real images {result['real_frechet_distance']:.2f}"
        )
        assert found["judge"]["accuracy"] >= 0.995
        assert result["accuracy"]["accuracy"] >= 0.96
        assert result["frechet_distance"] < 10
