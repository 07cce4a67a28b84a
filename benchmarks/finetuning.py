"""Teach a small SANA one new thing in several ways; judge what it learned and what it forgot.

The base is trained on critters with every kind of head but crowns. Each way then trains adapters
on the same few pictures of crowns. `sana eval` judges crowns and the other heads.

    OMP_NUM_THREADS=1 python benchmarks/finetuning.py --folder /tmp/finetuning --plot comparison.png

A run takes 4 minutes of one core, and the judgement of a checkpoint half a minute.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from diffusers.training_utils import _collate_lora_metadata
from matplotlib.figure import Figure
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor

from sana_cli import flow
from sana_cli.config.file import load_config, load_run_config
from sana_cli.config.keys import DataConfig, ObjectiveConfig
from sana_cli.dataset.reader import Dataset
from sana_cli.dataset.trainset import SingleDataset
from sana_cli.judging.judge import wilson
from sana_cli.runtime import files
from sana_cli.sources.critters import Critter, Critters
from sana_cli.sources.entry import UNSEEN, Entry
from sana_cli.training.batches import training_batch
from sana_cli.training.objective import RectifiedFlow
from sana_cli.training.optim import average_decay
from sana_cli.weights import checkpoint

NEW = "crown"  # the head that the base never sees
SIDE, BATCH = 32, 8
DRAWN = {"base": 14_000, "judge": 9000, "new": 7000}  # critters; about a seventh have a crown
LORA = "pytorch_lora_weights.safetensors"
TESTED = 300  # pictures of a split test
MARKERS = "osD^vP"  # of the curves


def sana(folder: Path, *arguments: str) -> str:
    """Run `sana ...` in `folder` and return its stdout."""
    command = [sys.executable, "-m", "sana_cli", *arguments]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def sets(**values: Any) -> list[str]:
    """`--set` options of a command, with `__` for the dot."""
    return [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


# --- pictures ---------------------------------------------------------------------------------


def critters(count: int, seed: int) -> Iterator[Entry]:
    """Critters as the package draws them for training."""
    return iter(Critters(DataConfig(source="critters", images=count, seed=seed)))


def is_new(entry: Entry) -> bool:
    """Whether it is what the base never sees."""
    return entry.attributes["head"] == NEW


def row_of(entry: Entry) -> dict[str, Any]:
    """A line of metadata.jsonl: captions, attributes, and which of these each caption names."""
    return {
        "file_name": f"{entry.id}.png",
        "text": list(entry.captions),
        "attributes": dict(entry.attributes),
        "caption_attributes": [sorted(says) for says in entry.says or ()],
    }


def with_one_caption(row: dict[str, Any]) -> dict[str, Any]:
    """The same with the first caption alone, which names everything."""
    return row | {"text": row["text"][:1], "caption_attributes": row["caption_attributes"][:1]}


def write_pictures(folder: Path, entries: Iterable[Entry], change: Any = lambda row: row) -> None:
    """Write pictures and metadata.jsonl, an image folder as users have them."""
    folder.mkdir(parents=True)
    rows = []
    for entry in entries:
        assert isinstance(entry.image, Critter)
        Image.fromarray(entry.image.draw(SIDE, SIDE)).save(folder / f"{entry.id}.png")
        rows.append(json.dumps(change(row_of(entry))))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def make_pictures(folder: Path, new_pictures: int) -> None:
    """Draw the image folders `base`, `new` and `judge`, each with the splits train and test.

    The judge's training set has every head. Its crowns have a caption that names nothing, so
    `sana eval` draws the other heads as "seen"; the crowns of its test split are "unseen".
    """
    base = [entry for entry in critters(DRAWN["base"], seed=0) if not is_new(entry)]
    write_pictures(folder / "base/train", base[:-TESTED])
    write_pictures(folder / "base/test", base[-TESTED:])
    new = [entry for entry in critters(DRAWN["new"], seed=1) if is_new(entry)]
    write_pictures(folder / "new/train", new[:new_pictures])
    write_pictures(folder / "new/test", new[-2 * TESTED : -TESTED])

    def nameless_if_new(row: dict[str, Any]) -> dict[str, Any]:
        whole = with_one_caption(row)
        hidden = {"text": ["a monster"], "caption_attributes": [[]]}
        return whole | hidden if row["attributes"]["head"] == NEW else whole

    def unseen(row: dict[str, Any]) -> dict[str, Any]:
        whole = with_one_caption(row)
        return whole | {"attributes": whole["attributes"] | {UNSEEN: NEW}}

    write_pictures(folder / "judge/train", critters(DRAWN["judge"], seed=2), nameless_if_new)
    write_pictures(folder / "judge/test", new[-TESTED:], unseen)


def embed(folder: Path, name: str) -> None:
    """Embed an image folder, by the config `critters` but for where the pictures are."""
    sana(folder, "embed", "--config", "critters", *data_of(name))


def data_of(name: str) -> list[str]:
    """The options that make the config `critters` read one of the image folders."""
    return sets(
        data__source="folder", data__path=f"pictures/{name}", data__held_out_split="test", data__dir=f"data/{name}"
    )  # fmt: skip


def train_base(folder: Path, steps: int) -> None:
    """Train the base on every head but the new one, if it is not there."""
    if (folder / "runs/base/checkpoints" / checkpoint.step_name(steps)).exists():
        return
    options = sets(train__steps=steps, run__dir="runs/base", save__every=500, log__sample_every=2000)
    sana(folder, "train", "--config", "critters", *data_of("base"), *options, "--resume", "auto")


# --- ways of training -------------------------------------------------------------------------

OURS = load_config("finetune-1.6b")  # for its recipe; model and pictures are small ones


@dataclass(frozen=True)
class Recipe:
    """The settings of `train_in_loop`: by default those of diffusers' SANA script."""

    rank: int = 4
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v")
    weight_decay: float = 1e-4
    warmup: int = 0
    ema_decay: float = 0.0
    objective: ObjectiveConfig | None = None  # None: as the script, without caption dropout
    adapters: torch.dtype = torch.bfloat16  # and their optimizer's


LIKE_OURS = Recipe(
    OURS.adapter.rank, OURS.adapter.targets, OURS.optim.weight_decay, OURS.optim.warmup_steps or 0,
    OURS.optim.ema_decay or 0.0, OURS.objective,
)  # fmt: skip
# False and True: `sana train` without and with old pictures. The others are `train_in_loop`.
# "ours, in diffusers' loop" tells what the loop changes from what bf16 adapters change.
WAYS: dict[str, Recipe | bool] = {
    "ours": False,
    "ours, bf16 adapters": LIKE_OURS,
    "ours, in diffusers' loop": replace(LIKE_OURS, adapters=torch.float32),
    "diffusers' maths": Recipe(),
    "diffusers' maths, float32 adapters": Recipe(adapters=torch.float32),
    "ours, with old pictures": True,
}


def train_ours(folder: Path, run: str, old_pictures: bool, steps: int, every: int, seed: int) -> None:
    """Train adapters on the base by `sana train`, as the config finetune-1.6b has it."""
    recipe = {
        f"{name}__{key}": value
        for name in ("adapter", "optim", "objective")
        for key, value in getattr(OURS, name).model_dump(mode="json", exclude_unset=True).items()
    }
    recipe["optim__warmup_steps"] = min(OURS.optim.warmup_steps or 0, steps // 2)
    options = sets(
        **{key: "null" if value is None else value for key, value in recipe.items()},
        train__init_from="runs/base", train__steps=steps, train__batch_size=BATCH, train__seed=seed,
        train__precision=OURS.train.precision, run__dir=f"runs/{run}", save__every=every, save__keep=1000,
        log__sample_every=steps, log__held_out_every=every,
    )  # fmt: skip
    if old_pictures:  # an epoch has as many of them as new ones
        share = len(Dataset(folder / "data/new")) / len(Dataset(folder / "data/base"))
        options += sets(data__also=f"{{data/base: {share:.4f}}}")
    sana(folder, "train", "--config", "critters", *data_of("new"), *options, "--resume", "auto")


def train_in_loop(folder: Path, run: str, recipe: Recipe, steps: int, every: int, seed: int) -> None:
    """Train as diffusers' examples/dreambooth/train_dreambooth_lora_sana.py computes.

    The script itself needs DC-AE and Gemma. Transformer, adapters and scheduler are diffusers' and
    peft's own; only the loop is written here. The base is cast to bf16. So are the adapters by
    default, since the script leaves them in the base's type. Pictures, captions and noise are
    those that `sana train` draws with this seed.
    """
    base, train_set = newest(folder, "base"), SingleDataset(Dataset(folder / "data/new"), seed)
    torch.manual_seed(seed)
    transformer = SanaTransformer2DModel.from_pretrained(base / "transformer", torch_dtype=torch.bfloat16)
    transformer.requires_grad_(False)
    lora = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.rank,
        init_lora_weights="gaussian",
        target_modules=list(recipe.targets),
    )
    transformer.add_adapter(lora)
    learned = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    for parameter in learned.values():
        parameter.data = parameter.data.to(recipe.adapters)
    average = {name: parameter.detach().float().clone() for name, parameter in learned.items()}
    optimizer = torch.optim.AdamW(
        learned.values(), OURS.optim.lr, betas=(0.9, 0.999), weight_decay=recipe.weight_decay
    )
    # a DPM-Solver's config: its flow_shift is not this scheduler's key, so that the shift is 1
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(base / "scheduler")
    objective = RectifiedFlow(shifted_as_base(folder, recipe.objective), timestep_scale=1.0, precision="bf16")
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = OURS.optim.lr * min(1, (step + 1) / max(1, recipe.warmup))
        batch = training_batch(train_set, objective, seed, np.arange(step * BATCH, (step + 1) * BATCH))
        sigma, timestep = batch.sigma, flow.TRAIN_TIMESTEPS * batch.sigma
        if recipe.objective is None:
            index = (torch.rand(BATCH) * scheduler.config.num_train_timesteps).long()
            sigma, timestep = scheduler.sigmas[index], scheduler.timesteps[index]
        x_0, noise, of_image = batch.x_0.bfloat16(), batch.noise.bfloat16(), batch.caption_index
        with torch.autocast("cpu", torch.bfloat16):  # as accelerate does
            velocity = transformer(
                flow.interpolate(x_0, noise, sigma.bfloat16()), batch.states[of_image].bfloat16(), timestep,
                encoder_attention_mask=batch.mask[of_image],
            ).sample  # fmt: skip
        loss = F.mse_loss(velocity.float(), (noise - x_0).float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in learned.items():
            average[name].lerp_(parameter.detach().float(), 1 - average_decay(recipe.ema_decay, step))
        if (step + 1) % every == 0:
            save_lora(transformer, average, folder / "runs" / run / f"lora-{step + 1}")
            print(f"{run}: step {step + 1}, loss {loss:.4f}", flush=True)


def shifted_as_base(folder: Path, objective: ObjectiveConfig | None) -> ObjectiveConfig:
    """An objective with the base's shift of noise levels; None: one without caption dropout."""
    shift = load_run_config(folder / "runs/base").objective.flow_shift
    return (objective or ObjectiveConfig(caption_dropout=0.0)).model_copy(update={"flow_shift": shift})


def save_lora(transformer: SanaTransformer2DModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write pytorch_lora_weights.safetensors as diffusers does, with these adapter weights."""
    SanaPipeline.save_lora_weights(
        folder,
        get_peft_model_state_dict(transformer, state_dict=transformer.state_dict() | weights),
        **_collate_lora_metadata({"transformer": transformer}),
    )


def merge(folder: Path, run_name: str) -> None:
    """Add each adapter file of a run to the base in float32, by diffusers, for `sana eval`."""
    base, run = newest(folder, "base"), folder / "runs" / run_name
    run.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "runs/base/config.yaml", run / "config.yaml")
    for lora in run.glob("lora-*"):
        target = run / "checkpoints" / checkpoint.step_name(int(lora.name.partition("-")[2]))
        shutil.rmtree(target, ignore_errors=True)  # of a merge that was stopped
        transformer = SanaTransformer2DModel.from_pretrained(base / "transformer")
        transformer.load_lora_adapter(lora, prefix="transformer", weight_name=LORA)
        transformer.fuse_lora()
        transformer.unload_lora()
        replace_weights(base, target, transformer.state_dict())


def replace_weights(source: Path, target: Path, weights: dict[str, Tensor]) -> None:
    """Copy a step folder, with other weights of the same names."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("training", checkpoint.MANIFEST))
    path = Path("transformer/diffusion_pytorch_model.safetensors")
    files.write_tensors(target / path, weights, files.read_metadata(source / path))
    written = sorted(path for path in target.rglob("*") if path.is_file())
    listing = {
        path.relative_to(target).as_posix(): {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
        for path in written
    }
    files.write_sealed_json(target / checkpoint.MANIFEST, {"files": listing})


def newest(folder: Path, run: str) -> Path:
    """The newest step folder of a run."""
    return checkpoint.steps(folder / "runs" / run)[-1]


# --- judging ----------------------------------------------------------------------------------


def judged(folder: Path, step: Path, images: int) -> dict[str, Any]:
    """What `sana eval` says of the new head and of the others; kept beside the step folder."""
    kept = step.parents[1] / f"{step.name}-{images}.json"
    if not kept.exists():
        sana(folder, "eval", str(step), "--data", "data/judge", "--images", str(images), "--out", str(kept))
    (result,) = json.loads(kept.read_text())["results"]
    (new,) = result["unseen"]
    return {"new": shares(new), "others": shares(result)}


def shares(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The shares of pictures with the right head, and with everything right."""
    head = next(share for share in result["attributes"] if share["name"] == "head")
    return {"head": head, "all": result["accuracy"]}


@dataclass(frozen=True)
class Pooled:
    """A share over the runs of all seeds, in per cent."""

    mean: float
    low: float  # Wilson's interval of all pictures together
    high: float
    least: float  # of a run
    most: float

    @staticmethod
    def of(runs: Sequence[dict[str, Any]], kind: str, key: str) -> "Pooled":
        """That of `judged` runs."""
        found = [run[kind][key] for run in runs]
        images = sum(share["images"] for share in found)
        hits = sum(share["accuracy"] * share["images"] for share in found)
        low, high = wilson(hits, images)
        each = [100 * share["accuracy"] for share in found]
        return Pooled(100 * hits / images, 100 * low, 100 * high, min(each), max(each))


Found = Mapping[str, Mapping[int, Sequence[dict[str, Any]]]]  # way, steps, seeds


def table(found: Found) -> str:
    """A markdown table of the shares, in per cent, a row for each way and number of steps."""
    lines = [
        "| way | steps | crowns: head | crowns: all seven | other heads: head | other heads: all seven |",
        "|---|---|---|---|---|---|",
    ]
    for way, points in found.items():
        for step, runs in points.items():
            cells = []
            for kind, key in (("new", "head"), ("new", "all"), ("others", "head"), ("others", "all")):
                share = Pooled.of(runs, kind, key)
                spread = f"; runs {share.least:.0f} to {share.most:.0f}" if len(runs) > 1 else ""
                cells.append(f"{share.mean:.1f} % ({share.low:.0f} to {share.high:.0f}{spread})")
            lines.append(" | ".join((f"| {way}", f"{step}", *cells)) + " |")
    return "\n".join(lines)


def plot(found: Found, start: dict[str, Any], path: Path) -> None:
    """Draw the shares of right heads over the steps, a curve for each way."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    titles = {"new": "Crowns: right head", "others": "Other heads: right head"}
    for panel, (kind, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for number, (way, points) in enumerate(found.items()):
            curve = [Pooled.of(runs, kind, "head") for runs in ([start], *points.values())]
            aside = (
                max(points) * 0.006 * (number - (len(found) - 1) / 2)
            )  # so that bars do not cover each other
            panel.errorbar(
                [step + aside for step in (0, *points)],
                [share.mean for share in curve],
                [[share.mean - share.low for share in curve], [share.high - share.mean for share in curve]],
                marker=MARKERS[number], ms=5, capsize=2, label=way,
            )  # fmt: skip
        panel.set(title=title, xlabel="steps of fine-tuning", ylabel="pictures, %", ylim=(-3, 103))
        panel.grid(alpha=0.3)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=130)


# --- all of it --------------------------------------------------------------------------------


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="work in this folder; what is there already is kept")
    add("--base-steps", type=int, default=3300)
    add("--pictures", type=int, default=200, help="of the new thing")
    add("--steps", type=int, nargs="+", default=[250, 500, 1000, 2000], help="judge after so many")
    add("--seeds", type=int, nargs="+", default=[1, 2], help="a run of each way for each")
    add("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    add("--images", type=int, default=400, help="per judged checkpoint, half of them of the new thing")
    add("--plot", type=Path, help="a .png to draw")
    return parser.parse_args(arguments)


def run_name(way: str, seed: int) -> str:
    """The name of the run of a way and a seed."""
    return "-".join(re.findall(r"\w+", way)) + f"-{seed}"


def train(folder: Path, way: str, seed: int, steps: int, every: int) -> Path:
    """Train a way if its last checkpoint is not there; give the folder of its checkpoints."""
    recipe, run = WAYS[way], run_name(way, seed)
    checkpoints = folder / "runs" / run / "checkpoints"
    if not (checkpoints / checkpoint.step_name(steps)).exists():
        if isinstance(recipe, Recipe):
            train_in_loop(folder, run, recipe, steps, every, seed)
            merge(folder, run)
        else:
            train_ours(folder, run, recipe, steps, every, seed)
    return checkpoints


def main() -> None:
    """Draw, embed and train what is not there yet, judge all of it, and print the table."""
    options = options_of()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder, last, every = options.folder.absolute(), max(options.steps), math.gcd(*options.steps)
    if not (folder / "pictures").exists():
        shutil.rmtree(folder / "pictures.partial", ignore_errors=True)
        make_pictures(folder / "pictures.partial", options.pictures)
        (folder / "pictures.partial").rename(folder / "pictures")
    for name in ("base", "new", "judge"):
        if not (folder / "data" / name).exists():
            embed(folder, name)
    train_base(folder, options.base_steps)
    start = judged(folder, newest(folder, "base"), options.images)
    found: dict[str, dict[int, list[dict[str, Any]]]] = {"the base": {0: [start]}}
    for way in options.ways:
        found[way] = {step: [] for step in options.steps}
        for seed in options.seeds:
            checkpoints = train(folder, way, seed, last, every)
            for step, runs in found[way].items():
                runs.append(judged(folder, checkpoints / checkpoint.step_name(step), options.images))
    print(table(found))
    if options.plot:
        plot({way: found[way] for way in options.ways}, start, options.plot)


if __name__ == "__main__":
    main()
