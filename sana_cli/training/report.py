"""report.html of a run: one page with everything in it, which needs no network.

It reads the run directory (metrics.jsonl, samples/, config.yaml) and can be made again at any time. The
page is `assets/report.html`; its data is one JSON document.
"""

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from sana_cli import __version__
from sana_cli.config.file import load_run_config
from sana_cli.config.keys import Architecture
from sana_cli.errors import SanaError, first_line
from sana_cli.model import build, module_rows
from sana_cli.runtime import files, hub
from sana_cli.training import metrics
from sana_cli.training.grids import grids
from sana_cli.weights.checkpoint import parameter_count

REPORT = "report.html"
MOST_LINES = 1000  # of metrics, on the page; more are averaged
MOST_GRIDS = 40
MOST_PIXELS = 1200  # to a side of a grid; larger ones become JPEG
DATA_MARK = "/*DATA*/null"


def write(run: Path, model: Architecture) -> Path:
    """Write report.html of a run, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    page = (Path(__file__).parents[1] / "assets" / REPORT).read_text(encoding="utf-8")
    data = json.dumps(collect(run, model), ensure_ascii=False, allow_nan=False)
    safe = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    target = run / REPORT
    with files.whole_file(target) as partial:
        files.write_text(partial, page.replace(DATA_MARK, safe, 1))
    return target


def try_write(run: Path, model: Architecture, step: int) -> str | None:
    """Bring report.html up to date, or say why that failed: a page is not worth a run."""
    try:
        write(run, model)
    except (SanaError, OSError, ValueError) as error:
        return f"no report at step {step}: {first_line(error)}"
    return None


def collect(run: Path, model: Architecture) -> dict[str, Any]:
    """What the page shows, as plain JSON values."""
    empty = build(model, seed=None)
    config, lines = run / "config.yaml", run / metrics.METRICS
    shown = _evenly(grids(run), MOST_GRIDS)
    return {
        "name": run.absolute().name,
        "made_by": f"sana {__version__}",
        "parameters": parameter_count(empty.parameters()),
        "lines": _averaged(metrics.read(lines) if lines.is_file() else []),
        "grids": [{"step": step, "image": _embedded(path)} for step, path in shown],
        "config": config.read_text(encoding="utf-8") if config.is_file() else "",
        "modules": [list(row) for row in module_rows(empty)],
        "begins_with": _begins_with(run),
    }


def _begins_with(run: Path) -> str | None:
    """The model that a run began with, whose pictures are those of step 0; None: it began at random."""
    try:
        init_from = load_run_config(run).train.init_from
    except SanaError:
        return None
    return None if init_from is None else hub.model_name(str(init_from))


def _evenly(rows: list[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    """At most `most` rows, evenly spaced, with the first and the last."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _embedded(path: Path) -> str:
    with Image.open(path) as image:
        if max(image.size) <= MOST_PIXELS:
            return "data:image/png;base64," + base64.b64encode(_bare_png(image)).decode()
        image.thumbnail((MOST_PIXELS, MOST_PIXELS))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=85)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _bare_png(image: Image.Image) -> bytes:
    """The picture without its text chunk."""
    buffer = io.BytesIO()
    image.copy().save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _averaged(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MOST_LINES` lines: runs of lines averaged, at the step of the last. Held-out losses stay."""
    width = -(-len(lines) // MOST_LINES)
    if width <= 1:
        return [_finite(line) for line in lines]
    return [_finite(_mean(lines[at : at + width])) for at in range(0, len(lines), width)]


def _mean(lines: list[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for line in lines:  # the latest value of what is not averaged
        joined.update(line)
    for key in ("loss", "grad_norm", "samples_per_second", "data_wait"):
        values = [line[key] for line in lines if isinstance(line.get(key), int | float)]
        if values:
            joined[key] = sum(values) / len(values)
    binned = [line["sigma_bins"] for line in lines if "sigma_bins" in line]
    if binned:
        joined["sigma_bins"] = _join_bins(binned)
    return joined


def _join_bins(binned: list[dict[str, Any]]) -> dict[str, Any]:
    images = [sum(counts) for counts in zip(*(one["images"] for one in binned), strict=True)]
    sums = [0.0] * len(images)
    for one in binned:
        for bin_, (loss, count) in enumerate(zip(one["loss"], one["images"], strict=True)):
            sums[bin_] += (loss or 0.0) * count
    means = [total / count if count else None for total, count in zip(sums, images, strict=True)]
    return {"loss": means, "images": images}


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    """A line without NaN and infinity, which JSON on a page cannot hold."""
    return {
        key: None if isinstance(value, float) and value - value != 0 else value for key, value in line.items()
    }
