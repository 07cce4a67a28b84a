"""Checkpoints of a run: what is on record in each, and which step is saved."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, cast

from sana_cli import __version__
from sana_cli.adapters import scale_of
from sana_cli.config.keys import Config
from sana_cli.dataset.reader import Dataset
from sana_cli.runtime.records import Base, CheckpointRecord, State
from sana_cli.training.grids import newest_grid
from sana_cli.training.plan import TrainPlan
from sana_cli.training.progress import Progress
from sana_cli.training.prompts import GridPrompts
from sana_cli.training.trainer import Trainer
from sana_cli.weights import card, checkpoint

# sections of the config
RECORDED = ("model", "objective", "optim", "adapter", "distill", "train", "log", "save", "sample")


class Saver:
    """Saves a run's steps. All processes call it; rank 0 writes."""

    def __init__(
        self,
        config: Config,
        plan: TrainPlan,
        dataset: Dataset,
        prompts: GridPrompts | None,
        saved: Path | None,
        step: int,
        origin: Base | None = None,
    ) -> None:
        """`prompts` is there at rank 0; `saved` is what the run goes on from, after `step` steps.

        `origin` is what adapters are for, or who taught a student.
        """
        self.base = origin if config.adapter.on else None
        self.teacher = origin if config.distill.on else None
        self.config, self.plan, self.dataset, self.prompts = config, plan, dataset, prompts
        self.folder, self.step = saved, step

    def save(self, trainer: Trainer, progress: Progress) -> Path:
        """A checkpoint of this step."""
        raw = trainer.weights()
        average = trainer.average_weights() if trainer.average.averaged else None
        optimizer, objective = trainer.optimizer_state(), trainer.objective_weights()
        self.step = trainer.step
        self.folder = self.config.run.dir / "checkpoints" / checkpoint.step_name(self.step)
        if self.prompts is None:
            return self.folder
        config = self.config.to_dict()
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        del config["train"]["init_from"], config["distill"]["teacher"]  # paths, which mean nothing elsewhere
        warmup = self.config.optim.warmup(self.config.train.steps)
        config["optim"]["warmup_steps"] = warmup  # a longer run that goes on from here keeps it
        predicted = trainer.task.objective.prediction_type
        settings = trainer.task.objective.sampling(self.config.sample)
        record = self._record(trainer, settings.model_dump(mode="json"), self.prompts)
        state = State(
            step=self.step,
            samples_seen=self.step * self.plan.batch,
            precision=self.plan.precision,
            dataset_sha256=record.dataset.sha256,
            compiled=trainer.model.is_compiled,
            window=progress.window.state(),
            last=progress.last,
            config={section: config[section] for section in RECORDED},
        )
        samples = newest_grid(self.config.run.dir, self.step)
        whole = checkpoint.Checkpoint(
            model=self.plan.model,
            prediction_type=predicted,
            sample=settings,
            record=record,
            state=state,
            weights=raw if average is None else average,
            raw_weights=None if average is None else raw,
            adapter_scale=None if self.base is None else scale_of(self.config.adapter),
            optimizer=optimizer,
            objective=objective,
            null_caption=self.prompts.null_caption,
            card=card.card(
                record,
                predicted,
                f"{trainer.task.objective.name}, {self.step:,} steps of {self.plan.batch}",
                None if samples is None else samples[0],
            ),
            samples=None if samples is None else samples[1],
            config_sha256=digest,
        )
        return checkpoint.save_checkpoint(self.config.run.dir, whole, self.config.save.keep)

    def _record(self, trainer: Trainer, settings: dict[str, Any], prompts: GridPrompts) -> CheckpointRecord:
        index = self.dataset.index
        record = CheckpointRecord(
            version=checkpoint.RECORD_VERSION,
            made_by=f"sana {__version__}",
            step=self.step,
            parameters=self.plan.parameters,
            encoder=prompts.encoder,
            one_word_captions=prompts.one_word,
            example_captions=prompts.examples,
            image=index.image,
            autoencoder=index.image.autoencoder,
            precision=cast("Literal['bf16', 'fp32']", self.plan.precision),
            sample=settings,
            dataset=trainer.task.train_set.record(),
        )
        record = record if self.base is None else record.but(base=self.base)
        record = record if self.teacher is None else record.but(teacher=self.teacher)
        return record if prompts.words is None else record.but(words=prompts.words)
