"""The weights that a run begins with: drawn from its seed, or those of another SANA, with or without adapters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_cli.adapters import attach, changes_from, matching, new_changes, scale_of
from sana_cli.config.keys import Architecture, Config
from sana_cli.dataset.match import differences
from sana_cli.errors import SanaError
from sana_cli.model import SanaTransformer, build, is_matrix
from sana_cli.runtime import hub
from sana_cli.runtime.records import Base
from sana_cli.sampling.pipeline import open_pipeline
from sana_cli.weights import checkpoint
from sana_cli.weights.adapters import is_adapter_file
from sana_cli.weights.reader import read_weights
from sana_cli.weights.stored import StoredWeights


def find_base_model(path: Path) -> Path:
    """What `checkpoint.find_checkpoint` finds for `train.init_from`.

    Raises:
        SanaError: there is none, or it has adapters alone.
    """
    try:
        source = checkpoint.find_checkpoint(path)
    except SanaError as error:
        first, *rest = str(error).splitlines()
        raise SanaError(f"train.init_from: {first}", *rest, exit_code=error.exit_code) from error
    if checkpoint.has_adapters_alone(source) or is_adapter_file(source):
        raise SanaError(
            f"train.init_from: {source} has adapters alone",
            "merge them into their model first, with: sana merge",
        )
    return source


def foreign_weights(path: Path, model: Architecture, prediction_type: str) -> StoredWeights:
    """The weights of another SANA, of any format, to start from (`train.init_from`).

    Raises:
        SanaError: it has another architecture, or its output or time mean something else; names each field.
    """
    source = find_base_model(path)
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
    return found


def with_base_recipe(config: Config) -> Config:
    """A config that leaves the shift of noise levels to its base, with that of the base's scheduler."""
    if config.objective.flow_shift is not None:
        return config
    assert config.train.init_from is not None, "the config is whole"
    base = open_pipeline(find_base_model(config.train.init_from))
    if base.unknown_scheduler is not None:
        first, *_ = str(base.unknown_scheduler).splitlines()
        raise SanaError(
            f"objective.flow_shift: null is that of the base's scheduler, which is not known: {first}",
            "say the shift: --set objective.flow_shift=3",
        )
    shift = base.sample.flow_shift
    sections: dict[str, Any] = {"objective": config.objective.model_copy(update={"flow_shift": shift})}
    if "flow_shift" not in config.sample.model_fields_set:
        sections["sample"] = config.sample.model_copy(update={"flow_shift": shift})
    return config.model_copy(update=sections)


def notes_on_base(config: Config, weights: StoredWeights) -> list[str]:
    """What a person should know of the model that a run begins with."""
    notes, where, shift = [], config.train.init_from, config.objective.flow_shift
    assert where is not None, "the run begins with it"
    if weights.dtypes == ("float16",):
        notes.append(
            f"train.init_from: {where} is stored in fp16, in which SANA overflows; if there is a bf16 one, take that"
        )
    own = open_pipeline(find_base_model(where), weights=weights).sample.flow_shift
    if own != shift:
        notes.append(
            f"objective.flow_shift: {shift:g}, and the scheduler of {where} has {own:g}; null takes that"
        )
    return notes


def base_record(path: Path, weights: StoredWeights) -> Base:
    """What checkpoints of adapters remember of the model that they are for."""
    name, source = hub.model_name(str(path)), find_base_model(path)
    if source != path and source.parent.name == checkpoint.CHECKPOINTS:
        name = f"{name}/{checkpoint.CHECKPOINTS}/{source.name}"  # of a run that may go on
    return Base(name=name, sha256=weights.sha256, origin=weights.origin)


def model_with(weights: Mapping[str, Tensor] | None, model: Architecture, config: Config) -> SanaTransformer:
    """A model with a copy of these weights in float32, or else the initial weights of `train.seed`."""
    made = build(model, config.train.seed if weights is None else None, config.train.init)
    if weights is not None:
        copies = {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}
        made.load_state_dict(copies, assign=True)
    return made


def adapted_model(
    base: Mapping[str, Tensor],
    adapters: Mapping[str, Tensor] | None,
    model: Architecture,
    config: Config,
    half: bool,
) -> SanaTransformer:
    """A frozen copy of a base's weights, with the adapters of a config on it: those given by name, or new ones.

    With `half` matrices are kept in bf16, which is what autocast would make of them: the result is the same.
    """
    made, wanted = build(model, seed=None), config.adapter

    def copied(name: str, weight: Tensor) -> Tensor:
        return weight.to(torch.bfloat16 if half and is_matrix(name, weight) else torch.float32, copy=True)

    made.load_state_dict({name: copied(name, weight) for name, weight in base.items()}, assign=True)
    made.requires_grad_(False)
    if adapters is None:
        generator = torch.Generator().manual_seed(config.train.seed)
        names, dora = matching(made, wanted.targets), wanted.kind == "dora"
        changes = new_changes(made, names, wanted.rank, scale_of(wanted), dora, generator)
    else:
        copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in adapters.items()}
        changes = changes_from(copies, scale_of(wanted))
    attach(made, changes, wanted.dropout)
    return made
