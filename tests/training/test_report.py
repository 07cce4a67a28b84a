"""report.html: one self-contained page that loads nothing from the network."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
from helpers import HELD_OUT, again, embedded, metrics_lines, trained
from PIL import Image

from sana_cli.config.keys import Config
from sana_cli.training import report


class Page(HTMLParser):
    """Collects the references of a page and the text of its script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.script = ""
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")
        ]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.script += data


def picture(data_url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2])))


def test_the_report_holds_everything_and_loads_nothing(config: Config) -> None:
    watched = again(config, *HELD_OUT, "log.sample_every=2")
    embedded(watched)
    summary = trained(watched)
    assert summary.report == watched.run.dir / "report.html"
    # a prompt that would end the script
    hostile = again(
        config, *HELD_OUT, "log.sample_every=2", 'sample.prompts=["4 two", "</script><img src=x>"]'
    )
    (watched.run.dir / "config.yaml").write_text(hostile.to_yaml())
    page = Page(report.write(watched.run.dir, watched.model.resolved(16, 128)).read_text())
    assert page.links == []
    assert page.tags.count("script") == 1
    assert "img" in page.tags
    assert "http:" not in page.script.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page.script
    found = re.search(r"const data = (.*);\n", page.script)
    assert found is not None
    data = json.loads(found[1])
    assert [line["step"] for line in data["lines"]] == [1, 2, 3, 4]
    assert data["lines"][3]["held_out_loss"] == metrics_lines(watched.run.dir)[3]["held_out_loss"]
    assert [grid["step"] for grid in data["grids"]] == [0, 2, 4]
    for grid in data["grids"]:
        with Image.open(watched.run.dir / "samples" / f"step-{grid['step']:06d}.png") as drawn:
            assert np.array_equal(np.asarray(picture(grid["image"])), np.asarray(drawn))
    assert "</script><img src=x>" in data["config"]
    assert sum(row[1] for row in data["modules"] if not row[0].startswith(" ")) == data["parameters"]


def test_a_long_run_is_averaged_for_the_page(config: Config) -> None:
    folder, model = config.run.dir, config.model.resolved(16, 128)
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 2501):
            bins = {"loss": [float(step)] + [None] * 9, "images": [step % 2, *[0] * 9]}
            line: dict[str, Any] = {"step": step, "loss": float(step), "sigma_bins": bins}
            file.write(json.dumps(line | ({"held_out_loss": 7.0} if step == 4 else {})) + "\n")
        file.write('{"step": 2501, "lo')  # truncated
    data = report.collect(folder, model)
    assert len(data["lines"]) == 834
    bins = {"loss": [5.0] + [None] * 9, "images": [1, *[0] * 9]}
    assert data["lines"][1] == {"step": 6, "loss": 5.0, "held_out_loss": 7.0, "sigma_bins": bins}
    (folder / "samples").mkdir()
    Image.new("L", (3000, 1500)).save(folder / "samples" / "step-000007.png")
    (grid,) = report.collect(folder, model)["grids"]
    assert grid["step"] == 7
    assert picture(grid["image"]).size == (1200, 600)
