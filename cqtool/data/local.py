"""Text from files on this machine: .txt, .jsonl, .parquet, or a folder of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from cqtool.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".parquet")
LOCAL_SPLITS = ("all", "train", "test")
_TEST_EVERY = 10  # one document in ten, or the last tenth of a .txt file, is the split `test`


def is_local(dataset: str) -> bool:
    """Whether a data set's name means a file or folder rather than a Hub id."""
    path = Path(dataset).expanduser()
    looks_like_path = dataset.startswith(("/", "./", "../", "~")) or path.suffix in SUFFIXES
    return looks_like_path or path.exists()


def local_documents(path: Path, split: str, column: str) -> Iterator[str]:
    """Yield the documents of a file or folder: a whole .txt, or a line or row of the others.

    Raises:
        DataError: the path, the split or the column does not exist, or a file is damaged.
    """
    if split not in LOCAL_SPLITS:
        raise DataError(f"A local file has no split '{split}'; use {', '.join(LOCAL_SPLITS)}.")
    for file in _files(path):
        if file.suffix == ".txt":
            yield _part_of_text(_read_text(file), split)
            continue
        rows = _jsonl_rows if file.suffix == ".jsonl" else _parquet_rows
        for index, text in enumerate(rows(file, column)):
            if split == "all" or (index % _TEST_EVERY == _TEST_EVERY - 1) == (split == "test"):
                yield text


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"Cannot read text from {path}; use a .txt, .jsonl or .parquet file.")
        return [path]
    if not path.is_dir():
        raise DataError(f"There is no file or folder {path}; check the path of --dataset.")
    found = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix in SUFFIXES)
    if not found:
        raise DataError(f"The folder {path} holds no .txt, .jsonl or .parquet file; add one.")
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, for example with iconv."
        ) from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}; check its permissions.") from error


def _part_of_text(text: str, split: str) -> str:
    """Cut a text in two at the first line end after nine tenths."""
    if split == "all":
        return text
    cut = text.find("\n", len(text) * (_TEST_EVERY - 1) // _TEST_EVERY) + 1
    if cut == 0:
        cut = len(text) * (_TEST_EVERY - 1) // _TEST_EVERY
    return text[:cut] if split == "train" else text[cut:]


def _jsonl_rows(path: Path, column: str) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_text(f"{path}:{number}", line, column)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; convert it, for example with iconv.") from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}; check its permissions.") from error


def _json_text(where: str, line: str, column: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not valid JSON ({error.msg}, column {error.colno}); "
            "correct or delete the line."
        ) from error
    if not isinstance(record, dict):
        raise DataError(f'{where} is not a JSON object; write one such as {{"text": "..."}}.')
    if column not in record:
        raise DataError(unknown_column(where, column, list(record)))
    return text_field(where, record[column], column)


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise DataError(unknown_column(str(path), column, file.schema_arrow.names))
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield text_field(f"{path}, row {row}", value, column)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable Parquet file; write it again or use another one."
        ) from error


def unknown_column(where: str, column: str, there_are: list[str]) -> str:
    """The sentence for a column that is not there."""
    names = ", ".join(sorted(map(str, there_are))) or "none"
    return f"{where} has no column '{column}'; name one of its columns with --text-column: {names}."


def text_field(where: str, value: object, column: str) -> str:
    """`value` when it is text; an absent value counts as empty.

    Raises:
        DataError: the column holds something else.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise DataError(
        f"{where}: column '{column}' holds {type(value).__name__}, not text; "
        "name a text column with --text-column."
    )
