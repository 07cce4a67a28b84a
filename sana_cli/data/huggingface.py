"""Hugging Face datasets, by id or local path, with the `datasets` extra. Images are taken as they are stored, undecoded."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sana_cli.config import DataConfig
from sana_cli.data.entry import BadImage, Entry, Skipped, captions_of
from sana_cli.data.images import MAX_FILE_BYTES
from sana_cli.errors import SanaError


class HuggingFace:
    """The rows of a dataset's split."""

    def __init__(self, data: DataConfig) -> None:
        try:
            import datasets
        except ImportError as error:
            raise SanaError(
                "data.source: datasets needs the library of that name, which is not installed",
                "install it with: pip install 'sana-cli[datasets]'",
            ) from error
        self.data, name = data, str(data.path)
        try:
            if (data.path is not None) and (data.path / "dataset_info.json").is_file():  # what save_to_disk wrote
                loaded = datasets.load_from_disk(name)
            elif (data.path is not None) and (data.path / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(name)[data.split]
            else:
                loaded = datasets.load_dataset(name, split=data.split)
        except Exception as error:  # the library's, the hub's and the network's
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SanaError(
                f"data.path: {name} is no dataset that can be loaded: {reason}", f"its split is {data.split}"
            ) from error
        for key, field in (("data.image_field", data.image_field), ("data.caption_field", data.caption_field)):
            if field not in loaded.column_names:
                raise SanaError(f"{key}: {name} has no column {field}; it has {', '.join(loaded.column_names)}", exit_code=2)
        if isinstance(loaded.features[data.image_field], datasets.Image):
            loaded = loaded.cast_column(data.image_field, datasets.Image(decode=False))
        self.rows = loaded
        self.roots = [Path(name).resolve(), Path(datasets.config.HF_CACHE_HOME).expanduser().resolve()]

    def count(self) -> int | None:
        """Rows of the split."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Entry | Skipped]:
        for index, row in enumerate(self.rows):
            name = f"{self.data.split}-{index:08d}"
            try:
                captions, weights = captions_of(row[self.data.caption_field], row.get("caption_weights"))
                yield Entry(name, _bytes(row[self.data.image_field], self.roots), captions, weights=weights)
            except BadImage as error:
                yield Skipped(name, str(error))

    def fingerprint(self) -> dict[str, Any]:
        """The library's own fingerprint of the table, and which columns are used."""
        columns = json.dumps([self.data.image_field, self.data.caption_field])
        rows = {"source": "datasets", "split": self.data.split, "rows": len(self.rows), "columns": columns}
        checksums = getattr(self.rows.info, "download_checksums", None)
        return rows | {"fingerprint": json.dumps(sorted(checksums)) if checksums else self.rows._fingerprint}


def _bytes(value: Any, roots: Sequence[Path]) -> bytes:
    """An image cell's encoded bytes: as stored, from the file it names, or of a picture, losslessly encoded again."""
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
