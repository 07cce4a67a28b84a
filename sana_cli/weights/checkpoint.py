"""Checkpoints of our runs: write, find, verify and load them.

A step folder is a diffusers folder too.

    checkpoints/step-000500/
      model_index.json, scheduler/, transformer/   the weights to use (EMA), in diffusers' form
      sana.json, null_caption.safetensors          what sampling needs besides weights
      README.md, samples.png                       a model card, and the grid that it shows
      training/                                    for resuming: raw weights, optimizer, state
      manifest.json                                sizes and sha256; written last, so a folder
                                                   without one is no checkpoint

Where adapters alone were trained, there is no model_index.json and transformer/ has its config
alone: pytorch_lora_weights.safetensors has the adapters, in diffusers' form, and sana.json says
whose weights they are for.

A step folder is written in a sibling of `checkpoints/` and renamed. It has no absolute path and
can be copied anywhere. No pickle is written. `load_transformer` also loads other people's
files, which `reader.py` reads. This module knows no trainer and no sampler.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from sana_cli import __version__
from sana_cli.adapters import (
    Change,
    attach,
    changes_from,
    empty_changes,
    matching,
    named_parameters,
    scale_of,
)
from sana_cli.choices import PredictionType, Weights
from sana_cli.config.file import RUN_CONFIG, load_run_config
from sana_cli.config.keys import AdapterConfig, Architecture, Config, SampleConfig
from sana_cli.config.renamed import in_new_names
from sana_cli.errors import SanaError
from sana_cli.model import SanaTransformer, build, is_matrix
from sana_cli.runtime import files, records
from sana_cli.runtime.device import has_native_bf16
from sana_cli.runtime.records import Base, CheckpointRecord, State
from sana_cli.weights import adapters, card, configs, strangers
from sana_cli.weights.reader import read_weights
from sana_cli.weights.stored import StoredWeights, check_tensors

MANIFEST = "manifest.json"
CARD = "README.md"
RECORD = "sana.json"
NULL_CAPTION = "null_caption.safetensors"
RAW_WEIGHTS = Path("training/raw.safetensors")
AVERAGE = Path("training/average.safetensors")  # of adapters, by the names of their parameters
OPTIMIZER = Path("training/optimizer.safetensors")
OBJECTIVE = Path("training/objective.safetensors")
STATE = Path("training/state.json")
CHECKPOINTS = "checkpoints"
RECORD_VERSION = 1
TEXT_SETTINGS = "text"  # in the metadata of an adapter: how captions were encoded, as JSON
TEXT_KEYS = ("instruction", "lowercase", "template", "max_length", "layer")
MOST_EXAMPLES = 20  # captions on a record
ASSETS = Path(__file__).parents[1] / "assets"
STUDENT_SUFFIX = "-distilled"  # of the names of students, after their teachers'
SHIPPED = "shipped"  # in place of a path, as `SHIPPED:NAME`: a checkpoint that comes with the package


def shipped(name: str = "quickstart") -> Path:
    """A step folder in the package: a config's weights in bf16, without training/."""
    return ASSETS / name


def shipped_names() -> list[str]:
    """The names of the step folders in the package."""
    return sorted(manifest.parent.name for manifest in ASSETS.glob(f"*/{MANIFEST}"))


def is_shipped(folder: Path) -> bool:
    """Whether this is a step folder in the package."""
    return folder.parent == ASSETS


def config_of_shipped(folder: Path) -> str:
    """The config that the data of a step folder in the package come from: a student's is that of its teacher."""
    return folder.name.removesuffix(STUDENT_SUFFIX)


def named_shipped(path: Path) -> Path | None:
    """The step folder in the package that `shipped` or `shipped:NAME` names.

    None: it names none. A file or folder that is really called like that comes first.

    Raises:
        SanaError: the package has none of this name; lists the names.
    """
    prefix, colon, name = str(path).partition(":")
    if prefix != SHIPPED or path.exists():
        return None
    if not colon:
        return shipped()
    names = shipped_names()
    if name not in names:
        raise SanaError(
            f"no checkpoint {path}: none of this name comes with sana",
            f"there are: {', '.join(f'{SHIPPED}:{known}' for known in names)}",
        )
    return shipped(name)


# --- writing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """The content of a step folder. Tensors may be on any device."""

    model: Architecture
    prediction_type: PredictionType
    sample: SampleConfig
    record: CheckpointRecord
    state: State
    weights: Mapping[str, Tensor]  # the weights to use: the average, if there is one
    raw_weights: Mapping[str, Tensor] | None  # those that the optimizer updates, if they differ
    adapter_scale: float | None  # None: the weights are a whole transformer's; else its adapters'
    optimizer: Mapping[str, Tensor]  # flat, as `state.name`
    objective: Mapping[str, Tensor]  # what the objective learned beside the transformer
    null_caption: Tensor  # (L, D)
    card: str
    samples: Path | None  # a picture for the card
    config_sha256: str

    @property
    def step(self) -> int:
        """The step after which it was taken."""
        return self.record.step


def step_name(step: int) -> str:
    """`step-000500` for 500."""
    return f"step-{step:06d}"


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `checkpoints/step-NNNNNN` of a run, then delete all but the `keep` newest.

    Raises:
        SanaError: a weight is not finite, and nothing is written. Or the disk is full or
            read-only; earlier checkpoints stay whole.
    """
    for name, tensor in (*checkpoint.weights.items(), *(checkpoint.raw_weights or {}).items()):
        if not tensor.isfinite().all():
            raise SanaError(f"step {checkpoint.step}: {name} is not finite, so no checkpoint was written")
    target, partial = run / "checkpoints" / step_name(checkpoint.step), run / "checkpoints.partial"
    doing = f"writing {target}"
    try:
        with files.whole_folder(target, partial / target.name) as folder:
            _write(folder, checkpoint, run.absolute().name)
        shutil.rmtree(partial)  # and what a killed process may have left in it
    except OSError as error:
        raise files.storage_error(error, doing) from error
    earlier = [folder for folder in steps(run) if step_of(folder) <= checkpoint.step]
    for old in earlier[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _write(folder: Path, checkpoint: Checkpoint, run_name: str) -> None:
    metadata = _metadata(checkpoint, run_name)
    _write_pipeline(folder, checkpoint, metadata)
    files.write_json(folder / RECORD, checkpoint.record.as_json())
    files.write_tensors(folder / NULL_CAPTION, {"states": checkpoint.null_caption})
    files.write_text(folder / CARD, checkpoint.card)
    if checkpoint.samples is not None:
        shutil.copyfile(checkpoint.samples, folder / card.SAMPLES)
        files.sync(folder / card.SAMPLES)
    (folder / "training").mkdir()
    raw, average = checkpoint.raw_weights, None
    if checkpoint.adapter_scale is not None:
        raw, average = raw or checkpoint.weights, None if raw is None else checkpoint.weights
    for name, tensors in ((RAW_WEIGHTS, raw), (AVERAGE, average)):
        if tensors is not None:
            files.write_tensors(folder / name, tensors, metadata)
    if checkpoint.objective:
        files.write_tensors(folder / OBJECTIVE, checkpoint.objective)
    files.write_tensors(folder / OPTIMIZER, checkpoint.optimizer)
    files.write_json(folder / STATE, checkpoint.state.as_json())
    _seal(folder)


def _metadata(checkpoint: Checkpoint, run_name: str) -> dict[str, str]:
    """The metadata of a weights file."""
    record, model = checkpoint.record, configs.diffusers_config(checkpoint.model, checkpoint.prediction_type)
    return {
        "format": "pt",
        "made_by": f"sana {__version__}",
        "step": str(checkpoint.step),
        "config_sha256": checkpoint.config_sha256,
        "model": json.dumps(model),  # for the file without its folder
        "encoder": record.encoder.encoder,
        "modelspec.sai_model_spec": "1.0.1",  # github.com/Stability-AI/ModelSpec: what model managers show
        "modelspec.architecture": "sana" if record.base is None else "sana/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"{run_name} {step_name(checkpoint.step)}",
        "modelspec.resolution": f"{record.image.width}x{record.image.height}",
    } | (_of_adapters(record, record.base) if record.base is not None else {})


def _of_adapters(record: CheckpointRecord, base: Base) -> dict[str, str]:
    """What the metadata of adapters say besides: whose they are, and how captions were encoded."""
    encoder = record.encoder.as_json()
    text = {key: encoder[key] for key in TEXT_KEYS if key in encoder}
    return {"base": base.name, "base_sha256": base.sha256, TEXT_SETTINGS: json.dumps(text)}


def _write_pipeline(folder: Path, checkpoint: Checkpoint, metadata: Mapping[str, str]) -> None:
    """Write the parts that diffusers reads: the transformer, the scheduler and their index."""
    for name in ("transformer", "scheduler"):
        (folder / name).mkdir()
    model = configs.diffusers_config(checkpoint.model, checkpoint.prediction_type)
    scheduler = configs.scheduler_config(checkpoint.sample, checkpoint.prediction_type)
    files.write_json(folder / "transformer" / "config.json", model)
    files.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if checkpoint.adapter_scale is not None:
        changes = changes_from(checkpoint.weights, checkpoint.adapter_scale)
        adapters.write_adapter(
            folder / card.ADAPTER_WEIGHTS,
            changes,
            adapters.shapes_of(build(checkpoint.model, seed=None)),
            metadata,
        )
        return
    files.write_tensors(folder / "transformer" / configs.WEIGHTS, checkpoint.weights, metadata)
    _write_index(folder, scheduler["_class_name"])


def _write_index(folder: Path, scheduler: str) -> None:
    """Write the index of a diffusers pipeline whose transformer and scheduler are there."""
    index = {
        "_class_name": "SanaSprintPipeline" if scheduler == "SCMScheduler" else "SanaPipeline",
        "_diffusers_version": configs.DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": [None, None],
    }
    files.write_json(folder / "model_index.json", index)


def _seal(folder: Path) -> None:
    """Write the manifest, which makes the folder a checkpoint."""
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
        for path in written
    }
    files.write_sealed_json(folder / MANIFEST, {"files": listing})


def _copy(source: Path, folder: Path, but: Sequence[str]) -> None:
    """Copy a step folder's files without training/ and those of these names."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_file() and name.parts[0] != "training" and name.name not in but:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def release(source: Path, target: Path, sample: Mapping[str, Any], more: Mapping[str, Any]) -> Path:
    """Copy a step folder to give away: averaged weights in bf16, without training/.

    Its record gets the run's config, which otherwise only training/ has.

    Args:
        source: the step folder.
        target: the new one.
        sample: sampling settings that replace the run's.
        more: further fields of the record.
    """
    record, config = read_record(source), read_state(source).config
    settings = {**config["sample"], **sample}
    given = record.as_json() | {"sample": settings, "config": config | {"sample": settings}, **more}
    with files.whole_folder(target, target.with_name(target.name + ".partial")) as folder:
        _copy(source, folder, but=(MANIFEST, RECORD, configs.WEIGHTS))
        weights = Path("transformer") / configs.WEIGHTS
        tensors = files.read_tensors(source / weights)
        half = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        files.write_tensors(folder / weights, half, files.read_metadata(source / weights))
        files.write_json(folder / RECORD, given)
        _seal(folder)
    return target


def write_merged(source: Path, target: Path, tensors: Mapping[str, Tensor], merged: Sequence[Any]) -> Path:
    """A copy of a step folder with other weights, and without training/ and adapters.

    Args:
        source: the step folder.
        target: the new one.
        tensors: its weights.
        merged: what was worked into them, for the record.
    """
    record = read_record(source)
    earlier = record.as_json().get("merged", [])
    given = record.as_json() | {"base": None, "score": None, "merged": [*earlier, *merged]}
    if (source / STATE).is_file():
        given["config"] = read_state(source).config
    left_out = (MANIFEST, RECORD, CARD, card.SAMPLES, configs.WEIGHTS, card.ADAPTER_WEIGHTS)
    with files.whole_folder(target, target.with_name(f".{target.name}.sana-partial")) as folder:
        _copy(source, folder, left_out)
        model, predicts = configs.read_model_config(source / "transformer")
        metadata = {"format": "pt", "made_by": f"sana {__version__}"}
        metadata["model"] = json.dumps(configs.diffusers_config(model, predicts))
        files.write_tensors(folder / "transformer" / configs.WEIGHTS, tensors, metadata)
        scheduler = files.read_json(folder / "scheduler" / "scheduler_config.json")
        _write_index(folder, scheduler["_class_name"])
        files.write_json(folder / RECORD, given)
        made = records.checked(CheckpointRecord, given, folder / RECORD)
        parts = [source.name if record.base is None else record.base.name]
        parts += [f"{one['name']} x {one['scale']:g}" for one in merged]
        files.write_text(folder / CARD, card.card(made, predicts, made_of=" and ".join(parts)))
        _seal(folder)
    return target


# --- finding ----------------------------------------------------------------------------------


def steps(run: Path) -> list[Path]:
    """The step folders of a run, oldest first, whole or not."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted(
        (path for path in folders if re.fullmatch(r"step-\d{6,}", path.name)),
        key=lambda path: int(path.name.partition("-")[2]),
    )


def step_of(folder: Path) -> int:
    """The number in a step folder's name, or 0."""
    found = re.fullmatch(r"step-(\d+)", folder.name)
    return int(found[1]) if found else 0


def verify(folder: Path, hashes: bool = False) -> Iterator[str]:
    """Compare a step folder's files with its manifest: sizes, and with `hashes` every byte.

    Yields:
        The name of each file that is whole.

    Raises:
        SanaError: it has no manifest, or a file is missing or damaged; names it.
    """
    if not (folder / MANIFEST).is_file():
        raise SanaError(f"{folder.name} lacks {MANIFEST}: it was not finished")
    listing = _listing(folder)
    yield MANIFEST
    for name, entry in listing.items():
        files.check_size(folder / name, entry.bytes)
        if hashes:
            files.check_hash(folder / name, entry.sha256)
        yield name


def _listing(folder: Path) -> dict[str, records.Entry]:
    """The files in the manifest, by name."""
    path = folder / MANIFEST
    return records.checked(records.Manifest, files.read_sealed_json(path), path).files


def weights_sha256(folder: Path, which: str = "ema") -> str | None:
    """The hash of a step folder's "ema" or "raw" weights, by its manifest, if it has one."""
    if not (folder / MANIFEST).is_file():
        return None
    used = Path("transformer") / configs.WEIGHTS
    if has_adapters_alone(folder):
        used = Path(card.ADAPTER_WEIGHTS)
    name = RAW_WEIGHTS if which == "raw" else used
    entry = _listing(folder).get(name.as_posix())
    return None if entry is None else entry.sha256


def newest_step(run: Path, hashes: bool = False) -> tuple[Path | None, list[str]]:
    """The newest whole step folder of a run, and why newer ones were skipped."""
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
    """Find the checkpoint that a path names.

    - None: the newest step folder of all runs in `runs/`, or if there is none, the quickstart's
      that comes with the package.
    - `shipped` or `shipped:NAME`: one of the shipped ones, as `named_shipped` says.
    - a run: its newest whole step folder.
    - a step folder, or other people's folder or file: itself.

    Raises:
        SanaError: there is none; says what there is, and how to get one.
    """
    if path is None:
        runs = _runs()
        return _newest(runs, "runs/*/checkpoints") if any(steps(run) for run in runs) else shipped()
    if (named := named_shipped(path)) is not None:
        return named
    inside = path.name in (card.ADAPTER_WEIGHTS, "transformer")
    if inside and path.exists() and has_adapters_alone(path.absolute().parent):
        return find_checkpoint(path.absolute().parent)
    if (path / "checkpoints").is_dir():
        # other trainers' folders have the same name
        if not steps(path) and (other := strangers.other_folder(path / "checkpoints")):
            raise SanaError(*other)
        return _newest([path], str(path))
    if path.is_file():
        return path
    if (path / "transformer").is_dir() or (path / "config.json").is_file():
        if (path / RECORD).is_file():  # one of ours, whose manifest lists its files
            for _ in verify(path):
                pass
        return path
    known = [f"there are runs: {', '.join(sorted(map(str, _runs())))}"] if _runs() else []
    if not path.exists():
        if link := strangers.broken_link(path):
            raise SanaError(*link)
        raise SanaError(f"no checkpoint at {path}: there is no such file or folder", *known)
    if other := strangers.other_folder(path):
        raise SanaError(*other)
    raise SanaError(
        f"no checkpoint in {path}: it has neither checkpoints/ nor transformer/",
        "give a run, one of its step folders, a diffusers folder, or a file of weights",
        *known,
    )


def _runs() -> list[Path]:
    return [folder.parent for folder in Path("runs").glob("*/checkpoints")]


def _newest(runs: Iterable[Path], where: str) -> Path:
    """The newest whole step folder of some runs, which a message calls `where`."""
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


# --- reading ----------------------------------------------------------------------------------


def read_record(folder: Path) -> CheckpointRecord:
    """`sana.json` of a step folder, with its config in today's names.

    Raises:
        SanaError: it is missing, damaged or of another version.
    """
    content = files.read_json(folder / RECORD)
    if content.get("version") != RECORD_VERSION:
        raise SanaError(
            f"{folder / RECORD}: version {content.get('version')}; this sana reads version {RECORD_VERSION}"
        )
    record = records.checked(CheckpointRecord, content, folder / RECORD)
    return record if record.config is None else record.but(config=in_new_names(record.config))


def read_state(folder: Path) -> State:
    """`training/state.json` of a step folder, with its config in today's names.

    Raises:
        SanaError: it is missing or damaged.
    """
    state = records.checked(State, files.read_json(folder / STATE), folder / STATE)
    return state.but(config=in_new_names(state.config))


def transformer_path(source: Path) -> Path:
    """The transformer in what `find_checkpoint` found: a folder with config.json, or a file."""
    inner = source / "transformer"
    return inner if inner.is_dir() else source


def has_adapters_alone(source: Path) -> bool:
    """Whether what `find_checkpoint` found is a step folder without a transformer's own weights."""
    return (source / RECORD).is_file() and (source / card.ADAPTER_WEIGHTS).is_file()


def base_record(source: Path) -> Base | None:
    """What the adapters of a step folder are for; None: it is another kind of checkpoint."""
    return read_record(source).base if has_adapters_alone(source) else None


def find_base(folder: Path) -> Path:
    """The model that a step folder's adapters are for: where the run's config says, or the record.

    Raises:
        SanaError: it is not there; says what it was, and how to say where it is now.
    """
    base = base_record(folder)
    if base is None:
        raise SanaError(f"{folder / RECORD} is damaged: it does not say what its adapters are for")
    return _find_recorded(
        folder,
        base,
        lambda config: config.train.init_from,
        "has adapters alone, and the model that they are for",
        f"sana sample (or sana merge) with BASE and --adapter {folder}",
    )


def step_around(source: Path) -> Path:
    """The step folder that has what `find_checkpoint` found as its transformer; else that itself."""
    folder = source.absolute().parent
    return folder if source.name == "transformer" and (folder / RECORD).is_file() else source


def learned_guidance(source: Path) -> tuple[float, float] | None:
    """The guidance scales that a student was trained on, lowest and highest. None: not on record.

    Args:
        source: what `find_checkpoint` found.
    """
    folder = step_around(source)
    record = read_record(folder) if (folder / RECORD).is_file() else None
    if record is None or record.teacher is None:
        return None
    config = record.config
    if config is None and (folder / STATE).is_file():
        config = read_state(folder).config
    return None if config is None else tuple(config["distill"]["guidance"])


def find_teacher(folder: Path, how: str) -> Path:
    """The checkpoint that a student was distilled from: where the run's config says, or the record.

    Args:
        folder: the student.
        how: a person can say where the teacher is now.

    Raises:
        SanaError: the checkpoint is no student, or its teacher is not there.
    """
    teacher = read_record(folder).teacher if (folder / RECORD).is_file() else None
    if teacher is None:
        raise SanaError(f"{folder} has no teacher: it was not distilled", "name a checkpoint by its path")
    return _find_recorded(
        folder,
        teacher,
        lambda config: config.distill.teacher,
        "was distilled, and its teacher",
        how,
    )


def _find_recorded(
    folder: Path, recorded: Base, configured: Callable[[Config], Path | None], what: str, how: str
) -> Path:
    """The model that a step folder comes from: where the run's config says, or the record.

    Args:
        folder: the step folder.
        recorded: the model, as its record has it.
        configured: the path of the model in a run's config.
        what: the step folder is, and the model to it, for a message.
        how: a person can say where the model is now.

    Raises:
        SanaError: it is not there; says what it was, and `how` to say where it is now.
    """
    places, run = [Path(recorded.name)], folder.resolve().parent.parent
    if (run / RUN_CONFIG).is_file():
        with suppress(SanaError):  # a config that cannot be read says nothing
            path = configured(load_run_config(run))
            places = [path, *places] if path is not None else places
    for place in places:
        if place.exists() or named_shipped(place) is not None:
            return find_checkpoint(step_of_base(place, recorded))
    raise SanaError(
        f"{folder} {what}, {recorded.name}, is not at {places[0]}",
        f"put it there, or say where it is: {how}",
        f"it is a model of {recorded.origin} format, whose tensors have the sha256 {recorded.sha256[:12]}...",
    )


def step_of_base(place: Path, base: Base) -> Path:
    """Of a run, which may have gone on since, the step folder on record; else the place itself."""
    step = place / CHECKPOINTS / Path(base.name).name
    return step if step.is_dir() else place


def check_base(found: StoredWeights, base: Base, place: Path, what: str, how: str = "was trained on") -> None:
    """Refuse a model that is not the one whose adapters or student `what` has.

    Raises:
        SanaError: its tensors are others; `how` says how `what` comes from it.
    """
    if found.sha256 != base.sha256:
        raise SanaError(
            f"{place} is not the model that {what} {how}: its tensors have the sha256 {found.sha256[:12]}..., "
            f"not {base.sha256[:12]}...",
            f"put the model there that was {base.name}",
        )


def read_transformer(
    source: Path, weights: Weights = "ema"
) -> tuple[StoredWeights, tuple[Mapping[str, Change], ...]]:
    """The transformer of what `find_checkpoint` found, and the adapters that it wears.

    Raises:
        SanaError: files are missing, damaged, or do not fit; or the base of adapters is not there.
    """
    if has_adapters_alone(source):
        base, record = find_base(source), base_record(source)
        if has_adapters_alone(base):
            raise SanaError(f"{base}, which the adapters of {source} are for, has adapters alone itself")
        found = read_weights(transformer_path(base))
        assert record is not None  # found by it
        check_base(found, record, base, str(source))
        return found, (own_adapters(source, found.model, weights),)
    found = read_weights(transformer_path(source), weights if source.is_file() else "ema")
    only_raw = (source / STATE).is_file() and not (source / RAW_WEIGHTS).is_file()  # a run without an average
    if weights == "raw" and source.is_dir() and not only_raw:
        file = _raw_weights(source)
        found = replace(found, path=file, tensors=files.read_tensors(file))
        check_tensors(found.tensors, build(found.model, seed=None).state_dict(), file, found.compared_to)
    return found, ()


def _raw_weights(folder: Path) -> Path:
    """The raw weights of a step folder.

    Raises:
        SanaError: there are none.
    """
    file = folder / RAW_WEIGHTS  # in step folders only
    if not file.is_file():
        raise SanaError(f"{folder} has no raw weights ({RAW_WEIGHTS})", "leave out `weights` raw")
    return file


def own_adapters(folder: Path, model: Architecture, weights: Weights) -> Mapping[str, Change]:
    """The adapters of a step folder."""
    if weights == "ema":
        return adapters.read_adapter(folder, adapters.shapes_of(build(model, seed=None))).layers
    file = _raw_weights(folder)
    tensors = files.read_tensors(file)
    config = AdapterConfig.model_validate(read_state(folder).config["adapter"], strict=False)
    check_tensors(tensors, adapter_parameters(model, config), file, "the run that it is of")
    return changes_from(tensors, scale_of(config))


def adapter_parameters(model: Architecture, config: AdapterConfig) -> dict[str, Tensor]:
    """The parameters of the adapters of a config, on the meta device, by name."""
    empty = build(model, seed=None)
    names = matching(empty, config.targets)
    return named_parameters(empty_changes(empty, names, config.rank, scale_of(config), config.kind == "dora"))


def load_transformer(
    path: str | Path,
    weights: Weights = "ema",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    applied: Sequence[Mapping[str, Change]] = (),
) -> SanaTransformer:
    """Load the transformer of a checkpoint, a diffusers folder or a file of weights.

    Args:
        path: a run (its newest whole checkpoint), a step folder, a diffusers pipeline or
            transformer, or a file.
        weights: "ema", or "raw" for those that the optimizer updates, in step folders and in
            trainers' files that have both.
        device: of the model.
        dtype: of its parameters, except adapters, which are float32. None: as stored, but float32
            for fp16, where SANA overflows. In step folders matrices alone are bf16: where they are
            stored so, or are the base of adapters, and the device has native bf16.
        applied: adapters to put on it, beside those that a step folder has.

    Raises:
        SanaError: there is none, or its files are missing, damaged, or do not fit its config. Or
            the model of a step folder's adapters is not where it was.
    """
    if weights not in get_args(Weights):
        raise SanaError(f"`weights`: {weights!r} is not one of {', '.join(get_args(Weights))}", exit_code=2)
    source = find_checkpoint(Path(path))
    found, own = read_transformer(source, weights)
    model = build(found.model, seed=None)

    ours, native = (source / RECORD).is_file(), has_native_bf16(torch.device(device))

    def kept(name: str, tensor: Tensor) -> torch.dtype:
        if dtype is not None:
            return dtype
        half = tensor.dtype == torch.bfloat16
        if ours:  # what autocast makes of them in training
            half = native and is_matrix(name, tensor) and (half or bool(own))
        return torch.bfloat16 if half else torch.float32

    state = {name: tensor.to(device, kept(name, tensor), copy=True) for name, tensor in found.tensors.items()}
    model.load_state_dict(state, assign=True)
    for changes in (*own, *applied):
        attach(model, {name: change.to(device, torch.float32) for name, change in changes.items()})
    return model.eval()


def parameter_count(shapes: Iterable[Tensor]) -> int:
    """Total parameter count."""
    return sum(tensor.numel() for tensor in shapes)
