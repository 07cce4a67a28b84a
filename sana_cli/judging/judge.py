"""A judge of pictures: a small classifier of a dataset's labels, and what its features say of a set of pictures.

It is trained once for a dataset and kept beside it (`data/NAME-judge.safetensors`). Its answers give prompt accuracy; its
features, the 64 numbers before the last layer, give the Fréchet distance to the dataset and the diversity within a caption.
It knows no transformer: pictures are pictures, wherever they come from.

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
VARIANCE = 4.0  # of a feature in the mean: a thousand of MNIST's test images are then at about 1.4, all ten thousand at 0.2
EPOCHS = 7
BATCH = 128
LR = 4e-3
MOST_IMAGES = 60_000  # of a dataset that the judge is trained on, and whose features are the reference
AT_ONCE = 500  # pictures through the classifier
SMALLEST = 8  # pixels to a side


class Classifier(nn.Module):
    """Four convolutions, each with batch norm, to `FEATURES` numbers, and a linear layer on these. Pixels in [-1, 1]."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()

        def convolution(into: int, out: int, size: int = 3, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(into, out, size, stride, size // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
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
        """Pictures (n, C, H, W) to logits (n, classes) and features (n, F)."""
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
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson & Landau 1982; FID, arXiv 1706.08500), for Gaussians of these moments.

    tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2).
    """

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    cross = torch.linalg.svdvals(root(a.covariance) @ root(b.covariance)).sum()
    total = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float(total))


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson 1927): it stays in [0, 1], and is none of width 0."""
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_spread(features: Tensor, reference: Moments, rounds: int = 20) -> float:
    """Standard deviation of the Fréchet distance over sets of as many pictures, drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(len(features), (len(features),), generator=generator) for _ in range(rounds))
    return float(torch.tensor([frechet_distance(Moments.of(features[rows]), reference) for rows in drawn]).std())


def scatter(features: Tensor) -> float:
    """Mean squared distance of features (n, F) from their mean, without bias."""
    return float(features.double().var(0).sum())


@dataclass(frozen=True)
class Judge:
    """A trained classifier, and what it found in the real images."""

    classifier: Classifier
    reference: Moments  # of the dataset's features
    scatter: Tensor  # (classes,) of each label's features in the dataset
    real: Tensor  # (m, F) features of the real images that it was not trained on
    accuracy: float  # on these
    scale: float  # features times this have a mean variance of `VARIANCE`

    @torch.inference_mode()
    def look(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (n,) and features (n, F) of pictures (n, C, H, W), uint8 or in [-1, 1]."""
        device, found = next(self.classifier.parameters()).device, []
        for part in pixels.split(AT_ONCE):
            part = part.to(device)
            found.append(self.classifier(part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part))
        logits, features = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        return logits.argmax(1), features * self.scale

    def real_distance(self, count: int) -> float:
        """The Fréchet distance of as many real images (of all there are, at most), evenly picked: what a perfect model has."""
        rows = torch.arange(min(count, len(self.real))) * len(self.real) // min(count, len(self.real))
        return frechet_distance(Moments.of(self.real[rows]), self.reference)


@dataclass(frozen=True)
class JudgeStep:
    """Progress of a judge's training, in batches."""

    done: int
    total: int


def judge_path(directory: Path) -> Path:
    """Where a dataset's judge lies: beside it."""
    whole = directory if directory.name else directory.absolute()
    return whole.with_name(f"{whole.name}-judge.safetensors")


def labels_of_captions(dataset: Dataset) -> dict[str, int]:
    """The label that each caption means. Captions that images of several labels share are left out.

    Raises:
        SanaError: the dataset has no labels, or latents in place of pixels.
    """
    labels = dataset.labels()
    if dataset.index["image"]["kind"] != "pixels":
        raise SanaError(f"{dataset.directory} holds latents; sana eval judges pixels", "embed it without data.autoencoder")
    if labels is None or int(labels.max()) < 1:
        raise SanaError(
            f"{dataset.directory} has no labels, so nothing says what a picture should show",
            "sana eval needs a dataset whose source has labels: mnist, idx files with labels, or a folder with a sub-folder for "
            "each class",
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


def obtain(dataset: Dataset, held_out: Dataset | None, device: torch.device) -> Iterator[JudgeStep | Judge]:
    """The judge of a dataset: the one beside it, or a new one, which is then put there. Yields progress, and the judge last.

    Args:
        dataset: with labels, of pixels.
        held_out: real images that it is measured on; None: every tenth image of the dataset, which it is not trained on.
        device: where it works.
    """
    path = judge_path(dataset.directory)
    labels = dataset.labels()
    assert labels is not None, "labels_of_captions has looked"
    classes = int(labels.max()) + 1
    about = {"version": str(VERSION), "dataset": dataset.index["sha256"], "held_out": _sha256(held_out)}
    if path.is_file():
        kept = _load(path, dataset.image_shape[0], classes, about, device)
        if kept is not None:
            yield kept
            return
    if min(dataset.image_shape[1:]) < SMALLEST:
        raise SanaError(f"{dataset.directory}: its images are smaller than {SMALLEST} pixels, too small to judge")
    rows = np.arange(min(len(dataset), MOST_IMAGES))
    images, labels = dataset.pixels(rows), labels[: len(rows)].long()
    if held_out is None:
        tenth = torch.from_numpy(rows % 10 == 9)
        real, real_labels, images, labels = images[tenth], labels[tenth], images[~tenth], labels[~tenth]
    else:
        found = held_out.labels()
        if found is None:
            raise SanaError(f"{held_out.directory} has no labels", "embed it again, or set data.held_out_split=null")
        real, real_labels = held_out.pixels(np.arange(len(held_out))), found.long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier(dataset.image_shape[0], classes)
    yield from _train(classifier, images, labels, device)
    bare = Judge(classifier, Moments(torch.empty(0), torch.empty(0)), torch.empty(0), torch.empty(0), 0.0, 1.0)
    _, features = bare.look(images)
    scale = float((VARIANCE / features.double().var(0).mean()) ** 0.5)
    answers, real_features = bare.look(real)
    each = [scatter(features[labels == label] * scale) if (labels == label).sum() > 1 else math.nan for label in range(classes)]
    judge = Judge(
        classifier,
        Moments.of(features * scale),
        torch.tensor(each, dtype=torch.float64),
        real_features * scale,
        float((answers == real_labels).float().mean()),
        scale,
    )
    _save(path, judge, about)
    yield judge


def _sha256(dataset: Dataset | None) -> str:
    return "" if dataset is None else str(dataset.index["sha256"])


def _train(classifier: Classifier, images: Tensor, labels: Tensor, device: torch.device) -> Iterator[JudgeStep]:
    """Cross-entropy with smoothed labels on slightly turned, scaled, slanted and shifted images; AdamW, one cycle.

    `images` are uint8 (n, C, H, W). It draws from a generator of its own.
    """
    generator = torch.Generator().manual_seed(0)
    classifier.to(device).train()
    each = max(1, len(images) // BATCH)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LR, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=EPOCHS * each, pct_start=0.15)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        for number in range(each):
            rows = order[number * BATCH : (number + 1) * BATCH]
            pixels = _distorted(images[rows].float() / 127.5 - 1, generator).to(device)
            loss = F.cross_entropy(classifier(pixels)[0], labels[rows].to(device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            yield JudgeStep(epoch * each + number + 1, EPOCHS * each)
    classifier.eval()


def _distorted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture under a small affine map of its own; what comes in at the border is the border's."""
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
    tensors |= {"mean": judge.reference.mean, "covariance": judge.reference.covariance, "scatter": judge.scatter}
    tensors |= {"real": judge.real, "numbers": torch.tensor([judge.accuracy, judge.scale], dtype=torch.float64)}
    with files.whole_file(path) as partial:
        files.write_tensors(partial, tensors, about)


def _load(path: Path, channels: int, classes: int, about: dict[str, str], device: torch.device) -> Judge | None:
    """The judge kept at `path`; None if it is of another dataset, of another version, or cannot be read: it is made anew."""
    try:
        if {key: files.read_metadata(path).get(key) for key in about} != about:
            return None
        tensors = {name: tensor.clone() for name, tensor in files.read_tensors(path).items()}
        classifier = Classifier(channels, classes)
        prefix = "classifier."
        classifier.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        accuracy, scale = tensors["numbers"].tolist()
        moments = Moments(tensors["mean"], tensors["covariance"])
        return Judge(classifier.eval().to(device), moments, tensors["scatter"], tensors["real"], accuracy, scale)
    except (SanaError, OSError, KeyError, ValueError, RuntimeError):
        return None


# --- a verdict ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """How many of `count` pictures show what their caption means, with the 95 % confidence interval of that share."""

    name: str
    hits: int
    count: int

    @property
    def accuracy(self) -> float:
        """The share."""
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's."""
        return wilson(self.hits, self.count)


@dataclass(frozen=True)
class Verdict:
    """What a judge says of pictures."""

    total: Share
    captions: tuple[Share, ...]
    labels: tuple[Share, ...]
    distance: float  # Fréchet, to the dataset
    distance_spread: float  # its standard deviation
    real_distance: float  # of as many real images
    diversity: float  # scatter of features within a caption over that of real images of its label; 1 is as diverse


def give(judge: Judge, pixels: Tensor, captions: Sequence[str], meaning: dict[str, int]) -> Verdict:
    """A judge's verdict on pictures (n, C, H, W) of `captions`, whose labels are in `meaning`."""
    answers, features = judge.look(pixels)
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
