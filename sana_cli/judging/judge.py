"""Judge pictures with a small classifier of a dataset's labels.

The classifier is trained once for a dataset and kept beside it (`data/NAME-judge.safetensors`).
Its answers give prompt accuracy. Its features, the 64 numbers before the last layer, give the
Fréchet distance to the dataset and the diversity within a caption. This module knows no
transformer: pictures may come from anywhere.

Shapes: n pictures, C H W of one, F features.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.runtime import files

VERSION = 1
FEATURES = 64
VARIANCE = 4.0  # mean of the features; a distance is then about 1.4 for 1,000 MNIST test images, 0.2 for all
EPOCHS = 7
BATCH = 128
LR = 4e-3
MOST_IMAGES = 60_000  # of a dataset, for training and for the reference features
AT_ONCE = 500  # pictures in a batch of the trained classifier
SMALLEST = 8  # pixels to a side


class Classifier(nn.Module):
    """Four convolutions with batch norm, a linear layer to F features, one to the classes."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()

        def convolution(into: int, out: int, size: int = 3, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(into, out, size, stride, size // 2, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
            )

        self.body = nn.Sequential(
            convolution(channels, 16, 5, 2),
            convolution(16, 32),
            nn.AdaptiveMaxPool2d(8),
            convolution(32, 64),
            nn.MaxPool2d(2),
            convolution(64, 64),
            nn.Flatten(),
            nn.Linear(64 * 16, FEATURES),
            nn.BatchNorm1d(FEATURES),
            nn.GELU(),
        )
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (n, C, H, W) in [-1, 1] to logits (n, classes) and features (n, F)."""
        features = self.body(pixels.contiguous(memory_format=torch.channels_last))
        return self.head(features), features


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


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
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


def scatter(features: Tensor) -> float:
    """Mean squared distance of features (n, F) from their mean, without bias."""
    return float(features.double().var(0).sum())


@dataclass(frozen=True)
class Judge:
    """A trained classifier, and its results for the real images."""

    classifier: Classifier
    reference: Moments  # of the dataset's features
    scatter: Tensor  # (classes,) of each label's features in the dataset
    real: Tensor  # (m, F), features of the test images
    accuracy: float  # on the test images
    scale: float  # features times this have a mean variance of `VARIANCE`

    @torch.inference_mode()
    def classify(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (n,) and features (n, F) of pictures (n, C, H, W), uint8 or in [-1, 1]."""
        device, found = next(self.classifier.parameters()).device, []
        for part in pixels.split(AT_ONCE):
            part = part.to(device)
            found.append(self.classifier(part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part))
        logits, features = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        return logits.argmax(1), features * self.scale

    def real_distance(self, count: int) -> float:
        """The Fréchet distance of `count` evenly spaced test images, or of all if fewer.

        A perfect model has this distance.
        """
        count = min(count, len(self.real))
        rows = torch.arange(count) * len(self.real) // count
        return frechet_distance(Moments.of(self.real[rows]), self.reference)


@dataclass(frozen=True)
class JudgeStep:
    """Progress of a judge's training, in batches."""

    done: int
    total: int


def judge_path(directory: Path) -> Path:
    """The file of a dataset's judge, beside the dataset."""
    named = directory if directory.name else directory.absolute()
    return named.with_name(f"{named.name}-judge.safetensors")


def labels_of_captions(dataset: Dataset) -> dict[str, int]:
    """The label that each caption means. Captions of images with several labels are left out.

    Raises:
        SanaError: the dataset has latents, no labels, or no caption that means one label.
    """
    labels = dataset.labels()
    if dataset.index.image.kind != "pixels":
        raise SanaError(
            f"{dataset.directory} holds latents; sana eval judges pixels", "embed it without data.autoencoder"
        )
    if labels is None or int(labels.max()) < 1:
        raise SanaError(
            f"{dataset.directory} has no labels, so nothing says what a picture should show",
            "sana eval needs a dataset whose source has labels: mnist, idx files with labels, "
            "or a folder with a sub-folder for each class",
        )
    meant: dict[int, set[int]] = {}
    for ids, label in zip(dataset.caption_ids(np.arange(len(dataset))), labels.tolist(), strict=True):
        for caption in ids:
            meant.setdefault(caption, set()).add(label)
    texts = dataset.texts()
    known = {texts[caption]: found.pop() for caption, found in sorted(meant.items()) if len(found) == 1}
    if not known:
        raise SanaError(
            f"{dataset.directory}: every caption belongs to images of several labels",
            "sana eval needs captions that mean one label",
        )
    return known


def load_or_train(
    dataset: Dataset, held_out: Dataset | None, device: torch.device
) -> Iterator[JudgeStep | Judge]:
    """Load a dataset's judge, or train and save one. Yields progress, and last the judge.

    Args:
        dataset: with labels, of pixels.
        held_out: real images to test it on. None: every tenth image of the dataset, which is
            then left out of training.
        device: of the classifier.

    Raises:
        SanaError: the images are too small, or the held-out set has no labels.
    """
    labels = dataset.labels()
    assert labels is not None, "labels_of_captions has checked this"
    classes, path = int(labels.max()) + 1, judge_path(dataset.directory)
    about = {"version": str(VERSION), "dataset": dataset.index.sha256}
    about["held_out"] = "" if held_out is None else held_out.index.sha256
    if path.is_file():
        kept = _load(path, dataset.image_shape[0], classes, about, device)
        if kept is not None:
            yield kept
            return
    if min(dataset.image_shape[1:]) < SMALLEST:
        raise SanaError(
            f"{dataset.directory}: its images are smaller than {SMALLEST} pixels, too small to judge"
        )
    training, test = _split(dataset, labels, held_out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier(dataset.image_shape[0], classes)
    yield from _train(classifier, training, device)
    judge = _measure(classifier, training, test)
    _save(path, judge, about)
    yield judge


@dataclass(frozen=True)
class _Images:
    pixels: Tensor  # (n, C, H, W), uint8
    labels: Tensor  # (n,)


def _split(dataset: Dataset, labels: Tensor, held_out: Dataset | None) -> tuple[_Images, _Images]:
    """Images to train on, and images to test on."""
    rows = np.arange(min(len(dataset), MOST_IMAGES))
    pixels, labels = dataset.pixels(rows), labels[: len(rows)].long()
    if held_out is None:
        tenth = torch.from_numpy(rows % 10 == 9)
        return _Images(pixels[~tenth], labels[~tenth]), _Images(pixels[tenth], labels[tenth])
    found = held_out.labels()
    if found is None:
        raise SanaError(
            f"{held_out.directory} has no labels", "embed it again, or set data.held_out_split=null"
        )
    return _Images(pixels, labels), _Images(held_out.pixels(np.arange(len(held_out))), found.long())


def _measure(classifier: Classifier, training: _Images, test: _Images) -> Judge:
    """The judge of a trained classifier: its accuracy, and the statistics of its features."""
    empty = torch.empty(0)
    unscaled = Judge(classifier, Moments(empty, empty), empty, empty, accuracy=0.0, scale=1.0)
    _, features = unscaled.classify(training.pixels)
    answers, real = unscaled.classify(test.pixels)
    scale = float((VARIANCE / features.double().var(0).mean()) ** 0.5)
    of_labels = [features[training.labels == label] * scale for label in range(classifier.head.out_features)]
    scatters = [scatter(found) if len(found) > 1 else math.nan for found in of_labels]
    return Judge(
        classifier,
        reference=Moments.of(features * scale),
        scatter=torch.tensor(scatters, dtype=torch.float64),
        real=real * scale,
        accuracy=float((answers == test.labels).float().mean()),
        scale=scale,
    )


def _train(classifier: Classifier, images: _Images, device: torch.device) -> Iterator[JudgeStep]:
    """Minimise cross-entropy with smoothed labels on distorted images, by AdamW in one cycle.

    Random numbers come from a generator of its own.
    """
    generator = torch.Generator().manual_seed(0)
    classifier.to(device).train()
    batches = max(1, len(images.labels) // BATCH)  # of an epoch
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LR, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=EPOCHS * batches, pct_start=0.15
    )
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images.labels), generator=generator)
        for number in range(batches):
            rows = order[number * BATCH : (number + 1) * BATCH]
            pixels = _distort(images.pixels[rows].float() / 127.5 - 1, generator).to(device)
            logits, _ = classifier(pixels)
            loss = F.cross_entropy(logits, images.labels[rows].to(device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            yield JudgeStep(epoch * batches + number + 1, EPOCHS * batches)
    classifier.eval()


def _distort(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, stretch and shift each picture a little. Empty parts repeat its border."""
    count = len(pixels)

    def between(bound: float) -> Tensor:
        return (2 * torch.rand(count, generator=generator) - 1) * bound

    angle, size, stretch = between(0.2), 1 + between(0.12), 1 + between(0.08)
    rows = [
        torch.stack([size * stretch * angle.cos(), between(0.15) - angle.sin(), between(0.12)], dim=1),
        torch.stack([angle.sin(), size * angle.cos(), between(0.12)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _save(path: Path, judge: Judge, about: dict[str, str]) -> None:
    tensors = {f"classifier.{name}": tensor.cpu() for name, tensor in judge.classifier.state_dict().items()}
    tensors |= {"mean": judge.reference.mean, "covariance": judge.reference.covariance}
    tensors |= {"scatter": judge.scatter, "real": judge.real}
    tensors["numbers"] = torch.tensor([judge.accuracy, judge.scale], dtype=torch.float64)
    with files.whole_file(path) as partial:
        files.write_tensors(partial, tensors, about)


def _load(
    path: Path, channels: int, classes: int, about: dict[str, str], device: torch.device
) -> Judge | None:
    """The judge in a file. None: it is of another dataset or version, or cannot be read."""
    try:
        if {key: files.read_metadata(path).get(key) for key in about} != about:
            return None
        tensors = {name: tensor.clone() for name, tensor in files.read_tensors(path).items()}
        classifier, prefix = Classifier(channels, classes), "classifier."
        names = [name for name in tensors if name.startswith(prefix)]
        classifier.load_state_dict({name.removeprefix(prefix): tensors[name] for name in names})
        accuracy, scale = tensors["numbers"].tolist()
        moments = Moments(tensors["mean"], tensors["covariance"])
        classifier.eval().to(device)
        return Judge(classifier, moments, tensors["scatter"], tensors["real"], accuracy, scale)
    except (SanaError, OSError, KeyError, ValueError, RuntimeError):
        return None


# --- verdicts ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """How many of `count` pictures show what their caption means."""

    name: str
    hits: int
    count: int

    @property
    def accuracy(self) -> float:
        """The share."""
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % confidence interval (Wilson)."""
        return wilson(self.hits, self.count)


@dataclass(frozen=True)
class Verdict:
    """A judge's results for a set of pictures."""

    total: Share
    captions: tuple[Share, ...]
    labels: tuple[Share, ...]
    distance: float  # Fréchet, to the dataset; NaN for one picture
    distance_spread: float  # its standard deviation
    real_distance: float  # of as many real images
    diversity: float  # scatter of features within a caption, over that of real images of its label


def verdict_on(judge: Judge, pixels: Tensor, captions: Sequence[str], meaning: dict[str, int]) -> Verdict:
    """Judge pictures (n, C, H, W) of n captions, whose labels are in `meaning`."""
    answers, features = judge.classify(pixels)
    asked = torch.tensor([meaning[caption] for caption in captions])
    right, names = answers == asked, np.array(captions, dtype=object)

    def share(name: str, rows: Tensor) -> Share:
        return Share(name, int(right[rows].sum()), int(rows.sum()))

    by_caption, ratios = [], []
    for caption in dict.fromkeys(captions):
        rows = torch.from_numpy(names == caption)
        by_caption.append(share(caption, rows))
        if int(rows.sum()) > 1:
            ratios.append(scatter(features[rows]) / float(judge.scatter[meaning[caption]]))
    by_label = [share(str(label), asked == label) for label in sorted(set(asked.tolist()))]
    moments = Moments.of(features) if len(features) > 1 else None
    return Verdict(
        total=share("all", torch.ones_like(right)),
        captions=tuple(by_caption),
        labels=tuple(by_label),
        distance=math.nan if moments is None else frechet_distance(moments, judge.reference),
        distance_spread=math.nan if moments is None else bootstrap_spread(features, judge.reference),
        real_distance=judge.real_distance(len(features)),
        diversity=sum(ratios) / len(ratios) if ratios else math.nan,
    )
