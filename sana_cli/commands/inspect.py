"""`sana inspect`: what a config, run, checkpoint, dataset, picture or file of weights is. Parameter counts first.

It builds models on the meta device, so it needs no encoder, no network and next to no memory. It prints nothing.
"""

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sana_cli import __version__
from sana_cli.config.file import find_config, load_config, packaged_configs
from sana_cli.config.keys import Config, ModelConfig
from sana_cli.dataset import layout
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError, one_line
from sana_cli.model import build, module_rows
from sana_cli.runtime import outputs
from sana_cli.runtime.device import devices, free_memory, resolve_device, resolve_precision
from sana_cli.runtime.openmp import USERS
from sana_cli.sampling import pictures
from sana_cli.sampling.pipeline import INDEX, Pipeline, open_pipeline
from sana_cli.text import TINY_DIM, text_config
from sana_cli.units import human_bytes
from sana_cli.weights import checkpoint, configs, strangers
from sana_cli.weights.reader import read_weights


@dataclass(frozen=True)
class InspectOptions:
    """What to look at; `None` is the shipped configs."""

    target: str | None = None
    verify: bool = False


@dataclass(frozen=True)
class Report:
    """Facts in the order they matter, and a table where there is one."""

    kind: str  # configs, config, run, checkpoint, pipeline, transformer, dataset or picture
    title: str
    facts: Mapping[str, Any]  # plain numbers, strings, lists and dictionaries
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()
    config: Config | None = None  # where there is one to start from (`--yaml`)


def inspect(options: InspectOptions) -> Report:
    """Find out what the target is, and say it.

    Raises:
        SanaError: nothing is there, it is none of these, or `verify` found damage.
    """
    if options.target is None:
        return _shipped()
    path = Path(options.target)
    if options.target == checkpoint.SHIPPED and not path.exists():
        return _checkpoint(checkpoint.shipped(), options.verify)
    if path.is_dir():
        if layout.is_dataset(path) or layout.partial_dir(path).is_dir():
            return _dataset(path, options.verify)
        if (path / "checkpoints").is_dir() or (path / checkpoint.RECORD).is_file():
            return _checkpoint(path, options.verify)
        if (path / "transformer").is_dir() or (path / "config.json").is_file():
            return _transformer(path)
        other = strangers.other_folder(path)
        raise SanaError(*(other or (f"{path} is neither a run, a checkpoint, a diffusers folder nor a dataset of sana's",)))
    if other := strangers.other_file(path):
        raise SanaError(*other)
    beginning = _beginning(path)
    if beginning.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF")) or path.suffix.lower() in outputs.PICTURES:
        return _picture(path)
    if beginning[4:9] == b"\0\0\0\0{" or beginning.startswith((b"PK", b"\x80")):  # safetensors, or a pickle, zipped or plain
        return _transformer(path)
    if path.suffix.lower() in strangers.SUFFIXES:
        return _transformer(path)  # which says what is wrong with it
    if path.parent != Path() and not path.exists():
        raise SanaError(f"{path} does not exist", "sana inspect alone lists the shipped configs", exit_code=2)
    return _config(find_config(options.target))


def _beginning(path: Path) -> bytes:
    if not path.is_file():  # a pipe would be waited for
        return b""
    try:
        with path.open("rb") as file:
            return file.read(9)
    except OSError:
        return b""


LIBRARIES = ("torch", "transformers", "diffusers", "safetensors", "pydantic", "typer", "rich", "pillow", "numpy")
VARIABLES = (
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "OMP_NUM_THREADS",
    *USERS,
    "CUDA_VISIBLE_DEVICES",
    "NO_COLOR",
    "WORLD_SIZE",
)


def environment() -> Report:
    """What `sana` runs on, to be pasted into a bug report: no path, no name of a user or machine, no token."""
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
        "devices": [f"{name} {torch.cuda.get_device_name(name)}" if name.startswith("cuda") else name for name in devices()],
        "auto is": f"{best}, {resolve_precision('auto', best)}",
        "threads": torch.get_num_threads(),
        "free memory": "unknown" if memory is None else human_bytes(memory),
        "token": "set" if os.environ.get("HF_TOKEN") else "not in the environment",
        "environment": [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
        or ["nothing that matters here"],
    }
    return Report("environment", "", facts)


# --- models -----------------------------------------------------------------------------------------------------------


MODULE_COLUMNS = ("module", "parameters", "share")
PREDICTIONS = {"flow_prediction": "the velocity", "sample": "the data"}


def _model_facts(model: ModelConfig) -> dict[str, Any]:
    positions = f"sine-cosine, scale {model.interpolation_scale:g}" if model.interpolation_scale is not None else "none (NoPE)"
    facts = {
        "parameters": checkpoint.parameter_count(build(model, seed=None).parameters()),
        "family": configs.family(model),
        "layers": model.num_layers,
        "width": f"{model.inner_dim} ({model.num_attention_heads} heads of {model.attention_head_dim})",
        "cross-attention": f"{model.num_cross_attention_heads} heads of {model.cross_attention_head_dim}",
        "norm of q and k": model.qk_norm,
        "guidance": "an input of the model" if model.guidance_embeds else None,
        "patch": model.patch_size,
        "predicts": PREDICTIONS[model.prediction_type],
        "positions": positions,
        "caption channels": model.caption_channels,
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def _resolved(config: Config) -> tuple[ModelConfig, str]:
    """The model of a config, and where its caption width comes from: itself, its dataset, or the built-in encoder."""
    model = config.model
    size = model.sample_size or max(config.data.sample_sides)
    if model.caption_channels is not None:
        return model.model_copy(update={"sample_size": size}), "config"
    if layout.is_dataset(config.data.dir):
        dim, origin = Dataset(config.data.dir).index["caption_dim"], str(config.data.dir)
    elif config.text.encoder == "tiny":
        dim, origin = TINY_DIM, "the tiny encoder"
    else:
        raise SanaError(
            f"model.caption_channels: null, and there is no dataset in {config.data.dir} to take it from",
            f"say the width of {config.text.encoder}'s states with --set model.caption_channels=N, or run sana embed",
        )
    return model.model_copy(update={"sample_size": size, "caption_channels": dim}), origin


# --- kinds ------------------------------------------------------------------------------------------------------------


def _shipped() -> Report:
    rows = []
    for path in sorted(packaged_configs().glob("*.yaml")):
        config = load_config(str(path))
        model, _ = _resolved(config)
        height, width = config.data.sample_sides
        about = next((line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")), "")
        count = checkpoint.parameter_count(build(model, seed=None).parameters())
        sample = f"{model.in_channels} x {height} x {width}"
        rows.append((path.stem, count, model.num_layers, model.inner_dim, model.patch_size, sample, config.text.encoder, about))
    columns = ("config", "parameters", "layers", "width", "patch", "sample", "encoder", "what")
    facts = {"configs": [dict(zip(columns, row, strict=True)) for row in rows]}
    return Report("configs", "the shipped configs", facts, columns[:-1], tuple(row[:-1] for row in rows))


def _config(path: Path) -> Report:
    config = load_config(str(path))
    model, origin = _resolved(config)
    train, (height, width) = config.train, config.data.sample_sides
    batch = train.batch_size * train.accumulate
    facts = _model_facts(model) | {
        "sample": f"{model.in_channels} x {height} x {width}, {(height // model.patch_size) * (width // model.patch_size)} tokens",
        "caption channels from": origin,
        "encoder": config.text.encoder,
        "dataset": str(config.data.dir) + ("" if layout.is_dataset(config.data.dir) else " (not embedded yet)"),
        "training": f"{train.steps:,} steps of {batch} ({train.batch_size} x {train.accumulate} accumulated), lr {train.lr:g}",
        "sampling": config.sample.in_words,
    }
    rows = module_rows(build(model, seed=None))
    return Report("config", str(path), facts, MODULE_COLUMNS, rows, config)


def _checkpoint(path: Path, verify: bool) -> Report:
    folder = checkpoint.find_checkpoint(path)
    checked = list(checkpoint.verify(folder, hashes=verify))
    record, pipeline = checkpoint.read_record(folder), open_pipeline(folder)
    image, encoder, model, sample = record["image"], record["encoder"], pipeline.model, pipeline.sample
    sizes = {name: sum(f.stat().st_size for f in (folder / name).rglob("*")) for name in ("transformer", "training")}
    facts: dict[str, Any] = {}
    is_run = (path / "checkpoints").is_dir()
    if is_run:
        facts["checkpoints"] = [step.name for step in checkpoint.steps(path)]
        facts["checkpoint"] = str(folder)
    facts |= _model_facts(model) | {
        "step": record["step"],
        "sample": f"{image['channels']} x {image['height']} x {image['width']} {image['kind']}",
        "weights": human_bytes(sizes["transformer"])
        + (f"; {human_bytes(sizes['training'])} to resume from" if sizes["training"] else ""),
        "trained in": record["precision"],
        "encoder": f"{encoder['encoder']} ({encoder['architecture']}, {encoder['dtype']}, {encoder['weights'][:12]})",
        "captions": "single words" if record["one_word_captions"] else "sentences",
        "dataset": f"{record['dataset']['images']:,} images, {record['dataset']['sha256'][:12]}",
        "sampling": sample.in_words,
        "made by": record["made_by"],
    }
    if "score" in record:
        score = record["score"]
        facts["score"] = (
            f"{score['accuracy']:.1%} of {score['images']:,} images read as prompted, Fréchet distance "
            f"{score['frechet_distance']:.2f} (real images {score['real_frechet_distance']:.2f})"
        )
    if verify:
        facts["verified"] = f"{len(checked)} files, every byte"
    run_config, state = path / "config.yaml", folder / checkpoint.STATE
    config = None
    if run_config.is_file():
        config = load_config(str(run_config))
    elif "config" in record or state.is_file():  # a step folder alone knows no paths
        known = dict(record["config"] if "config" in record else checkpoint.read_state(folder)["config"])
        known["text"] = text_config(encoder).model_dump()
        factor = image.get("factor", 1)
        known["data"] = {"image_size": [image["height"] * factor, image["width"] * factor], "autoencoder": record["autoencoder"]}
        known["data"] |= {"latent_factor": factor} if factor > 1 else {}
        try:
            config = Config.model_validate(known)
        except ValueError as error:
            raise SanaError(f"{folder}: the config on its record is not one: {one_line(str(error))[:200]}") from error
    rows = module_rows(build(model, seed=None))
    return Report("run" if is_run else "checkpoint", str(path), facts, MODULE_COLUMNS, rows, config)


AVERAGES = ("transformer_ema", "ema")  # folders that diffusers' and SimpleTuner's trainers write beside transformer/
ORIGINS = {"diffusers": "diffusers", "official": "NVlabs/Sana", "lesson": "the lesson"}


def _transformer(path: Path) -> Report:
    """A diffusers pipeline, a transformer folder, or a file of weights."""
    weights = read_weights(checkpoint.transformer_path(path))
    pipeline = open_pipeline(path, weights=weights)
    empty = build(weights.model, seed=None)
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.tensors.values())
    facts = _model_facts(weights.model)
    if weights.origin == "lesson":
        facts["family"] = "the lesson"
    facts["format"] = f"{ORIGINS[weights.origin]}, {', '.join(weights.dtypes)}, {human_bytes(size)}"
    if weights.choice:
        facts["weights"] = weights.choice
    elif averages := [f"{name}/" for name in AVERAGES if path.is_dir() and (path / name / "config.json").is_file()]:
        facts["weights"] = f"those of transformer/; {averages[0]} beside it, which can be named, may be their average"
    if weights.other_parts:
        facts["all-in-one"] = f"left out: {', '.join(weights.other_parts)}"
    if weights.left_out:
        facts["also holds"] = ", ".join(weights.left_out)
    facts |= _surroundings(path, pipeline)
    return Report(pipeline.kind, str(path), facts, MODULE_COLUMNS, module_rows(empty))


def _surroundings(path: Path, pipeline: Pipeline) -> dict[str, Any]:
    """What sampling would take around a transformer, and how to give something else."""
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
                f"at most {text.max_length} tokens",
            )
        )
    if pipeline.latents:
        facts["autoencoder"] = shown(pipeline.autoencoder)
    how = f"{sample.in_words}, flow shift {sample.flow_shift:g}"
    facts["sampling"] = str(pipeline.unknown_scheduler).splitlines()[0] if pipeline.unknown_scheduler else how
    if not inside:
        options = ["--encoder", "--instruction", *(["--autoencoder"] if pipeline.latents else [])]
        facts["to sample"] = f"sana sample --checkpoint {path} PROMPT, with other {', '.join(options)} if need be"
    return facts


def _dataset(path: Path, verify: bool) -> Report:
    dataset = Dataset(path)
    index = dataset.index
    counts, image, encoder = index["counts"], index["image"], index["encoder"]
    facts = {
        "images": counts["images"],
        "captions": counts["captions"],
        "tokens": counts["tokens"],
        **({"left out": f"{counts['skipped']:,}, listed in {layout.SKIPPED}"} if counts.get("skipped") else {}),
        **({"cut": f"{counts['cut']:,} captions, at text.max_length"} if counts.get("cut") else {}),
        "image": f"{image['kind']}, {image['channels']} x {image['height']} x {image['width']}",
        "caption states": f"{index['caption_dim']} wide, bf16",
        "bytes": dataset.bytes,
        "in the lesson's layout": human_bytes(counts["images"] * layout.LESSON_BYTES_PER_IMAGE),
        "encoder": f"{encoder['encoder']} ({encoder['architecture']}, {encoder['dtype']}, {encoder['weights'][:12]})",
        "source": " ".join(f"{key}={str(value)[:12]}" for key, value in index["source"].items()),
        "examples": [text for text in dataset.texts()[:21] if text],
        "sha256": index["sha256"],
    }
    if verify:
        facts["verified"] = f"{len(list(dataset.verify()))} files, every byte"
    rows = tuple((shard["file"], shard["count"], shard["bytes"]) for shard in (*index["captions"], *index["images"]))
    return Report("dataset", str(path), facts, ("file", "count", "bytes"), rows)


def _picture(path: Path) -> Report:
    if not path.is_file():
        raise SanaError(f"{path} does not exist")
    record = pictures.read_record(path)
    images = [image for row in record["images"] for image in row]
    facts = {key: value for key, value in record.items() if key not in ("images", "settings")} | record["settings"]
    rows = tuple((image["prompt"], image["seed"]) for image in images)
    return Report("picture", str(path), facts | {"images": len(images)}, ("prompt", "seed"), rows)
