"""Measure the memory of training on the CPU beside what `sana train --dry-run` expects.

`runs` measures `sana train` of the shipped configs in both precisions: short runs with all their parts, which
are steps, held-out loss, checkpoint, average and sample grid. Small configs embed their own images, or those of
`examples/shapes`. Others have random images, random captions and, where there is one, a random base. Large models
have fewer micro-batches and fewer cells in their grid, to save time. Their grid is drawn but not decoded.

`steps` measures two steps of a published shape alone, on random latents of 1024 x 1024 pixels, trained in
several ways.

Each is a process of its own, whose largest resident size is compared. What takes more than `--most` gigabytes
is left out.

    python benchmarks/memory.py runs [--only quickstart,critters] [--precision fp32,bf16] [--json FILE]
    python benchmarks/memory.py steps [--only full-adamw,lora] [--config sana-0.6b] [--json FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_cli.adapters import attach, matching, new_changes, scale_of
from sana_cli.config.file import load_config
from sana_cli.config.keys import Architecture, Config
from sana_cli.dataset.layout import held_out_dir
from sana_cli.dataset.match import resolve_architecture
from sana_cli.dataset.reader import Dataset
from sana_cli.model import SanaTransformer, build, is_matrix
from sana_cli.runtime import files, hub
from sana_cli.runtime.device import free_memory, keep_freed_memory, peak_memory
from sana_cli.text import config_fingerprint
from sana_cli.training.estimate import training_memory
from sana_cli.training.task import make_task, make_train_set
from sana_cli.training.trainer import Placement, Trainer
from sana_cli.units import human_bytes

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[1]
IMAGES, TOKENS = 4, 300  # of the dataset of a published shape, and of each caption
HEADER = f"{'':24} {'expected':>10} {'measured':>10} {'ratio':>6} {'seconds':>8}  expected parts"

# --- runs of the shipped configs ----------------------------------------------------------------

EMBEDDED = {  # configs that embed images, and how many of them
    "quickstart": 20_000,
    "critters": 4096,
    "critters-64": 1024,
    "emoji": 480,
    "folder-rgb": 480,
}
RUNS = (
    *EMBEDDED,
    "sana-384",
    "sana",
    "finetune-0.6b",
    "finetune-1.6b",
    "finetune-4.8b",
    "sana-0.6b",
    "sana-1.6b",
)
CHANGED: dict[str, dict[str, str]] = {
    "quickstart": {"train.steps": "100"},
    "critters": {"train.steps": "60"},
    "critters-64": {"train.steps": "6", "log.held_out_images": "64"},
    "emoji": {
        "train.steps": "60",
        "data.path": str(REPOSITORY / "examples" / "shapes"),
        "data.held_out_split": "null",
    },
    "folder-rgb": {"train.steps": "60", "data.path": str(REPOSITORY / "examples" / "shapes")},
    "sana-384": {"log.held_out_images": "64"},
    "sana": {"log.held_out_images": "64", "train.steps": "2"},
}
PUBLISHED = {"train.steps": "2", "train.accumulate": "2", "sample.steps": "1"}
DRAWN_PIXELS, DRAWN_TOKENS = 2048, 12  # images and caption tokens of drawn datasets of pixels


def run_changes(name: str, folder: Path) -> dict[str, str]:
    """What a short run changes in a config."""
    config = load_config(name, ())
    changes = {"data.dir": str(folder / name), "run.device": "cpu", "optim.warmup_steps": "1"}
    if name not in EMBEDDED:
        changes |= {"train.steps": "4", "sample.steps": "2"}
    if config.data.autoencoder is not None:
        changes |= PUBLISHED
        if config.train.init_from is not None:  # the text encoder and the autoencoder lie in it
            base = str(folder / f"base of {name}")
            changes |= {"train.init_from": base, "text.encoder": base, "data.autoencoder": base}
            changes["objective.flow_shift"] = "3"
    return changes | CHANGED.get(name, {})


def prepare(name: str, changes: Mapping[str, str]) -> None:
    """The dataset of a run, and its base."""
    sets = [f"{key}={value}" for key, value in changes.items()]
    config = load_config(name, sets)
    if name in EMBEDDED:
        limit = ("--limit", str(EMBEDDED[name]))
        sana("embed", name, changes, *limit)
        return
    pixels = config.data.autoencoder is None
    count, tokens = (DRAWN_PIXELS, DRAWN_TOKENS) if pixels else (IMAGES, TOKENS)
    drawn_dataset(config.data.dir, config, count, tokens)
    if config.data.held_out is not None:
        drawn_dataset(held_out_dir(config.data.dir, config.data.held_out), config, count // 8, tokens)
    if config.train.init_from is not None:
        drawn_base(config.train.init_from, resolve_architecture(config, Dataset(config.data.dir)))


def drawn_base(folder: Path, model: Architecture) -> None:
    """A random model in bf16, as a diffusers folder."""
    from sana_cli.weights import configs

    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    files.write_json(transformer / "config.json", configs.diffusers_config(model, "flow_prediction"))
    weights = {
        name: torch.empty(weight.shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03)
        for name, weight in build(model, seed=None).state_dict().items()
    }
    files.write_tensors(transformer / configs.WEIGHTS, weights)


def sana(command: str, name: str, changes: Mapping[str, str], *options: str) -> dict[str, Any]:
    """What a command prints as JSON."""
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    line = [sys.executable, "-m", "sana_cli", command, "--config", name, *sets, *options, "--json"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True, env=offline)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure_runs(only: list[str], precisions: list[str], most: float) -> Iterator[dict[str, Any]]:
    """A row for each config and precision."""
    for name in only or RUNS:
        with tempfile.TemporaryDirectory() as there:
            changes = run_changes(name, Path(there))
            prepared = False
            for precision in precisions:
                chosen = changes | {"train.precision": precision, "run.dir": f"{there}/run-{precision}"}
                if not prepared:
                    prepare(name, chosen)
                    prepared = True
                parts = sana("train", name, chosen, "--dry-run")["memory"]["parts"]
                row = {"what": f"{name} {precision}", "estimate": parts}
                if fits(row, most):
                    clock = time.perf_counter()
                    row["peak"] = sana("train", name, chosen)["peak_memory"]
                    row["seconds"] = time.perf_counter() - clock
                yield row


def drawn_dataset(folder: Path, config: Config, images: int, tokens: int) -> Dataset:
    """Random images with random captions, as `sana embed` would write them."""
    from sana_cli.dataset.writer import DatasetWriter, Images

    height, width = config.data.sample_sides
    channels, dim = config.model.in_channels, config.model.caption_channels
    assert dim is not None
    latents = config.data.autoencoder is not None
    shape = images, channels, height, width
    texts = ["", *(f"caption {n}" for n in range(min(images, 20)))]
    writer = DatasetWriter(folder, {})
    states = {text: torch.randn(tokens, dim).bfloat16() for text in texts}
    shard = writer.write_captions(0, 0, states)
    drawn = Images(
        pixels=torch.randn(shape).bfloat16() if latents else torch.randint(256, shape, dtype=torch.uint8),
        original_sizes=[config.data.size] * images,
        sample_ids=[str(n) for n in range(images)],
        captions=[[texts[1 + n % (len(texts) - 1)]] for n in range(images)],
        weights=[None] * images,
        attributes=[{}] * images,
        says=[None] * images,
        names=[],
    )
    writer.write(0, [shard], [drawn], {text: n for n, text in enumerate(texts)}, [])
    image: dict[str, Any] = {"kind": "pixels", "channels": channels, "height": height, "width": width}
    if config.data.autoencoder is not None:
        name, factor = hub.model_name(config.data.autoencoder), config.data.latent_factor
        image |= {"kind": "latents", "factor": factor, "autoencoder": name}
    if config.data.buckets is not None:
        image["buckets"] = list(config.data.buckets)
    encoder = {"architecture": "none", "weights": "", "dtype": "fp32", **config_fingerprint(config.text)}
    facts = {"image": image, "caption_dim": dim, "encoder": encoder, "source": {}, "attributes": {}}
    writer.finish(1, facts | {"one_word_captions": False})
    return Dataset(folder)


# --- steps of a published shape -----------------------------------------------------------------

PLAIN = {"optim.optimizer": "adamw", "optim.ema_decay": "null"}
WAYS: dict[str, dict[str, str]] = {
    "full-adamw-ema": {"optim.optimizer": "adamw"},
    "full-adamw": PLAIN,
    "full-came": PLAIN | {"optim.optimizer": "came"},
    "bf16-adamw": PLAIN | {"train.weights": "bf16"},
    "bf16-came": PLAIN | {"train.weights": "bf16", "optim.optimizer": "came"},
    "bf16-came-ema": {"train.weights": "bf16", "optim.optimizer": "came"},
    "bf16-came-plain": PLAIN
    | {"train.weights": "bf16", "optim.optimizer": "came", "train.activation_checkpointing": "false"},
    "bf16-came-accumulate": PLAIN
    | {"train.weights": "bf16", "optim.optimizer": "came", "train.accumulate": "2"},
    "lora": {"adapter.kind": "lora", "adapter.rank": "16"},
    "lora-plain": {
        "adapter.kind": "lora",
        "adapter.rank": "16",
        "train.activation_checkpointing": "false",
    },
    "dora": {"adapter.kind": "dora", "adapter.rank": "16"},
}


def way_config(name: str, way: Mapping[str, str], folder: Path) -> Config:
    """A config with two steps of one image, as a way changes it."""
    changes = {
        "data.dir": str(folder / "data"),
        "run.dir": str(folder / "run"),
        "run.device": "cpu",
        "train.precision": "bf16",
        "train.batch_size": "1",
        "train.accumulate": "1",
        "train.steps": "2",
        "train.activation_checkpointing": "true",
        "optim.warmup_steps": "0",
    }
    if "adapter.kind" in way:
        changes["train.init_from"] = "drawn"
    return load_config(name, [f"{key}={value}" for key, value in (changes | dict(way)).items()])


def drawn_model(model: Architecture, config: Config) -> SanaTransformer:
    """A model with random weights, drawn cheaply; the types and adapters are those of training."""
    made = build(model, seed=None)
    half = config.adapter.on  # matrices that are frozen are kept in bf16
    for name, parameter in list(made.named_parameters()):
        dtype = torch.bfloat16 if half and is_matrix(name, parameter) else torch.float32
        weight: Tensor = torch.empty(parameter.shape, dtype=dtype).uniform_(-0.03, 0.03)
        made.load_state_dict({name: weight}, strict=False, assign=True)
    if config.adapter.on:
        names, adapter = matching(made, config.adapter.targets), config.adapter
        made.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        dora, scale = adapter.kind == "dora", scale_of(adapter)
        attach(made, new_changes(made, names, adapter.rank, scale, dora, generator))
    return made


def child(what: str, config: Config) -> dict[str, Any]:
    """In a process of its own: the estimate, or two steps and what they took."""
    keep_freed_memory()
    dataset, precision = Dataset(config.data.dir), "bf16"
    model, placement = resolve_architecture(config, dataset), Placement(CPU, precision)
    if what == "estimate":
        train_set = make_train_set(config, dataset)
        return vars(training_memory(model, config, train_set, placement, drawn=1))
    task = make_task(config, model, precision, dataset, None)
    trainer = Trainer(drawn_model(model, config), task, config, placement, config.train.accumulate)
    begin, clock = peak_memory(CPU), time.perf_counter()
    losses = [trainer.advance().loss for _ in range(2)]
    seconds = (time.perf_counter() - clock) / 2
    moved = sum(p.numel() for p in trainer.parameters)
    trainer.close()
    peak = peak_memory(CPU)
    return {"peak": peak, "before": begin, "seconds": seconds, "losses": losses, "moved": moved}


def in_process(what: str, config: str, way: str, folder: Path) -> dict[str, Any]:
    """What `child` finds."""
    line = [
        sys.executable,
        __file__,
        "steps",
        "--config",
        config,
        "--only",
        way,
        "--child",
        what,
        str(folder),
    ]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_steps(name: str, only: list[str], most: float) -> Iterator[dict[str, Any]]:
    """A row for each way."""
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there)
        drawn_dataset(folder / "data", way_config(name, {}, folder), IMAGES, TOKENS)
        for way in only or WAYS:
            parts = in_process("estimate", name, way, folder)
            row = {"what": f"{name} {way}", "estimate": parts}
            if fits(row, most):
                row |= in_process("measure", name, way, folder)
            yield row


# --- both ---------------------------------------------------------------------------------------


def fits(row: Mapping[str, Any], most: float) -> bool:
    """Whether what is expected fits into the memory that may be taken."""
    free, total = free_memory(CPU), sum(row["estimate"].values())
    return total <= most * 1e9 and (free is None or 1.2 * total <= free)


def printed(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row, and add its ratio."""
    total = sum(row["estimate"].values())
    shown = ", ".join(f"{name} {human_bytes(size)}" for name, size in row["estimate"].items() if size)
    line = f"{row['what']:24} {human_bytes(total):>10}"
    if "peak" not in row:
        print(f"{line}  left out: {shown}", flush=True)
        return row
    ratio = total / row["peak"]
    print(f"{line} {human_bytes(row['peak']):>10} {ratio:6.2f} {row['seconds']:8.1f}  {shown}", flush=True)
    return row | {"ratio": ratio}


def main() -> None:
    """Print a line for each run, or way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["runs", "steps"])
    parser.add_argument("--only", default="", help="configs of runs, or ways of steps; all by default")
    parser.add_argument("--config", default="sana-0.6b", help="of steps")
    parser.add_argument("--precision", default="fp32,bf16", help="of runs")
    parser.add_argument("--most", type=float, default=12, help="gigabytes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    only = [name for name in arguments.only.split(",") if name]
    if arguments.child is not None:
        what, folder = arguments.child
        print(json.dumps(child(what, way_config(arguments.config, WAYS[only[0]], Path(folder)))))
        return
    print(HEADER)
    rows = (
        measure_runs(only, arguments.precision.split(","), arguments.most)
        if arguments.what == "runs"
        else measure_steps(arguments.config, only, arguments.most)
    )
    found = [printed(row) for row in rows]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
