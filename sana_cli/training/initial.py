"""The weights that a run begins with: drawn from its seed, or those of another SANA, with or without adapters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from sana_cli.training.student import new_student, student_architecture
from sana_cli.weights import checkpoint
from sana_cli.weights.adapters import is_adapter_file
from sana_cli.weights.reader import read_weights
from sana_cli.weights.stored import StoredWeights

TEACHER = "distill.teacher"


def find_base_model(path: Path, key: str = "train.init_from") -> Path:
    """What `checkpoint.find_checkpoint` finds for a key of the config.

    Raises:
        SanaError: there is none, or it has adapters alone.
    """
    try:
        source = checkpoint.find_checkpoint(path)
    except SanaError as error:
        first, *rest = str(error).splitlines()
        raise SanaError(f"{key}: {first}", *rest, exit_code=error.exit_code) from error
    if checkpoint.has_adapters_alone(source) or is_adapter_file(source):
        raise SanaError(
            f"{key}: {source} has adapters alone",
            "merge them into their model first, with: sana merge",
        )
    return source


def foreign_weights(path: Path, model: Architecture, prediction_type: str) -> StoredWeights:
    """The weights of another SANA, of any format, to start from (`train.init_from`).

    Raises:
        SanaError: it has another architecture, or its output or time mean something else; names each field.
    """
    found = read_weights(checkpoint.transformer_path(find_base_model(path)))
    _check_is(found, found.model, model, prediction_type, f"train.init_from: {path}")
    return found


def _check_is(
    found: StoredWeights, theirs: Architecture, ours: Architecture, prediction_type: str, what: str
) -> None:
    """Refuse weights whose architecture, as `theirs`, or prediction is not the config's."""
    free = {"dropout"} | ({"sample_size"} if ours.interpolation_scale is None else set())
    wrong = [
        f"model.{key}: it has {its!r}, not {own!r}"
        for key, its, own in differences(theirs.model_dump(), ours.model_dump())
        if key not in free
    ]
    if found.prediction_type != prediction_type:
        wrong.append(f"objective.prediction_type: it has {found.prediction_type!r}, not {prediction_type!r}")
    if wrong:
        raise SanaError(f"{what} is not the model of this config:", *wrong, "set these as it has them")


def read_teacher(path: Path) -> StoredWeights:
    """The weights of a teacher, of any format (`distill.teacher`).

    Raises:
        SanaError: there is none, or it draws in few steps itself.
    """
    source = find_base_model(path, TEACHER)
    found = read_weights(checkpoint.transformer_path(source))
    if found.model.guidance_embeds:
        raise SanaError(
            f"{TEACHER}: {path} is itself a few-step model, without the null branch that guidance needs",
            "give the model that it was distilled from",
        )
    return found


def check_student(config: Config, teacher: StoredWeights, model: Architecture) -> None:
    """Refuse a teacher that is of another architecture than the student, or predicts otherwise."""
    theirs = student_architecture(teacher.model, model.guidance_embeds_scale)
    _check_is(
        teacher, theirs, model, config.objective.prediction_type, f"{TEACHER}: {config.distill.teacher}"
    )


def frozen_model(weights: Mapping[str, Tensor], model: Architecture, half: bool) -> SanaTransformer:
    """A frozen copy of weights, of which matrices are bf16 with `half`: what autocast would make of them."""
    made = build(model, seed=None)

    def copied(name: str, weight: Tensor) -> Tensor:
        return weight.to(torch.bfloat16 if half and is_matrix(name, weight) else torch.float32, copy=True)

    made.load_state_dict({name: copied(name, weight) for name, weight in weights.items()}, assign=True)
    return made.requires_grad_(False)


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


def base_record(path: Path, weights: StoredWeights, key: str = "train.init_from") -> Base:
    """What checkpoints remember of the model that their adapters are for, or that taught them."""
    name, source = hub.model_name(str(path)), find_base_model(path, key)
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

    With `half` matrices are kept in bf16: the result is the same.
    """
    made, wanted = frozen_model(base, model, half), config.adapter
    if adapters is None:
        generator = torch.Generator().manual_seed(config.train.seed)
        names, dora = matching(made, wanted.targets), wanted.kind == "dora"
        changes = new_changes(made, names, wanted.rank, scale_of(wanted), dora, generator)
    else:
        copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in adapters.items()}
        changes = changes_from(copies, scale_of(wanted))
    attach(made, changes, wanted.dropout)
    return made


# --- how a run begins, or goes on -------------------------------------------------------------


@dataclass(frozen=True)
class Beginning:
    """The models of a run: the one that is trained, on the CPU, and what it comes from."""

    transformer: SanaTransformer
    teacher: SanaTransformer | None  # of a distillation
    origin: Callable[[], Base | None]  # the base of adapters or the teacher, with its hash
    notes: list[str]  # what a person should know


def begin(
    config: Config, model: Architecture, weights: Mapping[str, Tensor] | None, saved: Path | None, half: bool
) -> Beginning:
    """The models of a run that begins, or goes on from the step folder `saved` with its `weights`.

    With `half` the matrices of models that do not move are bf16.

    Raises:
        SanaError: the base or the teacher is missing, does not fit, or is not the one that the run began with.
    """
    own = None if saved is None else checkpoint.read_record(saved)
    if config.distill.on:
        return _distilled(config, model, weights, None if own is None else own.teacher, half, saved)
    init_from = config.train.init_from
    if init_from is None or (saved is not None and not config.adapter.on):
        return Beginning(model_with(weights, model, config), None, lambda: None, [])
    base = None if own is None else own.base
    init_from = init_from if base is None else checkpoint.step_of_base(init_from, base)
    given = foreign_weights(init_from, model, config.objective.prediction_type)
    notes = notes_on_base(config, given)
    if not config.adapter.on:
        return Beginning(model_with(given.tensors, model, config), None, lambda: None, notes)
    if saved is not None and base is None:
        raise SanaError(f"{saved} has no adapters to go on with", "start another run: --set run.dir=DIR")
    transformer = adapted_model(given.tensors, weights, model, config, half)
    return Beginning(transformer, None, lambda: _origin(init_from, given, base, saved), notes)


def _origin(
    path: Path, found: StoredWeights, recorded: Base | None, saved: Path | None, key: str = "train.init_from"
) -> Base:
    """What a run comes from; of one that goes on, what it began with.

    Raises:
        SanaError: that is another model.
    """
    if recorded is None:
        return base_record(path, found, key)
    how = "was distilled from" if key == TEACHER else "was trained on"
    checkpoint.check_base(found, recorded, path, str(saved), how)
    return recorded


def _distilled(
    config: Config,
    model: Architecture,
    weights: Mapping[str, Tensor] | None,
    recorded: Base | None,
    half: bool,
    saved: Path | None,
) -> Beginning:
    path = config.distill.teacher
    assert path is not None, "distillation is on"
    if saved is not None and recorded is None:
        raise SanaError(f"{saved} is not a student to go on with", "start another run: --set run.dir=DIR")
    path = path if recorded is None else checkpoint.step_of_base(path, recorded)
    found, notes = read_teacher(path), list[str]()
    check_student(config, found, model)
    if weights is None:
        scale, guidance = found.model.timestep_scale, config.distill.guidance
        student, error = new_student(found.tensors, model, scale, guidance)
        notes.append(
            f"the student begins as {path}; its new time embedding is {error:.1%} off, which training makes up for"
        )
        if config.distill.method == "scm" and found.prediction_type == "sample":
            notes.append(
                "distill.method: scm is for teachers that predict the velocity; from this one it collapses"
            )
    else:
        student = model_with(weights, model, config)
    teacher = frozen_model(found.tensors, found.model, half)
    return Beginning(student, teacher, lambda: _origin(path, found, recorded, saved, TEACHER), notes)
