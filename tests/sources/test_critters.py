"""`data.source: critters`: what is drawn, what its captions say, and what training never has."""

import hashlib
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageColor

from sana_cli.commands.embed import EmbedOptions, embed
from sana_cli.config.file import load_config
from sana_cli.config.keys import DataConfig
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.sources import critters, open_source
from sana_cli.sources.critters import Critter, unseen_kind
from sana_cli.sources.entry import Entry
from sana_cli.text import words_of

GOLDEN = "68ee94803679deba0cb5bee137b7849cacb373270debdb3fda6a916597b23d02"  # sha256
NOUN = "monster|creature|critter|beast"


def entries(images: int, split: str = "train", seed: int = 0) -> list[Entry]:
    data = DataConfig(source="critters", images=images, seed=seed, split=split, held_out_split=None)
    return list(open_source(data))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def training() -> list[Entry]:
    return entries(2000)


@pytest.fixture(scope="module")
def held_out() -> list[Entry]:
    return entries(4000, "test")


def drawn(entry: Entry, height: int = 32, width: int = 32) -> np.ndarray:
    assert isinstance(entry.image, Critter)
    return entry.image.draw(height, width)


def test_the_same_seed_draws_the_same_bytes_everywhere() -> None:
    digest = hashlib.sha256()
    for entry in (*entries(8), *entries(80, "test")):
        digest.update(drawn(entry).tobytes() + drawn(entry, 64, 64).tobytes())
        digest.update("\n".join((entry.id, *entry.captions)).encode())
    assert digest.hexdigest() == GOLDEN


def test_an_image_does_not_depend_on_how_many_there_are() -> None:
    assert entries(5) == entries(50)[:5]
    assert entries(5) != entries(5, seed=1)
    assert {entry.id for entry in entries(30, "test")} == {"test-000000", "test-000001", "test-000002"}


def test_the_picture_has_the_colours_that_it_is_said_to_have(training: list[Entry]) -> None:
    for entry in training[:60]:
        pixels, shown = drawn(entry, 64, 64).astype(int), entry.attributes
        ground = ImageColor.getrgb(critters.BACKGROUNDS[shown["background"]])
        assert (pixels[0, 0] == ground).all()
        assert (pixels[0, -1] == ground).all()
        palette = {name: np.array(ImageColor.getrgb(code)) for name, code in critters.COLOURS.items()}

        def share(name: str, part: np.ndarray, palette: dict[str, np.ndarray] = palette) -> float:
            return float((np.abs(part - palette[name]).max(-1) <= 6).mean())

        middle, above = pixels[50:60, 26:38], pixels[:26]
        assert share(shown["colour"], middle) > 0.7
        others = [c for c in palette if c not in (shown["colour"], shown["head colour"]) and c != "white"]
        assert share(shown["head colour"], above) > max(share(name, above) for name in others)


def test_a_picture_that_is_not_square_has_the_critter_at_the_bottom_in_the_middle() -> None:
    entry = entries(1)[0]
    square, wide, high = drawn(entry), drawn(entry, 32, 48), drawn(entry, 40, 32)
    assert (wide[:, 8:40] == square).all()
    assert (high[8:] == square).all()
    assert (wide[:, :8] == square[0, 0]).all()
    assert (high[:8] == square[0, 0]).all()


def test_training_has_no_unseen_combination_and_each_kind_has_its_own(
    training: list[Entry], held_out: list[Entry]
) -> None:
    def combination(entry: Entry) -> set[str]:
        shown = entry.attributes
        return unseen_kind(*(shown[name] for name in ("colour", "head", "head colour", "eyes", "mouth")))

    assert all("unseen" not in entry.attributes and not combination(entry) for entry in training)
    for entry in held_out:
        kind = entry.attributes["unseen"]
        assert combination(entry) == ({kind} if kind in ("colours", "faces") else set())
    assert {entry.attributes["unseen"] for entry in held_out} == set(critters.KINDS)


def test_every_pair_of_values_is_left_for_training() -> None:
    eyes, mouth = list(critters.EYES)[-1], next(iter(critters.MOUTHS))  # a face that training has
    triples = [
        (colour, head, other)
        for colour, head, other in itertools.product(critters.COLOURS, critters.HEADS, critters.COLOURS)
        if colour != other
    ]
    left = [triple for triple in triples if not unseen_kind(*triple, eyes, mouth)]
    assert 0.88 < len(left) / len(triples) < 0.92
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert {(t[a], t[b]) for t in left} == {(t[a], t[b]) for t in triples}
    colours = left[0]
    faces = [
        pair for pair in itertools.product(critters.EYES, critters.MOUTHS) if not unseen_kind(*colours, *pair)
    ]
    assert len(faces) == len(critters.EYES) * len(critters.MOUTHS) - 7
    assert {pair[0] for pair in faces} == set(critters.EYES)
    assert {pair[1] for pair in faces} == set(critters.MOUTHS)


def test_a_caption_names_what_it_is_said_to_name(training: list[Entry]) -> None:
    """Read back by rules of its own: what stands before the noun, before the head, and after "on"."""
    heads = "|".join(critters.HEADS)
    mouths = {
        "smiling": "smil", "laughing": "laugh", "showing teeth": "teeth", "surprised": "surprised|an open mouth",
        "frowning": "frown", "straight": "straight mouth", "one tooth": "tooth",
    }  # fmt: skip
    sizes = set()
    for entry in training:
        assert entry.says is not None
        for text, says in zip(entry.captions, entry.says, strict=True):
            body = re.search(rf"((?:[\w-]+ )*)(?:{NOUN})", text)
            top = re.search(rf"(?:(\w+) )?({heads})\b", text)
            assert body is not None
            words = body[1].split()
            found: dict[str, str | None] = {
                "shape": next((word for word in words if word in critters.SHAPES), None),
                "colour": next((word for word in words if word in critters.COLOURS), None),
                "head": top[2] if top else None,
                "head colour": top[1] if top and top[1] in critters.COLOURS else None,
                "eyes": next((eyes for eyes in critters.EYES if eyes in text.replace("single", "one")[1:].replace("a one", "one")), None),
                "mouth": next((name for name, signs in mouths.items() if re.search(signs, text)), None),
                "background": next((g for g in sorted(critters.BACKGROUNDS, key=len, reverse=True) if re.search(rf"\bon {g}\b|\b{g} background", text)), None),
            }  # fmt: skip
            assert {name: value for name, value in found.items() if value is not None} == {
                name: entry.attributes[name] for name in says
            }, text
            sizes.add(len(says))
        assert [len(says) for says in entry.says[:2]] == [7, 7]
    assert sizes == set(range(1, 8))


def test_articles_are_right(training: list[Entry], held_out: list[Entry]) -> None:
    for text in itertools.chain.from_iterable(entry.captions for entry in (*training, *held_out)):
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
        assert not re.search(r"  | ,|^,|,$| \.|with ,|with$", text), text


def test_unseen_wordings_are_unseen(training: list[Entry], held_out: list[Entry]) -> None:
    known = {word for entry in training for text in entry.captions for word in words_of(text)}
    heads = "|".join(critters.HEADS)

    def head_first(text: str) -> bool:
        head, noun = re.search(rf"\b({heads})\b", text), re.search(NOUN, text)
        return head is not None and noun is not None and head.start() < noun.start()

    assert not any(head_first(text) for entry in training for text in entry.captions)
    for entry in held_out:
        (text,), kind = entry.captions, entry.attributes["unseen"]
        assert (set(words_of(text)) <= known) == (kind != "synonyms"), text
        assert head_first(text) == (kind == "phrases"), text


def test_embedding_gives_the_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    """The counts of the attributes and captions are the source's, too."""
    folders = []
    for workers, limit in ((0, None), (2, None)):
        sets = [f"data.workers={workers}", "data.images=300", f"data.dir={tmp_path / str(workers)}"]
        options = EmbedOptions(load_config("critters", [*sets, "run.device=cpu"]), limit=limit)
        list(embed(options))
        folders += [tmp_path / str(workers)]
    for name in ("{}", "{}-test"):
        a, b = (folder.with_name(name.format(folder.name)) for folder in folders)
        assert [path.name for path in sorted(a.iterdir())] == [path.name for path in sorted(b.iterdir())]
        assert all(path.read_bytes() == (b / path.name).read_bytes() for path in a.iterdir())
    dataset = Dataset(folders[0])
    first = entries(300)[0]
    assert {name: dataset.attributes[name][number] for name, number in zip(
        dataset.attributes, dataset.attribute_ids()[0].tolist(), strict=True)} == first.attributes  # fmt: skip
    assert (dataset.pixels(np.array([0]))[0].numpy().transpose(1, 2, 0) == drawn(first)).all()
    held_out = Dataset(tmp_path / "0-test")
    assert sorted(held_out.attributes["unseen"]) == sorted(critters.KINDS)


def test_without_the_extra_one_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    with pytest.raises(SanaError, match=r"(?s)data\.source: critters needs .*resvg_py.*sana-cli\[critters\]"):
        entries(1)


def test_the_message_does_not_blame_the_held_out_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dicebear", None)
    config = load_config("critters", [f"data.dir={tmp_path / 'there'}"])
    with pytest.raises(SanaError, match=r"^data\.source: critters needs"):
        list(embed(EmbedOptions(config)))
    assert not list(tmp_path.iterdir())
