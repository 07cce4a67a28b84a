"""Whether a dataset is the one that a config asks for, and the architecture that follows from both."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sana_cli.config.keys import Architecture, Config
from sana_cli.dataset.layout import held_out_dir, is_dataset
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.runtime import hub
from sana_cli.text import TINY_DIM, check_same_encoder, config_fingerprint

SHAPES = ("buckets", "height", "width", "fit")  # of the image record: datasets of a run may differ in these


def resolve_architecture(config: Config, dataset: Dataset | None) -> Architecture:
    """The model of a config, with what it leaves to the dataset; without one, to the built-in encoder.

    Raises:
        SanaError: neither tells how wide caption states are.
    """
    side = max(config.data.sample_sides) if dataset is None else dataset.index.image.side
    if dataset is not None:
        width = dataset.index.caption_dim
    elif config.model.caption_channels is not None:
        width = config.model.caption_channels
    elif config.text.encoder == "tiny":
        width = TINY_DIM
    else:
        raise SanaError(
            f"model.caption_channels: null, and there is no dataset in {config.data.dir} to take it from",
            f"say the width of {config.text.encoder}'s states with --set model.caption_channels=N, "
            "or run sana embed",
        )
    return config.model.resolved(side, width)


def check_matches(config: Config, dataset: Dataset) -> None:
    """Refuse a dataset that was made by other settings than the config's.

    Raises:
        SanaError: names the first field that differs.
    """
    way_out = "embed it again with: sana embed --overwrite, or point data.dir at another"
    where, index = str(dataset.directory), dataset.index
    fingerprint = index.encoder.as_json()
    check_same_encoder(fingerprint, config_fingerprint(config.text), where, way_out)
    if is_dataset(config.run.dir):
        raise SanaError(
            f"run.dir: {config.run.dir} is a dataset",
            "a run needs a directory of its own: --set run.dir=DIR",
            exit_code=2,
        )
    autoencoder = config.data.autoencoder
    recorded, asked = index.image.autoencoder, None if autoencoder is None else hub.model_name(autoencoder)
    (height, width), wanted = index.image.pixels, config.data.size
    has, sizes = index.image.buckets, config.data.buckets
    shape = ("data.image_size", f"{height}x{width}", f"{wanted[0]}x{wanted[1]}")
    if has is not None or sizes is not None:
        named = ["none" if of is None else str(list(of)) for of in (has, sizes)]
        shape = ("data.buckets", named[0], named[1])
    for key, theirs, ours in (
        ("data.autoencoder", recorded or "pixels", asked or "pixels"),
        shape,
        ("model.in_channels", index.image.channels, config.model.in_channels),
        ("model.caption_channels", index.caption_dim, config.model.caption_channels or index.caption_dim),
    ):
        if theirs != ours:
            raise SanaError(f"{key}: {where} has {theirs}, not {ours}", way_out)
    open_also(config, dataset)


def open_held_out(config: Config, dataset: Dataset) -> Dataset | None:
    """The held-out dataset, if there is to be one and it is there.

    Raises:
        SanaError: it was embedded otherwise than the dataset; names the field.
    """
    split = config.data.held_out
    if split is None or not is_dataset(held_out_dir(config.data.dir, split)):
        return None
    found = Dataset(held_out_dir(config.data.dir, split))
    _check_alike(
        "data.held_out_split", found, dataset,
        "embed both again with: sana embed --overwrite, or set data.held_out_split=null",
    )  # fmt: skip
    return found


def open_also(config: Config, dataset: Dataset) -> list[tuple[Dataset, float]]:
    """The further datasets of a run, with how often an epoch has each of their images.

    Raises:
        SanaError: one is missing, or its samples or captions are not those of the dataset; names the field.
    """
    split = config.data.held_out
    held_out = None if split is None else held_out_dir(config.data.dir, split).resolve()
    found = []
    for directory, times in config.data.also.items():
        if directory.resolve() == held_out:
            raise SanaError(
                f"data.also: {directory} is what the held-out loss is taken of",
                "leave it out, or set data.held_out_split=null",
            )
        try:
            found.append((Dataset(directory), times))
        except SanaError as error:
            first, *_ = str(error).splitlines()
            raise SanaError(
                f"data.also: {first}",
                f"embed it with: sana embed --set data.dir={directory} and its own data.path",
            ) from error
    for other, _ in found:
        way_out = "embed it again with this config and another data.path, or leave it out of data.also"
        _check_alike("data.also", other, dataset, way_out, SHAPES)
        patch = config.model.patch_size
        for _, height, width in other.shapes:
            if height % patch or width % patch:
                raise SanaError(
                    f"data.also: {other.directory} has samples of {height}x{width}, "
                    f"which model.patch_size {patch} does not divide",
                    way_out,
                )
    return found


def _check_alike(key: str, found: Dataset, dataset: Dataset, way_out: str, but: Sequence[str] = ()) -> None:
    """Refuse datasets whose encoders or samples differ, in any field that is not in `but`."""
    if dataset.index.image.buckets is not None:
        but = (*but, "height", "width")  # of the most common shape
    for name, a, b in (
        ("encoder", found.index.encoder, dataset.index.encoder),
        ("image", found.index.image, dataset.index.image),
    ):
        for field, theirs, ours in differences(a.as_json(), b.as_json()):
            if field not in but:
                raise SanaError(
                    f"{key}: {found.directory} has {name} {field} {theirs!r}, "
                    f"and {dataset.directory} has {ours!r}",
                    way_out,
                )


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) for each value that differs between two nested dictionaries."""
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after
