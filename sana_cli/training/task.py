"""What a run learns, and from what: all that a trainer is given of its subject.

The next objective, train set or adapter is a class in a file of its own, its keys, and a line here.
"""

from dataclasses import dataclass, field

from sana_cli.adapters import is_adapter
from sana_cli.config.keys import Architecture, Config
from sana_cli.dataset.match import open_also
from sana_cli.dataset.reader import Dataset
from sana_cli.dataset.trainset import Mixture, Part, SingleDataset, TrainSet
from sana_cli.model import SanaTransformer
from sana_cli.training.distillation import Distillation
from sana_cli.training.objective import Objective, RectifiedFlow
from sana_cli.training.student import TIME_EMBEDDER
from sana_cli.training.trainable import Trainable


@dataclass(frozen=True)
class Task:
    """An objective, the images it learns from, and which parameters move."""

    objective: Objective
    train_set: TrainSet
    held_out: TrainSet | None = None
    trainable: Trainable = field(default_factory=Trainable)


def make_objective(
    config: Config, model: Architecture, precision: str, teacher: SanaTransformer | None = None
) -> Objective:
    """The objective of a config; with a teacher, its distillation."""
    if teacher is not None:
        return Distillation(
            config.distill,
            model,
            teacher,
            config.objective.prediction_type,
            precision,
            is_pixels=config.data.autoencoder is None,
            seed=config.train.seed,
        )
    return RectifiedFlow(config.objective, model.timestep_scale, precision)


def make_train_set(config: Config, dataset: Dataset) -> Mixture:
    """The rows and shapes of a dataset and of `data.also`, in the order of `train.seed`.

    Raises:
        SanaError: a further dataset is missing or does not fit.
    """
    further = [Part(other, times) for other, times in open_also(config, dataset)]
    further.sort(key=lambda part: (part.dataset.index.sha256, part.times))  # wherever they lie
    return Mixture([Part(dataset, config.data.repeats), *further], config.train.seed, config.train.chunk)


def make_task(
    config: Config,
    model: Architecture,
    precision: str,
    dataset: Dataset,
    held_out: Dataset | None,
    teacher: SanaTransformer | None = None,
) -> Task:
    """The task of a run."""
    return Task(
        objective=make_objective(config, model, precision, teacher),
        train_set=make_train_set(config, dataset),
        held_out=None if held_out is None else SingleDataset(held_out, config.train.seed),
        trainable=what_moves(config),
    )


def what_moves(config: Config) -> Trainable:
    """What a run moves, and keeps."""
    if config.adapter.on:
        return Trainable(is_adapter)
    if config.distill.on:  # a time embedder in closed form, which training would destroy
        return Trainable(lambda name: not name.startswith(TIME_EMBEDDER), keeps=lambda _name: True)
    return Trainable()
