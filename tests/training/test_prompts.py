"""The words that a run was trained on, and a prompt's other words."""

from pathlib import Path

import pytest
import torch
from helpers import again, sampled, trained

from sana_cli.commands.train import TrainOptions, TrainStart, train
from sana_cli.config.keys import Config
from sana_cli.dataset.reader import Dataset
from sana_cli.sources import DIGIT_WORDS
from sana_cli.training import prompts
from sana_cli.training.prompts import _in_order, encode_prompts
from sana_cli.weights import checkpoint


def test_captions_of_a_grid_are_in_the_order_of_their_classes(config: Config) -> None:
    dataset = Dataset(config.data.dir)
    assert dataset.attributes["label"] != sorted(dataset.attributes["label"])  # they are as they came
    texts = {text: number for number, text in enumerate(dataset.texts())}
    assert _in_order(dataset, texts) == [*map(str, range(10)), *DIGIT_WORDS]


def test_of_many_captions_the_first_are_looked_at(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt among the others is encoded anew, to the same states."""
    dataset, device = Dataset(config.data.dir), torch.device("cpu")
    last = dataset.texts()[-1]
    asked = again(config, f"sample.prompts=[{last!r}]")
    whole = encode_prompts(asked, dataset, device)
    monkeypatch.setattr(prompts, "MOST_SEARCHED", 4)
    few = encode_prompts(asked, dataset, device)
    assert len(few.states) == len(whole.states) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(few.states, whole.states, strict=True))
    assert (few.words, few.one_word, few.notes) == (whole.words, whole.one_word, ())
    without = encode_prompts(again(config, "sample.prompts=null"), dataset, device)
    assert sorted(cell.prompt for row in without.cells for cell in row) == sorted(dataset.texts()[1:4])


def test_a_checkpoint_knows_its_words(config: Config, tmp_path: Path) -> None:
    done = trained(config)
    assert checkpoint.read_record(done.checkpoint).words == sorted([*map(str, range(10)), *DIGIT_WORDS])

    def notes(*asked: str, negative_prompt: str | None = None) -> tuple[str, ...]:
        options = {"out": tmp_path / "x.png", "steps": 1, "negative_prompt": negative_prompt}
        return sampled(done.checkpoint, *asked, **options).notes

    assert notes("4 TWO", negative_prompt="six") == ()
    unknown = "words that this checkpoint was never trained on: - w forty ugly"
    assert notes("4 --w 32", "forty", negative_prompt="ugly") == (unknown,)
    (note,) = notes("4" * 400)
    assert "1 of the prompts are longer than text.max_length, 300 tokens" in note
    unseen = again(config, 'sample.prompts=["4 zebra"]', f"run.dir={tmp_path / 'unseen'}")
    start = next(step for step in train(TrainOptions(unseen)) if isinstance(step, TrainStart))
    assert "sample.prompts: words that no caption of the dataset has: zebra" in start.notes
