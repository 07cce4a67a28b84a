"""`sana merge`: work adapters into their model, in float32, for programs that read whole models alone.

It prints nothing.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sana_cli import __version__
from sana_cli.adapters import Change, merged
from sana_cli.choices import Weights
from sana_cli.errors import SanaError
from sana_cli.runtime import files
from sana_cli.sampling.pipeline import INDEX
from sana_cli.weights import checkpoint, configs
from sana_cli.weights.applied import notes_on, read_applied
from sana_cli.weights.stored import StoredWeights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class MergeOptions:
    """What to merge, and where to."""

    checkpoint: Path  # a model, or a run of adapters
    out: Path
    adapter: tuple[str, ...] = ()  # FILE or FILE:SCALE, in this order
    weights: Weights = "ema"  # of a run of ours
    dtype: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class MergeStep:
    """Progress: tensors done."""

    done: int
    total: int


@dataclass(frozen=True)
class MergeSummary:
    """A merged model."""

    folder: Path
    kind: str  # checkpoint (ours), pipeline (diffusers) or transformer (alone)
    layers: int  # that changed
    update: float  # norm of what was added, over the norm of the layers
    lost: float  # share of the update's norm that rounding to `dtype` changed
    dtype: str
    notes: tuple[str, ...] = ()


def merge(options: MergeOptions) -> Iterator[MergeStep | MergeSummary]:
    """Merge; yields progress, and at the end a `MergeSummary`.

    A diffusers pipeline is copied with its other parts, a transformer alone becomes diffusers' folder of it, and a
    step folder of ours stays one. What is at `checkpoint` is not touched.

    Raises:
        SanaError: nothing to merge, something does not fit, `out` is there already, or the disk is full.
    """
    place = checkpoint.find_checkpoint(options.checkpoint)
    found, own = checkpoint.read_transformer(place, options.weights)
    applied = read_applied(options.adapter, found.model, options.weights)
    if not own and not applied:
        raise SanaError(
            f"`adapter`: {place} has no adapters of its own, and none is given",
            "give one: FILE or FILE:SCALE",
            exit_code=2,
        )
    if options.out.exists():
        raise SanaError(f"`out`: {options.out} is there already", "choose another folder", exit_code=2)
    if place.is_dir() and options.out.resolve().is_relative_to(place.resolve()):
        raise SanaError(f"`out`: {options.out} is inside {place}", "choose another folder", exit_code=2)
    notes = tuple(notes_on(applied, lambda: found.sha256))
    tensors, changed, squares = dict[str, Tensor](), 0, torch.zeros(3, dtype=torch.float64)
    layers = [*own, *(one.changes for one in applied)]
    for number, (name, tensor) in enumerate(found.tensors.items()):
        changes = [
            of[layer] for of in layers if (layer := name.removesuffix(".weight")) in of and layer != name
        ]
        made, sizes = _merged(tensor, changes, DTYPES[options.dtype])
        tensors[name] = made
        if changes:
            changed, squares = changed + 1, squares + sizes
        yield MergeStep(number + 1, len(found.tensors))
    record = [one.record for one in applied]
    if own:
        record = [{"name": place.name, "scale": 1.0, "weights": options.weights}, *record]
    try:
        kind = _write(place, options.out, found, tensors, record)
    except OSError as error:
        raise files.storage_error(error, f"writing {options.out}") from error
    weight, update, lost = squares.sqrt().tolist()
    yield MergeSummary(
        folder=options.out,
        kind=kind,
        layers=changed,
        update=update / weight if weight else 0.0,
        lost=lost / update if update else 0.0,
        dtype=options.dtype,
        notes=notes,
    )


def _merged(tensor: Tensor, changes: list[Change], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight with its changes, and three sums of squares: of the weight, the update, and what rounding did to it."""
    if not changes:
        return tensor.to(dtype, copy=True), torch.zeros(3, dtype=torch.float64)
    before = tensor.flatten(1).float()
    after = merged(before, changes)
    if not after.isfinite().all():
        raise SanaError("a merged weight is not finite", "choose smaller scales", exit_code=2)
    rounded = after.to(dtype)
    parts = (before, after - before, rounded.float() - after)
    return rounded.view(tensor.shape), torch.stack([part.double().square().sum() for part in parts])


def _write(
    place: Path, out: Path, found: StoredWeights, tensors: Mapping[str, Tensor], record: list[dict[str, Any]]
) -> str:
    """Write the merged model as what the checkpoint was; its kind."""
    if (place / checkpoint.RECORD).is_file():
        checkpoint.write_merged(place, out, tensors, record)
        return "checkpoint"
    model = configs.diffusers_config(found.model, found.prediction_type)
    if found.origin == "official" and not (place / INDEX).is_file():
        model |= {configs.ORIGIN: found.origin}  # whose text and noise levels it was trained with
    metadata = {"format": "pt", "made_by": f"sana {__version__}", "merged": json.dumps(record)}
    is_pipeline = (place / INDEX).is_file()
    with files.whole_folder(out, out.with_name(f".{out.name}.sana-partial")) as folder:
        transformer = folder
        if is_pipeline:
            _copy_others(place, folder)
            transformer = folder / "transformer"
            transformer.mkdir(exist_ok=True)
        files.write_json(transformer / "config.json", model)
        files.write_tensors(transformer / configs.WEIGHTS, tensors, metadata)
    return "pipeline" if is_pipeline else "transformer"


def _copy_others(pipeline: Path, folder: Path) -> None:
    """Copy a diffusers pipeline without its transformer and what hubs leave beside it."""
    for part in sorted(pipeline.iterdir()):
        if part.name == "transformer" or part.name.startswith("."):
            continue
        if part.is_dir():
            shutil.copytree(part, folder / part.name)
        else:
            shutil.copyfile(part, folder / part.name)
