"""What a run learns, and from what: all that a trainer is given of its subject.

The next objective, train set or adapter is a class in a file of its own, its keys, and a line here.
"""

from dataclasses import dataclass, field

from sana_cli.config.keys import Architecture, Config
from sana_cli.dataset.reader import Dataset
from sana_cli.dataset.trainset import SingleDataset, TrainSet
from sana_cli.training.objective import Objective, RectifiedFlow
from sana_cli.training.trainable import Trainable


@dataclass(frozen=True)
class Task:
    """An objective, the images it learns from, and which parameters move."""

    objective: Objective
    train_set: TrainSet
    held_out: TrainSet | None = None
    trainable: Trainable = field(default_factory=Trainable)


def make_objective(config: Config, model: Architecture, precision: str) -> Objective:
    """The objective of a config."""
    return RectifiedFlow(config.objective, model.timestep_scale, precision)


def make_train_set(config: Config, dataset: Dataset) -> TrainSet:
    """The rows and shapes of a dataset, in the order of `train.seed`."""
    return SingleDataset(dataset, config.train.seed)


def make_task(
    config: Config, model: Architecture, precision: str, dataset: Dataset, held_out: Dataset | None
) -> Task:
    """The task of a run."""
    return Task(
        objective=make_objective(config, model, precision),
        train_set=make_train_set(config, dataset),
        held_out=None if held_out is None else make_train_set(config, held_out),
    )
