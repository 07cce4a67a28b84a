"""The weights that a run begins with: drawn from its seed, or those of another SANA."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sana_cli.config.keys import Architecture, Config
from sana_cli.dataset.match import differences
from sana_cli.errors import SanaError
from sana_cli.model import SanaTransformer, build
from sana_cli.weights import checkpoint
from sana_cli.weights.reader import read_weights


def foreign_weights(path: Path, model: Architecture, prediction_type: str) -> Mapping[str, Tensor]:
    """The weights of another SANA, of any format, to start from (`train.init_from`).

    Raises:
        SanaError: it has another architecture, or its output or time mean something else; names each field.
    """
    source = checkpoint.find_checkpoint(path)
    found = read_weights(checkpoint.transformer_path(source))
    free = {"dropout"} | ({"sample_size"} if model.interpolation_scale is None else set())
    wrong = [
        f"model.{key}: it has {theirs!r}, not {ours!r}"
        for key, theirs, ours in differences(found.model.model_dump(), model.model_dump())
        if key not in free
    ]
    if found.prediction_type != prediction_type:
        wrong.append(f"objective.prediction_type: it has {found.prediction_type!r}, not {prediction_type!r}")
    if wrong:
        raise SanaError(
            f"train.init_from: {path} is not the model of this config:", *wrong, "set these as it has them"
        )
    return found.tensors


def model_with(weights: Mapping[str, Tensor] | None, model: Architecture, config: Config) -> SanaTransformer:
    """A model with a copy of these weights in float32, or else the initial weights of `train.seed`."""
    made = build(model, config.train.seed if weights is None else None, config.train.init)
    if weights is not None:
        copies = {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}
        made.load_state_dict(copies, assign=True)
    return made
