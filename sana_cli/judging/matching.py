"""Judge pictures by their captions: a matcher, and the statistics of real pictures in its features.

It computes from the matcher's features, and trains nothing.

Shapes: n pictures, m real ones, E features.
"""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

from torch import Tensor

from sana_cli.dataset.reader import Dataset
from sana_cli.judging.asked import SEEN, Drawn, judged_rows, split_rows
from sana_cli.judging.judge import Moments, Share, bootstrap_spread, distance_to, real_distance, scale_of
from sana_cli.judging.retrieval import Matcher, companions
from sana_cli.judging.verdict import Reading, Verdict


@dataclass(frozen=True)
class Matching:
    """A trained matcher with what it measures by."""

    matcher: Matcher
    captions: Mapping[str, Set[str]]  # of the dataset, each with those that are true beside it
    reference: Moments  # of the dataset's features
    real: Tensor  # (m, E), features of real pictures that the matcher was not trained on
    scale: float  # features times this have a mean variance of `VARIANCE`

    @staticmethod
    def of(matcher: Matcher, dataset: Dataset, held_out: Dataset | None) -> "Matching":
        """Measure the pictures that the matcher was trained on, and those that it was not."""
        rows, tested = split_rows(dataset)
        if held_out is None:
            real = matcher.encode_pictures(dataset.pixels(tested))
        else:
            rows = judged_rows(dataset)
            real = matcher.encode_pictures(held_out.pixels(judged_rows(held_out)))
        features = matcher.encode_pictures(dataset.pixels(rows))
        scale = scale_of(features)
        return Matching(matcher, companions(dataset), Moments.of(features * scale), real * scale, scale)

    @property
    def real_reading(self) -> Reading:
        """R-precision of real pictures."""
        return _reading(self.matcher.real)

    def verdict_on(self, seen: Drawn) -> Verdict:
        """R-precision of pictures, and their Fréchet distance in the picture tower's features."""
        also_true = [self.captions.get(caption, frozenset()) for caption in seen.captions]
        found = self.matcher.r_precision(seen.pixels, seen.captions, self.captions, 0, also_true)
        features = self.matcher.encode_pictures(seen.pixels) * self.scale
        return Verdict(
            seen=_reading(found),
            unseen=(),
            captions=(),
            labels=(),
            distance=distance_to(self.reference, features),
            distance_spread=bootstrap_spread(features, self.reference) if len(features) > 1 else math.nan,
            real_distance=real_distance(self.reference, self.real, len(features)),
            diversity=math.nan,
        )


def _reading(found: Share) -> Reading:
    return Reading(SEEN, found, Share("single attributes", 0, 0), (), ())
