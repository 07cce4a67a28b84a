"""The JSON files that are ours, as types: what a dataset's index, a checkpoint's records and a picture's chunk must hold.

They may come from a stranger, so they are checked when they are read, and everyone else can rely on them. Keys that are not
listed here are let through: a later version may write more. It knows no file but by its content.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # typing's own is of no use to pydantic before Python 3.12

from sana_cli.errors import SanaError, one_line

Count = Annotated[int, Field(ge=0, lt=2**48)]
Size = Annotated[int, Field(gt=0, le=65536)]


def _is_inside(name: str) -> str:
    """A file's name or relative path that leads nowhere but down."""
    parts = name.split("/")
    if not name or not name.isprintable() or "\\" in name or ":" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError("must be the name of a file inside the folder")
    return name


def _is_name(name: str) -> str:
    if "/" in _is_inside(name):
        raise ValueError("must be the name of a file in the same folder")
    return name


Inside = Annotated[str, AfterValidator(_is_inside)]
Name = Annotated[str, AfterValidator(_is_name)]


class Open(TypedDict):
    """Strict in what it lists, and open to more."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)  # type: ignore[misc]


class Image(Open):
    """What a sample is."""

    kind: Literal["pixels", "latents"]
    channels: Size
    height: Size
    width: Size
    factor: NotRequired[Size]
    autoencoder: NotRequired[str]


class Encoder(Open):
    """The fingerprint of a caption encoder."""

    encoder: str
    architecture: str
    weights: str
    dtype: str


class Shard(Open):
    """A file of a dataset."""

    file: Name
    count: Count
    bytes: Count
    sha256: str


class Counts(Open):
    """Of a dataset."""

    images: Count
    captions: Count
    tokens: Count
    skipped: NotRequired[Count]
    cut: NotRequired[Count]  # captions longer than text.max_length


class Index(Open):
    """`index.json` of a dataset."""

    format_version: int
    counts: Counts
    image: Image
    caption_dim: Size
    encoder: Encoder
    source: dict[str, Any]
    one_word_captions: bool
    null_caption: Count
    skipped_sha256: NotRequired[str | None]
    captions: list[Shard]
    images: list[Shard]


class Entry(Open):
    """A file in a manifest."""

    bytes: Count
    sha256: str


class Manifest(Open):
    """`manifest.json` of a checkpoint."""

    files: dict[Inside, Entry]


class Origin(Open):
    """The dataset that a checkpoint was trained on."""

    sha256: str
    images: Count


class Score(Open):
    """What a judge said of the pictures of a checkpoint that is given away."""

    accuracy: float
    images: Count
    frechet_distance: float
    real_frechet_distance: float


class Checkpoint(Open):
    """`sana.json` of a checkpoint."""

    version: int
    made_by: str
    step: Count
    encoder: Encoder
    one_word_captions: bool
    example_captions: list[str]
    words: NotRequired[list[str]]  # of all captions, in lower case
    image: Image
    autoencoder: str | None
    precision: Literal["bf16", "fp32"]
    sample: dict[str, Any]
    dataset: Origin
    score: NotRequired[Score]
    config: NotRequired[dict[str, dict[str, Any]]]


class State(Open):
    """`training/state.json` of a checkpoint."""

    step: Annotated[int, Field(gt=0, lt=2**48)]
    samples_seen: Annotated[int, Field(gt=0, lt=2**62)]
    precision: str
    dataset_sha256: str
    config: dict[str, dict[str, Any]]
    window: NotRequired[dict[str, Any]]
    last: NotRequired[dict[str, float]]


class Drawn(Open):
    """An image of a picture."""

    prompt: str
    seed: int


class Picture(Open):
    """The `sana` chunk of a PNG."""

    made_by: str
    checkpoint: str
    settings: dict[str, Any]
    images: list[list[Drawn]]


@lru_cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def checked(kind: type, content: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """`content`, found to be a record of this kind.

    Raises:
        SanaError: it is not; names the first key that is missing or cannot be.
    """
    try:
        return dict(_adapter(kind).validate_python(content))
    except ValidationError as error:
        first = error.errors()[0]
        key, said = one_line(".".join(map(str, first["loc"]))[:80]), first["msg"].removeprefix("Value error, ")
        raise SanaError(f"{where} is not what sana writes: {key}: {said[0].lower()}{said[1:]}") from error
