"""The matcher: its loss and ranks against closed forms, and pictures that captions tell apart."""

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.folders import finished, folder_config
from PIL import Image

from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.judging import retrieval
from sana_cli.judging.retrieval import Matcher, info_nce, words_of

CPU = torch.device("cpu")
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 70, 230),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
    "yellow": (240, 220, 40),
}
PAIRS = [pair for pair in itertools.product(COLOURS, COLOURS) if pair[0] != pair[1]]
UNSEEN = [("red", "green"), ("blue", "yellow"), ("white", "blue"), ("black", "red")]


def captions_of(left: str, right: str) -> list[str]:
    """Both captions of a picture. With the words swapped they mean another picture."""
    return [f"a {left} square left of a {right} one", f"a {right} square right of a {left} one"]


def squares(folder: Path, pairs: list[tuple[str, str]], count: int) -> Dataset:
    """A dataset of `count` pictures 16x16 of two squares on grey, a caption of each pair in turn."""
    draws, lines = np.random.default_rng(len(pairs)), []
    (folder / "source").mkdir(parents=True)
    for number in range(count):
        left, right = pairs[number % len(pairs)]
        image = np.full((16, 16, 3), 128, dtype=np.uint8)
        for colour, start in ((left, 0), (right, 8)):
            y, x = draws.integers(0, 12), start + draws.integers(0, 4)
            image[y : y + 4, x : x + 4] = COLOURS[colour]
        Image.fromarray(image).save(folder / "source" / f"{number:04}.png")
        lines.append(json.dumps({"file_name": f"{number:04}.png", "text": captions_of(left, right)}))
    (folder / "source" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    config = folder_config(folder, folder / "source")
    finished(config)
    return Dataset(config.data.dir)


def last(dataset: Dataset, held_out: Dataset | None = None) -> Matcher:
    *_, found = retrieval.load_or_train(dataset, held_out, CPU)
    assert isinstance(found, Matcher)
    return found


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    """Pictures of most pairs of colours, and pictures of the others."""
    folder = tmp_path_factory.mktemp("squares")
    seen = [pair for pair in PAIRS if pair not in UNSEEN]
    return squares(folder / "seen", seen, 300), squares(folder / "unseen", UNSEEN, 100)


@pytest.fixture(scope="module")
def matcher(sets: tuple[Dataset, Dataset]) -> Iterator[Matcher]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "STEPS", 250)
        patch.setattr(retrieval, "BATCH", 64)
        yield last(*sets)


def unseen(sets: tuple[Dataset, Dataset]) -> tuple[torch.Tensor, list[str], list[list[str]], list[str]]:
    """Held-out pictures, a caption of each, all captions of each, and all captions that exist."""
    rows = np.arange(100)
    all_of = [captions_of(*UNSEEN[row % len(UNSEEN)]) for row in rows]
    own = [captions[row // len(UNSEEN) % 2] for row, captions in zip(rows, all_of, strict=True)]
    pool = [caption for pair in PAIRS for caption in captions_of(*pair)]
    return sets[1].pixels(rows), own, all_of, pool


def test_own_captions_rank_first_where_words_are_newly_combined(
    sets: tuple[Dataset, Dataset], matcher: Matcher
) -> None:
    pixels, own, all_of, pool = unseen(sets)
    found = matcher.r_precision(pixels, own, pool, 0, all_of)
    assert (found.count, found.of) == (100, len(pool) - 1)  # its other caption is true as well
    assert found.accuracy > 0.8  # chance is 1/59
    assert matcher.real.count == 100
    assert matcher.real.accuracy > 0.8
    in_floats = matcher.r_precision(pixels.float() / 127.5 - 1, own, pool, 0, all_of)
    assert in_floats == found
    # every picture with a caption of the next picture, which is of another pair
    strange = matcher.r_precision(pixels.roll(1, 0), own, pool, 0, all_of)
    assert strange.hits <= 100 / strange.of + 4 * math.sqrt(100 / strange.of)


def test_the_order_of_words_matters(sets: tuple[Dataset, Dataset], matcher: Matcher) -> None:
    """Of two captions with the same words, the true one scores higher."""
    pixels, _, all_of, _ = unseen(sets)
    pictures = matcher.encode_pictures(pixels)
    for which in range(2):
        right = matcher.encode_captions([captions[which] for captions in all_of])
        swapped = [captions_of(*reversed(UNSEEN[row % len(UNSEEN)]))[which] for row in range(100)]
        assert sorted(swapped[0].split()) == sorted(all_of[0][which].split())
        wrong = matcher.encode_captions(swapped)
        higher = (pictures * right).sum(1) > (pictures * wrong).sum(1)
        assert float(higher.float().mean()) > 0.9


def test_towers_give_unit_vectors_that_do_not_depend_on_the_batch(
    sets: tuple[Dataset, Dataset], matcher: Matcher
) -> None:
    pixels, own, _, _ = unseen(sets)
    pictures, captions = matcher.encode_pictures(pixels), matcher.encode_captions([*own, "a long one, " * 40])
    assert pictures.shape == (100, retrieval.WIDTH)
    assert captions.shape == (101, retrieval.WIDTH)
    assert torch.allclose(torch.cat([pictures, captions]).norm(dim=1), torch.ones(201), atol=1e-5)
    assert torch.allclose(matcher.encode_pictures(pixels[3:4])[0], pictures[3], atol=1e-5)
    assert torch.allclose(matcher.encode_captions(own[3:4])[0], captions[3], atol=1e-5)  # no padding
    assert torch.isfinite(matcher.encode_captions(["", "!", "птица", "一只红猫"])).all()


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 48), (3, 128, 128), (1, 100, 17)])
def test_pictures_of_any_shape(shape: tuple[int, int, int]) -> None:
    tower = retrieval._untrained(shape, ["a"]).pictures.eval()
    assert tower(torch.zeros(2, *shape)).shape == (2, retrieval.WIDTH)


def test_ranks_by_brute_force(sets: tuple[Dataset, Dataset], matcher: Matcher) -> None:
    """A pool of fewer than 99 is ranked in full; of more, any 99 are equally likely."""
    pixels, own, _, pool = unseen(sets)
    more = [f"{caption} on {colour}" for caption in pool for colour in ("grey", "red", "blue", "green")]
    spreads = []
    for texts in (pool[:40], [*pool, *more]):
        codes = dict(zip([*texts, *own], matcher.encode_captions([*texts, *own]).numpy(), strict=True))
        chances = []
        for picture, caption in zip(matcher.encode_pictures(pixels).numpy(), own, strict=True):
            others = [text for text in texts if text != caption]
            better = sum(float(picture @ codes[text]) >= float(picture @ codes[caption]) for text in others)
            passed = [1 - better / (len(others) - i) for i in range(min(99, len(others)))]
            chances.append(math.prod(max(0.0, share) for share in passed))
        found = matcher.r_precision(pixels, own, texts, 5)
        assert (found.count, found.of) == (100, min(100, 1 + max(len({*texts} - {text}) for text in own)))
        spreads.append(math.sqrt(sum(chance * (1 - chance) for chance in chances)))
        assert abs(found.hits - sum(chances)) <= 4 * spreads[-1]
        assert found == matcher.r_precision(pixels, own, texts, 5)
    assert spreads[0] == 0 < spreads[1]


def test_captions_that_are_excluded(sets: tuple[Dataset, Dataset], matcher: Matcher) -> None:
    pixels, own, all_of, pool = unseen(sets)
    false = own[1:] + own[:1]  # they rank first once all that score higher are excluded
    scores = matcher.encode_pictures(pixels) @ matcher.encode_captions([*pool, *false]).T
    higher = [
        [
            text
            for text, score in zip(pool, scores[row], strict=False)
            if score >= scores[row, len(pool) + row]
        ]
        for row in range(100)
    ]
    assert matcher.r_precision(pixels, false, pool, 0).hits <= 10
    found = matcher.r_precision(pixels, false, pool, 0, higher)
    assert 90 < found.hits == found.count  # a few score lowest, so that no others are left
    alone = matcher.r_precision(pixels, own, [*own, "a blue square"], 0, [sorted(set(own))] * 100)
    assert alone.of == 2
    # captions of the same words are one caption, and pictures without others are not counted
    assert matcher.r_precision(pixels, own, [own[0], own[0].upper(), f" {own[0]} "], 0).count == sum(
        caption != own[0] for caption in own
    )
    with pytest.raises(SanaError, match="at least 2 different captions"):
        matcher.r_precision(pixels[:1], own[:1], [own[0].upper()], 0)
    with pytest.raises(SanaError, match="at least 2 different captions"):
        matcher.r_precision(pixels[:1], own[:1], all_of[0], 0, all_of[:1])


def test_captions_that_tie_do_not_rank_first(sets: tuple[Dataset, Dataset], matcher: Matcher) -> None:
    """Unknown words are alike."""
    pixels, _, _, _ = unseen(sets)
    assert matcher.r_precision(pixels, ["quux"] * 100, ["xyzzy"], 0).hits == 0


def test_info_nce_without_false_negatives() -> None:
    """Against the mean over rows and columns of -log softmax, over pairs that are negatives."""
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    true = torch.eye(5, dtype=torch.bool)
    true[0, 3] = true[4, 1] = True
    terms = []
    for i in range(5):
        row = [float(scores[i, j].exp()) for j in range(5) if i == j or not true[i, j]]
        column = [float(scores[j, i].exp()) for j in range(5) if i == j or not true[j, i]]
        terms += [math.log(sum(part)) - float(scores[i, i]) for part in (row, column)]
    assert float(info_nce(scores, true)) == pytest.approx(sum(terms) / 10, rel=1e-12)
    assert torch.equal(info_nce(scores, true), info_nce(scores.T, true.T))
    assert float(info_nce(50 * F.one_hot(torch.arange(5)).double(), true)) == pytest.approx(0, abs=1e-12)


def test_words() -> None:
    assert words_of("A red Monster, with 2 horns!") == ["a", "red", "monster", ",", "with", "2", "horns", "!"]
    assert words_of("Ein GRÜNER Fuß") == ["ein", "grüner", "fuß"]
    assert words_of("一只red猫。") == ["一", "只", "red", "猫", "。"]
    assert words_of("ねこ カメ") == ["ね", "こ", "カ", "メ"]
    assert words_of("빨간 고양이") == ["빨간", "고양이"]
    assert words_of(" \n") == []
    assert words_of("e\u0301t\u00e9") == ["été"]  # composed and not are one word


def test_companions(sets: tuple[Dataset, Dataset]) -> None:
    one, other = captions_of("red", "green")
    found = retrieval.companions(sets[1])
    assert set(found) == {caption for pair in UNSEEN for caption in captions_of(*pair)}
    assert found[one] == {other}


def test_a_matcher_is_kept_beside_its_dataset(
    sets: tuple[Dataset, Dataset], matcher: Matcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = retrieval.matcher_path(sets[0].directory)
    monkeypatch.setattr(retrieval, "_train", None)  # to train again is a TypeError
    again = last(*sets)
    assert (again.words, again.real) == (matcher.words, matcher.real)
    for one, two in ((again.pictures, matcher.pictures), (again.captions, matcher.captions)):
        assert all(torch.equal(two.state_dict()[name], tensor) for name, tensor in one.state_dict().items())
    whole = path.read_bytes()
    with pytest.raises(TypeError):  # another held-out set
        last(sets[0])
    foreign = retrieval.matcher_path(sets[1].directory)
    shutil.copy(path, foreign)
    with pytest.raises(TypeError):  # another dataset
        last(sets[1], sets[0])
    path.write_bytes(whole[:-100])
    with pytest.raises(TypeError):  # a damaged file
        last(*sets)
    path.write_bytes(whole)
    monkeypatch.setattr(retrieval, "VERSION", 0)
    with pytest.raises(TypeError):
        last(*sets)


def test_the_same_dataset_gives_the_same_matcher(
    sets: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "STEPS", 3)
    path, found = retrieval.matcher_path(sets[1].directory), []
    for seed in range(2):
        torch.manual_seed(seed)
        path.unlink(missing_ok=True)
        found.append(last(sets[1]))  # every tenth picture is held out
    assert found[0].real == found[1].real
    assert found[0].real.count == 10
    one, two = (
        {**each.pictures.state_dict(), "words": each.captions.words.weight, "head": each.captions.head.weight}
        for each in found
    )
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(1))  # left as they were


def test_datasets_that_cannot_be_matched(tmp_path: Path, sets: tuple[Dataset, Dataset]) -> None:
    dataset = Dataset(sets[0].directory)

    def image(**changes: object) -> None:
        dataset.index = sets[0].index.model_copy(
            update={"sha256": "other", "image": sets[0].index.image.model_copy(update=changes)}
        )

    image(kind="latents")
    with pytest.raises(SanaError, match="holds latents"):
        last(dataset)
    image(height=15)
    with pytest.raises(SanaError, match="smaller than 16 pixels"):
        last(dataset)
    with pytest.raises(SanaError, match="all of its images have the same captions"):
        last(squares(tmp_path / "one", [("red", "blue")], 20))
    with pytest.raises(SanaError, match="5 images, too few"):
        last(squares(tmp_path / "few", PAIRS, 5))
