"""Checkpoints of our runs: written, found again, checked and loaded. Step folders are diffusers folders too.

    checkpoints/step-000500/
      model_index.json, scheduler/, transformer/     the weights to use (EMA), as diffusers reads them
      sana.json, null_caption.safetensors            all that sampling needs besides weights
      README.md, samples.png                         a model card, and the newest grid that it shows
      training/                                      raw weights, optimizer, counters: what resuming needs
      manifest.json                                  sizes and sha256, written last: no manifest, no checkpoint

A step folder is written in a sibling of `checkpoints/` and renamed. It holds no absolute path and works wherever it is
copied. No pickle is written. Other people's files are read by `formats.py`; `load_transformer` takes any of them.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from sana_cli import __version__
from sana_cli.choices import Weights
from sana_cli.config.keys import ModelConfig, SampleConfig
from sana_cli.errors import SanaError
from sana_cli.model import SanaTransformer, build
from sana_cli.runtime import files, records
from sana_cli.weights import configs, strangers
from sana_cli.weights.reader import read_weights
from sana_cli.weights.stored import check_tensors

MANIFEST = "manifest.json"
SAMPLES = "samples.png"
RECORD = "sana.json"
NULL_CAPTION = "null_caption.safetensors"
RAW_WEIGHTS = Path("training/raw.safetensors")
OPTIMIZER = Path("training/optimizer.safetensors")
STATE = Path("training/state.json")
RECORD_VERSION = 1
SHIPPED = "shipped"  # what the checkpoint that comes with the package is called, where a path is asked for


def shipped() -> Path:
    """The step folder that comes with the package: the quickstart's weights in bf16, with nothing to resume from."""
    return Path(__file__).parents[1] / "assets" / "quickstart"


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """All that a step folder holds. Tensors may lie on any device; `optimizer` is flat, `state.name`."""

    step: int
    weights: Mapping[str, Tensor]  # the weights to use (EMA)
    raw_weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]  # counters and the config, as JSON
    model: ModelConfig
    sample: SampleConfig
    record: Mapping[str, Any]  # what becomes sana.json
    null_caption: Tensor
    card: str
    samples: Path | None  # a picture that the card shows
    config_sha256: str


def step_name(step: int) -> str:
    """`step-000500` for 500."""
    return f"step-{step:06d}"


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `checkpoints/step-NNNNNN` of a run, and only when it is whole delete all but the `keep` newest.

    Raises:
        SanaError: a weight is not finite; nothing is written. Or the disk is full or read-only; the others stay whole.
    """
    for name, tensor in (*checkpoint.weights.items(), *checkpoint.raw_weights.items()):
        if not tensor.isfinite().all():
            raise SanaError(f"step {checkpoint.step}: {name} is not finite, so no checkpoint was written")
    target, partial = run / "checkpoints" / step_name(checkpoint.step), run / "checkpoints.partial"
    doing = f"writing {target}"
    try:
        with files.whole_folder(target, partial / target.name) as folder:
            _write(folder, checkpoint, run.absolute().name)
        shutil.rmtree(partial)  # with what a killed process may have left there
    except OSError as error:
        raise files.storage_error(error, doing) from error
    earlier = [folder for folder in steps(run) if step_of(folder) <= checkpoint.step]
    for old in earlier[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _write(folder: Path, checkpoint: Checkpoint, run_name: str) -> None:
    for name in ("transformer", "scheduler", "training"):
        (folder / name).mkdir()
    scheduler = configs.scheduler_config(checkpoint.sample, checkpoint.model.prediction_type)
    model = configs.diffusers_config(checkpoint.model)
    metadata = {
        "format": "pt",
        "made_by": f"sana {__version__}",
        "step": str(checkpoint.step),
        "config_sha256": checkpoint.config_sha256,
        "model": json.dumps(model),  # so that the file can be read without the folder
        "encoder": str(checkpoint.record["encoder"]["encoder"]),
        "modelspec.sai_model_spec": "1.0.1",  # github.com/Stability-AI/ModelSpec: what model managers show
        "modelspec.architecture": "sana",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"{run_name} {step_name(checkpoint.step)}",
        "modelspec.resolution": "x".join(str(checkpoint.record["image"][side]) for side in ("width", "height")),
    }
    files.write_tensors(folder / "transformer" / configs.WEIGHTS, checkpoint.weights, metadata)
    files.write_json(folder / "transformer" / "config.json", model)
    files.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "SanaPipeline",
        "_diffusers_version": configs.DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": [None, None],
    }
    files.write_json(folder / "model_index.json", index)
    files.write_json(folder / RECORD, checkpoint.record)
    files.write_tensors(folder / NULL_CAPTION, {"states": checkpoint.null_caption})
    files.write_text(folder / "README.md", checkpoint.card)
    if checkpoint.samples is not None:
        shutil.copyfile(checkpoint.samples, folder / SAMPLES)
        files.sync(folder / SAMPLES)
    files.write_tensors(folder / RAW_WEIGHTS, checkpoint.raw_weights, metadata)
    files.write_tensors(folder / OPTIMIZER, checkpoint.optimizer)
    files.write_json(folder / STATE, checkpoint.state)
    _seal(folder)


def _seal(folder: Path) -> None:
    """Write the manifest: after it, and not before, this is a checkpoint."""
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)} for path in written
    }
    files.write_sealed_json(folder / MANIFEST, {"files": listing})


def release(source: Path, target: Path, sample: Mapping[str, Any], more: Mapping[str, Any]) -> Path:
    """A step folder to give away: its averaged weights in bf16, nothing to resume from, and `more` on its record.

    It is drawn by the settings of `sample`, those of its run where that has none. What its config says of model, training and
    sampling goes into the record, where else only `training/` would have it.
    """
    record, config = read_record(source), read_state(source)["config"]
    record["sample"] = config["sample"] = {**config["sample"], **sample}
    with files.whole_folder(target, target.with_name(target.name + ".partial")) as folder:
        for path in sorted(source.rglob("*")):
            name = path.relative_to(source)
            if path.is_file() and name.parts[0] != "training" and name.name not in (MANIFEST, RECORD, configs.WEIGHTS):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)
        weights = Path("transformer") / configs.WEIGHTS
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in files.read_tensors(source / weights).items()}
        files.write_tensors(folder / weights, tensors, files.read_metadata(source / weights))
        files.write_json(folder / RECORD, {**record, "config": config, **more})
        _seal(folder)
    return target


# --- finding ----------------------------------------------------------------------------------------------------------


def steps(run: Path) -> list[Path]:
    """The step folders of a run, oldest first, whole or not."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted(
        (path for path in folders if re.fullmatch(r"step-\d{6,}", path.name)), key=lambda path: int(path.name.partition("-")[2])
    )


def step_of(folder: Path) -> int:
    """The number in a step folder's name, or 0."""
    found = re.fullmatch(r"step-(\d+)", folder.name)
    return int(found[1]) if found else 0


def verify(folder: Path, hashes: bool = False) -> Iterator[str]:
    """Compare a step folder's files with its manifest: sizes, and with `hashes` every byte. Yields each name found whole.

    Raises:
        SanaError: it has no manifest, or a file is missing or damaged; names it.
    """
    if not (folder / MANIFEST).is_file():
        raise SanaError(f"{folder.name} lacks {MANIFEST}: it was not finished")
    listing = _listing(folder)
    yield MANIFEST
    for name, entry in listing.items():
        files.check_size(folder / name, entry["bytes"])
        if hashes:
            files.check_hash(folder / name, entry["sha256"])
        yield name


def _listing(folder: Path) -> dict[str, Any]:
    """The manifest's files, each with its size and hash."""
    manifest = records.checked(records.Manifest, files.read_sealed_json(folder / MANIFEST), folder / MANIFEST)
    return dict(manifest["files"])


def weights_sha256(folder: Path, which: str = "ema") -> str | None:
    """Of the weights file that `which` draws with, as the manifest of one of our step folders has it; None elsewhere."""
    if not (folder / MANIFEST).is_file():
        return None
    name = RAW_WEIGHTS if which == "raw" else Path("transformer") / configs.WEIGHTS
    entry = _listing(folder).get(name.as_posix())
    return None if entry is None else str(entry["sha256"])


def newest_step(run: Path, hashes: bool = False) -> tuple[Path | None, list[str]]:
    """The newest whole step folder of a run, and why newer ones were passed over."""
    skipped = []
    for folder in reversed(steps(run)):
        try:
            for _ in verify(folder, hashes):
                pass
        except SanaError as error:
            skipped.append(str(error))
            continue
        return folder, skipped
    return None, skipped


def find_checkpoint(path: Path | None) -> Path:
    """The checkpoint that a path means.

    It is a step folder, the newest whole one of a run (`None`: of all runs under `runs/`, or where there are none, the one that
    comes with the package, which `SHIPPED` names as well), or a folder or file of other people's, as it is.

    Raises:
        SanaError: there is none; says what there is, and how to get one.
    """
    if path is None:
        runs = [folder.parent for folder in Path("runs").glob("*/checkpoints")]
        where = "runs/*/checkpoints"
        if not any(steps(run) for run in runs):
            return shipped()
    elif str(path) == SHIPPED and not path.exists():
        return shipped()
    elif (path / "checkpoints").is_dir():
        runs, where = [path], str(path)
    elif path.is_file():
        return path
    elif (path / "transformer").is_dir() or (path / "config.json").is_file():
        if (path / RECORD).is_file():  # one of ours, which knows what belongs to it
            for _ in verify(path):
                pass
        return path
    elif not path.exists():
        if link := strangers.broken_link(path):
            raise SanaError(*link)
        raise SanaError(f"no checkpoint at {path}: there is no such file or folder", *_known_runs())
    elif other := strangers.other_folder(path):
        raise SanaError(*other)
    else:
        raise SanaError(
            f"no checkpoint in {path}: it has neither checkpoints/ nor transformer/",
            "give a run, one of its step folders, a diffusers folder, or a file of weights",
            *_known_runs(),
        )
    found, reasons = [], []
    for run in runs:
        folder, skipped = newest_step(run)
        reasons += skipped
        if folder is not None:
            found.append(folder)
    if not found:
        if path is not None and not reasons and (other := strangers.other_folder(path / "checkpoints")):
            raise SanaError(*other)  # other trainers' folders are called the same
        reason = f" ({'; '.join(reasons)})" if reasons else ""
        raise SanaError(f"no checkpoint in {where}{reason}", "train one with: sana train")
    return max(found, key=lambda folder: ((folder / MANIFEST).stat().st_mtime_ns, step_of(folder)))


def _known_runs() -> list[str]:
    runs = sorted(str(folder.parent) for folder in Path("runs").glob("*/checkpoints"))
    return [f"there are runs: {', '.join(runs)}"] if runs else []


# --- reading ----------------------------------------------------------------------------------------------------------


def read_record(folder: Path) -> dict[str, Any]:
    """`sana.json` of a step folder.

    Raises:
        SanaError: there is none, or it is of another version.
    """
    record = files.read_json(folder / RECORD)
    if record.get("version") != RECORD_VERSION:
        raise SanaError(f"{folder / RECORD}: version {record.get('version')}; this sana reads version {RECORD_VERSION}")
    return records.checked(records.Checkpoint, record, folder / RECORD)


def read_state(folder: Path) -> dict[str, Any]:
    """`training/state.json` of a step folder.

    Raises:
        SanaError: there is none, or it is damaged.
    """
    return records.checked(records.State, files.read_json(folder / STATE), folder / STATE)


def transformer_path(place: Path) -> Path:
    """Where the transformer lies in what `find_checkpoint` found: a folder with `config.json`, or a file."""
    inner = place / "transformer"
    return inner if inner.is_dir() else place


def load_transformer(
    path: str | Path, weights: Weights = "ema", device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32
) -> SanaTransformer:
    """The transformer of a run, a checkpoint, a diffusers folder or file, an official or a lesson file, ready to call.

    Args:
        path: a run (its newest whole checkpoint), a step folder, a diffusers pipeline or transformer, or a file.
        weights: "ema", or "raw" for those that the optimizer moves (step folders, and files of trainers that hold both).
        device: where it goes.
        dtype: of its parameters; None: as they are stored, but fp16, in which SANA overflows, becomes float32.

    Raises:
        SanaError: there is none, or its files are missing, damaged, or do not fit its config.
    """
    if weights not in get_args(Weights):
        raise SanaError(f"weights: {weights!r} is not one of {', '.join(get_args(Weights))}", exit_code=2)
    place = find_checkpoint(Path(path))
    ours = place.is_dir()  # or other people's folder, which has no raw weights
    found = read_weights(transformer_path(place), "ema" if ours else weights)
    if weights == "raw" and ours:
        file = place / RAW_WEIGHTS
        if not file.is_file():
            raise SanaError(f"{place} has no raw weights ({RAW_WEIGHTS})", "leave out --weights raw")
        found = replace(found, path=file, tensors=files.read_tensors(file))
        check_tensors(found.tensors, build(found.model, seed=None), file, found.compared_to)
    model = build(found.model, seed=None)

    def kept(stored: torch.dtype) -> torch.dtype:
        return dtype or (torch.bfloat16 if stored == torch.bfloat16 else torch.float32)

    state = {name: tensor.to(device, kept(tensor.dtype), copy=True) for name, tensor in found.tensors.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def parameter_count(shapes: Iterable[Tensor]) -> int:
    """How many numbers."""
    return sum(tensor.numel() for tensor in shapes)
