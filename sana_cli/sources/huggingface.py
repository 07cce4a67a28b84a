"""Hugging Face datasets, by id or local path, with the `datasets` extra. Images stay encoded.

Captions are texts, lists of texts, or classes (`ClassLabel`), whose names fill
`data.caption_template`.
"""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sana_cli.config.keys import DataConfig
from sana_cli.errors import SanaError, first_line
from sana_cli.runtime.files import is_lfs_pointer
from sana_cli.sources.attributes import BadAttributes, attributes_of, refusal
from sana_cli.sources.captions import attribute_fields, captions_of
from sana_cli.sources.entry import LABEL, BadImage, Entry, Skipped
from sana_cli.sources.images import MAX_FILE_BYTES

TABLES = (".parquet", ".arrow", ".json", ".jsonl", ".csv")  # files with a dataset's rows


class HuggingFace:
    """The rows of one split of a dataset."""

    def __init__(self, data: DataConfig) -> None:
        try:
            import datasets
        except ImportError as error:
            raise SanaError(
                "data.source: datasets needs the library of that name, which is not installed",
                "install it with: pip install 'sana-cli[datasets]'",
            ) from error
        self.data, path = data, data.path
        assert path is not None
        self.rows = _load(path, data.split)
        self._check_column("data.image_field", data.image_field, datasets.Image)
        self._check_column("data.caption_field", data.caption_field, datasets.ClassLabel)
        if data.attribute_field not in (None, "attributes"):
            self._check_column("data.attribute_field", data.attribute_field, dict)
        if isinstance(self.rows.features[data.image_field], datasets.Image):
            self.rows = self.rows.cast_column(data.image_field, datasets.Image(decode=False))
        feature = _inner(self.rows.features[data.caption_field])
        self.classes: list[str] | None = feature.names if isinstance(feature, datasets.ClassLabel) else None
        self.roots = [path.resolve(), Path(datasets.config.HF_CACHE_HOME).expanduser().resolve()]

    def _check_column(self, key: str, field: str, kind: type) -> None:
        """Refuse a column that the dataset lacks. Suggest columns of `kind`."""
        if field not in self.rows.column_names:
            path = self.data.path
            assert path is not None
            _check_pointers(path)
            fit = [name for name, feature in self.rows.features.items() if isinstance(_inner(feature), kind)]
            columns = ", ".join(self.rows.column_names)
            hint = [f"use {' or '.join(fit)}, for example --set {key}={fit[0]}"] if fit else []
            raise SanaError(f"{key}: {path} has no column {field}; it has {columns}", *hint, exit_code=2)

    def count(self) -> int | None:
        """Count the rows of the split."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Entry | Skipped]:
        begun = False  # some row had attributes that can be used
        for index, row in enumerate(self.rows):
            name = f"{self.data.split}-{index:08d}"
            try:
                value, label = row[self.data.caption_field], dict[str, str]()
                if self.classes is not None:
                    value, label = self._of_classes(value, self.classes)
                shown, says = attribute_fields(row, self.data)
                shown = {**label, **attributes_of(shown)}
                found = captions_of(value, row.get("caption_weights"), shown, says)
                if label and found.says is not None:  # the caption is the class
                    found = found._replace(says=tuple(names | label.keys() for names in found.says))
                begun = begun or len(shown) > len(label)
                yield Entry(name, _bytes(row[self.data.image_field], self.roots), **found._asdict())
            except BadAttributes as error:
                if not begun:
                    raise refusal(f"{self.data.path}, {name}", error) from error
                yield Skipped(name, str(error))
            except BadImage as error:
                yield Skipped(name, str(error))

    def _of_classes(self, value: Any, names: Sequence[str]) -> tuple[Any, dict[str, str]]:
        """The captions of one class or a list of them, and the attribute of a single class.

        The caption of a class without a name is "".
        """

        def caption(number: Any) -> str:
            named = isinstance(number, int) and 0 <= number < len(names)
            return self.data.caption_template.replace("{}", names[number].replace("_", " ")) if named else ""

        captions = [caption(number) for number in (value if isinstance(value, list) else [value])]
        if isinstance(value, list):
            return captions, {}
        if not captions[0]:
            raise BadImage(f"no caption: its class is {value}, which has no name")
        return captions, {LABEL: names[value]}

    def fingerprint(self) -> dict[str, Any]:
        """The library's own fingerprint, the columns, and how classes become captions."""
        columns = json.dumps([self.data.image_field, self.data.caption_field, self.data.attribute_field])
        rows = {"source": "datasets", "split": self.data.split, "rows": len(self.rows), "columns": columns}
        if self.classes is not None:
            rows["captions"] = json.dumps([self.data.caption_template, *self.classes])
        checksums = getattr(self.rows.info, "download_checksums", None)
        return rows | {"fingerprint": json.dumps(sorted(checksums)) if checksums else self.rows._fingerprint}


def _load(path: Path, split: str) -> Any:
    """Load a split: of a folder that `save_to_disk` wrote, or of any source of `load_dataset`.

    Raises:
        SanaError: the dataset or the split does not exist.
    """
    import datasets

    try:
        if (path / "dataset_info.json").is_file():  # one dataset
            loaded = datasets.load_from_disk(str(path))
            saved = "" if loaded.split is None else str(loaded.split)
            splits = [part.partition("[")[0] for part in saved.split("+") if part]
            known = split == "train" or split in splits  # a folder without splits is all of train
        elif (path / "dataset_dict.json").is_file():  # one per split
            parts = datasets.load_from_disk(str(path))
            splits, known = list(parts), split in parts
            loaded = parts.get(split)
        else:
            loaded, splits, known = datasets.load_dataset(str(path), split=split), [split], True
    except Exception as error:  # of the library, the hub or the network
        _check_pointers(path)
        reason = first_line(error)
        if reason.startswith("Unknown split"):
            raise SanaError(f"data.split: {path}: {reason}", exit_code=2) from error
        what = f"data.path: {path} is no dataset that can be loaded: {reason}"
        raise SanaError(what, f"its split is {split}") from error
    if not known:
        choose = f"it has {', '.join(splits)}; choose one with --set data.split=NAME"
        has = choose if splits else "it was saved without splits"
        raise SanaError(f"data.split: {path} has no split {split}", has, exit_code=2)
    return loaded


def _inner(feature: Any) -> Any:
    """The feature of a column, or of the items if the column holds lists."""
    if isinstance(feature, list) and feature:
        return feature[0]
    return getattr(feature, "feature", feature)


def _check_pointers(path: Path) -> None:
    """Refuse a folder or file that Git LFS has not fetched.

    Raises:
        SanaError: naming the file.
    """
    try:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in TABLES and file.is_file():
                with file.open("rb") as opened:
                    if is_lfs_pointer(opened.read(64)):
                        what = f"data.path: {file} is a Git LFS pointer, not the file"
                        raise SanaError(what, "fetch it with: git lfs pull")
    except OSError:
        return


def _bytes(value: Any, roots: Sequence[Path]) -> bytes:
    """The encoded bytes of an image cell: stored, in a file, or of a decoded picture as PNG."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return value["bytes"]
        try:
            path = Path(value["path"]).resolve()
            if not any(path.is_relative_to(root) for root in roots):
                raise BadImage("its file lies outside the dataset")
            if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
                raise BadImage("no file, or one too large")
            return path.read_bytes()
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BadImage("no such file") from error
    if hasattr(value, "save"):
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return buffer.getvalue()
    raise BadImage("no image")
