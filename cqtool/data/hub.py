"""Text from a data set on the Hub, through the `datasets` library."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cqtool.data.local import text_field, unknown_column
from cqtool.errors import DataError

_DOWNLOAD_WHOLE = 1 << 30
"""Bytes up to which a data set is fetched once and kept; larger ones are streamed."""


def hub_documents(
    dataset: str, *, config: str | None, split: str, column: str, revision: str | None
) -> Iterator[str]:
    """Yield one document per row of a Hub data set.

    A data set of at most 1 GiB is downloaded into the `datasets` cache, which also serves it when
    the network is gone; a larger one, or one of unknown size, is streamed.

    Raises:
        DataError: the data set, its configuration, split or column is missing, or the Hub is out
            of reach.
    """
    with _explained(dataset, config):
        rows = _open(dataset, config, split, column, revision)
        for number, row in enumerate(rows, start=1):
            if column not in row:
                raise DataError(unknown_column(f"The data set {dataset}", column, list(row)))
            yield text_field(f"{dataset}, row {number}", row[column], column)


def _open(
    dataset: str, config: str | None, split: str, column: str, revision: str | None
) -> Iterator[dict[str, Any]]:
    import datasets

    builder = datasets.load_dataset_builder(dataset, config, revision=revision)
    info = builder.info
    if info.splits and split not in info.splits:
        raise DataError(
            f"The data set {dataset} has no split '{split}'; it has {', '.join(info.splits)}."
        )
    size = info.download_size
    if size is not None and size <= _DOWNLOAD_WHOLE:
        builder.download_and_prepare()
        rows = builder.as_dataset(split=split)
    else:
        rows = builder.as_streaming_dataset(split=split)
    if columns := rows.column_names:  # a stream of unknown make-up has none: its rows are checked
        if column not in columns:
            raise DataError(unknown_column(f"The data set {dataset}", column, columns))
        rows = rows.select_columns([column])
    return iter(rows)


@contextmanager
def _explained(dataset: str, config: str | None) -> Iterator[None]:
    """Silence bars off a terminal, and turn the library's exceptions into sentences."""
    import datasets

    bars_were_on = datasets.are_progress_bars_disabled() is False
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        sentence = _sentence(error, dataset, config)
        if sentence is None:
            raise
        raise DataError(sentence) from error
    finally:
        if bars_were_on:
            datasets.enable_progress_bars()


def _sentence(error: Exception, dataset: str, config: str | None) -> str | None:
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    text = str(error).split("\n")[0].rstrip(". ")
    if isinstance(error, DatasetNotFoundError) and "gated" in text:
        return (
            f"The data set {dataset} is gated: request access on its Hub page, then run "
            "`hf auth login`."
        )
    if isinstance(error, DatasetNotFoundError | HFValidationError):
        return (
            f"There is no data set '{dataset}' on the Hub that you may read; check its name, run "
            "`hf auth login` if it is private, or give the path of a .txt, .jsonl or .parquet file."
        )
    unreachable = type(error).__module__.startswith("httpx")  # or its successor, by version
    if unreachable or isinstance(error, ConnectionError | OfflineModeIsEnabled | HfHubHTTPError):
        return (
            f"Cannot reach the Hub for the data set {dataset}; check the network, or use a local "
            ".txt, .jsonl or .parquet file or --dataset demo."
        )
    if isinstance(error, ValueError) and "config" in text.lower():
        wanted = f"no configuration '{config}'" if config else "several configurations"
        return f"The data set {dataset} has {wanted}: {text}; choose one with --dataset-config."
    if isinstance(error, DatasetsError | ValueError | FileNotFoundError | RuntimeError):
        return f"The data set {dataset} cannot be read ({text}); use another data set or revision."
    return None
