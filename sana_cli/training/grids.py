"""Sample grids of a run, with the averaged weights. A grid that fails is a warning and ends no run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sana_cli.adapters import attach, changes_from, is_adapter, scale_of
from sana_cli.autoencoder import Autoencoder
from sana_cli.config.keys import Architecture, Config, SampleConfig
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
        weights = trainer.whole_average() if trainer.sharded else None
        if self.prompts is None:
            return None, None
        device = trainer.placement.device
        try:
            with trainer.average.in_use() as average:
                model = average if weights is None else _whole(average.config, weights, self.config, device)
                return self._sample(model, self.prompts, stop), None
        except (SanaError, OSError, RuntimeError) as error:
            release_memory(device)
            return None, f"no samples at step {trainer.step}: {first_line(error)}"

    def _sample(self, model: SanaTransformer, prompts: GridPrompts, stop: StopSignal) -> Path | None:
        """The file of a grid; None if `stop` asked for an end. Images of one shape are drawn at once."""
        settings = self.trainer.task.objective.sampling(self.config.sample)
        numbers: list[int] = []  # of cells, in the order of drawing
        samples: list[Tensor] = []  # (b, C, H, W) of each shape
        for shape in dict.fromkeys(prompts.shapes):
            here = [number for number, other in enumerate(prompts.shapes) if other == shape]
            found = self._draw(model, prompts, here, settings, stop)
            if found is None:
                return None
            numbers += here
            samples.append(found)
        if self.config.data.autoencoder is not None:
            # loaded for the picture alone, and freed
            device = self.trainer.placement.device
            autoencoder = Autoencoder(self.config.data.autoencoder, device)
            samples = [torch.cat(list(autoencoder.decode(latents))) for latents in samples]
            del autoencoder
            release_memory(device)
        drawn = [image for batch in samples for image in sampler.to_pixels(batch)]
        images = [drawn[numbers.index(number)] for number in range(len(drawn))]
        cells = prompts.cells if len(samples) == 1 else _sized(prompts.cells, images)
        path = grid_path(self.config.run.dir, self.trainer.step)
        record = pictures.grid_record(cells, settings, f"{self.config.run.dir.name}/{path.stem}")
        pictures.save_picture(pictures.grid(images, cells), path, record)
        return path

    def _draw(
        self,
        model: SanaTransformer,
        prompts: GridPrompts,
        numbers: Sequence[int],
        settings: SampleConfig,
        stop: StopSignal,
    ) -> Tensor | None:
        """Samples (b, C, H, W) of cells of one shape by their numbers; None if `stop` asked for an end."""
        cells = [cell for row in prompts.cells for cell in row]
        states, seeds = [prompts.states[at] for at in numbers], [cells[at].seed for at in numbers]
        prediction_type = self.trainer.task.objective.prediction_type
        recipe = sampler.Recipe(
            settings, prompts.shapes[numbers[0]], prediction_type, self.trainer.placement.precision
        )
        drawn = []
        for step in sampler.sample_images(model, states, [prompts.null_caption] * len(seeds), seeds, recipe):
            drawn.append(step)
            if stop():
                return None
        return sampler.final_images(drawn)


def _sized(cells: Sequence[Sequence[pictures.Cell]], images: Sequence[Tensor]) -> list[list[pictures.Cell]]:
    """Cells with the size of their images (C, H, W), row by row."""
    sizes = iter(images)
    return [[replace(cell, size=tuple(next(sizes).shape)) for cell in row] for row in cells]


def _whole(
    architecture: Architecture, weights: Mapping[str, Tensor], config: Config, device: torch.device
) -> SanaTransformer:
    """A model of its own with all weights, on the device that samples."""
    model = build(architecture, seed=None)
    own = {name: weight for name, weight in weights.items() if is_adapter(name)}
    attach(model, changes_from(own, scale_of(config.adapter)))
    model.load_state_dict({name: weight.to(device) for name, weight in weights.items()}, assign=True)
    return model.eval()
