"""`sana inspect`: describe a config, run, checkpoint, dataset, picture or file of weights.

It builds models on the meta device, so it needs no encoder, no network and little memory. It
prints nothing.
"""

import math
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sana_cli import __version__
from sana_cli.adapters import Dense, LowRank, kind_of, squared_norm
from sana_cli.choices import PredictionType
from sana_cli.config.file import find_config, load_config, load_run_config, packaged_configs
from sana_cli.config.keys import Architecture, Config
from sana_cli.dataset import layout
from sana_cli.dataset.match import resolve_architecture
from sana_cli.dataset.reader import Dataset
from sana_cli.dataset.shapes import ShapeReport, report
from sana_cli.errors import SanaError, one_line
from sana_cli.model import build, module_rows
from sana_cli.runtime import outputs
from sana_cli.runtime.device import devices, free_memory, resolve_device, resolve_precision
from sana_cli.runtime.openmp import USERS
from sana_cli.runtime.records import Base, CheckpointRecord
from sana_cli.sampling import pictures
from sana_cli.sampling.pipeline import INDEX, Pipeline, open_pipeline
from sana_cli.text import text_config
from sana_cli.units import human_bytes
from sana_cli.weights import checkpoint, configs, strangers
from sana_cli.weights.adapters import StoredAdapter, is_adapter_file, read_adapter
from sana_cli.weights.card import ADAPTER_WEIGHTS
from sana_cli.weights.reader import read_weights


@dataclass(frozen=True)
class InspectOptions:
    """What to describe. `None` is the shipped configs."""

    target: str | None = None
    verify: bool = False


@dataclass(frozen=True)
class Description:
    """Facts in the order they matter, and a table where there is one."""

    # configs, config, run, checkpoint, pipeline, transformer, adapter, dataset, picture or environment
    kind: str
    title: str
    facts: Mapping[str, Any]  # plain numbers, strings, lists and dictionaries
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()
    config: Config | None = None  # one to start from, if there is one
    shapes: tuple[ShapeReport, ...] = ()  # of a dataset with buckets
    fit: str = "crop"

    @property
    def document(self) -> dict[str, Any]:
        """The facts and the table as one JSON object. Configs have their table in the facts."""
        document = {"kind": self.kind, "target": self.title, **self.facts}
        if self.shapes:
            document |= {"fit": self.fit, "shapes": self.shapes}
        if self.kind != "configs":
            plain = [
                [cell.strip() if isinstance(cell, str) else cell for cell in row] for row in self.rows
            ]  # of indents
            document["table"] = [dict(zip(self.columns, row, strict=True)) for row in plain]
        return document


def inspect(options: InspectOptions) -> Description:
    """Find out what the target is, and describe it.

    Raises:
        SanaError: the target does not exist, is of no known kind, or is damaged.
    """
    if options.target is None:
        return _shipped()
    path = Path(options.target)
    if (shipped := checkpoint.named_shipped(path)) is not None:
        return _checkpoint(shipped, options.verify)
    if path.is_dir():
        if layout.is_dataset(path) or layout.partial_dir(path).is_dir():
            return _dataset(path, options.verify)
        if (path / "checkpoints").is_dir() or (path / checkpoint.RECORD).is_file():
            return _checkpoint(path, options.verify)
        if is_adapter_file(path):
            return _adapter(path)
        if (path / "transformer").is_dir() or (path / "config.json").is_file():
            return _transformer(path)
        other = strangers.other_folder(path)
        raise SanaError(
            *(
                other
                or (f"{path} is neither a run, a checkpoint, a diffusers folder nor a dataset of sana's",)
            )
        )
    if other := strangers.other_file(path):
        raise SanaError(*other)
    if is_adapter_file(path):
        return _adapter(path)
    beginning = strangers.read_beginning(path) if path.is_file() else b""
    if beginning.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF")) or path.suffix.lower() in outputs.PICTURES:
        return _picture(path)
    if beginning[4:9] == b"\0\0\0\0{" or beginning.startswith(
        (b"PK", b"\x80")
    ):  # safetensors, or a pickle, zipped or plain
        return _transformer(path)
    if path.suffix.lower() in strangers.SUFFIXES:
        return _transformer(path)  # whose error says what is wrong with it
    if path.parent != Path() and not path.exists():
        raise SanaError(f"{path} does not exist", "sana inspect alone lists the shipped configs", exit_code=2)
    return _config(find_config(options.target))


LIBRARIES = (
    "torch",
    "transformers",
    "diffusers",
    "safetensors",
    "pydantic",
    "typer",
    "rich",
    "pillow",
    "numpy",
)
VARIABLES = (
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "OMP_NUM_THREADS",
    *USERS,
    "CUDA_VISIBLE_DEVICES",
    "NO_COLOR",
    "WORLD_SIZE",
)


def environment() -> Description:
    """What `sana` runs on, for a bug report. It has no paths, names or tokens."""
    best = resolve_device("auto")
    facts: dict[str, Any] = {
        "sana": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    memory = free_memory(best)
    facts |= {
        "devices": [
            f"{name} {torch.cuda.get_device_name(name)}" if name.startswith("cuda") else name
            for name in devices()
        ],
        "auto is": f"{best}, {resolve_precision('auto', best)}",
        "threads": torch.get_num_threads(),
        "free memory": "unknown" if memory is None else human_bytes(memory),
        "token": "set" if os.environ.get("HF_TOKEN") else "not in the environment",
        "environment": [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
        or ["nothing that matters here"],
    }
    return Description("environment", "", facts)


# --- models -----------------------------------------------------------------------------------


MODULE_COLUMNS = ("module", "parameters", "share")
PREDICTIONS = {"flow_prediction": "the velocity", "sample": "the data"}


def _model_facts(model: Architecture, prediction_type: PredictionType) -> dict[str, Any]:
    positions = (
        f"sine-cosine, scale {model.interpolation_scale:g}"
        if model.interpolation_scale is not None
        else "none (NoPE)"
    )
    facts = {
        "parameters": checkpoint.parameter_count(build(model, seed=None).parameters()),
        "family": configs.family(model),
        "layers": model.num_layers,
        "width": f"{model.inner_dim} ({model.num_attention_heads} heads of {model.attention_head_dim})",
        "cross-attention": f"{model.num_cross_attention_heads} heads of {model.cross_attention_head_dim}",
        "norm of q and k": model.qk_norm,
        "guidance": "an input of the model" if model.guidance_embeds else None,
        "patch": model.patch_size,
        "predicts": PREDICTIONS[prediction_type],
        "positions": positions,
        "caption channels": model.caption_channels,
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def _resolved(config: Config) -> tuple[Architecture, str]:
    """The model of a config, and where its caption width comes from."""
    dataset = None
    if layout.is_dataset(config.data.dir):
        with suppress(SanaError):  # an old or damaged one says nothing here
            dataset = Dataset(config.data.dir)
    if config.model.caption_channels is not None:
        return resolve_architecture(config, None), "config"
    return resolve_architecture(config, dataset), "the tiny encoder" if dataset is None else str(
        config.data.dir
    )


# --- kinds ------------------------------------------------------------------------------------


def _shipped() -> Description:
    rows = []
    for path in sorted(packaged_configs().glob("*.yaml")):
        config = load_config(str(path))
        model, _ = _resolved(config)
        height, width = config.data.sample_sides
        comments = (line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
        about = next(comments, "").lstrip("# ")
        count = checkpoint.parameter_count(build(model, seed=None).parameters())
        sample = f"{model.in_channels} x {height} x {width}"
        sizes = (count, model.num_layers, model.inner_dim, model.patch_size)
        rows.append((path.stem, *sizes, sample, config.text.encoder, about))
    columns = ("config", "parameters", "layers", "width", "patch", "sample", "encoder", "what")
    facts = {"configs": [dict(zip(columns, row, strict=True)) for row in rows]}
    return Description("configs", "the shipped configs", facts, columns[:-1], tuple(row[:-1] for row in rows))


def _config(path: Path) -> Description:
    config = load_config(str(path))
    model, origin = _resolved(config)
    train, (height, width) = config.train, config.data.sample_sides
    batch = train.batch_size * train.accumulate
    tokens = (height // model.patch_size) * (width // model.patch_size)
    facts = _model_facts(model, config.objective.prediction_type) | {
        "sample": f"{model.in_channels} x {height} x {width}, {tokens} tokens",
        "caption channels from": origin,
        "encoder": config.text.encoder,
        "dataset": str(config.data.dir)
        + ("" if layout.is_dataset(config.data.dir) else " (not embedded yet)"),
        "training": f"{train.steps:,} steps of {batch} "
        f"({train.batch_size} x {train.accumulate} accumulated), lr {config.optim.lr:g}",
        "sampling": config.sample.in_words,
    }
    if config.adapter.on:
        trained = checkpoint.parameter_count(checkpoint.adapter_parameters(model, config.adapter).values())
        facts["adapters"] = f"{trained:,} parameters, {config.adapter.kind} of rank {config.adapter.rank}"
    rows = module_rows(build(model, seed=None))
    return Description("config", str(path), facts, MODULE_COLUMNS, rows, config)


def _checkpoint(path: Path, verify: bool) -> Description:
    folder = checkpoint.find_checkpoint(path)
    checked = list(checkpoint.verify(folder, hashes=verify))
    record, pipeline = checkpoint.read_record(folder), open_pipeline(folder)
    image, model, sample = record.image, pipeline.model, pipeline.sample
    sizes = {
        name: sum(f.stat().st_size for f in (folder / name).rglob("*"))
        for name in ("transformer", "training")
    }
    if record.base is not None:
        sizes["transformer"] = (folder / ADAPTER_WEIGHTS).stat().st_size
    facts: dict[str, Any] = {}
    is_run = (path / "checkpoints").is_dir()
    if is_run:
        facts["checkpoints"] = [step.name for step in checkpoint.steps(path)]
        facts["checkpoint"] = str(folder)
    facts |= _model_facts(model, pipeline.prediction_type) | {
        "step": record.step,
        "sample": f"{image.channels} x {image.height} x {image.width} {image.kind}"
        + (", and other shapes" if image.buckets else ""),
        **_adapters_of(folder, record),
        **({} if record.teacher is None else {"distilled from": _in_words(record.teacher)}),
        "weights": human_bytes(sizes["transformer"])
        + (f"; {human_bytes(sizes['training'])} to resume from" if sizes["training"] else ""),
        "trained in": record.precision,
        "encoder": record.encoder.in_words,
        "captions": "single words" if record.one_word_captions else "sentences",
        "dataset": f"{record.dataset.images:,} images, {record.dataset.sha256[:12]}",
        "sampling": sample.in_words,
        "made by": record.made_by,
    }
    if record.score is not None:
        score = record.score
        facts["score"] = (
            f"{score.accuracy:.1%} of {score.images:,} images read as prompted, Fréchet distance "
            f"{score.frechet_distance:.2f} (real images {score.real_frechet_distance:.2f})"
        )
    if verify:
        facts["verified"] = f"{len(checked)} files, every byte"
    run_config, state = path / "config.yaml", folder / checkpoint.STATE
    config = None
    if run_config.is_file():
        config = load_run_config(path)
    elif record.config is not None or state.is_file():  # a step folder alone knows no paths
        known = dict(record.config or checkpoint.read_state(folder).config)
        known["text"] = text_config(record.encoder.as_json()).model_dump()
        if record.base is not None:
            known["train"] = known["train"] | {"init_from": record.base.name}
        else:
            known.pop("adapter", None)  # merged, if there were any
        if record.teacher is not None:
            known["distill"] = known["distill"] | {"teacher": record.teacher.name}
        factor = image.factor
        known["data"] = {
            "image_size": [image.height * factor, image.width * factor],
            "autoencoder": record.autoencoder,
        }
        known["data"] |= {"latent_factor": factor} if factor > 1 else {}
        known["data"] |= {"source": "folder", "buckets": image.buckets} if image.buckets else {}
        try:
            config = Config.model_validate(known)
        except ValueError as error:
            raise SanaError(
                f"{folder}: the config on its record is not one: {one_line(str(error))[:200]}"
            ) from error
    rows = module_rows(build(model, seed=None))
    return Description("run" if is_run else "checkpoint", str(path), facts, MODULE_COLUMNS, rows, config)


def _adapters_of(folder: Path, record: CheckpointRecord) -> dict[str, Any]:
    """What a step folder of adapters alone has, and what it is for."""
    if record.base is None:
        return {}
    stored = read_adapter(folder)
    ranks = ", ".join(map(str, stored.ranks))
    return {
        "adapters": f"{_adapter_kinds(stored)} of rank {ranks} on {len(stored.layers)} layers",
        "of": _in_words(record.base),
    }


def _in_words(base: Base) -> str:
    return f"{base.name} ({base.origin}, {base.sha256[:12]})"


def _adapter(path: Path) -> Description:
    """A file of low-rank or other changes to a model."""
    stored = read_adapter(path)
    sizes, ranks = Counter[str](), defaultdict[str, set[int]](set)
    moved = defaultdict[str, float](float)
    for name, change in stored.layers.items():
        kind = kind_of(name)
        sizes[kind] += 1
        ranks[kind].add(change.rank if isinstance(change, LowRank) else 0)
        moved[kind] += squared_norm(change, None) if change.magnitude is None else math.nan
    facts: dict[str, Any] = {
        "adapts": f"{len(stored.layers)} layers",
        "form": stored.form,
        "size": human_bytes(stored.path.stat().st_size),
        "of": stored.metadata.get("base"),
        "made by": stored.metadata.get("made_by"),
        "to sample": f"sana sample --checkpoint BASE --adapter {path}",
    }
    if stored.notes:
        facts["note"] = "; ".join(stored.notes)
    rows = tuple(
        (
            kind,
            sizes[kind],
            ", ".join(str(rank) if rank else "full" for rank in sorted(ranks[kind])),
            f"{moved[kind] ** 0.5:.4g}" if moved[kind] == moved[kind] else "depends on the model",
        )
        for kind in sizes
    )
    known = {name: fact for name, fact in facts.items() if fact is not None}
    return Description("adapter", str(path), known, ("layer", "adapters", "rank", "norm of the update"), rows)


def _adapter_kinds(stored: StoredAdapter) -> str:
    """LoRA, DoRA or dense, in words."""
    changes = stored.layers.values()
    kinds = {
        "DoRA": any(change.magnitude is not None for change in changes),
        "LoRA": any(isinstance(change, LowRank) and change.magnitude is None for change in changes),
        "dense changes": any(isinstance(change, Dense) for change in changes),
    }
    return ", ".join(kind for kind, there in kinds.items() if there)


# folders that the trainers of diffusers and SimpleTuner write beside transformer/
AVERAGES = ("transformer_ema", "ema")
ORIGINS = {"diffusers": "diffusers", "official": "NVlabs/Sana", "lesson": "the lesson"}


def _transformer(path: Path) -> Description:
    """A diffusers pipeline, a transformer folder, or a file of weights."""
    weights = read_weights(checkpoint.transformer_path(path))
    pipeline = open_pipeline(path, weights=weights)
    empty = build(weights.model, seed=None)
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.tensors.values())
    facts = _model_facts(weights.model, weights.prediction_type)
    if weights.origin == "lesson":
        facts["family"] = "the lesson"
    facts["format"] = f"{ORIGINS[weights.origin]}, {', '.join(weights.dtypes)}, {human_bytes(size)}"
    if weights.choice:
        facts["weights"] = weights.choice
    elif averages := [
        f"{name}/" for name in AVERAGES if path.is_dir() and (path / name / "config.json").is_file()
    ]:
        facts["weights"] = (
            f"those of transformer/; {averages[0]} beside it, which can be named, may be their average"
        )
    if weights.other_parts:
        facts["all-in-one"] = f"left out: {', '.join(weights.other_parts)}"
    if weights.left_out:
        facts["also holds"] = ", ".join(weights.left_out)
    facts |= _surroundings(path, pipeline)
    return Description(pipeline.kind, str(path), facts, MODULE_COLUMNS, module_rows(empty))


def _surroundings(path: Path, pipeline: Pipeline) -> dict[str, Any]:
    """What sampling would use around a transformer, and how to replace it."""
    text, sample, inside = pipeline.text, pipeline.sample, (path / INDEX).is_file()
    channels, height, width = pipeline.sample_shape

    def shown(source: str | None) -> str:
        return "not on record" if source is None else "its own" if Path(source).is_absolute() else source

    facts = {
        "sample": f"{channels} x {height} x {width} {'latents' if pipeline.latents else 'pixels'}",
        "encoder": shown(text.encoder if text else None),
    }
    if text is not None:
        facts["captions"] = ", ".join(
            (
                f"after {text.instruction[:32]!r}..." if text.instruction else f"template {text.template}",
                *(["lower-cased"] if text.lowercase else []),
                *([f"layer {text.layer}"] if text.layer is not None else []),
                f"at most {text.max_length} tokens",
            )
        )
    if pipeline.latents:
        facts["autoencoder"] = shown(pipeline.autoencoder)
    how = f"{sample.in_words}, flow shift {sample.flow_shift:g}"
    facts["sampling"] = str(pipeline.unknown_scheduler).splitlines()[0] if pipeline.unknown_scheduler else how
    if not inside:
        options = ["--encoder", "--instruction", *(["--autoencoder"] if pipeline.latents else [])]
        facts["to sample"] = (
            f"sana sample --checkpoint {path} PROMPT, with other {', '.join(options)} if need be"
        )
    return facts


def _dataset(path: Path, verify: bool) -> Description:
    dataset = Dataset(path)
    index = dataset.index
    counts, image = index.counts, index.image
    facts = {
        "images": counts.images,
        "captions": counts.captions,
        "tokens": counts.tokens,
        **({"left out": f"{counts.skipped:,}, listed in {layout.SKIPPED}"} if counts.skipped else {}),
        **({"cut": f"{counts.cut:,} captions, at text.max_length"} if counts.cut else {}),
        "image": f"{image.kind}, {image.in_words}",
        **({"buckets": ", ".join(map(str, image.buckets))} if image.buckets else {}),
        "caption states": f"{index.caption_dim} wide, bf16",
        "bytes": dataset.bytes,
        "encoder": index.encoder.in_words,
        "source": " ".join(f"{key}={str(value)[:12]}" for key, value in index.source.items()),
        "examples": [text for text in dataset.texts(21) if text],
        "sha256": index.sha256,
    }
    if verify:
        facts["verified"] = f"{len(list(dataset.verify()))} files, every byte"
    rows = tuple((shard.file, shard.count, shard.bytes) for shard in index.shards)
    columns = ("file", "count", "bytes")
    return Description("dataset", str(path), facts, columns, rows, shapes=report(dataset), fit=image.fit)


def _picture(path: Path) -> Description:
    if not path.is_file():
        raise SanaError(f"{path} does not exist")
    record = pictures.read_record(path)
    images = record.cells
    facts = {
        key: value for key, value in record.as_json().items() if key not in ("images", "settings")
    } | record.settings
    if record.adapters:
        facts["adapters"] = [f"{one.get('name')} x {one.get('scale')}" for one in record.adapters]
    rows = tuple((image.prompt, image.seed) for image in images)
    return Description("picture", str(path), facts | {"images": len(images)}, ("prompt", "seed"), rows)
