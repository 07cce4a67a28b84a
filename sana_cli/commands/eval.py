"""`sana eval`: judge the pictures of a checkpoint or a folder.

The judge is a classifier trained on the dataset's attributes, or a matcher of its pictures and
captions. It finds prompt accuracy, Fréchet distance and diversity within a caption, at one
setting of the solver or at many, and of other checkpoints beside it. It prints nothing.
"""

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sana_cli import __version__
from sana_cli.choices import JudgedBy, Precision, Solver, Weights
from sana_cli.config.file import RUN_CONFIG, load_config, load_run_config
from sana_cli.config.keys import Config, SampleConfig
from sana_cli.dataset.layout import held_out_dir, is_dataset
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.judging import judge, plots, retrieval
from sana_cli.judging.asked import Drawn, Prompts, every_caption, judged_attributes, prompts_of, unseen_kinds
from sana_cli.judging.judge import Judge, JudgeStep, Share
from sana_cli.judging.matching import Matching
from sana_cli.judging.retrieval import Matcher
from sana_cli.judging.verdict import Reading, Swap, Verdict, pooled, real_readings, verdict_on
from sana_cli.runtime import files, outputs
from sana_cli.runtime.device import resolve_device, resolve_precision
from sana_cli.sampling import pictures, sampler
from sana_cli.sampling.pipeline import Pipeline, check_few_step, given_settings, open_pipeline
from sana_cli.sources import BadImage, decode_image, fit_image
from sana_cli.text import check_same_encoder
from sana_cli.weights import checkpoint
from sana_cli.weights.reader import read_weights

SWEEP_STEPS = (4, 6, 8, 12, 20)
SWEEP_FEW_STEPS = (1, 2, 3, 4)  # of a few-step model
SWEEP_GUIDANCE = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
TEACHER = "teacher"  # in place of a path: the checkpoint that the target was distilled from
LESS_DIVERSITY = 0.2  # a student with this share less than its teacher has collapsed
DIVERSITY_SPREAD = 1.7  # relative, over seeds, times the root of the number of pictures; measured on digits
J = TypeVar("J", Judge, Matcher)
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class EvalOptions:
    """What to judge: every combination of steps, scales and solvers.

    Empty or `None`: as the checkpoint has it. Settings and weights are for the target; other
    checkpoints have their own.
    """

    target: Path | None = None  # a run, a step folder or pictures; None: the newest run
    beside: tuple[Path, ...] = ()  # other checkpoints, by path or as `TEACHER`
    data: Path | None = None  # the dataset directory; None: that of the checkpoint's config
    by: JudgedBy = "auto"  # auto: by attributes where there are any that can be judged, else by captions
    images: int = 10_000  # drawn at each setting; half of captions of unseen kinds, where there are any
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
    """The results of a checkpoint at one setting."""

    checkpoint: Path | None  # None: pictures from a folder
    settings: SampleConfig | None  # None: pictures from a folder
    seconds: float  # of drawing
    images: int
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """A student beside its teacher, each at its own settings."""

    student: EvalResult
    teacher: EvalResult

    @property
    def collapsed(self) -> bool:
        """Whether the student's diversity is clearly below the teacher's.

        Clearly is by a fifth, and by more than chance.
        """
        student, teacher = self.student.verdict, self.teacher.verdict
        if not student.seen.total.count:
            return False
        # two standard deviations of a difference
        chance = 2 * DIVERSITY_SPREAD * math.sqrt(2 / student.seen.total.count)
        return student.diversity < (1 - max(LESS_DIVERSITY, chance)) * teacher.diversity


@dataclass(frozen=True)
class EvalSummary:
    """All results, and what they are measured by."""

    target: Path
    dataset: Path
    by: JudgedBy  # attributes or captions
    real: tuple[Reading, ...]  # of real images that the judge was not trained on, by kind
    notes: tuple[str, ...]  # attributes that are not judged, and checkpoints named twice
    results: tuple[EvalResult, ...]  # of the target first
    saved: tuple[Path, ...]
    comparison: Comparison | None = None  # where the target's teacher is among the results

    @property
    def names(self) -> dict[Path, str]:
        """What a table calls the checkpoints: their runs, with steps if these do not differ."""
        return _names({result.checkpoint for result in self.results if result.checkpoint is not None})


def _dataset(options: EvalOptions, place: Path | None) -> tuple[Dataset, Dataset | None]:
    """The dataset to judge by, and its held-out part where there is one."""
    data = (load_config(None) if place is None else _config_of(place)).data
    directory = options.data or data.dir
    if not is_dataset(directory):
        raise SanaError(
            f"no dataset in {directory}: the judge learns from its images and labels",
            "make one with: sana embed (with the same --config), or name another with `data` DIR",
        )
    there = None if data.held_out is None else held_out_dir(directory, data.held_out)
    dataset = Dataset(directory)
    if dataset.index.image.kind != "pixels":
        raise SanaError(
            f"{directory} holds latents; sana eval judges pixels", "embed it without data.autoencoder"
        )
    held_out = Dataset(there) if there is not None and is_dataset(there) else None
    shapes = {shape: one.directory for one in (dataset, held_out) if one is not None for shape in one.shapes}
    if len(shapes) > 1:
        _, height, width = list(shapes)[-1]
        raise SanaError(
            f"{directory}{'' if held_out is None else f', {there}'}: images of {len(shapes)} shapes, "
            f"one of them {height}x{width}; sana eval judges images of one shape",
            "embed them without data.buckets, and judge by that with `data` DIR",
        )
    return dataset, held_out


def _config_of(place: Path) -> Config:
    """The config of a checkpoint's run, or of the shipped name."""
    run = place.absolute().parents[1]
    if (run / RUN_CONFIG).is_file():
        return load_run_config(run)
    return load_config(checkpoint.config_of_shipped(place) if checkpoint.is_shipped(place) else None)


def _prompts(
    options: EvalOptions, dataset: Dataset, held_out: Dataset | None
) -> tuple[JudgedBy, list[Prompts], tuple[str, ...]]:
    """What pictures are judged by, the captions that they may have, and notes.

    Raises:
        SanaError: nothing in the dataset says what a picture should show.
    """
    attributes, notes = judged_attributes(dataset)
    if options.by != "captions" and attributes:
        return "attributes", prompts_of(dataset, held_out, attributes), notes
    if options.by != "attributes" and (every := every_caption(dataset)) is not None:
        return "captions", [every], ()
    lacks = {
        "auto": "attributes, nor captions that differ",
        "attributes": "attributes",
        "captions": "captions that differ",
    }
    raise SanaError(
        f"{dataset.directory} has no {lacks[options.by]}, so nothing says what a picture should show",
        *notes,
        "sana eval needs a dataset whose source has classes (mnist, idx files with labels, a folder with a "
        "sub-folder for each class), attributes in its metadata, or captions that differ (`by` captions)",
    )


def _settings(options: EvalOptions, pipeline: Pipeline) -> list[SampleConfig]:
    """Every combination of settings for the target.

    Raises:
        SanaError: a setting is wrong, or has no meaning for a few-step model.
    """
    base = pipeline.sample.model_dump() | {"seed": options.seed}
    check_few_step(
        pipeline, {"flow_shift": options.flow_shift, "guidance_interval": options.guidance_interval}
    )
    for key in ("guidance_interval", "flow_shift"):
        if getattr(options, key) is not None:
            base[key] = getattr(options, key)
    steps, scales = {base["steps"]}, {base["guidance_scale"]}
    if options.sweep and pipeline.model.guidance_embeds:
        low, high = checkpoint.learned_guidance(pipeline.place) or (-math.inf, math.inf)
        steps.update(SWEEP_FEW_STEPS)
        scales.update(scale for scale in SWEEP_GUIDANCE if low <= scale <= high)  # others it never learned
    elif options.sweep:
        steps.update(SWEEP_STEPS)
        scales.update(SWEEP_GUIDANCE)
    return [
        given_settings(pipeline, base, {"solver": solver, "steps": count, "guidance_scale": scale})
        for solver, count, scale in itertools.product(
            options.solver or (base["solver"],),
            options.steps or sorted(steps),
            options.guidance_scale or sorted(scales),
        )
    ]


def evaluate(options: EvalOptions) -> Iterator[EvalStep | EvalSummary]:
    """Judge; yields progress, and at the end an `EvalSummary`.

    Raises:
        SanaError: no checkpoint or dataset, a dataset that cannot be judged by, a checkpoint of
            another dataset, or a teacher that the target does not have.
    """
    to = _outputs(options)
    device = resolve_device(options.device)
    folder = options.target if options.target is not None and _is_pictures(options.target) else None
    if folder is not None and options.beside:
        raise SanaError(
            f"`beside`: all rows have the same prompts, and the pictures in {folder} have their own",
            "give a checkpoint as the target, or leave `beside` out",
            exit_code=2,
        )
    place = folder or checkpoint.step_around(checkpoint.find_checkpoint(options.target))
    dataset, held_out = _dataset(options, None if folder else place)
    by, prompts, notes = _prompts(options, dataset, held_out)
    source: Iterator[_Pictures | EvalStep]
    candidates: list[_Candidate] = []
    if folder is not None:
        source = _read(folder, prompts)
    else:
        pipeline = _open_own(place, prompts, "give its own with `data` DIR")
        candidates = [_Candidate(pipeline, options.weights, _settings(options, pipeline))]
        for path in options.beside:
            other = _beside(path, place, options.seed, prompts)
            if other.pipeline.place.resolve() in {one.pipeline.place.resolve() for one in candidates}:
                notes += (f"{other.pipeline.place} is named twice, and judged once",)
            else:
                candidates.append(other)
        source = _draw(options, candidates, prompts, device)
    verdict: Callable[..., Verdict]
    if by == "attributes":
        judged = yield from _trained(judge.load_or_train(dataset, held_out, device))
        real, verdict = real_readings(judged), partial(verdict_on, judged)
    else:
        matching = yield from _matching(dataset, held_out, device)
        real, verdict = (matching.real_reading,), matching.verdict_on
    summary = EvalSummary(place, dataset.directory, by, real, notes, (), ())
    for item in source:
        if isinstance(item, EvalStep):
            yield item
            continue
        images = sum(len(part.captions) for part in item.drawn)
        result = EvalResult(item.checkpoint, item.settings, item.seconds, images, verdict(*item.drawn))
        summary = replace(summary, results=(*summary.results, result))
        if to.unfinished is not None:  # a sweep may take hours, and may be stopped or killed
            _save(summary, to.unfinished)
    summary = replace(summary, comparison=_comparison(candidates, summary.results))
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

    checkpoint: Path | None  # None: pictures from a folder
    settings: SampleConfig | None  # None: pictures from a folder
    seconds: float  # of drawing
    drawn: tuple[Drawn, ...]  # the seen ones first


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint that is judged, and at which settings."""

    pipeline: Pipeline
    weights: Weights
    settings: list[SampleConfig]
    is_teacher: bool = False  # of the target


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
    inputs = [("the target", options.target), *(("`beside`", path) for path in options.beside)]
    outputs.check_distinct([("`out`", out), ("`plot`", plot)], inputs)
    if plot is not None:
        plots.check_matplotlib()
    try:
        return _Outputs(out, _unfinished(out), plot)
    except OSError as error:
        raise files.storage_error(error, f"writing {out}") from error


def _trained(steps: Iterator[JudgeStep | J]) -> Generator[EvalStep, None, J]:
    """What `load_or_train` of a judge or matcher yields last; yields its progress."""
    found: J | None = None
    for step in steps:
        if isinstance(step, JudgeStep):
            yield EvalStep("judge", step.done, step.total)
        else:
            found = step
    assert found is not None, "load_or_train yields it last"
    return found


def _matching(
    dataset: Dataset, held_out: Dataset | None, device: torch.device
) -> Generator[EvalStep, None, Matching]:
    """The matcher of a dataset with what it measures by, trained if there is none yet.

    Yields progress. The pictures have captions of the dataset. Real ones to compare with are therefore of the
    dataset too, where the held-out set has unseen kinds.
    """
    if unseen_kinds(dataset, held_out):
        held_out = None
    matcher = yield from _trained(retrieval.load_or_train(dataset, held_out, device))
    return Matching.of(matcher, dataset, held_out)


def _beside(path: Path, target: Path, seed: int, prompts: Sequence[Prompts]) -> _Candidate:
    """Another checkpoint at its own settings: the one at a path, or the target's teacher.

    Raises:
        SanaError: there is none, it is not the teacher that it should be, or it is of another dataset.
    """
    record = checkpoint.read_record(target)
    try:
        by_name = str(path) == TEACHER and not path.exists()
        if by_name:
            place = checkpoint.find_teacher(target, "`beside` PATH")
        else:
            place = checkpoint.step_around(checkpoint.find_checkpoint(path))
        pipeline = _open_own(place, prompts, f"all rows are judged by one dataset: judge {place} by itself")
        is_teacher = False
        if record.teacher is not None and not pipeline.adapters:
            found = read_weights(checkpoint.transformer_path(place))
            is_teacher = found.sha256 == record.teacher.sha256
            if by_name:
                checkpoint.check_base(found, record.teacher, place, str(target), "was distilled from")
    except SanaError as error:
        first, *rest = str(error).splitlines()
        raise SanaError(f"`beside`: {first}", *rest, exit_code=error.exit_code) from error
    settings = pipeline.sample.model_copy(update={"seed": seed})
    return _Candidate(pipeline, "ema", [settings], is_teacher)


def _open_own(place: Path, prompts: Sequence[Prompts], todo: str) -> Pipeline:
    """The pipeline of a checkpoint, of the captions' encoder and the dataset's image shape.

    Raises:
        SanaError: it is of others; says what is `todo`.
    """
    pipeline = open_pipeline(place)
    if pipeline.fingerprint is None:
        raise SanaError(
            f"{place} does not say how its captions were encoded; sana eval is for checkpoints of sana's own"
        )
    for dataset in {group.dataset.directory: group.dataset for group in prompts}.values():
        recorded, where = dataset.index.encoder.as_json(), str(dataset.directory)
        check_same_encoder(recorded, pipeline.fingerprint, where, todo)
        if pipeline.sample_shape != dataset.image_shape:
            raise SanaError(
                f"{place} draws {pipeline.sample_shape}, and {dataset.directory} has {dataset.image_shape}",
                todo,
            )
    return pipeline


def _comparison(candidates: Sequence[_Candidate], results: Sequence[EvalResult]) -> Comparison | None:
    """The target at its recorded settings, else at the first ones, beside its teacher.

    Args:
        candidates: the target first.
        results: of all settings of all candidates, in this order.
    """
    settings = [(candidate, setting) for candidate in candidates for setting in candidate.settings]
    taught = [result for (one, _), result in zip(settings, results, strict=False) if one.is_teacher]
    if not taught:
        return None
    target = candidates[0]
    own = target.pipeline.sample.model_copy(update={"seed": target.settings[0].seed})
    return Comparison(results[target.settings.index(own) if own in target.settings else 0], taught[0])


def _names(places: Iterable[Path]) -> dict[Path, str]:
    """A name of each of several checkpoints: as short as tells them apart."""

    def run(place: Path) -> str:
        if checkpoint.is_shipped(place):
            return f"{checkpoint.SHIPPED}:{place.name}"
        whole = place.absolute()
        return whole.parents[1].name if whole.parent.name == checkpoint.CHECKPOINTS else place.name

    def step(place: Path) -> str:
        return run(place) if run(place) == place.name else f"{run(place)}/{place.name}"

    places, names = list(places), dict[Path, str]()
    for name in (run, step, str):
        names = {place: name(place) for place in places}
        if len(set(names.values())) == len(places):
            break
    return names


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


def _counts(images: int, kinds: int) -> list[int]:
    """How many images each kind gets: all are seen ones, or half, and the rest is shared evenly."""
    if kinds == 1:
        return [images]
    unseen, others = images // 2, kinds - 1
    return [images - unseen, *(unseen // others + (number < unseen % others) for number in range(others))]


def _draw(
    options: EvalOptions,
    candidates: Sequence[_Candidate],
    prompts: Sequence[Prompts],
    device: torch.device,
) -> Iterator[_Pictures | EvalStep]:
    """Draw pictures of the same captions and seeds with each candidate at each of its settings.

    Yields progress in between.
    """
    null = prompts[0].dataset.states([prompts[0].dataset.index.null_caption])[0]
    chosen = [
        group.as_frequent(count)
        for group, count in zip(prompts, _counts(options.images, len(prompts)), strict=True)
    ]
    given = list[Tensor]()
    for group, captions in zip(prompts, chosen, strict=True):
        given += group.dataset.shared_states(captions)
    seeds = range(options.seed, options.seed + len(given))
    every = sum(setting.steps for candidate in candidates for setting in candidate.settings)
    before = 0
    for candidate in candidates:
        pipeline = candidate.pipeline
        precision = resolve_precision(options.precision or pipeline.precision, device)
        dtype = torch.float32 if precision == "fp32" else None
        model = checkpoint.load_transformer(pipeline.place, candidate.weights, device, dtype)
        for setting in candidate.settings:
            start, pixels = time.perf_counter(), {}
            recipe = sampler.Recipe(setting, pipeline.sample_shape, pipeline.prediction_type, precision)
            try:
                for step in sampler.sample_images(model, given, [null] * len(given), seeds, recipe):
                    if step.done % setting.steps == 0:
                        pixels[step.first] = sampler.to_pixels(step.images)
                    yield EvalStep("draw", before + step.done * setting.steps // step.total, every)
            except sampler.NoRoomError as error:
                raise SanaError(str(error), "judge it on another device: `device` cpu") from error
            before += setting.steps
            drawn = torch.cat([pixels[first] for first in sorted(pixels)]).split(list(map(len, chosen)))
            seconds = time.perf_counter() - start
            yield _Pictures(
                pipeline.place,
                setting,
                seconds,
                tuple(
                    group.of([group.texts[caption] for caption in captions], images)
                    for group, captions, images in zip(prompts, chosen, drawn, strict=True)
                    if len(images) or group is prompts[0]
                ),
            )
        del model  # before the next is loaded


def _read(folder: Path, prompts: Sequence[Prompts]) -> Iterator[_Pictures]:
    """Read the pictures of a folder.

    A picture's caption is its recorded prompt (as `sana sample --separate` writes it), or the
    name of the folder it is in.
    """
    dataset = prompts[0].dataset
    channels, height, width = dataset.image_shape
    found: dict[str, list[tuple[str, Tensor]]] = {group.kind: [] for group in prompts}
    for path in sorted(p for p in (*folder.glob("*"), *folder.glob("*/*")) if p.suffix.lower() in PICTURES):
        prompt = _prompt(path, folder)
        group = next((group for group in prompts if prompt in group.meaning), None)
        if group is None:
            if prompt in prompts[0].texts:
                raise SanaError(
                    f"{path}: its caption {prompt!r} asks for no attribute",
                    "judge pictures by their captions: `by` captions",
                )
            some = ", ".join(map(repr, itertools.islice(prompts[0].meaning, 4)))
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
        found[group.kind].append((str(prompt), torch.tensor(fit_image(image, (height, width), channels))))
    empty = torch.empty(0, channels, height, width, dtype=torch.uint8)
    yield _Pictures(
        None,
        None,
        0.0,
        tuple(
            group.of(
                [caption for caption, _ in pairs],
                torch.stack([image for _, image in pairs]) if pairs else empty,
            )
            for group, pairs in zip(prompts, found.values(), strict=True)
            if pairs or group is prompts[0]
        ),
    )


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
    results, names = [], summary.names
    for result in summary.results:
        verdict, settings, place = result.verdict, result.settings, result.checkpoint
        results.append(
            {
                "checkpoint": None if place is None else str(place),
                "name": None if place is None else names[place],
                "settings": None
                if settings is None
                else settings.model_dump(mode="json", exclude={"prompts"}),
                "images": result.images,
                "seconds": result.seconds,
                **_reading(verdict.seen),
                "unseen": [{"kind": reading.kind, **_reading(reading)} for reading in verdict.unseen],
                "frechet_distance": _number(verdict.distance),
                "frechet_distance_spread": _number(verdict.distance_spread),
                "real_frechet_distance": _number(verdict.real_distance),
                "diversity": _number(verdict.diversity),
                "captions": [_share(found) for found in verdict.captions],
                "labels": [_share(found) for found in verdict.labels],
            }
        )
    real = pooled("real", summary.real)
    return {
        "made_by": f"sana {__version__}",
        "target": str(summary.target),
        "teacher": None if summary.comparison is None else str(summary.comparison.teacher.checkpoint),
        "dataset": str(summary.dataset),
        "by": summary.by,
        "judge": {"accuracy": _number(real.total.accuracy), "real_images": real.total.count},
        "real": [{"kind": reading.kind, **_reading(reading)} for reading in summary.real],
        "notes": list(summary.notes),
        "results": results,
    }


def _reading(found: Reading) -> dict[str, Any]:
    return {
        "accuracy": _share(found.total),
        "single": _share(found.single),
        "attributes": [_share(share) for share in found.attributes],
        "swaps": [_swap(swap) for swap in found.swaps],
    }


def _swap(found: Swap) -> dict[str, Any]:
    return {
        "first": found.first,
        "second": found.second,
        "leak": _share(found.leak),
        "exchanged": _share(found.exchanged),
    }


def _share(found: Share) -> dict[str, Any]:
    low, high = map(_number, found.interval)
    return {
        "name": found.name,
        "accuracy": _number(found.accuracy),
        "low": low,
        "high": high,
        "images": found.images,
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
