"""Reads images from parquet files, as on Hugging Face: one row group at a time, without unpacking.

pyarrow is an extra (`pip install -e '.[parquet]'`), so it is imported only when it is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.errors import DataError, one_line

if TYPE_CHECKING:
    from pipeline.build.listing import Listing

BATCH = 64  # rows in memory at a time
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")


def _open(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path} needs pyarrow: pip install -e '.[parquet]'") from None
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path} ({one_line(error)}): download it again") from None


def _columns(file: Any, path: Path) -> tuple[str, str, list[str]]:
    """Return (image column, label column, class names or []), from the metadata or from the usual column names."""
    schema = file.schema_arrow
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {name: str(kind.get("_type")) for name, kind in features.items() if isinstance(kind, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        features, kinds = {}, {}
    images = [n for n in schema.names if kinds.get(n) == "Image"] or [
        n for n in _IMAGE_COLUMNS if n in schema.names
    ]
    labels = [n for n in schema.names if kinds.get(n) == "ClassLabel"]
    labels = [n for n in _LABEL_COLUMNS if n in labels or (not labels and n in schema.names)] or labels
    if not images or not labels:
        raise DataError(
            f"{path} has the columns {', '.join(schema.names)}: give files with an image and a label column"
        )
    names = features.get(labels[0], {}).get("names") if kinds else None
    return images[0], labels[0], [str(name) for name in names] if isinstance(names, list) else []


def index(listing: Listing, root: Path, names: list[str]) -> None:
    """List the rows of parquet files in `root`, with their labels."""
    from pipeline.build.listing import RawImage

    for name in names:
        with _open(root / name) as file:
            image, label, class_names = _columns(file, root / name)
            listing.class_names = listing.class_names or class_names
            wanted = [f"{image}.path", label]
            row = 0
            for group in range(file.num_row_groups):
                try:
                    table = file.read_row_group(group, columns=wanted).to_pydict()
                except Exception as error:  # pyarrow raises many types for a damaged file
                    raise DataError(
                        f"{root / name} is damaged ({one_line(error)}): download it again"
                    ) from None
                images = table.get(image) or [None] * len(table[label])
                for offset, (entry, value) in enumerate(zip(images, table[label], strict=True)):
                    path = entry.get("path") if isinstance(entry, dict) else None
                    base = str(path).rpartition("/")[2] if path else ""
                    unique = f"{name}/{row:07d}{'_' if base else ''}{base}"
                    row += 1
                    if value is None or value == -1:
                        listing.rejected.append((unique, "no label"))
                        continue
                    listing.given[unique] = str(value)
                    listing.add(RawImage(unique, -1, offset, group, name))


class ParquetReader:
    """Reads images row by row; fast if the rows are read in order."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._name, self._file, self._column = "", None, ""  # type: str, Any, str
        self._group, self._batches, self._start, self._rows = -1, iter(()), 0, []  # type: int, Any, int, list[Any]

    def read(self, name: str, group: int, row: int) -> bytes:
        """Return the image in a row of a row group; ValueError if there is none, OSError if it cannot be read."""
        if name != self._name:
            self.close()
            try:
                self._file = _open(self._root / name)
            except DataError as error:
                raise OSError(5, error.message) from None
            self._name, self._column = name, _columns(self._file, self._root / name)[0]
        try:
            if group != self._group or row < self._start:
                self._batches = self._file.iter_batches(BATCH, row_groups=[group], columns=[self._column])
                self._group, self._start, self._rows = group, 0, []
            while row >= self._start + len(self._rows):
                self._start += len(self._rows)
                self._rows = next(self._batches).column(0).to_pylist()
        except StopIteration:
            raise ValueError("the row is missing") from None
        except Exception as error:  # pyarrow raises many types for a damaged file
            self._group = -1
            raise ValueError(f"damaged parquet file: {' '.join(str(error).split())}") from None
        value = self._rows[row - self._start]
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ValueError("the row holds no image bytes")
        return content

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._name, self._file, self._group = "", None, -1
