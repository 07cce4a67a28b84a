"""The judge: its formulas against closed forms, and pictures with known answers."""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.folders import finished, folder_config
from helpers.steps import small_judge
from PIL import Image
from torch import nn

from sana_cli.config.keys import Config
from sana_cli.dataset.reader import Dataset
from sana_cli.judging import asked as asking
from sana_cli.judging import judge, retrieval
from sana_cli.judging.asked import Drawn, judged_attributes, judged_rows, prompts_of, split_rows, values_of
from sana_cli.judging.classifier import Classifier, LargeClassifier, classifier_for
from sana_cli.judging.judge import Judge, Moments, Share, frechet_distance, scatter, wilson
from sana_cli.judging.verdict import pooled, reading_of, real_readings, verdict_on
from sana_cli.sources import DIGIT_WORDS


def test_frechet_distance_of_gaussians() -> None:
    """For commuting covariances: |m_a - m_b|^2 + sum (sqrt a_i - sqrt b_i)^2, in any basis."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    a, b = (torch.rand(6, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    a[0] = 0  # a constant feature
    mean_a, mean_b = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    first = Moments(mean_a, basis @ a.diag() @ basis.T)
    second = Moments(mean_b, basis @ b.diag() @ basis.T)
    expected = float((mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_where_covariances_do_not_commute() -> None:
    """Against tr (A B)^(1/2) from the eigenvalues of A B, unlike the implementation."""
    generator = torch.Generator().manual_seed(1)
    roots = [torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    a, b = (root @ root.T for root in roots)
    cross = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    mean = torch.zeros(5, dtype=torch.float64)
    assert frechet_distance(Moments(mean, a), Moments(mean, b)) == pytest.approx(
        float(a.trace() + b.trace() - 2 * cross), rel=1e-8
    )


def test_moments_and_scatter() -> None:
    features = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 7.0]])
    moments = Moments.of(features)
    assert torch.allclose(moments.covariance, torch.from_numpy(np.cov(features.numpy().T)))
    assert moments.mean.tolist() == [2, 3]
    assert scatter(features) == pytest.approx(4 + 12)


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (5, 5), (3, 10), (990, 1000)])
def test_wilson_is_where_the_share_is_z_deviations_away(hits: int, count: int) -> None:
    """By definition, its ends solve |p - share| = z sqrt(p (1 - p) / count)."""
    low, high = wilson(hits, count)
    assert 0 <= low <= hits / count <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(end - hits / count) == pytest.approx(
                1.96 * math.sqrt(end * (1 - end) / count), rel=1e-9
            )


def test_the_interval_of_single_attributes_counts_pictures() -> None:
    share = Share("single", 690, 700, pictures=100)
    assert (share.accuracy, share.images) == (690 / 700, 100)
    assert share.interval == pytest.approx(wilson(100 * 690 / 700, 100))
    assert Share("all", 69, 70).interval == wilson(69, 70)


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, Judge]:
    return small_judge(tmp_path, monkeypatch)


def test_a_judge_reads_what_it_was_not_trained_on(
    judged: tuple[Config, Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = judged
    dataset = Dataset(config.data.dir)
    attributes, notes = judged_attributes(dataset)
    assert attributes == {"label": tuple("0123456789")}
    assert not notes
    (prompts,) = prompts_of(dataset, None, attributes)
    assert prompts.meaning == {name: (d,) for d in range(10) for name in (str(d), DIGIT_WORDS[d])}
    (real,) = real_readings(found)
    assert len(found.features) == real.total.count == 60  # every tenth image
    assert real.total.accuracy > 0.6  # on 60 images, trained on 540; chance is 0.1
    labels = values_of(dataset, attributes)[:, 0]
    pixels = dataset.pixels(np.arange(600))
    captions = [str(int(label)) for label in labels]
    right = verdict_on(found, prompts.of(captions, pixels))
    wrong = verdict_on(found, prompts.of([str((int(label) + 1) % 10) for label in labels], pixels))
    assert right.seen.total.accuracy > 0.8
    assert wrong.seen.total.accuracy < 0.1
    assert right.distance < 1 < 10 < verdict_on(found, prompts.of(captions, 255 - pixels)).distance
    assert right.diversity == pytest.approx(1, abs=0.15)
    same = prompts.of(captions[:1] * 20, pixels[:1].repeat(20, 1, 1, 1))
    assert verdict_on(found, same).diversity == pytest.approx(0, abs=1e-6)
    assert (
        sum(share.hits for share in right.captions)
        == sum(share.hits for share in right.labels)
        == right.seen.total.hits
        == right.seen.single.hits
    )
    assert [share.name for share in right.labels] == list("0123456789")

    # saved beside the dataset and loaded again; a damaged one is not used
    path = judge.judge_path(config.data.dir)
    monkeypatch.setattr(judge, "_train", None)
    (again,) = judge.load_or_train(dataset, None, torch.device("cpu"))
    assert isinstance(again, Judge)
    assert verdict_on(again, prompts.of(captions, pixels)) == right
    assert real_readings(again) == (real,)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TypeError):  # it would be trained again
        list(judge.load_or_train(dataset, None, torch.device("cpu")))


# --- several attributes: two squares of a colour each, and the height at which they lie -------

COLOURS = {"red": (230, 30, 30), "green": (30, 200, 30), "blue": (30, 60, 230)}
SQUARES = {"left": ("red", "green", "blue"), "right": ("blue", "green", "red"), "height": ("high", "low")}
Shown = tuple[str, ...]  # left, right and height


def squares(shown: Shown, seed: int) -> np.ndarray:
    """Pixels (16, 16, 3) of a grey picture with noise and two squares."""
    left, right, height = shown
    picture = np.random.default_rng(seed).integers(90, 160, (16, 16, 3), dtype=np.uint8)
    top = 2 if height == "high" else 9
    picture[top : top + 5, 2:7], picture[top : top + 5, 9:14] = COLOURS[left], COLOURS[right]
    return picture


def embedded_squares(folder: Path, rows: Sequence[tuple[Shown, dict[str, Any]]]) -> Dataset:
    """A dataset of these squares, each with more of its row of metadata."""
    source, lines = folder / "source", []
    source.mkdir(parents=True)
    for number, (shown, more) in enumerate(rows):
        Image.fromarray(squares(shown, number)).save(source / f"{number:04d}.png")
        attributes = dict(zip(SQUARES, shown, strict=True)) | more.get("attributes", {})
        named = {name: value for name, value in attributes.items() if value}
        lines.append({"file_name": f"{number:04d}.png", "text": f"{shown[0]} {shown[1]} {shown[2]}"})
        lines[-1] |= more | {"attributes": named}
    (source / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = folder_config(folder, source)
    finished(config)
    return Dataset(config.data.dir)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    """Squares without those of red at the left and green at the right, and a held-out part with only these."""
    every = [s for s in itertools.product(*SQUARES.values()) if s[:2] != ("red", "green")]
    rows: list[tuple[Shown, dict[str, Any]]] = [(every[i % len(every)], {}) for i in range(320)]
    rows[5] = (rows[5][0], {"attributes": {"height": None}})  # an image without this attribute
    seen = embedded_squares(tmp_path_factory.mktemp("seen"), rows)
    kinds: list[tuple[Shown, dict[str, Any]]] = [
        (("red", "green", height), {"attributes": {"unseen": kind}, "text": f"{kind}: red green {height}"})
        for kind, height in (("pairs", "low"), ("pairs", "high"), ("words", "high")) * 8
    ]
    return seen, embedded_squares(tmp_path_factory.mktemp("unseen"), kinds)


def test_a_judge_of_several_attributes_reads_combinations_it_never_saw(
    pair: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, held_out = pair
    monkeypatch.setattr(judge, "LARGE_IMAGES", 2500)
    monkeypatch.setattr(judge, "BATCH", 32)
    *_, found = judge.load_or_train(dataset, held_out, torch.device("cpu"))
    assert isinstance(found, Judge)
    assert isinstance(found.classifier, LargeClassifier)
    assert found.kinds == ("seen", "pairs", "words")
    seen, pairs, words = real_readings(found)
    assert [reading.total.count for reading in (seen, pairs, words)] == [32, 16, 8]
    # the two datasets number colours and heights differently, so a mistake there would be 0 %
    assert min(reading.single.accuracy for reading in (seen, pairs, words)) > 0.9
    (again,) = judge.load_or_train(dataset, held_out, torch.device("cpu"))
    assert isinstance(again, Judge)
    assert real_readings(again) == (seen, pairs, words)
    assert again.scatter == found.scatter
    assert len(found.scatter) == 16


def test_what_captions_ask(pair: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    attributes, _ = judged_attributes(pair[0])
    assert attributes == {
        "left": ("blue", "green", "red"),
        "right": ("blue", "green", "red"),
        "height": ("high", "low"),
    }
    seen, pairs, words = prompts_of(*pair, attributes)
    assert seen.meaning["blue red low"] == (0, 2, 1)
    assert seen.meaning["red blue low"] == (2, 0, 1)
    assert pairs.meaning == {"pairs: red green low": (2, 1, 1), "pairs: red green high": (2, 1, 0)}
    assert [group.kind for group in (seen, pairs, words)] == ["seen", "pairs", "words"]
    assert [pairs.texts[i] for i in pairs.as_frequent(5)].count("pairs: red green low") in (2, 3)

    rows: list[tuple[Shown, dict[str, Any]]] = [
        (
            ("red", "blue", "low"),
            {
                "text": ["all", "left", "same"],
                "caption_attributes": [[*SQUARES], ["left"], ["left", "right"]],
            },
        ),
        (
            ("red", "green", "low"),
            {"text": ["other", "same", "nothing"], "caption_attributes": [[*SQUARES], ["left", "right"], []]},
        ),
        (("red", "green", "high"), {"text": ["nothing"], "caption_attributes": [[]]}),
    ] * 3
    dataset = embedded_squares(tmp_path, rows)
    attributes, notes = judged_attributes(dataset)
    assert list(attributes) == ["right", "height"]  # all are red at the left
    assert notes == (
        "left is not judged: 1 values in 9 images; that needs 2 to 300 values, and 3 images of each on average",
    )
    (prompts,) = prompts_of(dataset, None, attributes)
    # "same" belongs to blue and green squares, and "left" names nothing that is judged
    assert prompts.meaning == {"all": (0, 1), "other": (1, 1)}
    assert {prompts.texts[i] for i in prompts.drawn} == {"all", "other"}
    both = {"left": ("red", "violet"), **attributes}
    (prompts,) = prompts_of(dataset, None, both)
    assert prompts.meaning == {"all": (0, 0, 1), "left": (0, -1, -1), "same": (0, -1, -1), "other": (0, 1, 1)}
    # those that ask for everything are 2 of 5
    assert {prompts.texts[i] for i in prompts.drawn} == {"all", "left", "same", "other"}
    rows[1][1]["text"], rows[1][1]["caption_attributes"] = ["other"], [[*SQUARES]]  # and now 4 of 6
    (prompts,) = prompts_of(embedded_squares(tmp_path / "more", rows), None, both)
    assert {prompts.texts[i] for i in prompts.drawn} == {"all", "other"}
    assert values_of(dataset, {"right": ("green",), "none": ("red",)})[:3].tolist() == [
        [-1, -1],
        [0, -1],
        [0, -1],
    ]


def test_unseen_kinds_are_no_attribute_and_none_is_called_seen(
    pair: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    attributes, notes = judged_attributes(pair[1])
    assert "unseen" not in attributes
    assert not any("unseen" in note for note in notes)
    kinds: list[tuple[Shown, dict[str, Any]]] = [
        (("red", "green", "low"), {"attributes": {"unseen": kind}, "text": f"{kind} {number}"})
        for number, kind in enumerate(("seen", "pairs", "words"))
    ]
    held_out = embedded_squares(tmp_path, kinds)
    attributes, _ = judged_attributes(pair[0])
    found = prompts_of(pair[0], held_out, attributes)
    assert [group.kind for group in found] == ["seen", "pairs", "words"]
    assert [[*group.meaning] for group in found[1:]] == [["pairs 1"], ["words 2"]]
    *_, kind = judge._split(pair[0], held_out, attributes, ("pairs", "words"))
    assert kind.tolist() == [0] * 33 + [1, 2]


def test_images_that_a_judge_learns_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly spaced ones, since a dataset may be sorted by class; at least one is tested on."""
    every = sorted(itertools.product(*SQUARES.values()))
    dataset = embedded_squares(tmp_path / "sorted", [(every[i // 5], {}) for i in range(90)])
    attributes, _ = judged_attributes(dataset)
    rows, tested = split_rows(dataset)
    assert judged_rows(dataset).tolist() == [*range(90)]
    assert (len(rows), tested.tolist()) == (81, [*range(9, 90, 10)])
    monkeypatch.setattr(asking, "MOST_IMAGES", 40)
    training, test, _ = judge._split(dataset, None, attributes, ())
    assert (len(training.values), len(test.values)) == (36, 4)
    assert training.values.amax(0).tolist() == [2, 2, 1]
    pairs, others = retrieval._split(dataset, None)
    assert torch.equal(pairs.pixels, training.pixels)
    assert torch.equal(others.pixels, test.pixels)
    assert set(retrieval.companions(dataset)) == {" ".join(shown) for shown in every}

    few = embedded_squares(tmp_path / "few", [(every[i % 2], {}) for i in range(6)])
    training, test, kind = judge._split(few, None, {"height": ("high", "low")}, ())
    assert (len(training.values), len(test.values), kind.tolist()) == (5, 1, [0])


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_no_pictures(shape: tuple[int, int, int]) -> None:
    network = classifier_for(shape, [2]).eval()
    found = replace(with_codes(), classifier=network, attributes={"eyes": ("one", "two")})
    answers, features = found.classify(torch.empty(0, *shape, dtype=torch.uint8))
    assert (answers.shape, answers.dtype, features.shape) == ((0, 1), torch.long, (0, network.FEATURES))


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 32, 32), (3, 33, 47), (3, 64, 64), (1, 128, 96)])
def test_the_large_network_takes_pictures_of_any_size(shape: tuple[int, int, int]) -> None:
    """Two pixels of a picture matter, wherever they are, at any size."""
    network = classifier_for(shape, [3, 2]).eval()
    assert isinstance(network, LargeClassifier)
    pixels = torch.zeros(2, *shape)
    pixels[1, :, shape[1] - 1, shape[2] - 2 :] = 1
    logits, features = network(network.distort(pixels, torch.Generator().manual_seed(0)))
    assert [tuple(found.shape) for found in (*logits, features)] == [(2, 3), (2, 2), (2, 128)]
    _, (without, with_two) = network(pixels)
    assert not torch.allclose(without, with_two, rtol=1e-4)


VALUES = {"colour": ("blue", "green", "red"), "head": ("red", "white", "blue"), "eyes": ("one", "two")}


class Codes(Classifier):
    """Reads the value of attribute i from pixel i: its answers are what a test writes."""

    FEATURES = 2

    def __init__(self) -> None:
        super().__init__([len(values) for values in VALUES.values()])
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, pixels: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        codes = ((pixels[:, 0, 0, :3] + 1) * 127.5).round().long()
        logits = [F.one_hot(code, len(v)).float() for code, v in zip(codes.T, VALUES.values(), strict=True)]
        return logits, pixels[:, 0, 1, :2]


def with_codes() -> Judge:
    moments = Moments(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    shown = torch.tensor([[0, 0, 0], [1, 1, -1], [2, 2, 1]])
    real = judge.Real(torch.tensor([[0, 0, 1], [1, 1, 0], [2, 1, 1]]), shown, torch.tensor([0, 0, 1]))
    scatter: dict[tuple[int, ...], float] = {(0, 1, 0): 4.0}
    return Judge(Codes(), VALUES, ("seen", "odd"), moments, scatter, torch.zeros(2, 2), real, scale=1.0)


def drawn(
    kind: str, asked: list[list[int]], read: list[list[int]], captions: list[str] | None = None
) -> Drawn:
    """Pictures of which the judge reads `read`."""
    pixels = torch.zeros(len(asked), 1, 2, 3, dtype=torch.uint8)
    pixels[:, 0, 0] = torch.tensor(read, dtype=torch.uint8).reshape(-1, 3)
    names = captions or [str(number) for number in range(len(asked))]
    return Drawn(kind, pixels, names, torch.tensor(asked, dtype=torch.long).reshape(-1, 3))


def counts(shares: Iterable[Share]) -> list[tuple[int, int]]:
    return [(share.hits, share.count) for share in shares]


def test_shares_of_attributes_and_of_all_at_once() -> None:
    asked = [[0, 1, 0], [0, 1, 1], [2, 0, -1], [-1, 2, -1]]
    verdict = verdict_on(
        with_codes(),
        drawn("seen", asked, [[0, 1, 0], [0, 2, 1], [2, 0, 1], [1, 0, 0]]),
        drawn("odd", asked[:1], [[1, 1, 1]]),
        drawn("even", asked[2:], [[2, 0, 0], [0, 2, 0]]),
    )
    seen, (odd, even) = verdict.seen, verdict.unseen
    assert (seen.total.hits, seen.total.count) == (2, 4)  # what a caption does not ask does not count
    assert (seen.single.hits, seen.single.count, seen.single.images) == (7, 9, 4)
    assert counts(seen.attributes) == [(3, 3), (2, 4), (2, 2)]
    assert [share.name for share in seen.attributes] == list(VALUES)
    assert (odd.kind, odd.total.hits, counts(odd.attributes)) == ("odd", 0, [(0, 1), (1, 1), (0, 1)])
    assert (even.kind, even.total.hits, counts(even.attributes)) == ("even", 2, [(1, 1), (2, 2), (0, 0)])
    assert math.isnan(even.attributes[2].accuracy)
    assert math.isnan(even.attributes[2].interval[0])
    assert counts(verdict.captions) == [(1, 1), (0, 1), (1, 1), (0, 1)]
    both = pooled("unseen", verdict.unseen)
    assert (both.total.hits, both.total.count, counts(both.attributes)) == (2, 3, [(1, 2), (3, 3), (0, 1)])
    assert (both.single.count, both.single.images, both.total.images) == (6, 3, 3)
    real_seen, real_odd = real_readings(with_codes())
    assert (counts([real_seen.total]), counts(real_seen.attributes)) == ([(1, 2)], [(2, 2), (2, 2), (0, 1)])
    assert counts([real_odd.total, real_odd.single]) == [(0, 1), (2, 3)]
    assert (
        verdict_on(with_codes(), drawn("seen", [], []), drawn("odd", asked[:1], asked[:1])).seen.total.count
        == 0
    )


def test_swaps_of_attributes_with_common_values() -> None:
    """Blue and red are colours of both; green is no colour of the head, and white none of the body."""
    asked = [[0, 0, 0], [2, 2, 0], [0, 1, 0], [1, 2, 0], [2, -1, 0], [0, 2, -1], [2, 2, 1]]
    # as text: (blue, red), (red, blue), (blue, white), (green, blue), (red, -), (blue, blue), (red, blue)
    read = [[2, 2, 0], [0, 1, 0], [0, 2, 0], [0, 1, 0], [0, 0, 0], [2, 0, 0], [2, 0, 1]]
    # as text: (red, blue), (blue, white), (blue, blue), (blue, white), ..., ..., (red, red)
    asked, read = [*asked, [2, 1, 0], [0, 1, 0]], [*read, [2, 1, 0], [2, 1, 0]]
    # as text: (red, white) and (blue, white), read as (red, white) twice
    of_colour, of_head = verdict_on(with_codes(), drawn("seen", asked, read)).seen.swaps
    assert (of_colour.first, of_colour.second) == ("colour", "head")
    assert counts([of_colour.leak, of_colour.exchanged]) == [(3, 4), (1, 3)]
    assert (of_head.first, of_head.second) == ("head", "colour")
    assert counts([of_head.leak, of_head.exchanged]) == [(3, 6), (1, 3)]
    perfect = verdict_on(with_codes(), drawn("seen", asked[:4], asked[:4])).seen
    assert [swap.leak.hits + swap.exchanged.hits for swap in perfect.swaps] == [0, 0]


def test_numbers_are_not_swapped() -> None:
    """The two eyes and the two horns are different things."""
    for values in (("1", "2"), ("true", "False"), ("-1.5", ".5")):
        names = {"eyes": values, "colour": ("red", "2"), "horns": values, "head": ("red", "blue")}
        found = reading_of("seen", torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.long), names).swaps
        assert [(swap.first, swap.second) for swap in found] == [("colour", "head"), ("head", "colour")]


def test_diversity_within_a_caption() -> None:
    """Over the scatter of real images that show what is asked; NaN where no caption has two pictures."""
    pictures = drawn("seen", [[0, 1, 0]] * 3, [[0, 1, 0]] * 3, ["a", "a", "b"])
    pictures.pixels[0, 0, 1, 0] = 255  # features (1, -1) and (-1, -1)
    found = verdict_on(with_codes(), pictures)
    assert found.diversity == pytest.approx(2 / 4)
    assert math.isnan(verdict_on(with_codes(), drawn("seen", [[0, 1, 0]], [[0, 1, 0]])).diversity)


def test_scatter_of_what_captions_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    features, values = (
        torch.randn(60, 5, generator=generator),
        torch.randint(0, 2, (60, 2), generator=generator),
    )
    values[:20, 1] = -1
    features[:20] *= 10  # images without the second attribute are no part of those that lack what is asked
    asked: list[tuple[int, int]] = [(0, -1), (1, -1), (1, 0), (0, 1)]
    found = judge._scatters(features, values, asked)
    assert found.keys() == set(asked)
    for meaning in asked:
        shown = [all(a in (-1, value) for a, value in zip(meaning, row, strict=True)) for row in values]
        assert found[meaning] == pytest.approx(scatter(features[torch.tensor(shown)]), rel=1e-6)
    assert judge._scatters(features, values, asked[::-1]) == found
    monkeypatch.setattr(judge, "MOST_SETS", 1)
    assert judge._scatters(features, values, asked[:3]).keys() == set(asked[:2])  # most ask for the first
    assert judge._scatters(features[:1].expand(4, 5), torch.zeros(4, 1), {(0,)}) == {}  # equal images


def test_values_that_an_image_lacks_do_not_count_in_the_loss() -> None:
    logits = [torch.randn(4, 3, requires_grad=True), torch.randn(4, 2, requires_grad=True)]
    values = torch.tensor([[0, -1], [2, 1], [-1, -1], [1, -1]])
    loss = judge._loss(logits, values)
    loss.backward()
    expected = [
        F.cross_entropy(logits[0][[0, 1, 3]], torch.tensor([0, 2, 1]), label_smoothing=0.05),
        F.cross_entropy(logits[1][[1]], torch.tensor([1]), label_smoothing=0.05),
    ]
    assert loss.item() == pytest.approx((expected[0] + expected[1]).item() / 2, rel=1e-6)
    gradients = [found.grad for found in logits]
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert not gradients[0][2].any()
    assert not gradients[1][[0, 2, 3]].any()
    assert judge._loss(logits, torch.full((4, 2), -1)).item() == 0
