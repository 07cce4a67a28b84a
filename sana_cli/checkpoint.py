"""Weights in and out: step folders of our runs, which are diffusers folders too, and diffusers' own.

    checkpoints/step-000500/
      model_index.json, scheduler/, transformer/     the weights to use (EMA), as diffusers reads them
      sana.json, null_caption.safetensors            all that sampling needs besides weights
      README.md                                      a model card
      training/                                      raw weights, optimizer, counters: what resuming needs
      manifest.json                                  sizes and sha256, written last: no manifest, no checkpoint

A step folder is written in a sibling of `checkpoints/` and renamed. It holds no absolute path and works wherever it is
copied. No pickle is written or read.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from sana_cli import __version__, files
from sana_cli.config import ModelConfig, SampleConfig
from sana_cli.errors import SanaError
from sana_cli.model import SanaTransformer, build

WEIGHTS = "diffusion_pytorch_model.safetensors"
MANIFEST = "manifest.json"
RECORD = "sana.json"
NULL_CAPTION = "null_caption.safetensors"
RAW_WEIGHTS = Path("training/raw.safetensors")
OPTIMIZER = Path("training/optimizer.safetensors")
STATE = Path("training/state.json")
RECORD_VERSION = 1
DIFFUSERS_VERSION = "0.42.1"  # the version whose format the folders follow


# --- the transformer as diffusers describes it ------------------------------------------------------------------------


def diffusers_config(config: ModelConfig) -> dict[str, Any]:
    """`transformer/config.json` of a resolved model config: every field of diffusers' `SanaTransformer2DModel`."""
    derived = {
        "out_channels": config.in_channels,
        "cross_attention_dim": config.inner_dim,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": None,
        "guidance_embeds_scale": 0.1,
    }
    header = {"_class_name": "SanaTransformer2DModel", "_diffusers_version": DIFFUSERS_VERSION}
    return header | config.model_dump(mode="json") | derived


def model_config(content: Mapping[str, Any], where: Path) -> ModelConfig:
    """The model config in a diffusers `config.json`.

    Raises:
        SanaError: another class, a field with an impossible value, or one that asks for what is not implemented.
    """
    if content.get("_class_name", "SanaTransformer2DModel") != "SanaTransformer2DModel":
        raise SanaError(f"{where}: is a {content['_class_name']}, not a SanaTransformer2DModel")
    given = {key: value for key, value in content.items() if not key.startswith("_")}
    defaults = {  # diffusers' own, for what a config leaves out
        "in_channels": 32, "num_attention_heads": 70, "num_layers": 20, "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112, "caption_channels": 2304, "sample_size": 32, "patch_size": 1,
    }  # fmt: skip
    known = {key: given[key] for key in ModelConfig.model_fields if key in given}
    try:
        config = ModelConfig.model_validate(defaults | known)
    except ValidationError as error:
        first = error.errors()[0]
        raise SanaError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    supported = diffusers_config(config)
    for key, value in given.items():
        expected = supported.get(key, None)
        if key == "out_channels" and value is None:
            continue
        if value != expected and key != "guidance_embeds_scale":
            raise SanaError(f"{where}: {key} = {value!r} is not supported; this sana has {key} = {expected!r}")
    return config


def scheduler_config(sample: SampleConfig) -> dict[str, Any]:
    """`scheduler/scheduler_config.json`: the diffusers scheduler that is our solver."""
    if sample.solver == "euler":
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": DIFFUSERS_VERSION,
            "num_train_timesteps": 1000,
            "shift": sample.flow_shift,
        }
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        "flow_shift": sample.flow_shift,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "midpoint",
        "use_flow_sigmas": True,
    }


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
            _write(folder, checkpoint)
        shutil.rmtree(partial)  # with what a killed process may have left there
    except OSError as error:
        raise files.storage_error(error, doing) from error
    earlier = [folder for folder in steps(run) if step_of(folder) <= checkpoint.step]
    for old in earlier[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    for name in ("transformer", "scheduler", "training"):
        (folder / name).mkdir()
    scheduler = scheduler_config(checkpoint.sample)
    metadata = {
        "format": "pt",
        "made_by": f"sana {__version__}",
        "step": str(checkpoint.step),
        "config_sha256": checkpoint.config_sha256,
    }
    files.write_tensors(folder / "transformer" / WEIGHTS, checkpoint.weights, metadata)
    files.write_json(folder / "transformer" / "config.json", diffusers_config(checkpoint.model))
    files.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "SanaPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
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
    files.write_tensors(folder / RAW_WEIGHTS, checkpoint.raw_weights, metadata)
    files.write_tensors(folder / OPTIMIZER, checkpoint.optimizer)
    files.write_json(folder / STATE, checkpoint.state)
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)} for path in written
    }
    files.write_sealed_json(folder / MANIFEST, {"files": listing})


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
    listing = files.read_sealed_json(folder / MANIFEST)["files"]
    yield MANIFEST
    for name, entry in listing.items():
        files.check_size(folder / name, entry["bytes"])
        if hashes:
            files.check_hash(folder / name, entry["sha256"])
        yield name


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
    """The folder that a path means: a step folder, or the newest whole one of a run; None: of all runs under `runs/`.

    Raises:
        SanaError: there is none; says what there is, and how to get one.
    """
    if path is None:
        runs = [folder.parent for folder in Path("runs").glob("*/checkpoints")]
        where = "runs/*/checkpoints"
    elif (path / "checkpoints").is_dir():
        runs, where = [path], str(path)
    elif (path / "transformer").is_dir() or (path / "config.json").is_file():
        if (path / RECORD).is_file():  # one of ours, which knows what belongs to it
            for _ in verify(path):
                pass
        return path
    elif not path.exists():
        raise SanaError(f"no checkpoint at {path}: there is no such file or folder", *_known_runs())
    else:
        raise SanaError(
            f"no checkpoint in {path}: it has neither checkpoints/ nor transformer/",
            "give a run, one of its step folders, or a diffusers folder",
            *_known_runs(),
        )
    found, reasons = [], []
    for run in runs:
        folder, skipped = newest_step(run)
        reasons += skipped
        if folder is not None:
            found.append(folder)
    if not found:
        reason = f" ({'; '.join(reasons)})" if reasons else ""
        raise SanaError(f"no checkpoint in {where}{reason}", "train one with: sana train")
    return max(found, key=lambda folder: ((folder / MANIFEST).stat().st_mtime_ns, step_of(folder)))


def _known_runs() -> list[str]:
    runs = sorted(str(folder.parent) for folder in Path("runs").glob("*/checkpoints"))
    return [f"there are runs: {', '.join(runs)}"] if runs else []


# --- reading ----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        SanaError: it is missing or not JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SanaError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise SanaError(f"{path} holds no JSON object")
    return content


def read_record(folder: Path) -> dict[str, Any]:
    """`sana.json` of a step folder.

    Raises:
        SanaError: there is none, or it is of another version.
    """
    if not (folder / RECORD).is_file():
        raise SanaError(
            f"{folder} has no {RECORD}: these are weights alone, and how captions are encoded is not on record",
            "sample a checkpoint that sana trained, or fine-tune these weights with train.init_from",
        )
    record = read_json(folder / RECORD)
    if record.get("version") != RECORD_VERSION:
        raise SanaError(f"{folder / RECORD}: version {record.get('version')}; this sana reads version {RECORD_VERSION}")
    return record


def transformer_folder(folder: Path) -> Path:
    """Where `config.json` and the weights lie in a step folder or a diffusers folder."""
    inner = folder / "transformer"
    return inner if inner.is_dir() else folder


def read_model_config(folder: Path) -> ModelConfig:
    """The transformer's config in a step folder or a diffusers folder."""
    path = transformer_folder(folder) / "config.json"
    return model_config(read_json(path), path)


def check_tensors(found: Mapping[str, Tensor], model: SanaTransformer, where: Path, compared_to: str) -> None:
    """Refuse weights that are not exactly the model's.

    Raises:
        SanaError: listing what is missing, unexpected or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [f"unexpected: {name} {tuple(tensor.shape)}" for name, tensor in found.items() if name not in expected]
    problems += [
        f"{name} is {tuple(found[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise SanaError(f"{where} does not fit {compared_to}:", *(f"  {line}" for line in (*problems[:10], *more)))


def load_transformer(
    path: str | Path, weights: str = "ema", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> SanaTransformer:
    """The transformer of a run, a checkpoint or a diffusers folder, ready to call.

    Args:
        path: a run (its newest whole checkpoint), a step folder, or a diffusers folder.
        weights: "ema", or "raw" for those that the optimizer moves (step folders only).
        device: where it goes.
        dtype: of its parameters.

    Raises:
        SanaError: there is none, or its files are missing, damaged, or do not fit its config.
    """
    folder = find_checkpoint(Path(path))
    config = read_model_config(folder)
    if weights == "raw":
        file = folder / RAW_WEIGHTS
        if not file.is_file():
            raise SanaError(f"{folder} has no raw weights ({RAW_WEIGHTS})", "leave out --weights raw")
    else:
        file = transformer_folder(folder) / WEIGHTS
    tensors = files.read_tensors(file)
    model = build(config, seed=None)
    check_tensors(tensors, model, file, str(transformer_folder(folder) / "config.json"))
    model.load_state_dict({name: tensor.to(device, dtype, copy=True) for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def parameter_count(shapes: Iterable[Tensor]) -> int:
    """How many numbers."""
    return sum(tensor.numel() for tensor in shapes)
