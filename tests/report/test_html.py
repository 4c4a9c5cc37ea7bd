"""The HTML report: complete, escaped, self-contained, and possible from any part of its files."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cqtool.errors import ArtifactError
from cqtool.report.html import write_report
from cqtool.report.markup import Markup, element, table

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HOSTILE = "<script>alert('x')</script> & \"org\"/m"


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    VOID = ("meta", "img", "br", "hr", "link")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.cells: list[list[str]] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self._open):
            self.cells[-1][-1] += data


def row(label: str, name: str, kl: float) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "objective": None if name == "fp32" else "fisher",
        "window": 128,
        "sinks": 4,
        "key_bits": 1.0,
        "value_bits": 1.0,
        "bits_per_channel": 1.0,
        "effective_bits": 2.9,
        "cache_bytes_per_token": 8352.0,
        "cache_bytes_per_token_full": 46080.0,
        "perplexity": 22.125,
        "perplexity_se": 0.5,
        "perplexity_increase": 0.105,
        "perplexity_increase_se": 0.004,
        "kl": kl,
        "kl_se": 0.002,
        "top1": 0.912,
        "top1_se": 0.003,
    }


def make_folder(folder: Path, model: str = "org/model") -> Path:
    reports = folder / "reports"
    reports.mkdir(parents=True)
    code = {"channels": 8, "bits": 8}
    layer = {
        "kv_heads": 3,
        "key_dim": 64,
        "value_dim": 64,
        "sliding_window": None,
        "rotation": {"style": "half", "dim": 64, "offset": 0, "source": 0},
    }
    config = {
        "format_version": 1,
        "tool": {"name": "cqtool", "version": "0.1.0"},
        "base_model": {
            "id": model,
            "revision": None,
            "license": None,
            "fingerprint": {"model_type": "llama", "shapes_sha256": "00", "probe": [[0.5] * 4]},
        },
        "cache": {"key": code, "value": code, "window": 128, "sinks": 4},
        "geometry": {"query_heads": 9, "layers": [layer]},
        "objective": "fisher",
        "recipe": {},
        "calibration": {
            "dataset": {"dataset": "demo", "split": "train"},
            "digest": "ab" * 32,
            "sequences": 16,
            "sequence_length": 2048,
            "seed": 0,
        },
    }
    calibration = {
        "data": {"dataset": "demo", "split": "train", "digest": "ab" * 32},
        "engine": "faiss",
        "seed": 0,
        "timings": {"sampling": 61.25},
        "versions": {"torch": "2.13.0"},
    }
    quality = {
        "format_version": 1,
        "model": model,
        "evaluation": {"dataset": "demo", "windows": 8, "window_length": 1024},
        "mode": "teacher",
        "device": "cpu",
        "dtype": "float32",
        "versions": {},
        "rows": [row("fp32", "fp32", 0.0), row("cq-8c8b <fisher>", "cq-8c8b", 0.125)],
        "gates": [
            {"name": "max_kl", "limit": 0.05, "value": 0.125, "passed": False},
            {"name": "max_ppl_increase", "limit": 0.2, "value": 0.105, "passed": True},
        ],
    }
    summary = {
        "kind": "key",
        "channels": 4,
        "joint": 9.5,
        "joint_std": 0.25,
        "marginal_sum": 12.0,
        "marginal_sum_std": 0.5,
        "saving": 0.2083,
        "small_sample": True,
    }
    entropy = {"bins": 16, "tokens": 4096, "ceiling_bits": 12.0, "summary": [summary]}
    (folder / "cq_config.json").write_text(json.dumps(config))
    (folder / "calibration.json").write_text(json.dumps(calibration))
    (reports / "quality.json").write_text(json.dumps(quality))
    (reports / "entropy.json").write_text(json.dumps(entropy))
    for name in ("quality.png", "entropy.png", "correlation.png"):
        (reports / name).write_bytes(PNG)
    return folder


def read(folder: Path) -> tuple[str, Page]:
    path = write_report(folder)
    assert path == folder / "reports" / "report.html"
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


def test_every_measured_figure_is_in_the_report(tmp_path: Path) -> None:
    _, page = read(make_folder(tmp_path))
    (quality,) = [cells for cells in page.cells if cells[0] == "cq-8c8b <fisher>"]
    assert quality[1:] == [
        "1.00",
        "2.90",
        "8.2 KiB",
        "22.12 ± 0.50",
        "+10.50 ± 0.40",
        "0.1250 ± 0.0020",
        "91.20 ± 0.30",
    ]
    assert ["KL divergence per token (nats), at most", "0.05", "0.125", "missed"] in page.cells
    assert ["Perplexity increase, at most", "20.00%", "10.50%", "passed"] in page.cells
    entropy = ["keys", "4", "9.50 ± 0.25", "12.00 ± 0.50", "20.8%", "too small"]
    assert entropy in page.cells
    # How long it took is not what a release is.
    assert "61.25" not in str(page.cells)
    assert "cq-8c8b for org/model" in page.text
    assert "5.5×" in page.text  # 46080 / 8352


def test_scores_of_tasks_and_their_differences_are_in_the_report(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    path = folder / "reports" / "quality.json"
    score = {"task": "passkey", "measure": "exact", "group": "512 tokens", "items": 8}
    scores = [
        {**score, "format": "fp32", "score": 1.0, "score_se": 0.0, "difference": 0.0}
        | {"difference_se": 0.0},
        {**score, "format": "cq-8c8b <fisher>", "score": 0.75, "score_se": 0.125}
        | {"difference": -0.25, "difference_se": 0.125},
    ]
    quality = json.loads(path.read_text())
    quality["generation"] = {"tasks": ["passkey"], "items": 8, "seed": 0, "scores": scores}
    path.write_text(json.dumps(quality))
    _, page = read(folder)
    own = ["passkey", "exact, 512 tokens", "cq-8c8b <fisher>", "8", "0.75 ± 0.125", "-0.25 ± 0.125"]
    assert own in page.cells
    assert "Text generated greedily over the cache" in page.text
    assert "lm-evaluation-harness" not in page.text


def test_the_costliest_layers_and_heads_are_in_the_report(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    path = folder / "reports" / "quality.json"
    quality = json.loads(path.read_text())
    parts = [
        {"layer": at, "kind": "value", "bits_per_channel": 1.25, "kl": kl, "kl_se": None}
        for at, kl in enumerate([0.001] * 30 + [0.47])
    ]
    heads = [{**one, "head": 6, "kl_se": 0.00021} for one in parts[-2:]]
    path.write_text(json.dumps(quality | {"by_layer": parts, "by_head": heads}))
    source, _ = read(folder)
    assert "values of one layer coded, all else exact: the 12 costliest of 31" in source
    assert "values of one head coded, all else exact: the 2 costliest of 2" in source
    assert "94.0%" in source and "0.47000 ± 0.00021" in source and "<th>Head</th>" in source


def test_each_text_of_a_mixture_has_a_row(tmp_path: Path) -> None:
    path = make_folder(tmp_path) / "calibration.json"
    calibration = json.loads(path.read_text())
    calibration["data"] = {
        "parts": [{"dataset": "demo", "share": 2.0}, {"dataset": HOSTILE, "share": 1.0}],
        "seed": 3,
    }
    path.write_text(json.dumps(calibration))
    _, page = read(tmp_path)
    assert ["text 1", "dataset: demo, share: 2"] in page.cells
    assert ["text 2", f"dataset: {HOSTILE}, share: 1"] in page.cells


def test_a_single_window_shows_figures_without_errors(tmp_path: Path) -> None:
    path = make_folder(tmp_path) / "reports" / "quality.json"
    quality = json.loads(path.read_text())
    for measured in quality["rows"]:
        measured |= {name: None for name in measured if name.endswith("_se")}
    path.write_text(json.dumps(quality))
    _, page = read(tmp_path)
    (cells,) = [cells for cells in page.cells if cells[0] == "cq-8c8b <fisher>"]
    assert cells[4:] == ["22.12", "+10.50", "0.1250", "91.20"]


def test_whatever_comes_from_a_file_is_escaped(tmp_path: Path) -> None:
    source, page = read(make_folder(tmp_path, model=HOSTILE))
    assert "script" not in page.tags
    assert "<script" not in source
    assert HOSTILE in page.text


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    source, page = read(make_folder(tmp_path))
    loaded = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert len(loaded) == 3
    for value in loaded:
        head, data = value.split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == PNG
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in source and "@import" not in source
    assert "prefers-color-scheme: dark" in source


@pytest.mark.parametrize(
    ("kept", "heading"),
    [
        ("cq_config.json", "Calibration"),
        ("calibration.json", "Calibration"),
        ("reports/quality.json", "Quality"),
        ("reports/entropy.json", "Entropy of coupled channels"),
    ],
)
def test_one_file_alone_makes_a_report(tmp_path: Path, kept: str, heading: str) -> None:
    folder = make_folder(tmp_path)
    for path in [*folder.glob("*.json"), *(folder / "reports").iterdir()]:
        if path != folder / kept:
            path.unlink()
    _, page = read(folder)
    assert heading in page.text
    assert page.tags.count("h2") == 1 and "img" not in page.tags


def test_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cqtool calibrate"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{", '{"summary": [{}]}', '{"summary": 3}'])
def test_a_damaged_file_is_one_sentence_and_leaves_the_old_report(
    tmp_path: Path, content: str
) -> None:
    folder = make_folder(tmp_path)
    before = write_report(folder).read_bytes()
    (folder / "reports" / "entropy.json").write_text(content)
    with pytest.raises(ArtifactError, match="again"):
        write_report(folder)
    assert (folder / "reports" / "report.html").read_bytes() == before


def test_markup_escapes_text_but_not_markup() -> None:
    assert element("p", "a < b & c") == "<p>a &lt; b &amp; c</p>"
    assert element("p", Markup("<b>x</b>"), None) == "<p><b>x</b>–</p>"
    assert "<td>&lt;i&gt;</td>" in table(["<h>"], [["<i>"]])
    assert "<th>&lt;h&gt;</th>" in table(["<h>"], [["<i>"]])
