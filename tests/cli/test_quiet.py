"""`--quiet`: results and errors only."""

from pathlib import Path

import pytest
from helpers import SMALL, Sana, invoke


def test_quiet_says_nothing_but_results_and_errors(
    sana: Sana, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command runs as a process, since libraries may print as they load."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SMALL + "run: {dir: runs/small, device: cpu}\n")
    embedded = invoke("embed", "--config", "small.yaml", "--limit", "50", "--quiet")
    assert (embedded.exit_code, embedded.stderr) == (0, "")
    trained = sana("train", "--config", "small.yaml", "-q")
    assert (trained.stdout, trained.stderr) == ("runs/small/checkpoints/step-000004\n", "")
    sampled = invoke("sample", "4", "-q")
    assert (sampled.stdout, sampled.stderr) == ("runs/small/sample-step-000004.png\n", "")
    again = invoke("train", "--config", "small.yaml", "-q")
    assert again.stderr.startswith("error: runs/small has checkpoints already")
    assert "--resume auto" in again.stderr  # the flag, not the setting's name in Python
