"""Text from files, from the demo and from the Hub's library, and what is said when it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cqtool.data import TextSource, documents, overlap, resolve_source
from cqtool.data.demo import clean_article
from cqtool.errors import DataError

ROWS = [f"Document number {i} tells a story." for i in range(25)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": row, "id": i}) for i, row in enumerate(ROWS)]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": ROWS, "id": list(range(len(ROWS)))})
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is out of reach at once, without the client's retries."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def read(path: Path | str, split: str = "all", **options: str) -> list[str]:
    return list(documents(TextSource(str(path), split=split, **options)))


def test_one_document_per_line_row_or_file(jsonl: Path, parquet: Path, tmp_path: Path) -> None:
    assert read(jsonl) == ROWS
    assert read(parquet) == ROWS
    text = tmp_path / "a.txt"
    text.write_text("one\n\ntwo\n", encoding="utf-8")
    assert read(text) == ["one\n\ntwo\n"]


def test_folder_is_read_in_the_order_of_its_names(jsonl: Path, parquet: Path) -> None:
    folder = jsonl.parent
    (folder / "sub").mkdir()
    (folder / "sub" / "z.txt").write_text("last", encoding="utf-8")
    (folder / "README.md").write_text("not text to calibrate on", encoding="utf-8")
    assert read(folder) == [*ROWS, *ROWS, "last"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_local_train_and_test_are_disjoint_and_complete(
    kind: str, request: pytest.FixtureRequest, tiny_text_file: Path, tiny_text: str
) -> None:
    path = tiny_text_file if kind == "txt" else request.getfixturevalue(kind)
    train, test = read(path, "train"), read(path, "test")
    if kind == "txt":
        assert train[0] + test[0] == tiny_text
        assert len(test[0]) == pytest.approx(len(tiny_text) / 10, rel=0.05)
    else:
        assert sorted(train + test) == sorted(ROWS)
        assert len(test) == 2


def test_auto_means_demo_text_for_the_demo_and_wikitext_for_the_rest() -> None:
    demo = resolve_source("auto", None, model="demo", role="calibration")
    assert demo == TextSource("demo", split="train")
    other = resolve_source("auto", None, model="gpt2", role="evaluation")
    assert other == TextSource("Salesforce/wikitext", "wikitext-2-raw-v1", "test")


def test_explicit_choices_win_and_files_are_taken_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "x.jsonl")
    assert resolve_source(path, None, model="demo", role="evaluation").split == "all"
    chosen = resolve_source("a/b", "dev", model="demo", role="calibration", config="c", column="t")
    assert chosen == TextSource("a/b", "c", "dev", "t")


def test_overlap_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("x", encoding="utf-8")

    def pair(first: str, second: str, splits: tuple[str, str]) -> str | None:
        return overlap(
            {"dataset": first, "config": None, "split": splits[0]},
            {"dataset": second, "config": None, "split": splits[1]},
        )

    assert pair("demo", "demo", ("train", "test")) is None
    assert pair("a/b", "a/b", ("train", "test")) is None
    assert "calibrated on" in str(pair("a/b", "a/b", ("test", "test")))
    assert "calibrated on" in str(pair("x.txt", str(tmp_path / "x.txt"), ("all", "test")))
    assert pair("x.txt", "x.txt", ("train", "test")) is None
    assert pair("x.txt", "demo", ("all", "test")) is None


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.txt", None, "no file or folder"),
        ("gone/sub", None, "no file or folder"),
        ("a.csv", "x", r"use a \.txt, \.jsonl or \.parquet"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.jsonl", '{"text": "x"}\n{"text": oops}\n', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n["x"]\n', r"a\.jsonl:2 is not a JSON object"),
        ("a.jsonl", '{"body": "x", "id": 1}\n', r"no column 'text'.*: body, id"),
        ("a.jsonl", '{"text": 5}\n', "holds int, not text"),
        ("a.parquet", "no parquet", "not a readable Parquet"),
    ],
)
def test_bad_files_are_named_with_the_fix(
    tmp_path: Path, name: str, content: str | bytes | None, said: str
) -> None:
    path = tmp_path / name
    if content is not None:
        _write(path, content)
    with pytest.raises(DataError, match=said):
        read(path)


def test_unknown_column_and_split_of_a_file(parquet: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'body'.*: id, text"):
        read(parquet, column="body")
    with pytest.raises(DataError, match="no split 'dev'; use all, train, test"):
        read(parquet, "dev")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.txt"):
        read(tmp_path)


@pytest.fixture
def hub_like(jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that the datasets library takes for a data set with one split, `train`."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hub"
    folder.mkdir()
    jsonl.rename(folder / "train.jsonl")
    return str(folder)


def test_hub_rows_columns_and_splits(hub_like: str) -> None:
    from cqtool.data.hub import hub_documents

    def read_hub(split: str, column: str) -> list[str]:
        found = hub_documents(hub_like, config=None, split=split, column=column, revision=None)
        return list(found)

    assert read_hub("train", "text") == ROWS
    with pytest.raises(DataError, match="not text"):
        read_hub("train", "id")
    with pytest.raises(DataError, match=r"no column 'body'.*id, text"):
        read_hub("train", "body")
    with pytest.raises(DataError, match=r"split.*test"):
        read_hub("test", "text")


def test_hub_out_of_reach(offline: None) -> None:
    with pytest.raises(DataError, match="Cannot reach the Hub for the data set nobody/nothing"):
        read("nobody/nothing", "train")


def test_unknown_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def refuse(*args: object, **options: object) -> None:
        raise DatasetNotFoundError(reason)

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    reason = "Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."
    with pytest.raises(DataError, match=r"no data set 'a/b'.*hf auth login"):
        read("a/b", "train")
    reason = "Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated to access it."
    with pytest.raises(DataError, match="gated: request access"):
        read("a/b", "train")


def test_cleaning_keeps_prose_and_drops_what_is_no_sentence() -> None:
    raw = (
        "\n'''Alabama''' () is a state, in the ''southeast'' of the United States .\n"
        "==Etymology==\n"
        "Photo of a river|alt=A river\n"
        "* The name comes from a people whose members lived by the river.\n"
        "population 4,779,736\n"
        "==Empty==\n"
        "==See also==\n===Lists===\n"
        "A sentence in a list of sources that is long enough to be prose.\n"
        "==History==\n"
        "It was settled a long time ago (; , ''early'') by people.\u00a0Then it grew.\n"
    )
    assert clean_article(raw) == (
        "Alabama is a state, in the southeast of the United States.\n\n"
        "Etymology\n\n"
        "The name comes from a people whose members lived by the river.\n\n"
        "History\n\n"
        "It was settled a long time ago (early) by people. Then it grew."
    )


def test_demo_splits_share_no_article(demo_available: None) -> None:
    train, test = read("demo", "train"), read("demo", "test")
    assert len(train) == 70
    assert len(test) >= 20
    assert not {a.split("\n")[0] for a in train} & {a.split("\n")[0] for a in test}
    text = "\n\n".join(train + test)
    assert len(text) > 2_500_000
    for left_over in ("[[", "{{", "'''", "<ref", "File:", "==", "|"):
        assert left_over not in text
    with pytest.raises(DataError, match="no split 'dev'"):
        read("demo", "dev")


def test_demo_without_gensim_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'cqtool\[demo\]'"):
        read("demo", "train")
