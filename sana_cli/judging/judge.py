"""Judge pictures with a small classifier of a dataset's attributes.

The classifier is trained once for a dataset and kept beside it (`data/NAME-judge.safetensors`).
Its answers give prompt accuracy. Its features, the numbers before the last layer, give the
Fréchet distance to the dataset and the diversity within a caption. This module knows no
transformer: pictures may come from anywhere.

Shapes: n pictures, C H W of one, a attributes, F features, m real pictures.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sana_cli.dataset.layout import beside
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.judging.asked import (
    SEEN,
    Meaning,
    Values,
    judged_attributes,
    judged_rows,
    kind_numbers,
    meanings,
    split_rows,
    unseen_kinds,
    values_of,
)
from sana_cli.judging.classifier import Classifier, SmallClassifier, classifier_for
from sana_cli.runtime import files

VERSION = 2
VARIANCE = 4.0  # mean of the features; a distance is then about 1.4 for 1,000 MNIST test images, 0.2 for all
EPOCHS = 7  # of the small network
LARGE_IMAGES = 130_000  # seen by the large network, some of them often
LARGE_EPOCHS = 40  # at most
BATCH = 128
LR = 4e-3
MOST_SETS = 300  # of attributes that captions ask together, for the diversity
AT_ONCE = 500  # pictures in a batch of the trained classifier
SMALLEST = 8  # pixels to a side


@dataclass(frozen=True)
class Moments:
    """Mean (F,) and covariance (F, F) of features, in float64."""

    mean: Tensor
    covariance: Tensor

    @staticmethod
    def of(features: Tensor) -> "Moments":
        """Those of features (n, F), n > 1."""
        return Moments(features.double().mean(0), torch.cov(features.double().T))


def frechet_distance(a: Moments, b: Moments) -> float:
    """The Fréchet distance of Gaussians (Dowson & Landau 1982; FID, arXiv 1706.08500).

    |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), where tr (A B)^(1/2) is the sum of the singular
    values of A^(1/2) B^(1/2).
    """

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    cross = torch.linalg.svdvals(root(a.covariance) @ root(b.covariance)).sum()
    total = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float(total))


def wilson(hits: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927): in [0, 1], never of width 0."""
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_spread(features: Tensor, reference: Moments, rounds: int = 20) -> float:
    """Standard deviation of the Fréchet distance over resamples of the features (n, F)."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(len(features), (len(features),), generator=generator) for _ in range(rounds))
    distances = [frechet_distance(Moments.of(features[rows]), reference) for rows in drawn]
    return float(torch.tensor(distances).std())


def distance_to(reference: Moments, features: Tensor) -> float:
    """The Fréchet distance of features (n, F). NaN for fewer than two."""
    return frechet_distance(Moments.of(features), reference) if len(features) > 1 else math.nan


def real_distance(reference: Moments, real: Tensor, count: int) -> float:
    """The Fréchet distance of `count` evenly spaced real pictures (m, F), or of all if fewer.

    A perfect model has this distance. NaN for fewer than two.
    """
    count = min(count, len(real))
    return distance_to(reference, real[torch.arange(count) * len(real) // max(1, count)])


def scale_of(features: Tensor) -> float:
    """The number that gives features (n, F) a mean variance of `VARIANCE`."""
    return float((VARIANCE / features.double().var(0).mean()) ** 0.5)


def scatter(features: Tensor) -> float:
    """Mean squared distance of features (n, F) from their mean, without bias."""
    return float(features.double().var(0).sum())


@dataclass(frozen=True)
class Share:
    """How many of `count` pictures, or attributes of them, are as their captions ask."""

    name: str
    hits: int
    count: int
    pictures: int | None = field(default=None, kw_only=True)  # that have `count` attributes; None: `count`

    @property
    def accuracy(self) -> float:
        """The share. NaN of nothing."""
        return self.hits / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % confidence interval (Wilson), of as many trials as there are pictures.

        The attributes of one picture are not independent.
        """
        if not self.count:
            return math.nan, math.nan
        return wilson(self.hits * self.images / self.count, self.images)

    @property
    def images(self) -> int:
        """How many pictures it is of."""
        return self.count if self.pictures is None else self.pictures


@dataclass(frozen=True)
class Real:
    """How the classifier reads real pictures that it was not trained on."""

    answers: Tensor  # (m, a), values that it reads
    shown: Tensor  # (m, a), values that they have; -1: none, or one that training lacks
    kind: Tensor  # (m,), the number of each picture's kind


@dataclass(frozen=True)
class Judge:
    """A trained classifier, and its results for the real images."""

    classifier: Classifier
    attributes: Values
    kinds: tuple[str, ...]  # of real pictures: seen, and the unseen ones
    reference: Moments  # of the dataset's features
    scatter: dict[Meaning, float]  # of the dataset's features, by what several of its captions ask
    features: Tensor  # (m, F) of the seen real pictures
    real: Real
    scale: float  # features times this have a mean variance of `VARIANCE`

    @torch.inference_mode()
    def classify(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Values (n, a) and features (n, F) of pictures (n, C, H, W), uint8 or in [-1, 1]."""
        device = next(self.classifier.parameters()).device
        answers = [torch.empty(0, len(self.attributes), dtype=torch.long)]
        features = [torch.empty(0, self.classifier.FEATURES)]
        for part in pixels.split(AT_ONCE) if len(pixels) else ():  # the networks need a picture
            part = part.to(device)
            logits, found = self.classifier(part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part)
            answers.append(torch.stack([of.argmax(1) for of in logits], dim=1).cpu())
            features.append(found.cpu())
        return torch.cat(answers), torch.cat(features) * self.scale

    def real_distance(self, count: int) -> float:
        """The Fréchet distance of as many real pictures."""
        return real_distance(self.reference, self.features, count)


@dataclass(frozen=True)
class JudgeStep:
    """Progress of a judge's training, in batches."""

    done: int
    total: int


def judge_path(directory: Path) -> Path:
    """The file of a dataset's judge, beside the dataset."""
    return beside(directory, "-judge.safetensors")


def load_or_train(
    dataset: Dataset, held_out: Dataset | None, device: torch.device
) -> Iterator[JudgeStep | Judge]:
    """Load a dataset's judge, or train and save one. Yields progress, and last the judge.

    Args:
        dataset: of pixels, with attributes that can be judged.
        held_out: real images to test it on. Every tenth image of the dataset is tested on too,
            and left out of training, where there is no held-out set or where that has only
            combinations of unseen kinds.
        device: of the classifier.

    Raises:
        SanaError: the images are too small, or the held-out set has none of the attributes.
    """
    attributes, _ = judged_attributes(dataset)
    assert attributes, "prompts_of has checked this"
    path, kinds = judge_path(dataset.directory), (SEEN, *unseen_kinds(dataset, held_out))
    about = {"version": str(VERSION), "dataset": dataset.index.sha256}
    about["held_out"] = "" if held_out is None else held_out.index.sha256
    if path.is_file():
        kept = _load(path, dataset.image_shape, attributes, kinds, about, device)
        if kept is not None:
            yield kept
            return
    if min(dataset.image_shape[1:]) < SMALLEST:
        raise SanaError(
            f"{dataset.directory}: its images are smaller than {SMALLEST} pixels, too small to judge"
        )
    training, test, kind = _split(dataset, held_out, attributes, kinds[1:])
    classifier = _untrained(dataset.image_shape, attributes)
    yield from _train(classifier, training, device)
    asked = set(meanings(dataset, attributes, judged_rows(dataset)).values())
    judge = _measure(classifier, attributes, kinds, training, test, kind, asked)
    _save(path, judge, about)
    yield judge


@dataclass(frozen=True)
class _Images:
    pixels: Tensor  # (n, C, H, W), uint8
    values: Tensor  # (n, a)


def _untrained(shape: tuple[int, int, int], attributes: Values) -> Classifier:
    return classifier_for(shape, [len(values) for values in attributes.values()])


def _split(
    dataset: Dataset, held_out: Dataset | None, attributes: Values, unseen: tuple[str, ...]
) -> tuple[_Images, _Images, Tensor]:
    """Images to train on, images to test on, and the kind of each of these."""
    rows, parts, kinds, shown = judged_rows(dataset), [], [], values_of(dataset, attributes)
    if held_out is None or unseen:
        rows, tested = split_rows(dataset)
        parts.append(_Images(dataset.pixels(tested), shown[tested]))
        kinds.append(torch.zeros(len(tested), dtype=torch.long))
    training = _Images(dataset.pixels(rows), shown[rows])
    if held_out is not None:
        shown = values_of(held_out, attributes)
        if int(shown.max()) < 0:
            raise SanaError(
                f"{held_out.directory} has no {' or '.join(attributes)}",
                "embed it again, or set data.held_out_split=null",
            )
        parts.append(_Images(held_out.pixels(np.arange(len(held_out))), shown))
        kinds.append(kind_numbers(held_out, unseen) + 1)  # without one, it is a seen one
    test = _Images(torch.cat([part.pixels for part in parts]), torch.cat([part.values for part in parts]))
    return training, test, torch.cat(kinds)


def _measure(
    classifier: Classifier,
    attributes: Values,
    kinds: tuple[str, ...],
    training: _Images,
    test: _Images,
    kind: Tensor,
    asked: Collection[Meaning],
) -> Judge:
    """The judge of a trained classifier: how it reads real pictures, and the statistics of its features."""
    empty = torch.empty(0)
    real = Real(empty, test.values, kind)
    unscaled = Judge(classifier, attributes, kinds, Moments(empty, empty), {}, empty, real, scale=1.0)
    _, features = unscaled.classify(training.pixels)
    answers, test_features = unscaled.classify(test.pixels)
    scale = scale_of(features)
    return replace(
        unscaled,
        reference=Moments.of(features * scale),
        scatter=_scatters(features * scale, training.values, asked),
        features=test_features[kind == 0] * scale,
        real=replace(real, answers=answers),
        scale=scale,
    )


def _scatters(features: Tensor, values: Tensor, asked: Collection[Meaning]) -> dict[Meaning, float]:
    """Scatter of the features (n, F) of images that show what is asked, by what that is.

    Left out: what fewer than two images show, what only equal images show, and all but the
    `MOST_SETS` sets of attributes that most of `asked` name: each set takes up to a second.
    """
    found, features = dict[Meaning, float](), features.double()
    sets = Counter(tuple(i for i, value in enumerate(asks) if value >= 0) for asks in asked)
    for columns in sorted(sets, key=lambda columns: (-sets[columns], columns))[:MOST_SETS]:
        have = (values[:, columns] >= 0).all(1)
        shown, place, counts = torch.unique(
            values[have][:, columns], dim=0, return_inverse=True, return_counts=True
        )
        sums = torch.zeros(len(shown), features.shape[1], dtype=torch.float64)
        means = sums.index_add(0, place, features[have]) / counts[:, None]
        squares = (features[have] - means[place]).square().sum(1)
        totals = torch.zeros(len(shown), dtype=torch.float64).index_add(0, place, squares)
        for row, total, count in zip(shown.tolist(), totals.tolist(), counts.tolist(), strict=True):
            meaning = [-1] * values.shape[1]
            for column, value in zip(columns, row, strict=True):
                meaning[column] = value
            if count > 1 and total / (count - 1) > 1e-6 and tuple(meaning) in asked:
                found[tuple(meaning)] = total / (count - 1)
    return found


def _train(classifier: Classifier, images: _Images, device: torch.device) -> Iterator[JudgeStep]:
    """Minimise cross-entropy with smoothed labels on distorted images, by AdamW in one cycle.

    The loss is the mean over attributes, of the images that have them. Random numbers come from
    a generator of its own.
    """
    generator, count = torch.Generator().manual_seed(0), len(images.values)
    classifier.to(device).train()
    small = isinstance(classifier, SmallClassifier)
    epochs = EPOCHS if small else max(1, min(LARGE_EPOCHS, LARGE_IMAGES // count))
    batches = max(1, count // BATCH)  # of an epoch
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LR, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=epochs * batches, pct_start=0.15
    )
    for epoch in range(epochs):
        order = torch.randperm(count, generator=generator)
        for number in range(batches):
            rows = order[number * BATCH : (number + 1) * BATCH]
            pixels = classifier.distort(images.pixels[rows].float() / 127.5 - 1, generator).to(device)
            logits, _ = classifier(pixels)
            loss = _loss(logits, images.values[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            yield JudgeStep(epoch * batches + number + 1, epochs * batches)
    classifier.eval()


def _loss(logits: list[Tensor], values: Tensor) -> Tensor:
    """Mean cross-entropy of the attributes that some picture has; values (n, a) of -1 do not count."""
    of = [
        F.cross_entropy(found, wanted, label_smoothing=0.05, ignore_index=-1)
        for found, wanted in zip(logits, values.T, strict=True)
        if (wanted >= 0).any()
    ]
    return torch.stack(of).mean() if of else 0 * torch.cat(logits, dim=1).sum()


def _save(path: Path, judge: Judge, about: dict[str, str]) -> None:
    tensors = {f"classifier.{name}": tensor.cpu() for name, tensor in judge.classifier.state_dict().items()}
    tensors |= {"mean": judge.reference.mean, "covariance": judge.reference.covariance}
    asked = torch.tensor([*judge.scatter], dtype=torch.long).reshape(-1, len(judge.attributes))
    tensors |= {"asked": asked, "scatter": torch.tensor([*judge.scatter.values()], dtype=torch.float64)}
    tensors |= {"features": judge.features, "scale": torch.tensor(judge.scale, dtype=torch.float64)}
    tensors |= {"answers": judge.real.answers, "shown": judge.real.shown, "kind": judge.real.kind}
    with files.whole_file(path) as partial:
        files.write_tensors(partial, tensors, about)


def _load(
    path: Path,
    shape: tuple[int, int, int],
    attributes: Values,
    kinds: tuple[str, ...],
    about: dict[str, str],
    device: torch.device,
) -> Judge | None:
    """The judge in a file. None: it is of another dataset or version, or cannot be read."""
    try:
        if {key: files.read_metadata(path).get(key) for key in about} != about:
            return None
        tensors = {name: tensor.clone() for name, tensor in files.read_tensors(path).items()}
        classifier, prefix = _untrained(shape, attributes), "classifier."
        names = [name for name in tensors if name.startswith(prefix)]
        classifier.load_state_dict({name.removeprefix(prefix): tensors[name] for name in names})
        classifier.eval().to(device)
        return Judge(
            classifier,
            attributes,
            kinds,
            reference=Moments(tensors["mean"], tensors["covariance"]),
            scatter=dict(
                zip(map(tuple, tensors["asked"].tolist()), tensors["scatter"].tolist(), strict=True)
            ),
            features=tensors["features"],
            real=Real(tensors["answers"], tensors["shown"], tensors["kind"]),
            scale=float(tensors["scale"]),
        )
    except (SanaError, OSError, KeyError, ValueError, RuntimeError):
        return None
