"""Captions of critters: a small grammar that says some or all of what a picture shows.

A caption has the same meaning in many wordings: other words, another order, another kind of sentence. Two
frames of sentences and some synonyms are kept from training, to ask for what was learned in words that
were not. This module draws nothing.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

NOUNS = ("monster", "creature", "critter")
WITH_ARTICLE = ("fin", "crown", "bobble", "sprout")  # heads that there is one of
MOUTHS = {  # what it does, and what it has
    "smiling": ("smiling", "a smile"),
    "laughing": ("laughing", "a laugh"),
    "showing teeth": ("showing teeth", "bared teeth"),
    "surprised": ("surprised", "an open mouth"),
    "frowning": ("frowning", "a frown"),
    "straight": ("with a straight mouth", "a straight mouth"),
    "one tooth": ("showing one tooth", "a single tooth"),
}
EYES = {"one eye": ("one eye", "a single eye")}  # others have one wording
SYNONYMS = {  # of the test split alone
    "monster": "beast", "creature": "beast", "critter": "beast", "square": "boxy", "tall": "towering",
    "round": "rotund", "red": "crimson", "purple": "violet", "brown": "chestnut", "antennae": "feelers",
    "happy": "merry", "sleepy": "drowsy", "angry": "furious", "laughing": "giggling", "frowning": "scowling",
    "surprised": "astonished",
}  # fmt: skip


@dataclass(frozen=True)
class Caption:
    """A caption, and the attributes that it names."""

    text: str
    says: frozenset[str]


def an(words: str) -> str:
    """Words with the article that their first letter asks for."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def listed(items: Sequence[str]) -> str:
    """Items as English lists them: a, b and c."""
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


@dataclass(frozen=True)
class _Parts:
    """The phrases of a caption; empty where it says nothing of the kind."""

    body: str  # with its article
    head: str
    eyes: str
    doing: str  # the mouth, as what it does
    mouth: str  # the mouth, as what it has
    background: str


def _parts(shown: Mapping[str, str], says: Collection[str], draws: random.Random) -> _Parts:
    def word(name: str) -> str:
        return shown[name] if name in says else ""

    adjectives = [word("shape"), word("colour"), draws.choice(NOUNS)]
    head = " ".join(filter(None, [word("head colour"), word("head")]))
    doing, mouth = MOUTHS[shown["mouth"]] if "mouth" in says else ("", "")
    return _Parts(
        body=an(" ".join(filter(None, adjectives))),
        head=an(head) if word("head") in WITH_ARTICLE else head,
        eyes=draws.choice(EYES.get(word("eyes"), (word("eyes"),))),
        doing=doing,
        mouth=mouth,
        background=word("background"),
    )


def _joined(*phrases: str) -> str:
    return ", ".join(filter(None, phrases))


def _with(body: str, *things: str) -> str:
    there = [thing for thing in things if thing]
    return f"{body} with {listed(there)}" if there else body


def _at_end(parts: _Parts) -> str:
    """The scene, with the background as the last words."""
    scene = _joined(_with(parts.body, parts.head, parts.eyes), parts.doing)
    if not parts.background:
        return scene
    return f"{scene} on {parts.background}" if scene == parts.body else f"{scene}, on {parts.background}"


def _at_start(parts: _Parts) -> str:
    """The background first, and eyes before the head."""
    background = f"on {parts.background}" if parts.background else ""
    return _joined(background, _with(parts.body, parts.eyes, parts.head), parts.doing)


def _mouth_first(parts: _Parts) -> str:
    """What the mouth does before what there is else."""
    background = f"against {an(parts.background)} background" if parts.background else ""
    things = _with("", parts.head, parts.eyes).strip()
    return _joined(parts.body, parts.doing, things, background)


def _tags(parts: _Parts) -> str:
    """Phrases without a sentence."""
    background = f"{parts.background} background" if parts.background else ""
    body = parts.body.partition(" ")[2]
    return _joined(body, parts.head, parts.eyes, parts.mouth, background)


def _sentences(parts: _Parts) -> str:
    """Two sentences."""
    first = f"{parts.body} on {parts.background}" if parts.background else parts.body
    things = [thing for thing in (parts.eyes, parts.head, parts.mouth) if thing]
    return f"{first}. it has {listed(things)}" if things else first


def _head_first(parts: _Parts) -> str:
    """The head before the body."""
    things = [thing for thing in (parts.head, parts.eyes) if thing]
    scene = f"{listed(things)} on {parts.body}" if things else parts.body
    return _joined(scene, parts.doing, f"on {parts.background}" if parts.background else "")


def _body_last(parts: _Parts) -> str:
    """The body as the last words."""
    things = _with("", parts.eyes, parts.head).strip()
    last = f"{parts.body} on {parts.background}" if parts.background else parts.body
    return _joined(parts.doing, things, last)


FRAMES = (_at_end, _at_start, _mouth_first, _tags, _sentences)
UNSEEN_FRAMES = (_head_first, _body_last)  # of the test split alone, in words that training has


def for_training(shown: Mapping[str, str], draws: random.Random) -> tuple[Caption, ...]:
    """Three captions: two that say everything in different frames, and one that says a part."""
    first, second, third = draws.sample(FRAMES, 3)
    everything = frozenset(shown)
    some = _some(shown, draws)
    return (
        Caption(first(_parts(shown, everything, draws)), everything),
        Caption(second(_parts(shown, everything, draws)), everything),
        Caption(third(_parts(shown, some, draws)), some),
    )


def _some(shown: Mapping[str, str], draws: random.Random) -> frozenset[str]:
    """One to five of the attributes, and often the colour of a head, which is never named alone."""
    others = [name for name in shown if name != "head colour"]
    says = set(draws.sample(others, draws.randint(1, len(others) - 1)))
    if "head" in says and draws.random() < 0.7:
        says.add("head colour")
    return frozenset(says)


def for_test(shown: Mapping[str, str], draws: random.Random, kind: str) -> Caption:
    """One caption that says everything: of training's wordings, or for these kinds of others."""
    frames = UNSEEN_FRAMES if kind == "phrases" else FRAMES
    text = draws.choice(frames)(_parts(shown, frozenset(shown), draws))
    if kind == "synonyms":
        text = _other_words(text)
    return Caption(text, frozenset(shown))


def _other_words(text: str) -> str:
    """Replace every word that has a synonym, and put the articles right."""
    words = text.split(" ")
    for at, word in enumerate(words):
        bare = word.rstrip(".,")
        words[at] = SYNONYMS.get(bare, bare) + word[len(bare) :]
        if at and words[at - 1] in ("a", "an"):
            words[at - 1] = an(words[at]).partition(" ")[0]
    return " ".join(words)
