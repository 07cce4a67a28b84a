"""`sana eval`: how good a checkpoint's pictures are, or a folder's, by a judge trained on the dataset's labels. It prints nothing.

Prompt accuracy, Fréchet distance and diversity within a caption, at one setting of the solver or at many.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana_cli import __version__
from sana_cli.choices import Precision, Solver, Weights
from sana_cli.config.file import DEFAULT_CONFIG, load_config
from sana_cli.config.keys import SampleConfig
from sana_cli.dataset.layout import held_out_dir, is_dataset
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.judging import judge, plots
from sana_cli.judging.judge import Judge, JudgeStep, Verdict
from sana_cli.runtime import files, outputs
from sana_cli.runtime.device import resolve_device, resolve_precision
from sana_cli.sampling import pictures, sampler
from sana_cli.sampling.pipeline import Pipeline, given_settings, open_pipeline
from sana_cli.sources import BadImage, decode_image, fit_image
from sana_cli.text import as_of_today, check_same_encoder
from sana_cli.weights import checkpoint

SWEEP_STEPS = (4, 6, 8, 12, 20)
SWEEP_GUIDANCE = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class EvalOptions:
    """What to judge. Several steps, scales or solvers are judged in every combination; empty: as the checkpoint has it."""

    target: Path | None = None  # a run, a step folder, or a folder of pictures; None: the newest checkpoint under runs/
    data: Path | None = None  # the dataset directory; None: that of the run's config
    images: int = 10_000  # drawn at each setting, of captions as frequent as in the dataset
    steps: tuple[int, ...] = ()
    guidance_scale: tuple[float, ...] = ()
    solver: tuple[Solver, ...] = ()
    guidance_interval: tuple[float, float] | None = None
    flow_shift: float | None = None
    sweep: bool = False  # over `SWEEP_STEPS`, `SWEEP_GUIDANCE` and the checkpoint's own, where steps and scales are not given
    seed: int = 0
    weights: Weights = "ema"
    device: str = "auto"
    precision: Precision | None = None
    out: str | Path | None = None  # a JSON file; a folder, or a path that ends in a slash: there, by its own name
    plot: str | Path | None = None  # a PNG, SVG or PDF file, as `out`


@dataclass(frozen=True)
class EvalStep:
    """Progress: "judge" (its training, in batches), or "draw" (solver steps over all batches and settings)."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class EvalResult:
    """What was found at one setting."""

    settings: SampleConfig | None  # None: pictures that were there
    seconds: float  # of drawing
    images: int
    verdict: Verdict


@dataclass(frozen=True)
class EvalSummary:
    """All results, and what they are measured by."""

    target: Path
    dataset: Path
    judge_accuracy: float  # on real images that the judge was not trained on
    real_images: int  # how many of these there are
    results: tuple[EvalResult, ...]
    saved: tuple[Path, ...]


def _dataset(options: EvalOptions, place: Path | None) -> tuple[Dataset, Dataset | None]:
    """The dataset to judge by, and its held-out part where there is one."""
    run = None if place is None else place.absolute().parents[1] / "config.yaml"
    config = load_config(str(run) if run is not None and run.is_file() else DEFAULT_CONFIG)
    directory = options.data or config.data.dir
    if not is_dataset(directory):
        raise SanaError(
            f"no dataset in {directory}: the judge learns from its images and labels",
            "make one with: sana embed (with the same --config), or name another with --data DIR",
        )
    split = config.data.held_out
    there = None if split is None else held_out_dir(directory, split)
    return Dataset(directory), Dataset(there) if there is not None and is_dataset(there) else None


def _settings(options: EvalOptions, pipeline: Pipeline) -> list[SampleConfig]:
    base = pipeline.sample.model_dump() | {"seed": options.seed}
    for key in ("guidance_interval", "flow_shift"):
        if getattr(options, key) is not None:
            base[key] = getattr(options, key)
    own_steps, own_scale = base["steps"], base["guidance_scale"]
    steps = options.steps or (sorted({*SWEEP_STEPS, own_steps}) if options.sweep else (own_steps,))
    scales = options.guidance_scale or (sorted({*SWEEP_GUIDANCE, own_scale}) if options.sweep else (own_scale,))
    return [
        given_settings(pipeline, base, {"solver": solver, "steps": count, "guidance_scale": scale})
        for solver, count, scale in itertools.product(options.solver or (base["solver"],), steps, scales)
    ]


def evaluate(options: EvalOptions) -> Iterator[EvalStep | EvalSummary]:
    """Judge; yields progress, and at the end an `EvalSummary`.

    Raises:
        SanaError: no checkpoint or dataset, one without labels, or two that do not belong together.
    """
    if options.images < 2:
        raise SanaError("--images: at least 2 are needed", exit_code=2)
    out = None if options.out is None else outputs.output("--out", options.out, "eval.json", outputs.DOCUMENTS)
    plot = None if options.plot is None else outputs.output("--plot", options.plot, "eval.png", outputs.PLOTS)
    outputs.check_distinct([("--out", out), ("--plot", plot)], [("the target", options.target)])
    if plot is not None:
        plots.check_matplotlib()
    try:
        unfinished = _unfinished(out)
    except OSError as error:
        raise files.storage_error(error, f"writing {out}") from error
    device = resolve_device(options.device)
    folder = options.target if options.target is not None and _is_pictures(options.target) else None
    place = None if folder is not None else checkpoint.find_checkpoint(options.target)
    dataset, held_out = _dataset(options, place)
    meaning = judge.labels_of_captions(dataset)
    source: Iterator[tuple[SampleConfig | None, float, Tensor, Sequence[str]] | EvalStep]
    if folder is not None:
        source, target = _pictures(folder, dataset, meaning), folder
    else:
        assert place is not None, "a folder of pictures or a checkpoint"
        pipeline = open_pipeline(place)
        if pipeline.fingerprint is None:
            raise SanaError(f"{place} does not say how its captions were encoded; sana eval is for checkpoints of sana's own")
        recorded, drawn_by = (as_of_today(one, dataset.texts()) for one in (dataset.index["encoder"], pipeline.fingerprint))
        check_same_encoder(recorded, drawn_by, str(dataset.directory), "give its own with --data DIR")
        if pipeline.sample_shape != dataset.image_shape:
            raise SanaError(f"{place} draws {pipeline.sample_shape}, and {dataset.directory} has {dataset.image_shape}")
        source = _drawn(options, place, pipeline, dataset, meaning, _settings(options, pipeline), device)
        target = place
    found: Judge | None = None
    for step in judge.obtain(dataset, held_out, device):
        if isinstance(step, JudgeStep):
            yield EvalStep("judge", step.done, step.total)
        else:
            found = step
    assert found is not None, "the last thing that obtain yields"
    summary = EvalSummary(target, dataset.directory, found.accuracy, len(found.real), (), ())
    for drawn in source:
        if isinstance(drawn, EvalStep):
            yield drawn
            continue
        settings, seconds, pixels, captions = drawn
        result = EvalResult(settings, seconds, len(pixels), judge.give(found, pixels, captions, meaning))
        summary = replace(summary, results=(*summary.results, result))
        if unfinished is not None:  # what there is so far: a sweep may take hours, and may be stopped or killed
            _save(summary, unfinished)
    try:
        if out is not None:
            _save(summary, out)
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)
        if plot is not None:
            plots.evaluation(record(summary), plot)
    except OSError as error:
        raise files.storage_error(error, "writing what was found") from error
    yield replace(summary, saved=tuple(path for path in (out, plot) if path is not None))


def _unfinished(out: Path | None) -> Path | None:
    """Where the results of a sweep are until all are there; what `out` held before stays so long. A pipe is told the end only."""
    real = None if out is None else files.regular_file(out)
    return None if real is None else real.with_name(real.name + ".unfinished")


def _save(summary: EvalSummary, path: Path) -> None:
    try:
        with files.whole_file(path) as partial:
            files.write_text(partial, files.json_text(record(summary)))
    except OSError as error:
        raise files.storage_error(error, f"writing {path}") from error


def _is_pictures(target: Path) -> bool:
    """A folder with pictures in it that is no run and no checkpoint, which may hold some as well."""
    if any((target / name).exists() for name in ("checkpoints", "transformer", "config.json")):
        return False
    return target.is_dir() and any(path.suffix.lower() in PICTURES for path in (*target.glob("*"), *target.glob("*/*")))


def _drawn(
    options: EvalOptions,
    place: Path,
    pipeline: Pipeline,
    dataset: Dataset,
    meaning: Mapping[str, int],
    settings: Sequence[SampleConfig],
    device: torch.device,
) -> Iterator[tuple[SampleConfig, float, Tensor, Sequence[str]] | EvalStep]:
    """For each of `settings`: it, the seconds, the pictures (n, C, H, W) uint8, and their captions. Progress in between."""
    precision = resolve_precision(options.precision or pipeline.precision, device)
    model = checkpoint.load_transformer(place, options.weights, device)
    known = dataset.texts()
    meant = [number for number, text in enumerate(known) if text in meaning]
    states = {known[number]: dataset.states([number])[0] for number in meant}
    null = dataset.states([dataset.index["null_caption"]])[0]
    captions = [known[number] for number in _as_frequent(dataset, meant, options.images)]
    seeds = range(options.seed, options.seed + len(captions))
    shape = pipeline.sample_shape
    every = sum(setting.steps for setting in settings)
    before = 0
    for setting in settings:
        start, pixels = time.perf_counter(), {}
        given = [states[caption] for caption in captions]
        try:
            for step in sampler.sample_images(model, given, [null] * len(given), seeds, shape, setting, precision):
                if step.done % setting.steps == 0:
                    pixels[step.first] = sampler.to_pixels(step.images)
                yield EvalStep("draw", before + step.done * setting.steps // step.total, every)
        except sampler.NoRoomError as error:
            raise SanaError(str(error), "judge it on another device: --device cpu") from error
        before += setting.steps
        yield setting, time.perf_counter() - start, torch.cat([pixels[first] for first in sorted(pixels)]), captions


def _as_frequent(dataset: Dataset, captions: Sequence[int], count: int) -> list[int]:
    """`count` of the captions (their numbers), each as often as training draws it, within one.

    What a Fréchet distance compares is then whole: real digits, taken in even numbers of each, are 0.2 further from MNIST's own.
    """
    shares = np.zeros(len(dataset.texts()))
    every = np.arange(len(dataset))
    for ids, weights in zip(dataset.caption_ids(every), dataset.caption_weights(every), strict=True):
        given = np.array(weights if weights is not None else [1.0] * len(ids))
        np.add.at(shares, ids, given / given.sum())
    chosen = shares[list(captions)]
    places = np.searchsorted(chosen.cumsum() / chosen.sum(), (np.arange(count) + 0.5) / count)
    return [captions[place] for place in places]


def _pictures(folder: Path, dataset: Dataset, meaning: Mapping[str, int]) -> Iterator[tuple[None, float, Tensor, Sequence[str]]]:
    """The pictures of a folder: each says its prompt (as `sana sample --separate` writes it), or lies in a folder of that name."""
    channels, height, width = dataset.image_shape
    images, captions = [], []
    for path in sorted(p for p in (*folder.glob("*"), *folder.glob("*/*")) if p.suffix.lower() in PICTURES):
        prompt = _prompt(path, folder)
        if prompt not in meaning:
            some = ", ".join(map(repr, list(meaning)[:4]))
            raise SanaError(
                f"{path}: its caption is {prompt!r}, which is none of {dataset.directory}",
                f"a picture's caption is what sana sample --separate wrote into it, or its folder's name; there are {some}, ...",
            )
        try:
            image = decode_image(path.read_bytes())
        except (BadImage, OSError) as error:
            raise SanaError(f"{path}: {error}") from error
        if image.size != (width, height):
            raise SanaError(
                f"{path} is {image.width}x{image.height}; {dataset.directory} has {width}x{height}",
                "single images are judged, not grids: sana sample --separate DIR",
            )
        images.append(torch.tensor(fit_image(image, (height, width), channels)))
        captions.append(str(prompt))
    yield None, 0.0, torch.stack(images), captions


def _prompt(path: Path, folder: Path) -> str | None:
    try:
        prompts = [image["prompt"] for row in pictures.read_record(path)["images"] for image in row]
        return prompts[0] if len(prompts) == 1 else None
    except (SanaError, KeyError, TypeError):
        return path.parent.name if path.parent != folder else None


def record(summary: EvalSummary) -> dict[str, Any]:
    """A summary as plain JSON values: what `--json` prints and `--out` keeps."""

    def share(found: judge.Share) -> dict[str, Any]:
        low, high = found.interval
        return {"name": found.name, "accuracy": found.accuracy, "low": low, "high": high, "images": found.count}

    results = []
    for result in summary.results:
        verdict, settings = result.verdict, result.settings
        told = None
        if settings is not None:
            told = settings.model_dump(mode="json", exclude={"prompts"})
        results.append(
            {
                "settings": told,
                "images": result.images,
                "seconds": result.seconds,
                "accuracy": share(verdict.total),
                "frechet_distance": verdict.distance,
                "frechet_distance_spread": verdict.distance_spread,
                "real_frechet_distance": verdict.real_distance,
                "diversity": verdict.diversity,
                "captions": [share(found) for found in verdict.captions],
                "labels": [share(found) for found in verdict.labels],
            }
        )
    return {
        "made_by": f"sana {__version__}",
        "target": str(summary.target),
        "dataset": str(summary.dataset),
        "judge": {"accuracy": summary.judge_accuracy, "real_images": summary.real_images},
        "results": results,
    }
