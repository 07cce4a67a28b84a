"""Sample grids of a run, with the averaged weights. A grid that fails is a warning and ends no run."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sana_cli.autoencoder import Autoencoder
from sana_cli.config.keys import Architecture, Config
from sana_cli.errors import SanaError, first_line
from sana_cli.model import SanaTransformer, build
from sana_cli.runtime.device import release_memory
from sana_cli.sampling import pictures, sampler
from sana_cli.training.prompts import GridPrompts
from sana_cli.training.trainer import StopSignal, Trainer
from sana_cli.weights.checkpoint import step_name


def grid_path(run: Path, step: int) -> Path:
    """Where the grid of a step lies."""
    return run / "samples" / f"{step_name(step)}.png"


def grids(run: Path) -> list[tuple[int, Path]]:
    """The sample grids of a run with their steps, oldest first."""
    found = []
    for path in (run / "samples").glob("step-*.png"):
        name = re.fullmatch(r"step-(\d+)", path.stem)
        if name is not None:
            found.append((int(name[1]), path))
    return sorted(found)


def newest_grid(run: Path, step: int) -> tuple[int, Path] | None:
    """The newest grid after step 0, with its step. A step is saved before its own grid is sampled."""
    return max((grid for grid in grids(run) if 0 < grid[0] <= step), default=None)


class GridSampler:
    """Draws the grid of a step. All processes call it; rank 0 draws."""

    def __init__(self, config: Config, trainer: Trainer, prompts: GridPrompts | None) -> None:
        """`prompts` is there at rank 0."""
        self.config, self.trainer, self.prompts = config, trainer, prompts

    def try_sample(self, stop: StopSignal) -> tuple[Path | None, str | None]:
        """The file of this step's grid, or a warning why there is none; neither if `stop` asked for an end."""
        trainer = self.trainer
        # shards are gathered by all processes, on the CPU; only then may rank 0 fail alone
        weights = trainer.average_weights() if trainer.sharded else None
        if self.prompts is None:
            return None, None
        device = trainer.placement.device
        try:
            with trainer.average.in_use() as average:
                model = average if weights is None else _whole(average.config, weights, device)
                return self._sample(model, self.prompts, stop), None
        except (SanaError, OSError, RuntimeError) as error:
            release_memory(device)
            return None, f"no samples at step {trainer.step}: {first_line(error)}"

    def _sample(self, model: SanaTransformer, prompts: GridPrompts, stop: StopSignal) -> Path | None:
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
            # loaded for the picture alone, and freed
            images = torch.cat(
                list(Autoencoder(self.config.data.autoencoder, placement.device).decode(images))
            )
            release_memory(placement.device)
        path = grid_path(self.config.run.dir, self.trainer.step)
        record = pictures.grid_record(prompts.cells, settings, f"{self.config.run.dir.name}/{path.stem}")
        pictures.save_picture(pictures.grid(sampler.to_pixels(images), prompts.cells), path, record)
        return path


def _whole(
    architecture: Architecture, weights: Mapping[str, Tensor], device: torch.device
) -> SanaTransformer:
    """A model of its own with all weights, on the device that samples."""
    model = build(architecture, seed=None)
    model.load_state_dict({name: weight.to(device) for name, weight in weights.items()}, assign=True)
    return model.eval()
