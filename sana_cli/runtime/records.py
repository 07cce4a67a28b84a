"""Types of our JSON files: a dataset's index, a checkpoint's records, a picture's chunk.

Their content may be untrusted, so it is checked once, when it is read. Keys without a field are
kept, since a later version may write more. This module opens no file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from sana_cli.errors import SanaError, one_line

Count = Annotated[int, Field(ge=0, lt=2**48)]
Size = Annotated[int, Field(gt=0, le=65536)]


def _is_inside(name: str) -> str:
    """Refuse a path that is absolute or could lead out of the folder."""
    parts = name.split("/")
    if (
        not name.isprintable()
        or "\\" in name
        or ":" in name
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise ValueError("must be the name of a file inside the folder")
    return name


def _is_name(name: str) -> str:
    """Refuse a path that is not a plain file name."""
    if "/" in _is_inside(name):
        raise ValueError("must be the name of a file in the same folder")
    return name


Inside = Annotated[str, AfterValidator(_is_inside)]
Name = Annotated[str, AfterValidator(_is_name)]


class Record(BaseModel):
    """A JSON object, strict about its fields, open to other keys, written back unchanged."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    def as_json(self) -> dict[str, Any]:
        """The fields that were given, as plain JSON values."""
        return self.model_dump(mode="json", exclude_unset=True)

    def but(self, **fields: Any) -> Self:
        """A copy with these fields replaced."""
        return self.model_copy(update=fields)


class Image(Record):
    """The samples of a dataset: pixels, or latents with sides `factor` times smaller.

    Of several shapes, `height` and `width` are those of the most common one.
    """

    kind: Literal["pixels", "latents"]
    channels: Size
    height: Size
    width: Size
    buckets: list[Size] | None = None  # sizes of the tables that shapes were chosen from
    fit: str = "crop"
    factor: Size = 1
    autoencoder: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.height, self.width

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.height * self.factor, self.width * self.factor

    @property
    def side(self) -> int:
        """The longer side of a sample, or with buckets the side of the square of the largest size."""
        return max(self.height, self.width) if self.buckets is None else max(self.buckets) // self.factor

    @property
    def in_words(self) -> str:
        """The shape of a sample in words."""
        shape = " x ".join(map(str, self.shape))
        return shape if self.buckets is None else f"{shape} and other shapes"


class Encoder(Record):
    """The fingerprint of a caption encoder (`text.load_encoder`)."""

    encoder: str
    architecture: str
    weights: str
    dtype: str

    @property
    def in_words(self) -> str:
        """The encoder in one line."""
        return f"{self.encoder} ({self.architecture}, {self.dtype}, {self.weights[:12]})"


class Shard(Record):
    """A file of a dataset."""

    file: Name
    count: Count
    bytes: Count
    sha256: str


class CaptionShard(Shard):
    """A file of captions, as a window's record has it."""

    tokens: Count
    longest: Count  # tokens of its longest caption


class ImageShard(Shard):
    """A file of images of one shape: height and width of a sample."""

    height: Size
    width: Size


class LeftOut(Record):
    """An entry of the source that could not be used."""

    name: str
    reason: str


class Window(Record):
    """`window-00000.json` of a dataset that is being written."""

    captions: list[CaptionShard]
    images: list[ImageShard]
    skipped: list[LeftOut]
    cut: Count  # captions longer than text.max_length


class Counts(Record):
    """The size of a dataset."""

    images: Count
    captions: Count
    tokens: Count
    skipped: Count = 0
    cut: Count = 0  # captions longer than text.max_length
    longest: Count | None = None  # tokens of the longest caption; None: not on record


class Index(Record):
    """`index.json` of a dataset."""

    format_version: int
    counts: Counts
    image: Image
    caption_dim: Size
    encoder: Encoder
    source: dict[str, Any]
    one_word_captions: bool
    null_caption: Count
    words: list[str] | None = None  # of all captions, in lower case; None: too many, or not on record
    attributes: dict[str, list[str]]  # names, and the values of each
    skipped_sha256: str | None = None
    captions: list[Shard]
    images: list[ImageShard]
    sha256: str = ""

    @property
    def shards(self) -> list[Shard]:
        """All its files."""
        return [*self.captions, *self.images]

    @property
    def shapes(self) -> dict[tuple[int, int, int], int]:
        """How many images there are of each shape (channels, height, width), largest shape first."""
        counts: dict[tuple[int, int, int], int] = {}
        for shard in self.images:
            shape = self.image.channels, shard.height, shard.width
            counts[shape] = counts.get(shape, 0) + shard.count
        return dict(sorted(counts.items(), key=lambda item: (-item[0][1] * item[0][2], item[0])))


class Entry(Record):
    """A file in a manifest."""

    bytes: Count
    sha256: str


class Manifest(Record):
    """`manifest.json` of a checkpoint."""

    files: dict[Inside, Entry]


class Origin(Record):
    """The dataset that a checkpoint was trained on."""

    sha256: str
    images: Count


class Base(Record):
    """The model that a checkpoint's adapters are for, or its teacher."""

    name: str  # where it was read, as the run called it; of an absolute path the last part
    sha256: str  # of its tensors, by diffusers' names (`hub.hash_tensors`)
    origin: str  # of its file: diffusers, official or lesson


class Score(Record):
    """A judge's results for a released checkpoint."""

    accuracy: float
    images: Count
    frechet_distance: float
    real_frechet_distance: float


class CheckpointRecord(Record):
    """`sana.json` of a checkpoint."""

    version: int
    made_by: str
    step: Count
    parameters: Count = 0
    encoder: Encoder
    one_word_captions: bool
    example_captions: list[str]
    words: list[str] | None = None  # of all captions, in lower case; None: not on record
    image: Image
    autoencoder: str | None
    precision: Literal["bf16", "fp32"]
    sample: dict[str, Any]
    dataset: Origin
    base: Base | None = None  # of adapters; None: the checkpoint has all weights
    teacher: Base | None = None  # of a student; None: it was not distilled
    score: Score | None = None
    config: dict[str, dict[str, Any]] | None = None


class State(Record):
    """`training/state.json` of a checkpoint."""

    step: Annotated[int, Field(gt=0, lt=2**48)]
    samples_seen: Annotated[int, Field(gt=0, lt=2**62)]
    precision: str
    dataset_sha256: str
    compiled: bool = False  # by torch.compile, whose sums differ in their last bits
    window: dict[str, Any] = {}
    last: dict[str, float] = {}
    config: dict[str, dict[str, Any]]

    @property
    def images(self) -> int:
        """Images in a step."""
        return self.samples_seen // self.step


class Drawn(Record):
    """An image of a picture."""

    prompt: str
    seed: int
    size: list[int] | None = None  # channels, height, width; None: that of all


class Picture(Record):
    """The `sana` chunk of a PNG."""

    made_by: str
    checkpoint: str
    settings: dict[str, Any]
    weights: str | None = None
    size: list[int] | None = None  # channels, height, width of an image
    precision: str | None = None
    autoencoder: str | None = None
    weights_sha256: str | None = None
    negative_prompt: str | None = None
    adapters: list[dict[str, Any]] | None = None  # name, scale and sha256 of each
    images: list[list[Drawn]]

    @property
    def cells(self) -> list[Drawn]:
        """All images, row by row."""
        return [image for row in self.images for image in row]


T = TypeVar("T", bound=Record)


def checked(kind: type[T], content: Mapping[str, Any], where: Path) -> T:
    """Check `content` and return it as a record of this kind.

    Raises:
        SanaError: names the first key that is missing or impossible, and `where` it is.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = one_line(".".join(map(str, first["loc"]))[:80])
        problem = first["msg"].removeprefix("Value error, ")
        raise SanaError(
            f"{where} is not what sana writes: {key}: {problem[0].lower()}{problem[1:]}"
        ) from error
