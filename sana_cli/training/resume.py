"""Which checkpoint a run goes on from, whether it may, and what is loaded from it. It writes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sana_cli.config.keys import AdapterConfig, Architecture, Config, may_change
from sana_cli.dataset.match import differences
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.model import build
from sana_cli.runtime import files
from sana_cli.runtime.records import State
from sana_cli.training.plan import TrainPlan
from sana_cli.training.task import make_train_set
from sana_cli.weights import checkpoint
from sana_cli.weights.configs import WEIGHTS
from sana_cli.weights.stored import check_tensors

# sections that make a step what it is
COMPARED = ("model", "objective", "optim", "adapter", "distill", "train")
FORMER_WARMUP = 50  # steps of warm-up in a checkpoint whose config does not say
MISNAMED = ("latest", "last", "newest", "true", "yes", "on")  # what other tools call `auto`


@dataclass(frozen=True)
class Saved:
    """The part of a step folder that only training needs."""

    folder: Path
    state: State


@dataclass(frozen=True)
class SavedTensors:
    """What a run goes on with, by name."""

    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None  # None: there is no average
    optimizer: Mapping[str, Tensor]
    objective: Mapping[str, Tensor]


def choose_checkpoint(run: Path, resume: str) -> tuple[Path | None, tuple[str, ...]]:
    """The step folder to continue from, and why newer ones were passed over.

    Args:
        run: the run directory.
        resume: "none", "auto", or the path of a step folder or run.

    Raises:
        SanaError: two runs would be mixed, or no checkpoint is whole.
    """
    there = checkpoint.steps(run)
    if resume == "none":
        if there:
            raise SanaError(
                f"{run} has checkpoints already, the newest {there[-1].name}",
                "continue it with `resume` auto, or start another run with --set run.dir=DIR",
            )
        return None, ()
    if resume == "auto":
        folder, skipped = checkpoint.newest_step(run, hashes=True)
        if there and folder is None:
            raise SanaError(
                f"no checkpoint of {run} is whole:",
                *skipped,
                "start another run with --set run.dir=DIR, or remove these",
            )
        return folder, tuple(skipped)
    if resume.lower() in MISNAMED and not Path(resume).exists():
        raise SanaError(
            f"`resume`: {resume!r} is no checkpoint", "the newest of the run is `resume` auto", exit_code=2
        )
    folder = checkpoint.find_checkpoint(Path(resume).expanduser())
    for _ in checkpoint.verify(folder, hashes=True):
        pass
    later = [path.name for path in there if checkpoint.step_of(path) > checkpoint.step_of(folder)]
    if later:
        raise SanaError(
            f"{run} has later checkpoints than {folder.name}: {', '.join(later)}",
            "continue into another run with --set run.dir=DIR, or remove them",
        )
    return folder, ()


def with_recorded_warmup(saved: Saved, config: Config) -> Config:
    """A config that leaves the warm-up to the number of steps, with that which the run began with."""
    if config.optim.warmup_steps is not None:
        return config
    recorded = _recorded(saved.state, config, "optim")["warmup_steps"]
    return config.model_copy(update={"optim": config.optim.model_copy(update={"warmup_steps": recorded})})


def _recorded(state: State, config: Config, section: str) -> dict[str, Any]:
    """A section of the run's config. An earlier version recorded fewer keys: it ran with their defaults."""
    defaults = type(getattr(config, section))().model_dump(mode="json")
    defaults |= {"warmup_steps": FORMER_WARMUP} if section == "optim" else {}
    return defaults | state.config.get(section, {})


def check_resumable(saved: Saved, config: Config, dataset: Dataset, plan: TrainPlan) -> tuple[str, ...]:
    """Notes about a run that goes on: how else its steps are now cut.

    Raises:
        SanaError: config, dataset or precision are not the run's; names each field.
    """
    state, now, train = saved.state, config.to_dict(), config.train
    wrong = []
    for section in COMPARED:
        for key, before, after in differences(_recorded(state, config, section), now[section]):
            if not may_change(section, key):
                wrong.append(f"{section}.{key}: the run has {before!r}, not {after!r}")
    if state.dataset_sha256 != make_train_set(config, dataset).record().sha256:
        wrong.append(
            f"data.dir: {dataset.directory} is not the dataset that the run was trained on"
            if not config.data.also and config.data.repeats == 1
            else "data.dir, data.also, data.repeats: not the datasets that the run was trained on, or not as often"
        )
    if state.precision != plan.precision:
        wrong.append(
            f"train.precision: the run used {state.precision}, and here it would be {plan.precision}"
        )
    then = _recorded(state, config, "train")
    cut = [key for key in ("batch_size", "accumulate") if then[key] != now["train"][key]]
    if plan.batch != state.images and cut:
        processes = f" x {plan.processes} processes" * (plan.processes > 1)
        wrong.append(
            f"{', '.join(f'train.{key}' for key in cut)}: the run's steps have {state.images} images, and "
            f"{train.batch_size} x {train.accumulate}{processes} are {plan.batch}"
        )
    if wrong:
        raise SanaError(
            f"{saved.folder} cannot be resumed with this config:",
            *wrong,
            "start another run with --set run.dir=DIR",
        )
    if plan.batch == state.images:
        return ()
    rounds = plan.with_images(state.images).micro_batches
    return (
        f"steps stay {state.images} images, as the run began: "
        f"{rounds} micro-batches of {train.batch_size} or fewer "
        f"in {plan.processes} process{'es' * (plan.processes > 1)}",
    )


def load_saved(folder: Path, model: Architecture, adapter: AdapterConfig) -> SavedTensors:
    """The tensors of a step folder, memory-mapped, found to fit the architecture.

    Raises:
        SanaError: a file is missing or damaged, or does not fit.
    """
    raw, objective = folder / checkpoint.RAW_WEIGHTS, folder / checkpoint.OBJECTIVE
    optimizer = files.read_tensors(folder / checkpoint.OPTIMIZER)
    learned = files.read_tensors(objective) if objective.is_file() else {}
    if adapter.on:
        expected, used = checkpoint.adapter_parameters(model, adapter), folder / checkpoint.AVERAGE
    else:
        expected, used = build(model, seed=None).state_dict(), folder / "transformer" / WEIGHTS
    averages = not adapter.on or used.is_file()  # adapters without an average are in `raw` alone
    average = files.read_tensors(used) if averages else None
    moved = files.read_tensors(raw) if raw.is_file() else None
    for tensors, path in ((average, used), (moved, raw)):
        if tensors is not None:
            check_tensors(tensors, expected, path, "this config")
    if moved is not None:
        return SavedTensors(moved, average, optimizer, learned)
    assert average is not None  # of whole weights; one file serves as both
    return SavedTensors(average, None, optimizer, learned)
