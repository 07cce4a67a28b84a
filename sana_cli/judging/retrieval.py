"""Judge pictures with a small model that matches pictures and captions of a dataset.

It serves datasets without attributes. Two towers, one for pictures and one for captions, are
trained once for a dataset and kept beside it (`data/NAME-matcher.safetensors`). They give
R-precision as in text-to-image papers (AttnGAN, arXiv 1711.10485): how often a picture's own
caption ranks first among 100. This module knows no transformer and no caption encoder: pictures
may come from anywhere, and captions are read as text.

Shapes: n pictures, C H W of one, m captions, W words of the longest, E numbers of a tower.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_cli.dataset.layout import beside, pack_texts, unpack_texts
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.judging.asked import judged_rows, split_rows
from sana_cli.judging.judge import JudgeStep, Share
from sana_cli.runtime import files

VERSION = 1
WIDTH = 128  # E
WORD_WIDTH = 96  # inside the caption tower
MOST_OTHERS = 99  # captions that a picture's own is ranked against
MOST_WORDS = 64  # read of a caption
MOST_KNOWN = 8192  # words of a vocabulary
STEPS = 1200  # at most: about 3 minutes on two cores for pictures of 32x32
EPOCHS = 200  # at most
BATCH = 128
LR = 2e-3
DROPPED = 0.05  # of the words in training, so that the embedding of unknown words is trained
MOST_REAL = 5_000  # real pictures that are ranked
AT_ONCE = 500  # pictures or captions in a batch of a trained tower
SMALLEST = 16  # pixels to a side

PADDING, UNKNOWN = 0, 1  # numbers of words; those of the vocabulary follow
# scripts without spaces between words: Thai to Burmese, Khmer, kana, Han
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003134f"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


def words_of(caption: str) -> list[str]:
    """Lower-cased words and punctuation marks of a caption, in order.

    A word is a run of letters and digits. In scripts without spaces, such as Chinese, Japanese
    and Thai, each character is a word.
    """
    return _WORD.findall(unicodedata.normalize("NFC", caption).lower())


class PictureTower(nn.Module):
    """Residual blocks with batch norm at three resolutions, a 4x4 grid, a linear layer.

    Pictures of about 32 pixels keep their resolution in the first block: eyes and mouths have a
    few pixels. Larger ones are reduced to about 32 pixels by the first convolution.
    """

    def __init__(self, channels: int, stride: int, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 2 * stride + 1, stride, stride, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            _Residual(width),
        ]
        for out in (2 * width, 4 * width):
            layers += [
                nn.Conv2d(out // 2, out, 3, 2, 1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
                _Residual(out),
            ]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.head = nn.Linear(4 * width * 16, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures (n, C, H, W) in [-1, 1] to (n, E) of norm 1."""
        return F.normalize(self.head(self.body(pixels.contiguous(memory_format=torch.channels_last))), dim=1)


class _Residual(nn.Module):
    """relu(x + f(x)), where f has two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class CaptionTower(nn.Module):
    """Two layers of self-attention over words and their positions, the mean, a linear layer."""

    def __init__(self, known: int) -> None:
        super().__init__()
        self.words = nn.Embedding(2 + known, WORD_WIDTH, padding_idx=PADDING)
        self.positions = nn.Parameter(torch.randn(MOST_WORDS, WORD_WIDTH))
        layer = nn.TransformerEncoderLayer(
            WORD_WIDTH, 4, 2 * WORD_WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WORD_WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WORD_WIDTH, WIDTH)

    def forward(self, words: Tensor) -> Tensor:
        """Numbers of words (m, W), `PADDING` after the last, to (m, E) of norm 1."""
        padding = words == PADDING
        x = self.layers(self.words(words) + self.positions[: words.shape[1]], src_key_padding_mask=padding)
        there = ~padding[:, :, None]
        return F.normalize(self.head((x * there).sum(1) / there.sum(1)), dim=1)


@dataclass(frozen=True)
class RPrecision(Share):
    """How many of `count` pictures have their own caption first."""

    of: int  # captions that are ranked, the own one included: 100, or fewer where there are fewer


@dataclass(frozen=True)
class Matcher:
    """The trained towers, and their result for real pictures."""

    pictures: PictureTower
    captions: CaptionTower
    words: tuple[str, ...]  # the vocabulary
    real: RPrecision  # of real pictures that the towers were not trained on

    @torch.inference_mode()
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """Pictures (n, C, H, W), uint8 or in [-1, 1], to (n, E) of norm 1, on the CPU."""
        device, found = self.captions.positions.device, []
        for part in pixels.split(AT_ONCE):
            part = part.to(device)
            part = part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part.float()
            found.append(self.pictures(part).cpu())
        return torch.cat(found)

    @torch.inference_mode()
    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Captions to (m, E) of norm 1, on the CPU."""
        device = self.captions.positions.device
        numbers, place = _numbers(captions, self.words).unique(dim=0, return_inverse=True)
        parts = [self.captions(_cut(part).to(device)).cpu() for part in numbers.split(AT_ONCE)]
        return torch.cat(parts)[place]

    def r_precision(
        self,
        pixels: Tensor,
        captions: Sequence[str],
        pool: Iterable[str],
        seed: int,
        also_true: Sequence[Collection[str]] = (),
    ) -> RPrecision:
        """Count the pictures whose own caption scores strictly above 99 others.

        Captions of the same words are one caption.

        Args:
            pixels: (n, C, H, W), uint8 or in [-1, 1].
            captions: n, each picture's own.
            pool: captions to draw the others from, without repetition. All are taken where
                there are fewer than 99.
            seed: of the draw.
            also_true: for each picture, further captions that are true of it. They are not
                among its others. Empty: none.

        Raises:
            SanaError: `pool` has no other caption for any picture. Where it has none for some,
                they are not counted.
        """
        others = list(dict.fromkeys(map(_plain, pool)))
        own = list(map(_plain, captions))
        texts = list(dict.fromkeys((*others, *own)))  # of which the others are the first
        number = {text: i for i, text in enumerate(texts)}
        encoded, draws = self.encode_captions(texts), np.random.default_rng(seed)
        hits = count = of = 0
        for picture, text, true in zip(
            self.encode_pictures(pixels), own, also_true or [()] * len(own), strict=True
        ):
            excluded = {text, *map(_plain, true)}
            drawn = draws.choice(
                len(others), min(len(others), MOST_OTHERS + len(excluded)), replace=False, shuffle=True
            )
            ranked = [number[text], *[i for i in drawn if others[i] not in excluded][:MOST_OTHERS]]
            if len(ranked) > 1:
                scores = (encoded[ranked] * picture).sum(1)  # row by row: equal captions tie
                hits += int(scores[0] > scores[1:].max())
                count, of = count + 1, max(of, len(ranked))
        if not count:
            raise SanaError(
                "R-precision ranks a picture's caption against others, and there are none",
                "it needs at least 2 different captions, of different images",
            )
        return RPrecision("R-precision", hits, count, of)


def matcher_path(directory: Path) -> Path:
    """The file of a dataset's matcher, beside the dataset."""
    return beside(directory, "-matcher.safetensors")


def companions(dataset: Dataset) -> dict[str, set[str]]:
    """All captions of the images that are judged by, and for each those that some image has as well.

    They serve `Matcher.r_precision` as the pool, and as what is also true of a picture drawn
    from a caption.
    """
    texts, found = dataset.texts(), dict[str, set[str]]()
    for ids in dataset.caption_ids(judged_rows(dataset)):
        together = {texts[i] for i in ids}
        for text in sorted(together):
            found.setdefault(text, set()).update(together - {text})
    return found


def load_or_train(
    dataset: Dataset, held_out: Dataset | None, device: torch.device
) -> Iterator[JudgeStep | Matcher]:
    """Load a dataset's matcher, or train and save one. Yields progress, and last the matcher.

    On a CPU, the same dataset gives the same matcher.

    Args:
        dataset: of pixels, with captions.
        held_out: real images to rank. None: every tenth image of the dataset, which is then
            left out of training.
        device: of the towers.

    Raises:
        SanaError: the dataset has latents, images that are too small or too few, or no two
            captions of different images.
    """
    if dataset.index.image.kind != "pixels":
        raise SanaError(
            f"{dataset.directory} holds latents; sana eval judges pixels", "embed it without data.autoencoder"
        )
    about = {"version": str(VERSION), "dataset": dataset.index.sha256}
    about["held_out"] = "" if held_out is None else held_out.index.sha256
    path, shape = matcher_path(dataset.directory), dataset.image_shape
    if path.is_file():
        kept = _load(path, shape, about, device)
        if kept is not None:
            yield kept
            return
    if min(shape[1:]) < SMALLEST:
        raise SanaError(
            f"{dataset.directory}: its images are smaller than {SMALLEST} pixels, too small to match with captions"
        )
    training, test = _split(dataset, held_out)
    matcher = _untrained(shape, _vocabulary(training.texts))
    yield from _train(matcher, training, device)
    matcher = replace(matcher, real=_rank_real(matcher, training, test))
    _save(path, matcher, about)
    yield matcher


@dataclass(frozen=True)
class _Pairs:
    pixels: Tensor  # (n, C, H, W), uint8
    texts: list[str]  # m, different in their words
    ids: Tensor  # (n, k), rows of `texts` for each picture, -1 after the last


def _pairs(dataset: Dataset, rows: np.ndarray) -> _Pairs:
    """Images, and their captions in plain form."""
    given, texts = dataset.caption_ids(rows), dataset.texts()
    place: dict[str, int] = {}
    number = {
        i: place.setdefault(_plain(texts[i]), len(place)) for i in sorted({i for ids in given for i in ids})
    }
    ids = [torch.tensor(list(dict.fromkeys(number[i] for i in ids))) for ids in given]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    return _Pairs(dataset.pixels(rows), list(place), padded)


def _split(dataset: Dataset, held_out: Dataset | None) -> tuple[_Pairs, _Pairs]:
    """Images to train on, and images to test on."""
    if held_out is None:
        if len(dataset) < 10:
            raise SanaError(
                f"{dataset.directory} has {len(dataset)} images, too few to match with captions",
                "it needs 10",
            )
        training, test = (_pairs(dataset, rows) for rows in split_rows(dataset))
    else:
        training = _pairs(dataset, judged_rows(dataset))
        test = _pairs(held_out, np.arange(min(len(held_out), MOST_REAL)))
    if int((training.ids >= 0).sum(1).min()) == len(training.texts):
        raise SanaError(
            f"{dataset.directory}: all of its images have the same captions",
            "R-precision needs at least 2 different captions, of different images",
        )
    return training, test


def _rank_real(matcher: Matcher, training: _Pairs, test: _Pairs) -> RPrecision:
    """R-precision of test images, each with one of its captions."""
    draw, own, also = torch.Generator().manual_seed(0), [], []
    rows = test.ids[:MOST_REAL]
    for chosen, ids in zip(_draw(rows, draw).tolist(), rows.tolist(), strict=True):
        own.append(test.texts[chosen])
        also.append([test.texts[i] for i in ids if i >= 0])
    return matcher.r_precision(test.pixels[:MOST_REAL], own, (*training.texts, *test.texts), 0, also)


def _draw(ids: Tensor, generator: torch.Generator) -> Tensor:
    """One of each row's ids (n, k), -1 after the last: (n,)."""
    counts = (ids >= 0).sum(1)
    return ids.gather(1, (torch.rand(len(ids), generator=generator) * counts).long()[:, None])[:, 0]


def _plain(caption: str) -> str:
    """A caption as the tower reads it: equal for captions that it cannot tell apart."""
    return " ".join(words_of(caption))


def _vocabulary(texts: Iterable[str]) -> tuple[str, ...]:
    """The most frequent words of captions."""
    counts = Counter(word for text in texts for word in words_of(text))
    return tuple(word for word, _ in counts.most_common(MOST_KNOWN))


def _numbers(captions: Sequence[str], words: Sequence[str]) -> Tensor:
    """Captions as numbers of words (m, W), `PADDING` after the last."""
    number = {word: i for i, word in enumerate(words, UNKNOWN + 1)}
    # a caption without words is one unknown word, since attention needs one
    found = [
        torch.tensor([number.get(word, UNKNOWN) for word in words_of(caption)[:MOST_WORDS]] or [UNKNOWN])
        for caption in captions
    ]
    return nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=PADDING)


def _cut(numbers: Tensor) -> Tensor:
    """Numbers of words (m, W) without columns of padding alone."""
    return numbers[:, : int((numbers != PADDING).sum(1).max())]


def _untrained(shape: tuple[int, int, int], words: Sequence[str]) -> Matcher:
    """New towers for images of this shape (C, H, W), from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pictures = PictureTower(shape[0], max(1, round(min(shape[1:]) / 32)))
        return Matcher(pictures, CaptionTower(len(words)), tuple(words), RPrecision("R-precision", 0, 0, 0))


def info_nce(scores: Tensor, true: Tensor) -> Tensor:
    """The symmetric InfoNCE of CLIP (arXiv 2103.00020).

    Args:
        scores: (n, n), of picture i and caption j. The diagonal has the pairs.
        true: (n, n), whether caption j is true of picture i. If so, they are not negatives.
    """
    pairs = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    scores = scores.masked_fill(true & ~pairs, -math.inf)
    answers = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, answers) + F.cross_entropy(scores.T, answers)) / 2


def _train(matcher: Matcher, pairs: _Pairs, device: torch.device) -> Iterator[JudgeStep]:
    """Minimise the InfoNCE of batches by AdamW in one cycle.

    Each epoch draws one caption for each picture. Random numbers come from a generator of its own.
    """
    generator = torch.Generator().manual_seed(0)
    numbers, size = _numbers(pairs.texts, matcher.words), min(BATCH, len(pairs.ids))
    log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07), device=device))
    towers = nn.ModuleList([matcher.pictures, matcher.captions]).to(device).train()
    optimizer = torch.optim.AdamW([*towers.parameters(), log_scale], lr=LR, weight_decay=0.02)
    batches = len(pairs.ids) // size  # of an epoch
    steps = min(STEPS, EPOCHS * batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.15)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < size:
            order = torch.randperm(len(pairs.ids), generator=generator)
        rows, order = order[:size], order[size:]
        ids = pairs.ids[rows]
        drawn = _draw(ids, generator)
        words = _cut(numbers[drawn])
        dropped = torch.rand(words.shape, generator=generator) < DROPPED
        words = words.masked_fill(dropped & (words != PADDING), UNKNOWN)
        pictures = matcher.pictures(_distort(pairs.pixels[rows], generator).to(device))
        scale = log_scale.clamp(max=math.log(100)).exp()
        scores = scale * pictures @ matcher.captions(words.to(device)).T
        loss = info_nce(scores, (ids[:, :, None] == drawn).any(1).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield JudgeStep(step + 1, steps)
    towers.eval()


def _distort(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift uint8 pictures a little, change contrast and brightness, add noise. In about [-1, 1].

    The shift is at most 1/16 of a side. Empty parts repeat the border.
    """
    count, _, height, width = pixels.shape

    def places(side: int) -> Tensor:
        most = side // 16
        shifts = torch.randint(-most, most + 1, (count, 1), generator=generator)
        return (torch.arange(side) + shifts).clamp(0, side - 1)

    def normal(spread: float) -> Tensor:
        return spread * torch.randn(count, 1, 1, 1, generator=generator)

    rows, columns = places(height)[:, :, None], places(width)[:, None, :]
    shifted = pixels[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
    noise = torch.randn(pixels.shape, generator=generator) * normal(0.05)
    return (shifted.float() / 127.5 - 1) * (1 + normal(0.05)) + normal(0.05) + noise


def _save(path: Path, matcher: Matcher, about: dict[str, str]) -> None:
    tensors = {f"pictures.{name}": tensor.cpu() for name, tensor in matcher.pictures.state_dict().items()}
    tensors |= {f"captions.{name}": tensor.cpu() for name, tensor in matcher.captions.state_dict().items()}
    tensors["words"], tensors["word_offsets"] = pack_texts(matcher.words)
    tensors["real"] = torch.tensor([matcher.real.hits, matcher.real.count, matcher.real.of])
    with files.whole_file(path) as partial:
        files.write_tensors(partial, tensors, about)


def _load(
    path: Path, shape: tuple[int, int, int], about: dict[str, str], device: torch.device
) -> Matcher | None:
    """The matcher in a file. None: it is of another dataset or version, or cannot be read."""
    try:
        if {key: files.read_metadata(path).get(key) for key in about} != about:
            return None
        tensors = {name: tensor.clone() for name, tensor in files.read_tensors(path).items()}
        hits, count, of = tensors.pop("real").tolist()
        words = unpack_texts(tensors.pop("words"), tensors.pop("word_offsets"))
        matcher = replace(_untrained(shape, words), real=RPrecision("R-precision", hits, count, of))
        towers = nn.ModuleDict({"pictures": matcher.pictures, "captions": matcher.captions})
        towers.load_state_dict(tensors)
        towers.eval().to(device)
        return matcher
    except (SanaError, OSError, KeyError, ValueError, RuntimeError):
        return None
