"""Datasets whose windows are written in any order are read back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_cli.dataset import writer
from sana_cli.dataset.reader import Dataset


@settings(max_examples=30, deadline=None)
@given(
    captions=st.lists(
        st.lists(st.text(max_size=8), min_size=1, max_size=3, unique=True), min_size=1, max_size=6
    ),
    channels=st.sampled_from([1, 3]),
    windows_count=st.integers(1, 3),
)
def test_any_dataset_comes_back(
    tmp_path_factory: pytest.TempPathFactory, captions: list[list[str]], channels: int, windows_count: int
) -> None:
    folder = tmp_path_factory.mktemp("set")
    plan = {"source": "drawn"}
    states: dict[str, torch.Tensor] = {}
    ids: dict[str, int] = {}
    windows, pixels = [], []
    for number in range(windows_count):
        new = [text for row in (captions if number else [[""], *captions]) for text in row]
        fresh = {
            text: torch.randn(1 + len(text), 4).bfloat16()
            for text in dict.fromkeys(new)
            if text not in states
        }
        ids |= {text: len(ids) + at for at, text in enumerate(fresh)}
        states |= fresh
        pixels.append(
            np.random.default_rng(number).integers(0, 256, (len(captions), channels, 2, 3), dtype=np.uint8)
        )
        names = [f"é/{number}-{i}" for i in range(len(captions))]
        nothing = [None] * len(captions)
        images = writer.Images(torch.from_numpy(pixels[-1]), names, captions, nothing, nothing)
        windows.append(([fresh] if fresh else [], images))
    for number in reversed(range(windows_count)):  # in any order, by any writer with the same plan
        into = writer.DatasetWriter(folder, plan)
        shards = [into.write_captions(number, at, fresh) for at, fresh in enumerate(windows[number][0])]
        into.write(number, shards, windows[number][1], ids, [])
    image = {"kind": "pixels", "channels": channels, "height": 2, "width": 3}
    encoder = {"encoder": "drawn", "architecture": "none", "weights": "", "dtype": "fp32"}
    facts = {"image": image, "encoder": encoder, "source": {}, "caption_dim": 4}
    writer.DatasetWriter(folder, plan).finish(windows_count, ids, facts)
    dataset = Dataset(folder)
    assert dataset.labels() is None
    assert dataset.texts() == list(states)
    for text, found in zip(dataset.texts(), dataset.states(range(len(states))), strict=True):
        assert torch.equal(found, states[text])
    rows = np.arange(len(dataset))[::-1].copy()
    assert torch.equal(
        dataset.images(rows), torch.from_numpy(np.concatenate(pixels)[rows]).float() / 127.5 - 1
    )
    assert [[dataset.texts()[i] for i in ids] for ids in dataset.caption_ids(rows)] == (
        captions * windows_count
    )[::-1]
    assert dataset.sample_ids(rows)[0] == f"é/{windows_count - 1}-{len(captions) - 1}"
