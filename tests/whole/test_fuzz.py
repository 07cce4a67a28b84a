"""Any file, config or caption gives a result or one message: no traceback, flood or hang.

docs/trust.md states the counts: 2,000 configs, 500 files.
"""

import contextlib
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from helpers import embedded, small_config, trained
from helpers.folders import metadata_folder
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import PngImagePlugin

from sana_cli import console
from sana_cli.commands.embed import EmbedOptions, embed
from sana_cli.commands.inspect import InspectOptions, inspect
from sana_cli.commands.sample import SampleOptions, SampleSummary, sample
from sana_cli.commands.train import TrainOptions, train
from sana_cli.config.file import parse_config
from sana_cli.config.keys import Config
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.model import build
from sana_cli.runtime import files
from sana_cli.runtime.device import peak_memory
from sana_cli.sampling import pictures
from sana_cli.weights import checkpoint, configs

CONFIGS, FILES_OF_A_KIND = 2000, 100  # of five kinds
MOST_GROWTH = 300 * 2**20  # bytes that the hundred files of a kind may add to the memory of the process
HANG = 20  # seconds

# --- configs ------------------------------------------------------------------------------------------------

FIELDS = [
    (section, key, field)
    for section, kind in Config.model_fields.items()
    for key, field in kind.annotation.model_fields.items()  # type: ignore[union-attr]
]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.lists(st.integers(-2, 99) | st.floats(0, 1) | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(0, 3), max_size=2),
)


def likely(field: Any) -> st.SearchStrategy[Any]:
    """Values that a field may take, and similar ones."""
    kinds = [get_args(a) for a in (field.annotation, *get_args(field.annotation))]
    words = [word for kind in kinds for word in kind if isinstance(word, str)]
    some = [
        st.just(field.get_default()),
        st.integers(0, 64),
        st.floats(0, 2),
        st.booleans(),
        st.sampled_from(["a", "tiny", "x/y"]),
    ]
    return st.one_of(*some, *([st.sampled_from(words)] if words else []))


KEYS = st.sampled_from(FIELDS).flatmap(lambda it: st.tuples(st.just(it[:2]), likely(it[2]) | ODD))
STRANGE_KEYS = st.tuples(
    st.tuples(st.sampled_from([*Config.model_fields, "trian", ""]), st.text(max_size=8)), ODD
)


def as_yaml(pairs: list[tuple[tuple[str, str], Any]]) -> str:
    nested: dict[str, dict[str, Any]] = {}
    for (section, key), value in pairs:
        plain = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        nested.setdefault(section, {})[key] = plain
    return yaml.safe_dump(nested, allow_unicode=True)


@settings(max_examples=CONFIGS, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(KEYS | STRANGE_KEYS, max_size=6).map(as_yaml))
def test_configs_load_or_are_refused_by_key_and_line(text: str) -> None:
    try:
        config = parse_config(text, "c.yaml")
    except SanaError as error:
        assert error.exit_code == 2
        for line in str(error).splitlines():
            assert re.match(r"c\.yaml:\d+: .*\w", line) or line.startswith("c.yaml: "), line
        named = [key for key in (*Config.model_fields, "trian") if key in str(error)]
        assert named or "key" in str(error) or "expected" in str(error) or "not YAML" in str(error), str(
            error
        )
    else:
        assert parse_config(config.to_yaml(), "dumped") == config
        assert parse_config(config.to_commented_yaml(), "commented") == config


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{k}: &{k} [{', '.join(['*' + chr(ord(k) - 1)] * 9)}]\n" for k in "bcdefghi"),
        "[" * 100_000,
        "{a: " * 50_000,
        "train: {lr: " + "9" * 100_000 + "}",
        "? " * 5_000,
        "train: !!python/object/apply:os.system ['touch pwned']",
    ],
    ids=["aliases", "lists", "maps", "digits", "keys", "python"],
)
def test_yaml_bombs_are_one_message(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with guarded(), pytest.raises(SanaError) as caught:
        parse_config(text, "c.yaml")
    assert caught.value.exit_code == 2
    assert len(str(caught.value)) < 1000
    assert not list(tmp_path.iterdir())


def test_a_config_of_ten_megabytes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text("# " + "x" * 10_000_000)
    with pytest.raises(SanaError, match="over 1,000,000 bytes"):
        inspect(InspectOptions(str(tmp_path / "big.yaml")))


# --- files --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Fail after `HANG` seconds."""

    def late(*_: Any) -> None:
        raise AssertionError(f"not done after {HANG} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged(raw: bytes, draw_: Any) -> bytes:
    """The bytes with one fault: some changed, missing or added."""
    at = draw_(st.integers(0, max(0, len(raw) - 1)))
    kind = draw_(st.sampled_from(["flip", "cut", "insert", "erase", "number", "head", "swap"]))
    if kind == "flip":
        changed = bytearray(raw)
        for _ in range(draw_(st.integers(1, 8))):
            changed[draw_(st.integers(0, len(raw) - 1))] ^= draw_(st.integers(1, 255))
        return bytes(changed)
    if kind == "cut":
        return raw[:at]
    if kind == "insert":
        return raw[:at] + draw_(st.binary(min_size=1, max_size=64)) + raw[at:]
    if kind == "erase":
        return raw[:at] + bytes(min(64, len(raw) - at)) + raw[at + 64 :]
    if kind == "number":  # an enormous length
        return (
            raw[:at]
            + draw_(st.sampled_from([b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"999999999999", b"-1", b"1e309"]))
            + raw[at + 8 :]
        )
    if kind == "head":
        return draw_(st.binary(min_size=8, max_size=16)) + raw[16:]
    return raw[at:] + raw[:at]


def rearranged(content: Any, draw_: Any) -> Any:
    """JSON with one value replaced, missing, or of another type."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            walk(value)

    walk(content)
    node, key = draw_(st.sampled_from(places))
    strange: st.SearchStrategy[Any] = st.sampled_from(
        [None, -1, 0, 2**62, 1e308, "", "../x", "/etc/passwd", [], {}, [[]], "a" * 300, True, "\x1b[31m"]
    )
    if draw_(st.booleans()) and isinstance(node, dict):
        del node[key]
    else:
        node[key] = draw_(strange)
    return content


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small file or folder of each kind, as written by `sana` and diffusers."""
    from diffusers import SanaTransformer2DModel

    folder = tmp_path_factory.mktemp("made")
    config = small_config(folder)
    embedded(config, 12)
    attributes = small_config(folder / "attributes", "data.source=folder", f"data.path={folder / 'images'}")
    rows = [
        {
            "file_name": f"{n}.png",
            "text": [str(n), "a digit"],
            "attributes": {"digit": n, "even": n % 2 == 0},
            "caption_attributes": [["digit"], []],
        }
        for n in range(12)
    ]
    metadata_folder(folder / "images", rows)
    embedded(attributes)
    summary = trained(config)
    assert summary.grid is not None
    theirs = folder / "theirs"
    model = config.model.resolved(16, 8)
    SanaTransformer2DModel.from_config(configs.diffusers_config(model)).save_pretrained(theirs)
    torch.save(build(model).state_dict(), folder / "weights.pth")
    return {
        "dataset": attributes.data.dir,
        "checkpoint": summary.checkpoint,
        "picture": summary.grid,
        "diffusers": theirs,
        "pth": folder / "weights.pth",
    }


def use_dataset(place: Path) -> None:
    for verify in (True, False):
        with contextlib.suppress(SanaError):
            inspect(InspectOptions(str(place), verify))
    dataset = Dataset(place)
    rows = np.arange(min(len(dataset), 100))
    (
        dataset.images(rows),
        dataset.caption_ids(rows),
        dataset.caption_weights(rows),
        dataset.sample_ids(rows),
        dataset.attribute_ids(),
        dataset.caption_attributes(rows),
    )
    dataset.states(range(len(dataset.texts())))
    train_config = small_config(place.parent, f"data.dir={place}", "train.steps=2")
    for _ in train(TrainOptions(train_config)):
        pass


def use_checkpoint(place: Path) -> None:
    for verify in (True, False):
        with contextlib.suppress(SanaError):
            inspect(InspectOptions(str(place), verify))
    for _ in sample(SampleOptions(("4",), place, device="cpu", steps=1, out=place.parent / "out.png")):
        pass


def use_transformer(place: Path) -> None:
    with contextlib.suppress(SanaError):
        inspect(InspectOptions(str(place)))
    checkpoint.load_transformer(place)


USES: dict[str, Callable[[Path], None]] = {
    "dataset": use_dataset,
    "checkpoint": use_checkpoint,
    "picture": lambda place: console.plain(inspect(InspectOptions(str(place)))) and None,
    "diffusers": use_transformer,
    "pth": use_transformer,
}


@pytest.mark.parametrize("kind", USES)
def test_files_are_used_or_refused(kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    before, outcomes = peak_memory(torch.device("cpu")), {"used": 0, "refused": 0}

    @settings(
        max_examples=FILES_OF_A_KIND, deadline=None, suppress_health_check=list(HealthCheck), database=None,
        phases=[Phase.generate],
    )  # fmt: skip
    @given(st.data())
    def one(data: st.DataObject) -> None:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        (tmp_path / "x").mkdir()
        place = tmp_path / "x" / made[kind].name
        shutil.copytree(made[kind], place) if made[kind].is_dir() else shutil.copy(made[kind], place)
        path = data.draw(
            st.sampled_from(sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place])
        )
        if path.suffix == ".json" and data.draw(st.booleans()):
            content = json.loads(path.read_text())
            write = files.write_json if content.pop("sha256", None) is None else files.write_sealed_json
            write(path, rearranged(content, data.draw))
        elif kind == "picture" and data.draw(st.booleans()):  # an intact picture with a damaged record
            record = rearranged(pictures.read_record(path).as_json(), data.draw)
            info = PngImagePlugin.PngInfo()
            info.add_itxt(pictures.PNG_KEY, json.dumps(record))
            pictures.to_image(torch.zeros(1, 8, 8, dtype=torch.uint8)).save(path, pnginfo=info)
        else:
            path.write_bytes(damaged(path.read_bytes(), data.draw))
        if kind == "checkpoint" and path.name != checkpoint.MANIFEST and data.draw(st.booleans()):
            (place / checkpoint.MANIFEST).unlink()
            checkpoint._seal(place)  # with valid checksums, as an attacker would write them
        try:
            with guarded():
                USES[kind](place)
        except SanaError as error:
            assert str(error)
            assert len(str(error)) < 5000
            outcomes["refused"] += 1
        else:
            outcomes["used"] += 1

    one()
    assert sum(outcomes.values()) >= FILES_OF_A_KIND
    assert outcomes["refused"], outcomes
    assert peak_memory(torch.device("cpu")) - before < MOST_GROWTH
    assert not [path for path in tmp_path.iterdir() if path.name != "x"], "nothing is written elsewhere"


# --- texts --------------------------------------------------------------------------------------------------

TEXTS = [
    "x" * 1_000_000,
    "\x1b[31mred\x07\x00\r\n\ttab",
    "[red]markup[/red] [link=file:///etc]x[/link]",
    "🙂👨‍👩‍👧‍👦",
    "שלום ‮olleh",
    "\ud800",
    "\u2028\u200b",
]


@pytest.mark.parametrize(
    "text", TEXTS, ids=["megabyte", "control", "markup", "emoji", "right to left", "surrogate", "separators"]
)
def test_any_caption_and_prompt(
    text: str, made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with guarded():
        *_, summary = sample(
            SampleOptions((f"4 {text}",), made["checkpoint"], device="cpu", steps=1, out=tmp_path / "o.png")
        )
    assert isinstance(summary, SampleSummary)
    report = inspect(InspectOptions(str(tmp_path / "o.png")))
    console.table(report.columns, [tuple(row) for row in report.rows])
    console.note(text)
    console.error(SanaError(text))
    output = "".join(capsys.readouterr())
    assert "\x1b" not in output
    assert "\x07" not in output
    if "[red]" in text:
        assert "[red]markup[/red]" in output
    (tmp_path / "images").mkdir()
    pictures.to_image(torch.zeros(1, 16, 16, dtype=torch.uint8)).save(tmp_path / "images" / "a.png")
    row = json.dumps({"file_name": "a.png", "text": text})
    (tmp_path / "images" / "metadata.jsonl").write_text(row)
    source = (f"data.path={tmp_path / 'images'}", "data.source=folder", f"data.dir={tmp_path / 'set'}")
    with guarded():
        try:
            for _ in embed(EmbedOptions(small_config(tmp_path, *source))):
                pass
        except SanaError as error:
            assert "no entry can be used" in str(error)  # followed by the reason
        else:
            assert len(Dataset(tmp_path / "set")) == 1
