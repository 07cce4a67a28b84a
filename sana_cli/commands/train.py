"""`sana train`: an objective on a pre-embedded dataset. A generator of steps; it prints nothing.

It is the order in which a run happens: load, save, log, sample, stop. How weights move is
`training/trainer.py`'s matter. Under torchrun all processes run it, and rank 0 alone writes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sana_cli.adapters import matching
from sana_cli.config.file import RUN_CONFIG
from sana_cli.config.keys import Config
from sana_cli.dataset.layout import held_out_dir
from sana_cli.dataset.match import open_held_out
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import Interrupted, SanaError
from sana_cli.model import build
from sana_cli.runtime import files
from sana_cli.runtime.device import has_native_bf16, is_out_of_memory, peak_memory
from sana_cli.runtime.distributed import World, world
from sana_cli.runtime.launch import launch
from sana_cli.runtime.records import Base
from sana_cli.training import compiling, metrics, report, resume
from sana_cli.training.grids import GridSampler, grid_path
from sana_cli.training.initial import (
    begin,
    find_base_model,
    foreign_weights,
    read_teacher,
    with_base_recipe,
)
from sana_cli.training.movement import TOTAL, Movement
from sana_cli.training.plan import TrainPlan, choose_device, make_plan
from sana_cli.training.progress import Progress
from sana_cli.training.prompts import encode_prompts
from sana_cli.training.saver import Saver
from sana_cli.training.task import make_task, make_train_set
from sana_cli.training.trainer import NotFiniteError, Placement, Trainer
from sana_cli.weights.checkpoint import read_state


@dataclass(frozen=True)
class TrainOptions:
    """What to train. `stop` is asked before each micro-batch; a signal number from it ends the run, saved."""

    config: Config
    resume: str = "none"  # none, auto, or the path of a step folder
    stop: Callable[[], int | None] = lambda: None


@dataclass(frozen=True)
class TrainStart:
    """All is loaded, and nothing has been written yet."""

    plan: TrainPlan
    step: int  # that the run goes on after
    checkpoint: Path | None  # what it goes on from
    notes: tuple[
        str, ...
    ]  # what a person should know: checkpoints passed over; another cut into micro-batches


@dataclass(frozen=True)
class TrainNote:
    """Before the first step: what takes long, or what was decided."""

    text: str


@dataclass(frozen=True)
class TrainStep:
    """After an optimizer step (or, at the beginning, before the first): what a person watches."""

    step: int
    steps: int
    loss: float  # mean over the images of this step
    lr: float
    grad_norm: float
    samples_per_second: float
    seconds_left: float
    data_wait: float  # share of the time in which training waited for images
    memory: int
    held_out_loss: float | None = None  # the latest
    movement: float | None = None  # of adapters, over the norm of their layers, the latest
    saved: Path | None = None
    sampled: Path | None = None
    warning: str | None = None  # what went wrong beside training, which goes on


@dataclass(frozen=True)
class TrainSummary:
    """A finished run."""

    run: Path
    checkpoint: Path
    grid: Path | None
    report: Path | None
    steps: int
    first_step: int  # where this process began; `steps` if there was nothing left to do
    loss: float
    held_out_loss: float | None
    seconds: float
    peak_memory: int
    skipped: tuple[str, ...] = ()  # checkpoints that resuming passed over, and why


def plan(options: TrainOptions) -> TrainPlan:
    """What would be done (`--dry-run`), found without writing; refuses what `train` would refuse."""
    config = with_base_recipe(options.config)
    dataset = Dataset(config.data.dir)
    teacher = None if config.distill.teacher is None else read_teacher(config.distill.teacher)
    found = make_plan(config, dataset, open_held_out(config, dataset), with_memory=True, teacher=teacher)
    folder, _ = resume.choose_checkpoint(config.run.dir, options.resume)
    if folder is not None:
        saved = resume.Saved(folder, read_state(folder))
        resume.check_resumable(saved, resume.with_recorded_warmup(saved, config), dataset, found)
        if config.adapter.on and config.train.init_from is not None:
            find_base_model(config.train.init_from)
        return found.with_images(saved.state.images)
    if config.train.init_from is not None:
        foreign_weights(config.train.init_from, found.model, config.objective.prediction_type)
    if config.adapter.on:
        matching(build(found.model, seed=None), config.adapter.targets)
    return found


def train(options: TrainOptions) -> Iterator[TrainStart | TrainNote | TrainStep | TrainSummary]:
    """Train; yields a `TrainStart`, a `TrainStep` for each step, and at the end a `TrainSummary`.

    Until `TrainStart` nothing has been written, and it does no harm to stop it by an exception. Every
    process of several yields alike; rank 0 alone writes.

    Raises:
        Interrupted: `options.stop` asked for an end; the last whole step has been saved.
        SanaError: no dataset, another dataset than the config's, a run directory in use, a loss that is
            not finite, or a disk that fails. The checkpoints that were there stay.
    """
    begin = time.perf_counter()
    compiling.use_cache()
    with world(cuda=launch().size > 1 and choose_device(options.config).type == "cuda") as here:
        with here.together():
            options = replace(options, config=with_base_recipe(options.config))
        run = _load(options, here)
        yield TrainStart(run.plan, run.first_step, run.saver.folder, run.notes)
        with _writing(run, options.config) as log:
            yield from map(TrainNote, _compile(run))
            yield from _steps(run, log)
        yield _summary(run, time.perf_counter() - begin)


# --- loading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A run that is loaded. Its parts are each whole; the order in which they act is `_steps`."""

    config: Config
    plan: TrainPlan
    trainer: Trainer
    progress: Progress
    saver: Saver
    grids: GridSampler
    movement: Movement | None  # None: all weights are trained
    stop: Callable[[], int | None]
    first_step: int
    notes: tuple[str, ...]
    skipped: tuple[str, ...]
    was_compiled: bool | None  # as it was before it goes on; None: it begins

    @property
    def world(self) -> World:
        """The processes."""
        return self.trainer.placement.world

    def due(self, every: int) -> bool:
        """Whether what is done `every` so many steps, and at the end, is to be done after this one."""
        return self.trainer.step % every == 0 or self.trainer.step == self.config.train.steps


def _load(options: TrainOptions, here: World) -> _Run:
    """Everything that a run needs, found to belong together. All processes call it."""
    config, notes = options.config, []
    with here.together():
        dataset = Dataset(config.data.dir)
        held_out = open_held_out(config, dataset)
        plan = make_plan(config, dataset, held_out, with_memory=False)
    saved, skipped = _choose_checkpoint(options, here)
    with here.together():
        notes += [f"passed over: {reason}" for reason in skipped]
        if saved is not None:
            config = resume.with_recorded_warmup(saved, config)
            notes += resume.check_resumable(saved, config, dataset, plan)
            plan = plan.with_images(saved.state.images)
    images = make_train_set(config, dataset).record().sha256
    seen = here.gather([images, None if saved is None else saved.state.as_json()])
    if any(one != seen[0] for one in seen):
        raise SanaError(
            "the processes do not see the same files: data.dir and run.dir must be on a disk that all machines share"
        )
    split = config.data.held_out
    if split is not None and held_out is None:
        missing = held_out_dir(config.data.dir, split)
        notes.append(f"no held-out loss: there is no {missing} (sana embed makes it; data.held_out_split)")
    trainer, origin, more = _trainer(config, plan, dataset, held_out, saved, here)
    notes += more
    with here.together():
        prompts = encode_prompts(config, dataset, trainer.placement.device) if here.first else None
    return _Run(
        config=config,
        plan=plan,
        trainer=trainer,
        progress=Progress(plan.batch, None if saved is None else saved.state),
        saver=Saver(
            config, plan, dataset, prompts, None if saved is None else saved.folder, trainer.step, origin
        ),
        grids=GridSampler(config, trainer, prompts),
        movement=Movement(trainer.model) if config.adapter.on else None,
        stop=options.stop,
        first_step=trainer.step,
        notes=(*notes, *(prompts.notes if prompts is not None else ())),
        skipped=skipped,
        was_compiled=None if saved is None else saved.state.compiled,
    )


def _choose_checkpoint(options: TrainOptions, here: World) -> tuple[resume.Saved | None, tuple[str, ...]]:
    """What to go on from, chosen by rank 0, and why newer ones were passed over."""
    folder: Path | None = None
    skipped: tuple[str, ...] = ()
    with here.together():
        if here.first:
            files.check_unlocked(options.config.run.dir)
            folder, skipped = resume.choose_checkpoint(options.config.run.dir, options.resume)
    chosen = here.gather(None if folder is None else str(folder))[0]
    with here.together():
        saved = None if chosen is None else resume.Saved(Path(chosen), read_state(Path(chosen)))
    return saved, skipped


def _trainer(
    config: Config,
    plan: TrainPlan,
    dataset: Dataset,
    held_out: Dataset | None,
    saved: resume.Saved | None,
    here: World,
) -> tuple[Trainer, Base | None, list[str]]:
    """The trainer of a run that begins or goes on, the model that it begins with, and notes on that."""
    placement = Placement(torch.device(plan.device), plan.precision, here)
    half = plan.precision == "bf16" and has_native_bf16(placement.device)
    with here.together():
        tensors = None if saved is None else resume.load_saved(saved.folder, plan.model, config.adapter)
        weights = None if tensors is None else tensors.weights
        begun = begin(config, plan.model, weights, None if saved is None else saved.folder, half)
        origin = begun.origin() if here.first else None  # its hash takes seconds
    task = make_task(config, plan.model, plan.precision, dataset, held_out, begun.teacher)
    trainer = Trainer(
        begun.transformer, task, config, placement, plan.batch, None if tensors is None else tensors.average
    )
    if saved is not None and tensors is not None:
        trainer.resume(tensors.optimizer, tensors.objective, saved.state.step)
    return trainer, origin, begun.notes


@contextmanager
def _writing(run: _Run, config: Config) -> Iterator[metrics.Log | None]:
    """The run directory, locked, with its config and its open log; None where this process writes nothing."""
    directory, writes = run.config.run.dir, run.world.first and run.first_step < run.config.train.steps
    with ExitStack() as held:
        held.callback(run.trainer.close)
        try:
            log = None
            with run.world.together():
                if writes:
                    held.enter_context(files.locked(directory))
            if writes:
                (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
                files.write_text(directory / RUN_CONFIG, config.to_yaml())
                log = metrics.Log(directory, run.first_step, config.log.tensorboard)
                held.callback(log.close)
            yield log
        except OSError as error:
            raise files.storage_error(error, f"writing {directory}") from error


# --- compiled blocks --------------------------------------------------------------------------


def _compile(run: _Run) -> Iterator[str]:
    """Compile the blocks, if the config says so, or if the run is so already, or where it pays. Yields notes.

    A run goes on as it began: the sums of compiled blocks differ in their last bits.
    """
    train, trainer = run.config.train, run.trainer
    device = trainer.placement.device
    steps_left = train.steps - run.first_step
    if train.compile is False or (train.compile == "auto" and run.was_compiled is False) or not steps_left:
        return
    if train.compile == "auto" and run.was_compiled is None and not _may_compile(run):
        return
    missing = compiling.missing_compiler(device)
    if train.compile is True or run.was_compiled:
        if missing is None:
            trainer.model.compile_blocks()
        else:
            yield f"blocks are no longer compiled: this machine lacks {missing}"
        return
    left = steps_left * run.plan.micro_batches
    if missing is not None:
        if left >= compiling.FEWEST:
            yield f"blocks are not compiled: this machine lacks {missing}"
        return
    facts = {
        "model": run.plan.model.model_dump(mode="json"),
        "shape": run.trainer.task.train_set.shapes[0],
        "precision": run.plan.precision,
        "adapter": run.config.adapter.model_dump(mode="json"),
        "train": [train.batch_size, train.weights, train.activation_checkpointing, run.world.size],
    }
    kind = compiling.kind_of_micro_batch(device, facts)
    for found in compiling.decide(kind, left, trainer.seconds_of_micro_batch, trainer.compile):
        if isinstance(found, str):
            yield found
            continue
        everywhere = all(run.world.gather(found.compiled))
        if trainer.model.is_compiled and not everywhere:
            trainer.model.compile_blocks(False)
        if found.why:
            yield found.why


def _may_compile(run: _Run) -> bool:
    """Whether compiling was ever found to work for runs like this one, and shapes are few."""
    return not (run.config.distill.on or run.trainer.sharded or len(run.trainer.task.train_set.shapes) > 1)


# --- the order of things ----------------------------------------------------------------------


def _steps(run: _Run, log: metrics.Log | None) -> Iterator[TrainStep]:
    """Steps to the end. After each, and before the first: its line, its checkpoint, its grid, as they are due.

    After a resume, work that a stop interrupted is done before the first step.
    """
    if run.first_step >= run.config.train.steps:
        return
    try:
        while True:
            yield _after_step(run, log)
            if run.trainer.step >= run.config.train.steps:
                return
            with run.progress.timed():
                step = run.trainer.advance(run.stop)
            run.progress.count(step)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SanaError(
            f"step {run.trainer.step + 1}: out of memory on {run.plan.device}; the last checkpoint is whole",
            "lower train.batch_size and raise train.accumulate by as much (the step stays the same), or set",
            "train.activation_checkpointing=true, and go on with `resume` auto; "
            "train.precision=bf16 takes less too, in another run",
        ) from error
    except NotFiniteError as error:
        raise _diverged(run, error) from error
    except Interrupted as interrupt:
        raise _interrupted(run, interrupt) from None


def _after_step(run: _Run, log: metrics.Log | None) -> TrainStep:
    """Log, save and sample what is due after this step."""
    trainer, progress, config = run.trainer, run.progress, run.config
    _log_line(run, log)
    saved = sampled = warning = None
    if trainer.step != run.saver.step and run.due(config.save.every):
        saved = run.saver.save(trainer, progress)
    if _grid_due(run):
        sampled, warning = run.grids.try_sample(run.stop)
        if run.world.first:
            warning = warning or report.try_write(config.run.dir, run.plan.model, trainer.step)
        if sampled is not None and log is not None:
            log.picture(sampled, trainer.step)
    rate = progress.samples_per_second
    return TrainStep(
        step=trainer.step,
        steps=config.train.steps,
        loss=progress.loss,
        lr=progress.last["lr"],
        grad_norm=progress.grad_norm,
        samples_per_second=rate,
        seconds_left=(config.train.steps - trainer.step) * run.plan.batch / rate if rate else float("nan"),
        data_wait=progress.data_wait,
        memory=peak_memory(trainer.placement.device),
        held_out_loss=progress.held_out_loss,
        movement=progress.movement.get(TOTAL),
        saved=saved,
        sampled=sampled,
        warning=warning,
    )


def _log_line(run: _Run, log: metrics.Log | None) -> None:
    """Write this step's line of metrics, if one is due and not written yet.

    Raises:
        Interrupted: while the held-out loss was taken; the line is owed.
    """
    trainer, progress = run.trainer, run.progress
    waited = trainer.batches.waited
    progress.measure_wait(waited)
    evaluate = trainer.task.held_out is not None and run.due(run.config.log.held_out_every)
    if not progress.window.images or not (run.due(run.config.log.every) or evaluate):
        return
    held_out = trainer.evaluate(run.stop) if evaluate else None
    line = progress.line(trainer.step, held_out, waited, peak_memory(trainer.placement.device))
    if run.movement is not None:
        progress.movement = run.movement.measure()
        line["adapter_movement"] = progress.movement
    if log is not None:
        log.write(line)


def _grid_due(run: _Run) -> bool:
    """Whether to sample now: after resuming, only a grid that a stop cut short."""
    if not run.due(run.config.log.sample_every):
        return False
    resumed_here = run.first_step > 0 and run.trainer.step == run.first_step
    return not (
        resumed_here and run.world.gather(grid_path(run.config.run.dir, run.trainer.step).is_file())[0]
    )


def _diverged(run: _Run, error: NotFiniteError) -> NotFiniteError:
    """Save the last whole step, and say how to go on from it."""
    trainer, saver = run.trainer, run.saver
    if trainer.step > saver.step:
        saver.save(trainer, run.progress)
    lr = f"--set optim.lr={run.config.optim.lr / 4:g}"
    elsewhere = " and --set run.dir=DIR" if saver.folder is not None else ""
    again = f"start again with another --set train.seed, or {lr}{elsewhere}"
    if saver.folder is not None and not (run.config.adapter.on or run.config.distill.on):
        again = f"start another run from it: --set train.init_from={saver.folder} --set run.dir=DIR {lr}"
    saved = [f"step {trainer.step} is saved in {saver.folder}"] if saver.folder else []
    stopped = NotFiniteError(*str(error).splitlines(), *saved, again)
    stopped.silent = not run.world.first
    return stopped


def _interrupted(run: _Run, interrupt: Interrupted) -> Interrupted:
    """Save the last whole step, and say how to go on."""
    trainer, saver = run.trainer, run.saver
    if trainer.step > saver.step:
        saver.save(trainer, run.progress)
    where = saver.folder if saver.step == trainer.step else None
    ended = Interrupted(
        f"stopped after step {trainer.step}"
        + (f", which is saved in {where}" if where else "; nothing was saved yet"),
        f"continue with: {_again(run.config)}",
        exit_code=interrupt.exit_code,
    )
    ended.silent = not run.world.first
    return ended


def _again(config: Config) -> str:
    if config.distill.on:
        return f"sana distill {config.distill.teacher} --resume auto (and the same --set)"
    return "sana train --resume auto (and the same config)"


def _summary(run: _Run, seconds: float) -> TrainSummary:
    assert run.saver.folder is not None, "a finished run has a checkpoint"
    directory, trainer = run.config.run.dir, run.trainer
    grid, page = grid_path(directory, trainer.step), directory / report.REPORT
    return TrainSummary(
        run=directory,
        checkpoint=run.saver.folder,
        grid=grid if run.first_step < trainer.step and grid.is_file() else None,
        report=page if page.is_file() else None,
        steps=trainer.step,
        first_step=run.first_step,
        loss=run.progress.loss,
        held_out_loss=run.progress.held_out_loss,
        seconds=seconds,
        peak_memory=peak_memory(trainer.placement.device),
        skipped=run.skipped,
    )
