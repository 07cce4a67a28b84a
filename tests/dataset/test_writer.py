"""Datasets whose windows are written in any order are read back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_cli.dataset import writer
from sana_cli.dataset.reader import Dataset

NAMES = ("a", "b", "late")  # of attributes; the last is in later windows only
ROW = st.tuples(
    st.lists(st.text(max_size=8), min_size=1, max_size=3, unique=True),
    st.dictionaries(st.sampled_from(NAMES), st.integers(0, 2), max_size=3),
    st.none() | st.lists(st.frozensets(st.sampled_from(NAMES)), min_size=3, max_size=3),
)
Row = tuple[list[str], dict[str, int], list[frozenset[str]] | None]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(ROW, min_size=1, max_size=6),
    channels=st.sampled_from([1, 3]),
    windows_count=st.integers(1, 3),
)
def test_any_dataset_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], channels: int, windows_count: int
) -> None:
    folder = tmp_path_factory.mktemp("set")
    plan = {"source": "drawn"}
    captions = [texts for texts, _, _ in rows]
    states: dict[str, torch.Tensor] = {}
    ids: dict[str, int] = {}
    windows, pixels, shown, said = [], [], [], []
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
        known = NAMES if number else NAMES[:2]
        shown.append([{name: row[1][name] for name in known if name in row[1]} for row in rows])
        said.append(
            [
                says and [frozenset(here) & names for names in says[: len(texts)]]
                for (texts, _, says), here in zip(rows, shown[-1], strict=True)
            ]
        )
        nothing = [None] * len(captions)
        images = writer.Images(
            torch.from_numpy(pixels[-1]),
            [(number + 1, 7)] * len(names),
            names,
            captions,
            nothing,
            shown[-1],
            said[-1],
            known,
        )
        windows.append(([fresh] if fresh else [], images))
    for number in reversed(range(windows_count)):  # in any order, by any writer with the same plan
        into = writer.DatasetWriter(folder, plan)
        shards = [into.write_captions(number, at, fresh) for at, fresh in enumerate(windows[number][0])]
        into.write(number, shards, [windows[number][1]], ids, [])
    image = {"kind": "pixels", "channels": channels, "height": 2, "width": 3}
    encoder = {"encoder": "drawn", "architecture": "none", "weights": "", "dtype": "fp32"}
    attributes = {name: ["0", "1", "2"] for name in NAMES}
    facts = {"image": image, "encoder": encoder, "source": {}, "caption_dim": 4, "attributes": attributes}
    facts |= {"one_word_captions": False}
    writer.DatasetWriter(folder, plan).finish(windows_count, facts)
    dataset = Dataset(folder)
    assert dataset.attributes == attributes
    every = [row for window in shown for row in window]
    assert dataset.attribute_ids().tolist() == [[row.get(name, -1) for name in NAMES] for row in every]
    assert [list(map(set, says)) for says in dataset.caption_attributes(np.arange(len(dataset)))] == [
        [set(here)] * len(texts) if says is None else says
        for window, saying in zip(shown, said, strict=True)
        for here, says, texts in zip(window, saying, captions, strict=True)
    ]
    assert dataset.texts() == list(states)
    for text, found in zip(dataset.texts(), dataset.states(range(len(states))), strict=True):
        assert torch.equal(found, states[text])
    backwards = np.arange(len(dataset))[::-1].copy()
    assert torch.equal(
        dataset.images(backwards), torch.from_numpy(np.concatenate(pixels)[backwards]).float() / 127.5 - 1
    )
    assert [[dataset.texts()[i] for i in ids] for ids in dataset.caption_ids(backwards)] == (
        captions * windows_count
    )[::-1]
    assert [size for _, sizes in dataset.original_sizes() for size in sizes.tolist()] == [
        [number + 1, 7] for number in range(windows_count) for _ in captions
    ]
    assert dataset.shapes == {(channels, 2, 3): len(dataset)}
    assert dataset.sample_ids(backwards)[0] == f"é/{windows_count - 1}-{len(captions) - 1}"
