"""Sample grids of a run, with the averaged weights. A grid that fails is a warning and ends no run."""

from pathlib import Path

import torch

from sana_cli.config.keys import Config
from sana_cli.errors import SanaError, first_line
from sana_cli.model import SanaTransformer, build
from sana_cli.runtime.device import release_memory
from sana_cli.sampling import pictures, sampler
from sana_cli.training.prompts import GridPrompts
from sana_cli.training.report import grids
from sana_cli.training.trainer import Stop, Trainer
from sana_cli.weights.checkpoint import step_name


def grid_path(run: Path, step: int) -> Path:
    """Where the grid of a step lies."""
    return run / "samples" / f"{step_name(step)}.png"


def newest_grid(run: Path, step: int) -> tuple[int, Path] | None:
    """The newest grid after step 0, with its step. A step is saved before its own grid is sampled."""
    return max((grid for grid in grids(run) if 0 < grid[0] <= step), default=None)


class GridSampler:
    """Draws the grid of a step. All processes call it; rank 0 draws."""

    def __init__(self, config: Config, trainer: Trainer, prompts: GridPrompts | None) -> None:
        """`prompts` is there at rank 0."""
        self.config, self.trainer, self.prompts = config, trainer, prompts

    def try_sample(self, stop: Stop) -> tuple[Path | None, str | None]:
        """The file of this step's grid, or a warning why there is none; neither if `stop` asked for an end."""
        placement = self.trainer.placement
        with self.trainer.average.in_use() as average:
            model = self._gathered(average) if self.trainer.sharded else average
            if self.prompts is None:
                return None, None
            try:
                return self._sample(model, self.prompts, stop), None
            except (SanaError, OSError, RuntimeError) as error:
                release_memory(placement.device)
                reason = first_line(error)
                return None, f"no samples at step {self.trainer.step}: {reason}"

    def _gathered(self, sharded: SanaTransformer) -> SanaTransformer:
        """A sharded model put together at rank 0, which samples alone."""
        placement, weights = self.trainer.placement, self.trainer.average_weights()
        model = build(sharded.config, seed=None)
        if placement.world.first:
            model.load_state_dict({name: w.to(placement.device) for name, w in weights.items()}, assign=True)
        return model.eval()

    def _sample(self, model: SanaTransformer, prompts: GridPrompts, stop: Stop) -> Path | None:
        seeds = [cell.seed for row in prompts.cells for cell in row]
        objective, placement = self.trainer.task.objective, self.trainer.placement
        settings, shape = objective.sampling(self.config.sample), self.trainer.task.train_set.shapes[0]
        recipe = sampler.Recipe(settings, shape, objective.prediction_type, placement.precision)
        drawn = []
        for step in sampler.sample_images(
            model, prompts.states, [prompts.null_caption] * len(seeds), seeds, recipe
        ):
            drawn.append(step)
            if stop():
                return None
        images = sampler.final_images(drawn)
        if self.config.data.autoencoder is not None:
            from sana_cli.autoencoder import Autoencoder  # loaded for the picture alone, and freed

            images = torch.cat(
                list(Autoencoder(self.config.data.autoencoder, placement.device).decode(images))
            )
            release_memory(placement.device)
        path = grid_path(self.config.run.dir, self.trainer.step)
        record = pictures.grid_record(prompts.cells, settings, f"{self.config.run.dir.name}/{path.stem}")
        pictures.save_picture(pictures.grid(sampler.to_pixels(images), prompts.cells), path, record)
        return path
