"""Whether a dataset and its held-out split match a config."""

import json
import re
from pathlib import Path

import pytest
from helpers import HELD_OUT, again, embedded, trained

from sana_cli.commands.train import TrainOptions, TrainStart, train
from sana_cli.config.keys import Config
from sana_cli.dataset.match import open_also
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.runtime import files


def test_config_and_dataset_must_agree(config: Config) -> None:
    for override, message in (
        ("data.image_size=24", "data.image_size: .* has 16x16, not 24x24"),
        ("model.in_channels=3", "model.in_channels: .* has 1, not 3"),
        ("model.caption_channels=2304", "model.caption_channels: .* has 128, not 2304"),
        ("text.encoder=google/gemma-2-2b-it", "text.encoder: .* has 'tiny', not 'google/gemma-2-2b-it'"),
    ):
        with pytest.raises(SanaError, match=f"{message}.*\nembed it again"):
            trained(again(config, override))
    assert not config.run.dir.exists()


def test_embed_makes_the_held_out_split_a_dataset_of_its_own(config: Config) -> None:
    summary = embedded(again(config, *HELD_OUT))  # the training split exists already
    assert summary.held_out is not None
    assert (summary.was_there, summary.held_out.was_there) == (True, False)
    dataset = Dataset(Path(f"{config.data.dir}-test"))
    assert (len(dataset), dataset.index.source["split"]) == (40, "test")
    assert list(dataset.verify())
    with pytest.raises(SanaError, match=r"data\.held_out_split: train is what is trained on"):
        again(config, "data.held_out_split=train")


def test_a_held_out_split_that_is_missing_or_of_another_kind(config: Config) -> None:
    watched = again(config, *HELD_OUT)
    embedded(watched)
    other = again(config, "data.held_out_split=other", "data.source=folder", "data.path=nowhere")
    start = next(iter(train(TrainOptions(other))))
    assert isinstance(start, TrainStart)
    assert start.plan.held_out is None
    assert re.search(
        r"no held-out loss: there is no .*data-other \(sana embed makes it; data.held_out_split\)",
        start.notes[0],
    )
    path = Path(f"{watched.data.dir}-test") / "index.json"
    index = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    index["encoder"]["max_length"] = 7
    files.write_sealed_json(path, index)
    with pytest.raises(
        SanaError, match=r"data\.held_out_split: .*data-test has encoder max_length 7, and .*data has 300"
    ):
        trained(watched)


def test_the_held_out_part_is_not_trained_on(config: Config) -> None:
    there = config.data.dir.with_name("data-test")
    held = again(config, "data.held_out_split=test", f"data.also={{{there}: 1}}")
    embedded(held)
    with pytest.raises(SanaError, match=r"data\.also: .*data-test is what the held-out loss is taken of"):
        open_also(held, Dataset(config.data.dir))
    with pytest.raises(SanaError, match=r"data\.also: no dataset in nowhere\n.*data\.dir=nowhere"):
        open_also(again(config, "data.also={nowhere: 1}"), Dataset(config.data.dir))
