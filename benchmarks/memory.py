"""Measure the memory of training steps beside what `sana train --dry-run` expects.

Each way trains two steps on random latents of 1024 x 1024 pixels, with random weights, on the CPU
in a process of its own, and its largest resident size is compared. The bigger models need many
gigabytes: a way that does not fit into the free memory is left out.

    python benchmarks/memory.py [--only full-adamw,lora] [--config sana-0.6b] [--json FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_cli.adapters import attach, matching, new_changes, scale_of
from sana_cli.config.file import load_config
from sana_cli.config.keys import Architecture, Config
from sana_cli.dataset.match import resolve_architecture
from sana_cli.dataset.reader import Dataset
from sana_cli.model import SanaTransformer, build, is_matrix
from sana_cli.runtime.device import free_memory, keep_freed_memory, peak_memory
from sana_cli.training.estimate import training_memory
from sana_cli.training.task import make_task, make_train_set
from sana_cli.training.trainer import Placement, Trainer
from sana_cli.units import human_bytes

CPU = torch.device("cpu")
IMAGES, TOKENS = 4, 300  # of the dataset, and of each caption
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


def synthetic_dataset(folder: Path, config: Config) -> Dataset:
    """A few random latents with random captions, as `sana embed` would write them."""
    from sana_cli.dataset.writer import DatasetWriter, Images

    height, width = config.data.sample_sides
    channels, dim = config.model.in_channels, config.model.caption_channels
    assert dim is not None
    texts = ["", *(f"caption {n}" for n in range(IMAGES))]
    writer = DatasetWriter(folder, {})
    states = {text: torch.randn(TOKENS, dim).bfloat16() for text in texts}
    shard = writer.write_captions(0, 0, states)
    images = Images(
        pixels=torch.randn(IMAGES, channels, height, width).bfloat16(),
        original_sizes=[config.data.size] * IMAGES,
        sample_ids=[str(n) for n in range(IMAGES)],
        captions=[[text] for text in texts[1:]],
        weights=[None] * IMAGES,
        attributes=[{}] * IMAGES,
        says=[None] * IMAGES,
        names=[],
    )
    writer.write(0, [shard], [images], {text: n for n, text in enumerate(texts)}, [])
    image = {"kind": "latents", "channels": channels, "height": height, "width": width, "factor": 32}
    encoder = {"encoder": "drawn", "architecture": "none", "weights": "", "dtype": "fp32"}
    facts = {"image": image, "caption_dim": dim, "encoder": encoder, "source": {}, "attributes": {}}
    writer.finish(1, texts, facts)
    return Dataset(folder)


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
    task = make_task(config, model, precision, dataset, None)
    if what == "estimate":
        train_set = make_train_set(config, dataset)
        return vars(training_memory(model, config, train_set, placement, 1))
    trainer = Trainer(drawn_model(model, config), task, config, placement, config.train.accumulate)
    begin = peak_memory(CPU)
    clock = time.perf_counter()
    losses = [trainer.advance().loss for _ in range(2)]
    seconds = (time.perf_counter() - clock) / 2
    moved = sum(p.numel() for p in trainer.parameters)
    trainer.close()
    return {
        "peak": peak_memory(CPU),
        "before": begin,
        "seconds": seconds,
        "losses": losses,
        "moved": moved,
    }


def in_process(what: str, config: str, way: str, folder: Path) -> dict[str, Any]:
    """What `child` finds."""
    command = [sys.executable, __file__, "--config", config, "--only", way, "--child", what, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="sana-0.6b")
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    ways = arguments.only.split(",")
    if arguments.child is not None:
        what, folder = arguments.child
        print(json.dumps(child(what, way_config(arguments.config, WAYS[ways[0]], Path(folder)))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there)
        synthetic_dataset(folder / "data", way_config(arguments.config, {}, folder))
        print(
            f"{'config':10} {'way':22} {'estimate':>10} {'measured':>10} {'ratio':>6} {'s/step':>7}  estimated parts"
        )
        for way in ways:
            parts = in_process("estimate", arguments.config, way, folder)
            total, free = sum(parts.values()), free_memory(CPU)
            shown = ", ".join(f"{name} {human_bytes(size)}" for name, size in parts.items() if size)
            line = f"{arguments.config:10} {way:22} {human_bytes(total):>10}"
            if free is not None and total > free:
                print(f"{line}  left out: {human_bytes(free)} are free", flush=True)
                continue
            found = in_process("measure", arguments.config, way, folder)
            ratio = total / found["peak"]
            rows.append({"config": arguments.config, "way": way, "estimate": parts, **found, "ratio": ratio})
            print(
                f"{line} {human_bytes(found['peak']):>10} {ratio:6.2f} {found['seconds']:7.1f}  {shown}",
                flush=True,
            )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
