"""Small results of `sana`: a step folder without its run, pictures sampled from it, a judge."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import embedded, sampled, small_config, trained
from sana_cli.commands.sample import SampleSummary
from sana_cli.config.keys import Config
from sana_cli.dataset.reader import Dataset
from sana_cli.judging import judge
from sana_cli.runtime import files
from sana_cli.weights import checkpoint, configs


def perturb(folder: Path, smooth_in_time: bool = False) -> None:
    """Change the weights of a step folder so that captions matter, and update its manifest.

    With `smooth_in_time` its embedder ignores sinusoids that turn often between noise and data,
    as one does that was trained for long.
    """
    model = checkpoint.load_transformer(folder)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        if smooth_in_time:
            model.time_embed.emb.timestep_embedder.linear_1.weight.unflatten(1, (2, -1))[:, :, :90] = 0

    path = folder / "transformer" / configs.WEIGHTS
    files.write_tensors(path, model.state_dict(), {"format": "pt"})
    listing = files.read_sealed_json(folder / "manifest.json")["files"]
    listing[f"transformer/{configs.WEIGHTS}"] = {
        "bytes": path.stat().st_size,
        "sha256": files.sha256_file(path),
    }
    files.write_sealed_json(folder / "manifest.json", {"files": listing})


def step_folder(tmp_path_factory: pytest.TempPathFactory, *overrides: str) -> Path:
    """A step folder without its run; predicts velocities by default, as published models do."""
    folder = tmp_path_factory.mktemp("training")
    config = small_config(folder, *overrides)
    embedded(config)
    trained(config)
    alone = tmp_path_factory.mktemp("copied") / "mine"
    shutil.copytree(folder / "run" / "checkpoints" / "step-000004", alone)
    shutil.rmtree(folder)
    perturb(alone)
    return alone


def sample_predicting_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step folder that predicts samples, with a solver that diffusers does not have."""
    return step_folder(tmp_path_factory, "objective.prediction_type=sample", "sample.solver=heun")


def drawn(step: Path, *prompts: str, **options: Any) -> SampleSummary:
    """Sample pictures of prompts, beside the step folder unless an option says where."""
    if "separate" not in options:
        options.setdefault("out", step.parent / "out.png")
    return sampled(step, *prompts, **options)


def small_judge(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, judge.Judge]:
    """A config whose dataset has 600 digits, and the judge trained on them for six epochs."""
    monkeypatch.setattr(judge, "EPOCHS", 6)
    monkeypatch.setattr(judge, "BATCH", 32)
    config = small_config(
        folder, "data.image_size=32", "train.steps=2", "log.sample_every=2", "sample.prompts=null"
    )
    embedded(config, limit=600)
    *_, found = judge.load_or_train(Dataset(config.data.dir), None, torch.device("cpu"))
    assert isinstance(found, judge.Judge)
    return config, found
