"""Plot the results of `sana eval`. It computes nothing.

Only this module imports matplotlib (the `plot` extra).
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sana_cli.errors import SanaError
from sana_cli.runtime import files, outputs

WIDTH, HEIGHT = 4.0, 3.2  # inches, of a panel


def check_matplotlib() -> None:
    """Refuse, before long work begins, a plot that could not be drawn.

    Raises:
        SanaError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise SanaError(
            "`plot` needs matplotlib", "install it with: pip install 'sana-cli[plot]', or leave `plot` out"
        )


def evaluation(record: Mapping[str, Any], path: Path) -> None:
    """Plot a record of `commands.eval`: several results by guidance scale, one by caption or attribute."""
    results = record["results"]
    if len(results) > 1:
        _sweep(results, path, str(record["target"]))
    else:
        _captions(results[0], path, str(record["target"]))


def _sweep(results: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Accuracy, Fréchet distance and diversity over the guidance scale.

    There is a curve for each checkpoint, solver and number of steps.
    """
    several = len({result["checkpoint"] for result in results}) > 1
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        settings = result["settings"]
        of = f"{result['name']}: " if several else ""
        steps = "1 step" if settings["steps"] == 1 else f"{settings['steps']} steps"
        lines.setdefault(f"{of}{settings['solver']}, {steps}", []).append(result)
    figure, panels = _panels(3)
    for name, points in lines.items():
        scales = [point["settings"]["guidance_scale"] for point in points]
        shares = [point["accuracy"] for point in points]
        low, high = _errors(shares)
        panels[0].errorbar(
            scales,
            [100 * share["accuracy"] for share in shares],
            [low, high],
            marker="o",
            capsize=2,
            label=name,
        )
        distances = [point["frechet_distance"] for point in points]
        panels[1].errorbar(
            scales, distances, [point["frechet_distance_spread"] for point in points], marker="o", capsize=2
        )
        panels[2].plot(scales, [point["diversity"] for point in points], marker="o")
    panels[1].axhline(results[0]["real_frechet_distance"], color="grey", linestyle="--", label="real images")
    panels[2].axhline(1, color="grey", linestyle="--", label="real images")
    for panel, label in zip(
        panels, ("read as prompted, %", "Fréchet distance", "diversity within a caption"), strict=True
    ):
        panel.set(xlabel="guidance scale", ylabel=label)
        panel.legend(fontsize="small")
    panels[1].set_ylim(bottom=0)
    panels[2].set_ylim(bottom=0)
    _save(figure, path, title)


def _captions(result: Mapping[str, Any], path: Path, title: str) -> None:
    """Accuracy of each caption, with its confidence interval; of each attribute if captions are too many."""
    shares = result["captions"] or [*result["attributes"], result["accuracy"]]
    shares = [share for share in shares if share["images"]]
    figure, (panel,) = _panels(1, width=max(WIDTH, 0.4 * len(shares)))
    heights = [100 * share["accuracy"] for share in shares]
    panel.errorbar(range(len(shares)), heights, _errors(shares), fmt="o", capsize=3)
    panel.set_xticks(range(len(shares)), [share["name"][:20] for share in shares], rotation=60, ha="right")
    panel.set(ylabel="read as prompted, %")
    _save(figure, path, title)


def training_curves(
    runs: Mapping[str, Sequence[Mapping[str, float]]],
    real_distance: float,
    path: Path,
    since: str = "sana embed",
) -> None:
    """Plot accuracy and Fréchet distance over training time, a curve for each run.

    Args:
        runs: points by name, with `seconds`, `accuracy`, its `low` and `high`, and `distance` if any.
        real_distance: the Fréchet distance of real images.
        path: the picture to write.
        since: the command with which time began.
    """
    figure, panels = _panels(2)
    for name, points in runs.items():
        seconds = [point["seconds"] for point in points]
        heights = [100 * point["accuracy"] for point in points]
        panels[0].errorbar(seconds, heights, _errors(points), marker="o", capsize=2, label=name)
        if all("distance" in point for point in points):
            panels[1].plot(seconds, [point["distance"] for point in points], marker="o", label=name)
    panels[1].axhline(real_distance, color="grey", linestyle="--", label="real test images")
    for panel, label in zip(panels, ("read as prompted, %", "Fréchet distance"), strict=True):
        panel.set(xlabel=f"seconds since {since} began", ylabel=label)
        panel.legend(fontsize="small")
    lowest = min(point["accuracy"] for points in runs.values() for point in points)
    panels[0].set_ylim(min(80, 10 * int(10 * lowest)), 100.2)
    panels[1].set_yscale("log")
    _save(figure, path, "")


def _errors(shares: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """How far the intervals of shares go down and up, in per cent. The last bit may be below zero."""
    below = [100 * max(0, share["accuracy"] - share["low"]) for share in shares]
    above = [100 * max(0, share["high"] - share["accuracy"]) for share in shares]
    return below, above


def _panels(count: int, width: float = WIDTH) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure  # pyplot would look for a screen

    figure = Figure(figsize=(width * count, HEIGHT), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure, panels


def _save(figure: Any, path: Path, title: str) -> None:
    if title:
        figure.suptitle(title, fontsize="small")
    with files.whole_file(path) as partial:
        figure.savefig(partial, dpi=130, format=outputs.format_of("`plot`", path, outputs.PLOTS))
