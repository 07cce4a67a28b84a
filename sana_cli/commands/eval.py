"""`sana eval`: judge the pictures of a checkpoint or a folder.

The judge is a classifier trained on the dataset's labels. It finds prompt accuracy, Fréchet
distance and diversity within a caption, at one setting of the solver or at many. It prints
nothing.
"""

import itertools
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana_cli import __version__
from sana_cli.choices import Precision, Solver, Weights
from sana_cli.config.file import RUN_CONFIG, load_config, load_run_config
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
from sana_cli.text import check_same_encoder, upgrade_fingerprint
from sana_cli.weights import checkpoint

SWEEP_STEPS = (4, 6, 8, 12, 20)
SWEEP_GUIDANCE = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class EvalOptions:
    """What to judge: every combination of steps, scales and solvers.

    Empty or `None`: as the checkpoint has it.
    """

    target: Path | None = None  # a run, a step folder or pictures; None: the newest run
    data: Path | None = None  # the dataset directory; None: that of the run's config
    images: int = 10_000  # drawn at each setting, of captions as frequent as in the dataset
    steps: tuple[int, ...] = ()
    guidance_scale: tuple[float, ...] = ()
    solver: tuple[Solver, ...] = ()
    guidance_interval: tuple[float, float] | None = None
    flow_shift: float | None = None
    sweep: bool = False  # steps and scales not given are `SWEEP_...` and the checkpoint's own
    seed: int = 0
    weights: Weights = "ema"
    device: str = "auto"
    precision: Precision | None = None
    out: str | Path | None = None  # a JSON file, or a folder (or DIR/) for one
    plot: str | Path | None = None  # a PNG, SVG or PDF file, as `out`


@dataclass(frozen=True)
class EvalStep:
    """Progress: "judge" (batches of its training), or "draw" (solver steps of all settings)."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class EvalResult:
    """The results of one setting."""

    settings: SampleConfig | None  # None: pictures from a folder
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
    run = None if place is None else place.absolute().parents[1]
    config = load_run_config(run) if run is not None and (run / RUN_CONFIG).is_file() else load_config(None)
    directory = options.data or config.data.dir
    if not is_dataset(directory):
        raise SanaError(
            f"no dataset in {directory}: the judge learns from its images and labels",
            "make one with: sana embed (with the same --config), or name another with `data` DIR",
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
    scales = options.guidance_scale or (
        sorted({*SWEEP_GUIDANCE, own_scale}) if options.sweep else (own_scale,)
    )
    return [
        given_settings(pipeline, base, {"solver": solver, "steps": count, "guidance_scale": scale})
        for solver, count, scale in itertools.product(options.solver or (base["solver"],), steps, scales)
    ]


def evaluate(options: EvalOptions) -> Iterator[EvalStep | EvalSummary]:
    """Judge; yields progress, and at the end an `EvalSummary`.

    Raises:
        SanaError: no checkpoint or dataset, a dataset without labels, or a checkpoint of
            another dataset.
    """
    to = _outputs(options)
    device = resolve_device(options.device)
    folder = options.target if options.target is not None and _is_pictures(options.target) else None
    place = checkpoint.find_checkpoint(options.target) if folder is None else folder
    dataset, held_out = _dataset(options, None if folder else place)
    meaning = judge.labels_of_captions(dataset)
    source: Iterator[_Pictures | EvalStep]
    if folder is not None:
        source = _read(folder, dataset, meaning)
    else:
        pipeline = _open_own(place, dataset)
        source = _draw(options, pipeline, dataset, meaning, _settings(options, pipeline), device)
    trained = yield from _judge(dataset, held_out, device)
    summary = EvalSummary(place, dataset.directory, trained.accuracy, len(trained.real), (), ())
    for item in source:
        if isinstance(item, EvalStep):
            yield item
            continue
        verdict = judge.verdict_on(trained, item.pixels, item.captions, meaning)
        result = EvalResult(item.settings, item.seconds, len(item.pixels), verdict)
        summary = replace(summary, results=(*summary.results, result))
        if to.unfinished is not None:  # a sweep may take hours, and may be stopped or killed
            _save(summary, to.unfinished)
    _write(summary, to)
    yield replace(summary, saved=tuple(path for path in (to.results, to.plot) if path is not None))


# --- what is judged, and where results go -----------------------------------------------------


@dataclass(frozen=True)
class _Outputs:
    """The files that will be written."""

    results: Path | None
    unfinished: Path | None  # the results so far, until all are there
    plot: Path | None


@dataclass(frozen=True)
class _Pictures:
    """Pictures that are judged together."""

    settings: SampleConfig | None  # None: pictures from a folder
    seconds: float  # of drawing
    pixels: Tensor  # (n, C, H, W) uint8
    captions: Sequence[str]  # n


def _outputs(options: EvalOptions) -> _Outputs:
    """Where results go.

    Raises:
        SanaError: a suffix is unknown, an output is another or the target, or matplotlib is
            missing.
    """
    if options.images < 2:
        raise SanaError("`images`: at least 2 are needed", exit_code=2)
    out = (
        None if options.out is None else outputs.output("`out`", options.out, "eval.json", outputs.DOCUMENTS)
    )
    plot = None if options.plot is None else outputs.output("`plot`", options.plot, "eval.png", outputs.PLOTS)
    outputs.check_distinct([("`out`", out), ("`plot`", plot)], [("the target", options.target)])
    if plot is not None:
        plots.check_matplotlib()
    try:
        return _Outputs(out, _unfinished(out), plot)
    except OSError as error:
        raise files.storage_error(error, f"writing {out}") from error


def _judge(
    dataset: Dataset, held_out: Dataset | None, device: torch.device
) -> Generator[EvalStep, None, Judge]:
    """The judge of a dataset, trained if there is none yet; yields progress."""
    found: Judge | None = None
    for step in judge.load_or_train(dataset, held_out, device):
        if isinstance(step, JudgeStep):
            yield EvalStep("judge", step.done, step.total)
        else:
            found = step
    assert found is not None, "load_or_train yields it last"
    return found


def _open_own(place: Path, dataset: Dataset) -> Pipeline:
    """The pipeline of a checkpoint, which must be of the dataset's encoder and image shape."""
    pipeline = open_pipeline(place)
    if pipeline.fingerprint is None:
        raise SanaError(
            f"{place} does not say how its captions were encoded; sana eval is for checkpoints of sana's own"
        )
    recorded, drawn_by = (
        upgrade_fingerprint(one, dataset.texts())
        for one in (dataset.index.encoder.as_json(), pipeline.fingerprint)
    )
    check_same_encoder(recorded, drawn_by, str(dataset.directory), "give its own with `data` DIR")
    if pipeline.sample_shape != dataset.image_shape:
        raise SanaError(
            f"{place} draws {pipeline.sample_shape}, and {dataset.directory} has {dataset.image_shape}"
        )
    return pipeline


def _write(summary: EvalSummary, to: _Outputs) -> None:
    """Write results and plot where wanted, and remove the unfinished results."""
    try:
        if to.results is not None:
            _save(summary, to.results)
        if to.unfinished is not None:
            to.unfinished.unlink(missing_ok=True)
        if to.plot is not None:
            plots.evaluation(record(summary), to.plot)
    except OSError as error:
        raise files.storage_error(error, "writing the results") from error


def _unfinished(out: Path | None) -> Path | None:
    """The file beside `out` for the results so far. None: `out` is a pipe."""
    real = None if out is None else files.regular_file(out)
    return None if real is None else real.with_name(real.name + ".unfinished")


def _save(summary: EvalSummary, path: Path) -> None:
    try:
        with files.whole_file(path) as partial:
            files.write_text(partial, files.json_text(record(summary)))
    except OSError as error:
        raise files.storage_error(error, f"writing {path}") from error


def _is_pictures(target: Path) -> bool:
    """Whether the target is a folder with pictures that is neither a run nor a checkpoint."""
    if any((target / name).exists() for name in ("checkpoints", "transformer", "config.json")):
        return False
    return target.is_dir() and any(
        path.suffix.lower() in PICTURES for path in (*target.glob("*"), *target.glob("*/*"))
    )


def _draw(
    options: EvalOptions,
    pipeline: Pipeline,
    dataset: Dataset,
    meaning: Mapping[str, int],
    settings: Sequence[SampleConfig],
    device: torch.device,
) -> Iterator[_Pictures | EvalStep]:
    """Draw pictures at each of `settings`; yields progress in between."""
    precision = resolve_precision(options.precision or pipeline.precision, device)
    model = checkpoint.load_transformer(pipeline.place, options.weights, device)
    known = dataset.texts()
    meant = [number for number, text in enumerate(known) if text in meaning]
    states = {known[number]: dataset.states([number])[0] for number in meant}
    null = dataset.states([dataset.index.null_caption])[0]
    captions = [known[number] for number in _as_frequent(dataset, meant, options.images)]
    seeds = range(options.seed, options.seed + len(captions))
    every = sum(setting.steps for setting in settings)
    before = 0
    for setting in settings:
        start, pixels = time.perf_counter(), {}
        given = [states[caption] for caption in captions]
        recipe = sampler.Recipe(setting, pipeline.sample_shape, pipeline.prediction_type, precision)
        try:
            for step in sampler.sample_images(model, given, [null] * len(given), seeds, recipe):
                if step.done % setting.steps == 0:
                    pixels[step.first] = sampler.to_pixels(step.images)
                yield EvalStep("draw", before + step.done * setting.steps // step.total, every)
        except sampler.NoRoomError as error:
            raise SanaError(str(error), "judge it on another device: `device` cpu") from error
        before += setting.steps
        drawn = torch.cat([pixels[first] for first in sorted(pixels)])
        yield _Pictures(setting, time.perf_counter() - start, drawn, captions)


def _as_frequent(dataset: Dataset, captions: Sequence[int], count: int) -> list[int]:
    """Choose `count` of the captions (their numbers), as often as training draws each.

    Other frequencies raise the Fréchet distance: real digits in even numbers of each are 0.2
    further from all of MNIST.
    """
    shares = np.zeros(len(dataset.texts()))
    every = np.arange(len(dataset))
    for ids, weights in zip(dataset.caption_ids(every), dataset.caption_weights(every), strict=True):
        given = np.array(weights if weights is not None else [1.0] * len(ids))
        np.add.at(shares, ids, given / given.sum())
    chosen = shares[list(captions)]
    places = np.searchsorted(chosen.cumsum() / chosen.sum(), (np.arange(count) + 0.5) / count)
    return [captions[place] for place in places]


def _read(folder: Path, dataset: Dataset, meaning: Mapping[str, int]) -> Iterator[_Pictures]:
    """Read the pictures of a folder.

    A picture's caption is its recorded prompt (as `sana sample --separate` writes it), or the
    name of the folder it is in.
    """
    channels, height, width = dataset.image_shape
    images, captions = [], []
    for path in sorted(p for p in (*folder.glob("*"), *folder.glob("*/*")) if p.suffix.lower() in PICTURES):
        prompt = _prompt(path, folder)
        if prompt not in meaning:
            some = ", ".join(map(repr, list(meaning)[:4]))
            raise SanaError(
                f"{path}: its caption is {prompt!r}, which is none of {dataset.directory}",
                f"a picture's caption is what sana sample --separate wrote into it, or its folder's name; "
                f"there are {some}, ...",
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
    yield _Pictures(None, 0.0, torch.stack(images), captions)


def _prompt(path: Path, folder: Path) -> str | None:
    try:
        prompts = [image.prompt for image in pictures.read_record(path).cells]
        return prompts[0] if len(prompts) == 1 else None
    except SanaError:
        return path.parent.name if path.parent != folder else None


def record(summary: EvalSummary) -> dict[str, Any]:
    """A summary as plain JSON values: what `--json` prints and `out` keeps.

    It is a file format. Its keys say in full what the fields of `Verdict` say in short, and
    they stay when these change.
    """

    def share(found: judge.Share) -> dict[str, Any]:
        low, high = found.interval
        return {
            "name": found.name,
            "accuracy": found.accuracy,
            "low": low,
            "high": high,
            "images": found.count,
        }

    results = []
    for result in summary.results:
        verdict, settings = result.verdict, result.settings
        results.append(
            {
                "settings": None
                if settings is None
                else settings.model_dump(mode="json", exclude={"prompts"}),
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
