"""What a judge says of pictures: how often as asked, how close to real ones, how diverse.

It computes from the judge's answers and features, and trains nothing.

Shapes: n pictures, C H W of one, a attributes, F features.
"""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sana_cli.judging.asked import SEEN, Drawn, Values, places_in
from sana_cli.judging.judge import Judge, Share, bootstrap_spread, distance_to, scatter

MOST_LISTED = 300  # captions with a share each; of more, none is listed
_NUMBER = re.compile(r"[-+]?\d*\.?\d+|true|false", re.IGNORECASE)


@dataclass(frozen=True)
class Swap:
    """How often a value asked of one attribute is shown by another.

    Counted among pictures whose caption asks two different values for the two, of which
    `first` has both.
    """

    first: str
    second: str
    leak: Share  # `first` has the value asked of `second`
    exchanged: Share  # and `second` that asked of `first`, among those where it has it too


@dataclass(frozen=True)
class Reading:
    """How many pictures of a kind are as asked."""

    kind: str
    total: Share  # pictures with all that their caption asks
    single: Share  # single attributes, all together
    attributes: tuple[Share, ...]  # each attribute, of the pictures whose caption asks it
    swaps: tuple[Swap, ...]  # of each ordered pair of attributes with common values that are words


@dataclass(frozen=True)
class Verdict:
    """A judge's results for a set of pictures."""

    seen: Reading  # captions of the training set
    unseen: tuple[Reading, ...]  # captions that training lacks, by kind
    captions: tuple[Share, ...]  # each seen caption; none if there are too many
    labels: tuple[Share, ...]  # each value asked for, where there is one attribute
    distance: float  # Fréchet, of the seen ones to the dataset; NaN for one picture
    distance_spread: float  # its standard deviation
    real_distance: float  # of as many real images
    diversity: float  # scatter of features within a caption, over that of real images as it asks; or NaN


def difference_interval(share: Share, other: Share) -> tuple[float, float]:
    """The 95 % interval of `share` minus `other` (Newcombe 1998, method 10)."""
    (low, high), (other_low, other_high) = share.interval, other.interval
    more = share.accuracy - other.accuracy
    below = math.hypot(share.accuracy - low, other_high - other.accuracy)
    above = math.hypot(high - share.accuracy, other.accuracy - other_low)
    return more - below, more + above


def reading_of(kind: str, answers: Tensor, asked: Tensor, attributes: Values) -> Reading:
    """Compare values (n, a) that a judge reads with those that are asked, -1 for none."""
    wanted = asked >= 0
    right = (answers == asked) & wanted
    counted = wanted.any(1)
    return Reading(
        kind,
        total=_share("all", (right == wanted).all(1), counted),
        single=replace(_share("single attributes", right, wanted), pictures=int(counted.sum())),
        attributes=tuple(
            _share(name, right[:, column], wanted[:, column]) for column, name in enumerate(attributes)
        ),
        swaps=tuple(_swaps(answers, asked, attributes)),
    )


def _share(name: str, hits: Tensor, among: Tensor) -> Share:
    return Share(name, int((hits & among).sum()), int(among.sum()))


def _swaps(answers: Tensor, asked: Tensor, attributes: Values) -> Iterable[Swap]:
    """Each ordered pair of attributes with common values.

    Left out are attributes whose values are all numbers, or true and false: two of them have
    common values that mean different things.
    """
    named = [
        (column, name)
        for column, (name, values) in enumerate(attributes.items())
        if not all(map(_NUMBER.fullmatch, values))
    ]
    for (i, first), (j, second) in itertools.permutations(named, 2):
        of_second = places_in(attributes[first], attributes[second])[asked[:, j]]  # as a value of `first`
        of_first = places_in(attributes[second], attributes[first])[asked[:, i]]
        if not set(attributes[first]) & set(attributes[second]):
            continue
        among = (asked[:, i] >= 0) & (of_second >= 0) & (of_second != asked[:, i])
        leak = answers[:, i] == of_second
        yield Swap(
            first,
            second,
            _share(f"{first} is the {second}'s", leak, among),
            _share(
                f"{first} and {second} exchanged", leak & (answers[:, j] == of_first), among & (of_first >= 0)
            ),
        )


def real_readings(judge: Judge) -> tuple[Reading, ...]:
    """How the judge reads real pictures that it was not trained on, by kind."""
    real, found = judge.real, []
    for number, kind in enumerate(judge.kinds):
        rows = real.kind == number
        found.append(reading_of(kind, real.answers[rows], real.shown[rows], judge.attributes))
    return tuple(found)


def pooled(kind: str, readings: Sequence[Reading]) -> Reading:
    """Several readings, at least one, as that of all their pictures."""

    def pool(shares: Sequence[Share]) -> Share:
        hits, count, images = (
            sum(getattr(share, part) for share in shares) for part in ("hits", "count", "images")
        )
        return Share(shares[0].name, hits, count, pictures=None if shares[0].pictures is None else images)

    return Reading(
        kind,
        pool([reading.total for reading in readings]),
        pool([reading.single for reading in readings]),
        tuple(map(pool, zip(*(reading.attributes for reading in readings), strict=True))),
        tuple(
            Swap(
                swaps[0].first,
                swaps[0].second,
                pool([swap.leak for swap in swaps]),
                pool([swap.exchanged for swap in swaps]),
            )
            for swaps in zip(*(reading.swaps for reading in readings), strict=True)
        ),
    )


def verdict_on(judge: Judge, seen: Drawn, *unseen: Drawn) -> Verdict:
    """Judge pictures of captions that training has, which may be none, and of other kinds."""
    answers, features = judge.classify(seen.pixels)
    right = ((answers == seen.asked) | (seen.asked < 0)).all(1)
    rows_of = dict[str, list[int]]()
    for row, caption in enumerate(seen.captions):
        rows_of.setdefault(caption, []).append(row)
    by_caption, ratios = [], []
    for caption, rows in rows_of.items():
        by_caption.append(Share(caption, int(right[rows].sum()), len(rows)))
        real = judge.scatter.get(tuple(seen.asked[rows[0]].tolist()))
        if real is not None and len(rows) > 1:
            ratios.append(scatter(features[rows]) / real)
    by_label = []
    if len(judge.attributes) == 1:
        (values,) = judge.attributes.values()
        by_label = [
            _share(value, right, seen.asked[:, 0] == number)
            for number, value in enumerate(values)
            if (seen.asked[:, 0] == number).any()
        ]
    return Verdict(
        seen=reading_of(SEEN, answers, seen.asked, judge.attributes),
        unseen=tuple(
            reading_of(part.kind, judge.classify(part.pixels)[0], part.asked, judge.attributes)
            for part in unseen
        ),
        captions=tuple(by_caption) if len(by_caption) <= MOST_LISTED else (),
        labels=tuple(by_label),
        distance=distance_to(judge.reference, features),
        distance_spread=bootstrap_spread(features, judge.reference) if len(features) > 1 else math.nan,
        real_distance=judge.real_distance(len(features)),
        diversity=sum(ratios) / len(ratios) if ratios else math.nan,
    )
