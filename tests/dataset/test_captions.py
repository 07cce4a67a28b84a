"""Captions get the ids that a dictionary of all texts would give them, in a memory that does not grow."""

import hashlib
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import again, embedded
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_cli.config.keys import Config
from sana_cli.dataset import captions, embedding
from sana_cli.dataset.captions import CaptionIds


class InADictionary:
    """What `CaptionIds` stands for: it keeps every text."""

    def __init__(self, _: Path) -> None:
        self.ids: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def number(self, texts: list[str]) -> tuple[dict[str, int], list[str]]:
        new = [text for text in texts if text not in self.ids]
        self.ids |= {text: len(self.ids) + at for at, text in enumerate(new)}
        return {text: self.ids[text] for text in texts}, new

    def close(self) -> None:
        pass


WINDOWS = st.lists(
    st.lists(st.text(max_size=3) | st.integers(0, 400).map(str), unique=True, max_size=60), max_size=12
)


@pytest.mark.parametrize("high_bits", [64, 2])
@settings(max_examples=60, deadline=None)
@given(windows=WINDOWS)
def test_ids_are_those_of_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, high_bits: int, windows: list[list[str]]
) -> None:
    """Also where many hashes have the same first half."""
    hashes = captions._hashes

    def alike(texts: list[str]) -> np.ndarray:
        high, low = hashes(texts)
        return np.stack([high >> np.uint64(64 - high_bits) << np.uint64(64 - high_bits), low])

    folder = tmp_path_factory.mktemp("ids")
    ours, theirs = CaptionIds(folder), InADictionary(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(captions, "SMALL", 16)
        patched.setattr(captions, "_hashes", alike)
        for window in windows:
            assert ours.number(window) == theirs.number(window)
        assert len(ours) == len(theirs)
    assert not list(folder.iterdir()), "its files have no names"


def test_hashes_are_all_of_128_bits_of_blake2b() -> None:
    texts = ["", "a", "É \udc80", "a" * 1000]
    for text, found in zip(texts, captions._hashes(texts).T, strict=True):
        raw = text.encode("utf-8", "surrogatepass")
        assert found.tobytes() == hashlib.blake2b(raw, digest_size=16).digest()


def test_few_runs_and_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "SMALL", 2**10)
    ids, at_once = CaptionIds(tmp_path), 500

    def peak_of(first: int, count: int) -> int:
        tracemalloc.start()
        for number in range(first, first + count, at_once):
            ids.number([f"caption {one}" for one in range(number, number + at_once)])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_of(90_000, 90_000) < 2 * peak_of(0, 30_000)
    lengths = [run.shape[1] for run in ids._runs]
    assert sum(lengths) == len(ids) == 120_000
    assert all(one >= 2 * other for one, other in pairwise(lengths))
    assert all(isinstance(run, np.memmap) for run in ids._runs if run.shape[1] > 2**10)
    found, new = ids.number(["caption 5", "another", "caption 90004"])
    assert (found, new) == ({"caption 5": 90_005, "another": 120_000, "caption 90004": 4}, ["another"])


@pytest.mark.parametrize("window", [5, 1000])
def test_a_dataset_has_the_bytes_that_a_dictionary_gives_it(
    config: Config, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr("sana_cli.commands.embed.IMAGES_AT_ONCE", window)
    monkeypatch.setattr("sana_cli.commands.embed.writer.WINDOW", window)
    monkeypatch.setattr(captions, "SMALL", 4)
    folders = []
    for name, kind in (("ours", CaptionIds), ("theirs", InADictionary)):
        monkeypatch.setattr(embedding, "CaptionIds", kind)
        made = again(config, f"data.dir={config.data.dir}-{name}")
        embedded(made)
        folders.append({path.name: path.read_bytes() for path in made.data.dir.iterdir()})
    assert folders[0] == folders[1]
    assert len(folders[0]) >= 3
