"""Named attributes of images: from each source into a dataset, or one message."""

import csv
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import encoded, small_config
from helpers.folders import (
    RGB,
    finished,
    folder_config,
    images,
    metadata_folder,
    opened,
    picture,
    refused,
    tar_of,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_cli.config.keys import Config
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.sources import BadImage, Entry, Skipped
from sana_cli.sources.attributes import LONGEST, MOST, attributes_of, named_in_captions
from sana_cli.sources.captions import captions_of

ROWS: list[dict[str, Any]] = [
    {
        "text": ["a red one", " ", "one"],
        "attributes": {"colour": "red", "eyes": 3},
        "caption_attributes": [["colour"], ["eyes"], []],
    },
    {
        "text": ["a tall one"],
        "attributes": {"colour": " blue ", "eyes": None, "tall": True, "note": " ", "size": 1.5},
        "caption_attributes": None,
    },
    {"text": ["plain"], "attributes": None, "caption_attributes": None},
    {"text": ["a short one"], "attributes": {"tall": False, "eyes": 0}, "caption_attributes": [["tall"]]},
]
SHOWN = [
    {"colour": "red", "eyes": "3"},
    {"colour": "blue", "tall": "true", "size": "1.5"},
    {},
    {"tall": "false", "eyes": "0"},
]
SAID = [[{"colour"}, set()], [{"colour", "tall", "size"}], [set()], [{"tall"}]]


def in_dataset(config: Config) -> tuple[list[dict[str, str]], list[list[set[str]]]]:
    """The attributes of each image of a dataset, and those that each caption names."""
    dataset = Dataset(config.data.dir)
    shown = [
        {
            name: values[number]
            for (name, values), number in zip(dataset.attributes.items(), row, strict=True)
            if number >= 0
        }
        for row in dataset.attribute_ids().tolist()
    ]
    said = dataset.caption_attributes(np.arange(len(dataset)))
    return shown, [[set(names) for names in captions] for captions in said]


def hugging_face(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    datasets = pytest.importorskip("datasets")
    pictures = [{"bytes": encoded(picture(seed)), "path": None} for seed in range(len(rows))]
    made = datasets.Dataset.from_list([{**row} for row in rows])
    made = made.add_column("image", pictures).cast_column("image", datasets.Image())
    made.save_to_disk(path)
    return path


def written(kind: str, path: Path, rows: Sequence[dict[str, Any]]) -> tuple[str, Path]:
    """The rows as a source of this kind: its name and its path."""
    path.mkdir()
    if kind == "metadata.jsonl":
        metadata_folder(path, [{"file_name": f"{n}.png", **row} for n, row in enumerate(rows)])
        return "folder", path
    if kind == "webdataset":
        members = [
            member
            for n, row in enumerate(rows)
            for member in ((f"{n}.png", encoded(picture(n))), (f"{n}.json", json.dumps(row).encode()))
        ]
        tar_of(path / "a.tar", members)
        return "webdataset", path
    if kind == "columns of JSON":
        texts = ("attributes", "caption_attributes")
        rows = [{**row, **{key: json.dumps(row[key]) for key in texts}} for row in rows]
    return "datasets", hugging_face(path, rows)


@pytest.mark.parametrize("kind", ["metadata.jsonl", "webdataset", "columns", "columns of JSON"])
def test_attributes_come_from_each_source(tmp_path: Path, kind: str) -> None:
    source, path = written(kind, tmp_path / "source", ROWS)
    given = (f"data.source={source}", f"data.path={path}", "data.workers=0", *RGB)
    config = small_config(tmp_path, *given)
    assert finished(config).skipped == 0
    assert in_dataset(config) == (SHOWN, SAID)
    assert Dataset(config.data.dir).index.format_version == 3
    without = small_config(tmp_path / "without", *given, "data.attribute_field=null")
    finished(without)
    assert in_dataset(without) == ([{}] * 4, [[set()] * count for count in (2, 1, 1, 1)])
    assert Dataset(without.data.dir).attributes == {}
    assert Dataset(without.data.dir).attribute_ids().shape == (4, 0)
    with pytest.raises(SanaError, match=r"source\.\w+ .*\n.*`overwrite`"):
        finished(small_config(tmp_path, *given, "data.attribute_field=null"))


def test_attributes_come_from_csv(tmp_path: Path) -> None:
    write(tmp_path / "source", images("0.png", "1.png", "2.png", "3.png"))
    with (tmp_path / "source" / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "attributes", "caption_attributes"])
        for number, row in enumerate(ROWS):
            said = None if row["caption_attributes"] is None else row["caption_attributes"][:1]
            fields = ("" if value is None else json.dumps(value) for value in (row["attributes"], said))
            writer.writerow([f"{number}.png", row["text"][0], *fields])
    config = folder_config(tmp_path, tmp_path / "source")
    assert finished(config).skipped == 0
    assert in_dataset(config) == (SHOWN, [[{"colour"}], *SAID[1:]])


def test_another_field_may_hold_the_attributes(tmp_path: Path) -> None:
    rows = [{**row, "facts": row["attributes"], "attributes": 7} for row in ROWS]
    for kind in ("metadata.jsonl", "webdataset", "columns"):
        source, path = written(kind, tmp_path / kind, rows)
        found = list(opened(path, source, attribute_field="facts"))
        assert [dict(entry.attributes) for entry in found if isinstance(entry, Entry)] == SHOWN
        prints = [opened(path, source, attribute_field=field).fingerprint() for field in ("facts", None)]
        assert prints[0] != prints[1]
    known = r"data\.attribute_field: .* has no column fact; .*\n.*--set data\.attribute_field=facts"
    refused(path, known, "datasets", attribute_field="fact")


def test_classes_of_hugging_face_join_other_attributes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = hugging_face(tmp_path / "saved", [{"text": 1, "attributes": {"eyes": 2}}])
    made = datasets.load_from_disk(str(path))
    made = made.cast_column("text", datasets.ClassLabel(names=["cat", "dog"]))
    made.save_to_disk(tmp_path / "classes")
    (entry,) = opened(tmp_path / "classes", "datasets")
    assert isinstance(entry, Entry)
    assert entry.attributes == {"label": "dog", "eyes": "2"}


def test_captions_that_are_dropped_take_their_names_along() -> None:
    shown, says = {"x": 1, "y": 2}, [["x"], ["y"], [], ["x", "y"]]
    texts = ["", "a", " ", "b"]
    found = captions_of(texts, None, shown, says)
    assert (found.captions, found.says) == (("a", "b"), (frozenset("y"), frozenset("xy")))
    found = captions_of(texts, [1, 0, 1, 2], shown, says)
    assert (found.captions, found.weights) == (("b",), (2.0,))
    assert found.says == (frozenset("xy"),)
    assert captions_of(texts, None, shown).says is None


# --- attributes of another form -----------------------------------------------------------------------------

FOREIGN: list[tuple[dict[str, Any], str]] = [
    ({"attributes": ["red", 3]}, "its attributes are no object of names and values: ['red', 3]"),
    ({"attributes": "red"}, "its attributes are no object of names and values: 'red'"),
    ({"attributes": 0}, "its attributes are no object of names and values: 0"),
    (
        {"attributes": {"colour": ["red"]}},
        "its attribute 'colour' is not a text, a number or true or false: ['red']",
    ),
    (
        {"attributes": {" ": "red"}},
        f"its attribute ' ' has an empty name, or a text over {LONGEST} characters",
    ),
    (
        {"attributes": {"colour": "r" * 201}},
        f"its attribute 'colour' has an empty name, or a text over {LONGEST} characters",
    ),
    (
        {"attributes": {"colour": "\ud800"}},
        "its attribute 'colour' has half a character, which UTF-8 cannot write",
    ),
    (
        {"attributes": {f"a{number}": 1 for number in range(MOST + 1)}},
        f"{MOST + 1} attributes; the most is {MOST}",
    ),
    (
        {"attributes": {"eyes": 1}, "caption_attributes": [["colour"]]},
        "its caption_attributes name 'colour', which it has no attribute of",
    ),
    (
        {"caption_attributes": [["colour"]]},
        "its caption_attributes name 'colour', which it has no attribute of",
    ),
    (
        {"attributes": {"eyes": 1}, "caption_attributes": ["eyes"]},
        "its caption_attributes are not one list of names for each caption",
    ),
    (
        {"attributes": {"eyes": 1}, "caption_attributes": [[1]]},
        "its caption_attributes are not one list of names for each caption",
    ),
    (
        {"attributes": {"eyes": 1}, "caption_attributes": [["eyes"], []]},
        "its caption_attributes are not one list of names for each caption",
    ),
]
FIRST = {"file_name": "0.png", "text": "first"}


def lines(*rows: dict[str, Any] | str) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.mark.parametrize(("row", "message"), FOREIGN)
def test_foreign_attributes_are_one_message_before_any_work(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    source = write(tmp_path / "source", images("0.png", "1.png"))
    foreign = {"file_name": "1.png", "text": "second", **row}
    write(source, {"metadata.jsonl": lines(FIRST, "", foreign)})
    error = refused(source, r"metadata\.jsonl:3: .*\n.*for example.*\n.*--set data\.attribute_field=null")
    assert error.exit_code == 2
    assert str(error).splitlines() == [
        f"{source / 'metadata.jsonl'}:3: {message}",
        'attributes are for example "attributes": {"colour": "red", "eyes": 3}',
        "leave them out with --set data.attribute_field=null",
    ]
    found = list(opened(source, attribute_field=None))
    assert [entry.attributes for entry in found if isinstance(entry, Entry)] == [{}, {}]
    # after a row that is well formed, only the row is lost
    write(source, {"metadata.jsonl": lines({**FIRST, "attributes": {"eyes": 2}}, foreign)})
    config = folder_config(tmp_path, source)
    assert finished(config).images == 1
    (left,) = Dataset(config.data.dir).skipped()
    assert (left.name, left.reason) == ("1.png", message)
    assert in_dataset(config) == ([{"eyes": "2"}], [[{"eyes"}]])


def test_foreign_attributes_in_csv_are_one_message(tmp_path: Path) -> None:
    write(tmp_path, images("0.png", "1.png"))
    write(tmp_path, {"metadata.csv": "file_name,text,attributes\n0.png,first,\n1.png,second,red\n"})
    error = refused(tmp_path, r"metadata\.csv:3: its attributes are no object of names and values: 'red'")
    assert error.exit_code == 2
    twice = "file_name,text,attributes,attributes\n0.png,first,,\n"
    write(tmp_path, {"metadata.csv": twice})
    refused(tmp_path, r"metadata\.csv has 2 columns attributes: which one is meant\?")


def test_only_attributes_are_refused_early(tmp_path: Path) -> None:
    """A row without a caption is left out, even if a field of captions is called like attributes."""
    write(tmp_path, images("0.png", "1.png"))
    first = {"file_name": "0.png", "attributes": {"eyes": 1}, "caption_attributes": [["eyes"], []]}
    second = {"file_name": "1.png", "attribute_text": "second", "attributes": {"eyes": 2}}
    write(tmp_path, {"metadata.jsonl": lines(first | {"caption_attributes": None}, second)})
    found = list(opened(tmp_path, caption_field="attribute_text"))
    assert [type(entry) for entry in found] == [Skipped, Entry]
    both = {**first, "attribute_text": ["one", ""]}
    write(tmp_path, {"metadata.jsonl": lines(both, second)})
    found = list(opened(tmp_path, caption_field="attribute_text"))
    assert [type(entry) for entry in found] == [Entry, Entry]


@pytest.mark.parametrize("kind", ["webdataset", "columns of JSON"])
def test_foreign_attributes_elsewhere_are_refused_at_once_or_left_out_later(
    tmp_path: Path, kind: str
) -> None:
    """As a folder's: the first row that has any decides. Later ones cost their image, and say why."""
    foreign = {"text": "a", "attributes": ["red"], "caption_attributes": None}
    none = {"text": "b", "attributes": None, "caption_attributes": None}
    ours = {"text": "c", "attributes": {"colour": "red"}, "caption_attributes": None}
    reason = "its attributes are no object of names and values: ['red']"
    source, path = written(kind, tmp_path / "first", [none, foreign])
    with pytest.raises(SanaError, match=re.escape(reason) + r"(?s:.*)data\.attribute_field=null"):
        list(opened(path, source))
    assert len(list(opened(path, source, attribute_field=None))) == 2
    if kind == "webdataset":  # a column of a dataset has one type
        source, path = written(kind, tmp_path / "later", [ours, foreign])
        read, left = opened(path, source)
        assert isinstance(read, Entry)
        assert isinstance(left, Skipped)
        assert left.reason == reason


def test_attributes_beside_captions_in_a_text_file(tmp_path: Path) -> None:
    members = [("0.png", encoded(picture(0))), ("0.txt", b"a red cat\na cat")]
    members.append(("0.json", json.dumps({"attributes": {"colour": "red"}, "text": "unread"}).encode()))
    members += [("1.png", encoded(picture(1))), ("1.txt", b"a dog"), ("1.json", b"not JSON")]
    first, second = opened(tar_of(tmp_path / "a.tar", members), "webdataset")
    assert isinstance(first, Entry)
    assert isinstance(second, Entry)
    assert (first.captions, first.attributes) == (("a red cat", "a cat"), {"colour": "red"})
    assert (second.captions, second.attributes) == (("a dog",), {})


def test_a_class_keeps_its_attribute_beside_others(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({
        "image": datasets.Image(), "text": datasets.ClassLabel(names=["cat", "dog"]),
        "attributes": {"colour": datasets.Value("string")},
        "caption_attributes": datasets.Sequence(datasets.Sequence(datasets.Value("string"))),
    })  # fmt: skip
    rows = {
        "image": [{"bytes": encoded(picture(n)), "path": None} for n in range(2)],
        "text": [1, 0],
        "attributes": [{"colour": "red"}, {"colour": "blue"}],
        "caption_attributes": [[["label"]], [[]]],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    entries = [entry for entry in opened(tmp_path / "saved", "datasets") if isinstance(entry, Entry)]
    assert [entry.attributes for entry in entries] == [
        {"label": "dog", "colour": "red"},
        {"label": "cat", "colour": "blue"},
    ]
    assert [entry.says for entry in entries] == [(frozenset({"label"}),)] * 2  # the caption is the class


def test_captions_that_name_nothing_where_nothing_is_shown(tmp_path: Path) -> None:
    rows = [{"file_name": "0.png", "text": "x", "caption_attributes": [[]]}]
    config = folder_config(tmp_path, metadata_folder(tmp_path / "source", rows))
    finished(config)
    assert in_dataset(config) == ([{}], [[set()]])


def test_too_many_values_of_an_attribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana_cli.dataset.embedding.MOST_VALUES", 2)
    rows = [{"file_name": f"{n}.png", "text": "x", "attributes": {"url": f"of {n}"}} for n in range(3)]
    config = folder_config(tmp_path, metadata_folder(tmp_path / "source", rows))
    with pytest.raises(
        SanaError, match=r"data\.attribute_field: .*'url' has over 2 values, one of them 'of 2'"
    ):
        finished(config)


def test_too_many_attributes_of_all_images_together(tmp_path: Path) -> None:
    rows = [{"file_name": f"{n}.png", "text": "x", "attributes": {f"of {n}": 1}} for n in range(MOST + 1)]
    config = folder_config(tmp_path, metadata_folder(tmp_path / "source", rows))
    with pytest.raises(
        SanaError, match=f"data.attribute_field: .* over {MOST} attributes.*'of {MOST}'\n.*\n"
    ):
        finished(config)
    assert not config.data.dir.exists()
    most = folder_config(tmp_path / "most", metadata_folder(tmp_path / "fewer", rows[:MOST]))
    finished(most)
    assert in_dataset(most)[0] == [{f"of {n}": "1"} for n in range(MOST)]


def test_class_folders_whose_names_are_other_bytes(tmp_path: Path) -> None:
    write(tmp_path / "source", images("tea/1.png", os.fsdecode(b"caf\xe9/1.png")))
    config = folder_config(tmp_path, tmp_path / "source")
    finished(config)
    assert sorted(in_dataset(config)[0], key=str) == [{"label": "caf\\udce9"}, {"label": "tea"}]


# --- any JSON -----------------------------------------------------------------------------------------------

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
NAMES = st.sampled_from(["a", "b", ""])
LIKELY = st.dictionaries(NAMES, PLAIN, max_size=3)
SAYS = st.none() | st.lists(st.lists(NAMES, max_size=2), max_size=3)


def either(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """These values, and their JSON."""
    return values | values.map(json.dumps)


@settings(max_examples=500, deadline=None)
@given(value=either(JSON) | either(LIKELY), says=either(JSON) | either(SAYS), captions=st.integers(0, 3))
def test_any_json_gives_attributes_or_a_reason(value: Any, says: Any, captions: int) -> None:
    shown: dict[str, str] = {}
    try:
        shown = attributes_of(value)
        named = named_in_captions(says, captions, shown)
    except BadImage as error:
        assert 0 < len(str(error)) < 300
    else:
        assert named is None or (len(named) == captions and all(names <= shown.keys() for names in named))
    for name, text in shown.items():
        assert name.strip()
        assert text == text.strip() != ""
        assert f"{name}{text}".encode()
        assert max(len(name), len(text)) <= LONGEST


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries({"attributes": JSON | LIKELY, "caption_attributes": JSON | SAYS}), max_size=4
    )
)
def test_any_row_is_read_or_left_out(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    source = tmp_path_factory.mktemp("source")
    names = [f"{number}.png" for number in range(1 + len(rows))]
    write(source, images(*names))
    texts = [{"file_name": name, "text": "x", **row} for name, row in zip(names[1:], rows, strict=True)]
    write(source, {"metadata.jsonl": lines({**FIRST, "attributes": {"a": 1}}, *texts)})
    found = list(opened(source))
    assert [entry.id if isinstance(entry, Entry) else entry.name for entry in found] == names
    assert isinstance(found[0], Entry)


def test_lists_of_lists_of_lists_are_reasons() -> None:
    for depth in (*range(900, 1100), 100_000):
        for text in ("[" * depth + "]" * depth, '{"a": ' + "[" * depth + "]" * depth + "}"):
            with pytest.raises(BadImage):
                attributes_of(text)
            with pytest.raises(BadImage):
                named_in_captions(text, 1, {})
