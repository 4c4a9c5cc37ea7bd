"""Scores on benchmarks, in the file in which the Hub reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import Blob, HubServer
from huggingface_hub import parse_eval_result_entries
from synthetic_artifact import edit_json

from cqtool.artifact.export import export
from cqtool.artifact.push import preview, push
from cqtool.artifact.verify import verify
from cqtool.manifest import read_manifest

NAME, REPO = ".eval_results/cqtool.yaml", "org/tiny-cq"
STRICT = "exact_match (strict-match)"


def measure(calibration: Path, *scores: tuple[str, str, float], items: int | None = None) -> None:
    """Tasks of the harness, with better scores of full precision and of another format."""

    def add(report: dict[str, Any]) -> None:
        full, own, other = (row["label"] for row in report["rows"])
        rest = {"group": None, "items": 1319, "score_se": 0.01, "difference": 0.0}
        listed = [
            {"format": label, "task": task, "measure": measure, "score": score + more, **rest}
            | {"difference_se": None}
            for task, measure, score in scores
            for label, more in ((full, 0.1), (own, 0.0), (other, 0.2))
        ]
        names = list(dict.fromkeys(task for task, _, _ in scores))
        report["tasks"] = {"tasks": names, "items": items, "scores": listed}

    edit_json(calibration / "reports" / "quality.json", add)


def written(calibration: Path, **options: Any) -> bytes | None:
    file = export(calibration, calibration.parent / "scored", **options).folder / NAME
    return file.read_bytes() if file.exists() else None


def test_a_benchmark_s_score_is_what_the_hub_reads(calibration: Path) -> None:
    measure(calibration, ("arc_easy", "acc", 0.5), ("gsm8k", STRICT, 0.31234))
    data = written(calibration, repo_id=REPO)
    assert data is not None and data == written(calibration, repo_id=REPO)
    assert yaml.safe_load(data) == [
        {
            "dataset": {"id": "openai/gsm8k", "task_id": "gsm8k"},
            "value": 31.23,
            "source": {"url": "https://huggingface.co/org/tiny-cq", "name": "Model card"},
            "notes": "lm-evaluation-harness gsm8k, exact_match (strict-match); KV cache in "
            "0.625 bits per channel (k-cq-4c3b-v-cq-8c4b)",
        }
    ]
    (entry,) = parse_eval_result_entries(yaml.safe_load(data))
    assert (entry.dataset_id, entry.value) == ("openai/gsm8k", 31.23)
    assert NAME in read_manifest(calibration.parent / "scored")


def test_there_is_one_entry_for_a_benchmark_and_no_source_without_a_repository(
    calibration: Path,
) -> None:
    measure(calibration, ("gsm8k_cot", STRICT, 0.4), ("gsm8k", STRICT, 0.3))
    (entry,) = yaml.safe_load(written(calibration) or b"")
    assert entry["value"] == 30.0 and "source" not in entry


@pytest.mark.parametrize(
    ("task", "name", "items"),
    [("gsm8k", STRICT, 100), ("arc_easy", "acc", None), ("gsm8k", "exact_match (other)", None)],
)
def test_a_part_of_a_benchmark_or_another_task_is_no_score_of_it(
    calibration: Path, task: str, name: str, items: int | None
) -> None:
    measure(calibration, (task, name, 0.5), items=items)
    assert written(calibration) is None


def test_scores_are_pushed_and_those_of_others_stay(
    hub: HubServer, calibration: Path, tmp_path: Path
) -> None:
    measure(calibration, ("gsm8k", STRICT, 0.3))
    artifact = export(calibration, tmp_path / "artifact").folder
    push(artifact, REPO)
    repo = hub.repos[REPO]
    assert repo.commits[-1].files[NAME].content == (artifact / NAME).read_bytes()
    theirs = ".eval_results/somebody.yaml"
    repo.add("main", "proposed", repo.commits[-1].files | {theirs: Blob(b"- value: 1", False)})
    assert verify(REPO).files == len(read_manifest(artifact)) + 1
    assert not preview(artifact, REPO).changed
    measure(calibration, ("arc_easy", "acc", 0.5))
    export(calibration, artifact)
    assert NAME in push(artifact, REPO).plan.paths("delete")
    assert theirs in repo.commits[-1].files and NAME not in repo.commits[-1].files
