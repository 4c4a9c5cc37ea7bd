"""The model card says what was measured, and nothing that is in none of the artifact's files."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from synthetic_artifact import config, edit_json, quality
from typer.main import get_command

from cqtool.artifact.export import export
from cqtool.cli.app import app
from cqtool.models.demo import DEMO_ID


def card_of(calibration: Path, **options: Any) -> str:
    out = calibration.parent / "card-artifact"
    return (export(calibration, out, **options).folder / "README.md").read_text()


def test_metadata_are_what_the_hub_reads(calibration: Path) -> None:
    text = card_of(calibration, repo_id="org/tiny-cq")
    # Read with a YAML parser as well as with the Hub client.
    plain = yaml.safe_load(text.split("---\n")[1])
    assert plain == ModelCard(text).data.to_dict()
    assert plain == {
        "base_model": "some-org/Tiny-Model",
        "base_model_relation": "quantized",
        "library_name": "cqtool",
        "license": "apache-2.0",
        "datasets": ["Salesforce/wikitext"],
        "tags": [
            "kv-cache",
            "kv-cache-quantization",
            "coupled-quantization",
            "quantization",
            "k-cq-4c3b-v-cq-8c4b",
        ],
        "model-index": [
            {
                "name": "Tiny-Model, KV cache in k-cq-4c3b-v-cq-8c4b",
                "results": [
                    {
                        "task": {
                            "type": "text-generation",
                            "name": "Next token, over a coded KV cache",
                        },
                        "dataset": {
                            "name": "Salesforce/wikitext",
                            "type": "Salesforce/wikitext",
                            "config": "wikitext-2-raw-v1",
                            "split": "test",
                        },
                        "metrics": [
                            {
                                "type": "perplexity",
                                "value": 23.891,
                                "name": "Perplexity (6 windows of 768 tokens)",
                            },
                            {
                                "type": "kl_divergence",
                                "value": 0.0871,
                                "name": "KL divergence from the unquantized cache, nats per token "
                                "(6 windows of 768 tokens)",
                            },
                            {
                                "type": "top1_agreement",
                                "value": 0.9143,
                                "name": "Same most probable token as with the unquantized cache "
                                "(6 windows of 768 tokens)",
                            },
                        ],
                    }
                ],
            }
        ],
    }


@pytest.mark.parametrize("dataset", ["/home/somebody/text.txt", "demo", None, "two"])
def test_figures_of_what_is_no_data_set_of_the_hub_are_in_no_index(
    calibration: Path, dataset: str | None
) -> None:
    changes: dict[str, Any] = {"dataset": dataset}
    if dataset == "two":
        changes = {"parts": [{"dataset": "org/a"}, {"dataset": "org/b"}]}
    edit_json(calibration / "reports" / "quality.json", lambda q: q["evaluation"].update(changes))
    assert "model-index" not in ModelCard(card_of(calibration)).data.to_dict()


@pytest.mark.parametrize(
    ("link", "revision", "shown"),
    [
        ("LICENSE", "0123abc", "https://huggingface.co/some-org/Tiny-Model/blob/0123abc/LICENSE"),
        ("./a b", None, "https://huggingface.co/some-org/Tiny-Model/blob/main/a%20b"),
        ("https://example.org/terms", "0123abc", "https://example.org/terms"),
    ],
)
def test_a_license_of_its_own_is_carried_over_with_its_name_and_text(
    calibration: Path, link: str, revision: str | None, shown: str
) -> None:
    own = {"license": "other", "license_name": "tongyi-qianwen", "license_link": link}
    edit_json(
        calibration / "cq_config.json",
        lambda c: c["base_model"].update(own, revision=revision),
    )
    data = ModelCard(card_of(calibration)).data.to_dict()
    assert {name: data[name] for name in own} == own | {"license_link": shown}


def test_a_file_of_a_local_model_is_no_link(calibration: Path) -> None:
    local = {"id": "./tiny", "license_link": "LICENSE", "license_name": "own"}
    edit_json(calibration / "cq_config.json", lambda c: c["base_model"].update(local))
    data = ModelCard(card_of(calibration)).data.to_dict()
    assert "license_link" not in data and data["license_name"] == "own"


def test_local_models_and_texts_are_not_given_as_hub_ids(calibration: Path) -> None:
    def make_local(value: dict[str, Any]) -> None:
        value["base_model"].update(id="/home/somebody/models/tiny", license=None)
        value["calibration"]["dataset"].update(dataset="/home/somebody/corpus.txt", config=None)

    edit_json(calibration / "cq_config.json", make_local)
    edit_json(
        calibration / "reports" / "quality.json",
        lambda q: q["evaluation"].update(dataset="/home/somebody/corpus.txt"),
    )
    text = card_of(calibration)
    assert ModelCard(text).data.to_dict().keys() == {"library_name", "tags"}
    assert "/home/somebody" not in text
    assert "`tiny`" in text and "`corpus.txt`" in text


def test_every_measured_figure_is_there_with_its_standard_error(calibration: Path) -> None:
    text = card_of(calibration).replace("\u00a0", " ")
    row = next(line for line in text.splitlines() if line.startswith("| **K 4c3b"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "**K 4c3b, V 8c4b**",
        "0.625",
        "23.891 ± 0.829",
        "+11.92% ± 1.37%",
        "0.0871 ± 0.0023",
        "91.43% ± 0.31%",
    ]
    assert "| **K 4c3b, V 8c4b** | 22 | 4.3% | 1.375 |" in text
    assert "4.3% of the bytes of the fp32 cache at 768 tokens, perplexity +11.92% ± 1.37%" in text


def test_no_number_is_invented(calibration: Path) -> None:
    """Each number of the text is in a source file, or follows from the format by arithmetic."""
    text = card_of(calibration, repo_id="org/tiny-cq")
    body = text.split("---\n", 2)[2].split("## Citation")[0]
    sources = json.dumps([config(), quality()])
    size = (calibration / "codebooks.safetensors").stat().st_size
    derived = {
        "0.625", "0.75", "0.5",  # bits per channel: (3/4 + 4/8) / 2, 3/4 and 4/8
        "8", "16",  # centroids: 2**3 and 2**4; sinks + window
        "2", "10", "128", f"{size / 1000:.3g}",  # layers, code bytes, channels per token, kB
        "11.92", "1.37", "91.43", "0.31", "4.3", "100.0",  # fractions as per cent
        "2.0",  # per cent: code bytes of 512 bytes per token
    }  # fmt: skip
    numbers = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w])", body)
    known = {float(n) for n in [*re.findall(r"\d+(?:\.\d+)?", sources), *derived]}
    assert len(numbers) > 40
    assert {n for n in numbers if float(n) not in known} == set()


def test_the_command_names_everything_that_was_chosen(calibration: Path) -> None:
    text = card_of(calibration, repo_id="org/tiny-cq")
    command = text.split("```bash\n")[1].split("```")[0]
    download, check = command.replace("\\\n", " ").strip().splitlines()
    assert shlex.split(download) == ["hf", "download", "org/tiny-cq", "--local-dir", "artifact"]
    assert (
        " ".join(shlex.split(check))
        == "cqtool check some-org/Tiny-Model --revision 0123abc artifact "
        "--dataset Salesforce/wikitext --dataset-config wikitext-2-raw-v1 --split test "
        "--text-column text --windows 6 --window-length 768 --window 5 --sinks 3 --mode teacher "
        "--dtype float32 --compare int4"
    )
    assert text.split("```bash\n")[2].split("```")[0] == "cqtool verify org/tiny-cq --rebuild\n"


def test_the_command_leaves_out_what_a_reader_does_not_have(calibration: Path) -> None:
    """Other calibrations are folders of whoever measured; --items is the harness's where it ran."""

    def change(report: dict[str, Any]) -> None:
        report["rows"][2].update(name="cq-4c8b", objective="query", label="cq-4c8b query (tuned)")
        score = {"format": report["rows"][1]["label"], "task": "copy", "measure": "exact"}
        score |= {"group": None, "items": 20, "score": 0.5, "score_se": None}
        score |= {"difference": 0.0, "difference_se": None}
        report["generation"] = {"tasks": ["copy"], "items": 20, "seed": 0, "scores": [score]}
        report["tasks"] = {**report["generation"], "tasks": ["winogrande"], "items": None}

    edit_json(calibration / "reports" / "quality.json", change)
    command = card_of(calibration, repo_id="org/tiny-cq").split("```bash\n")[1].split("```")[0]
    assert "--generation copy" in command and "--tasks winogrande" in command
    assert "--items" not in command and "--compare" not in command and "--context" not in command
    edit_json(calibration / "reports" / "quality.json", lambda report: report.update(context=4096))
    command = card_of(calibration, repo_id="org/tiny-cq").split("```bash\n")[1].split("```")[0]
    assert "--context 4096" in command


def test_commands_are_ones_that_cqtool_has(calibration: Path) -> None:
    edit_json(
        calibration / "reports" / "quality.json",
        lambda q: q["rows"][2].update(name="cq-4c8b", objective="uniform"),
    )
    text = card_of(calibration, repo_id="org/tiny-cq")
    commands = [
        shlex.split(line)
        for block in text.split("```bash\n")[1:]
        for line in block.split("```")[0].replace("\\\n", " ").splitlines()
        if line.startswith("cqtool")
    ]
    assert [words[1] for words in commands] == ["calibrate", "check", "verify"]
    assert commands[0][-4:] == ["--recipe", "artifact", "--out", "calibration"]
    assert commands[1][-4:] == ["--compare", "cq-4c8b:uniform", "--samples", "calibration"]
    known = get_command(app).commands
    for _, name, *arguments in commands:
        # Parsing refuses an option that does not exist or a value of the wrong type.
        known[name].make_context(name, list(arguments), resilient_parsing=False)


def test_a_tuned_calibration_says_so(calibration: Path) -> None:
    assert "tuned end to end" not in card_of(calibration)
    edit_json(calibration / "cq_config.json", lambda c: c.update(tuned=True))
    assert "then tuned end to end, on further text; `calibration.json` names it" in card_of(
        calibration
    )


def test_what_it_takes_to_make_the_codebooks_again(calibration: Path) -> None:
    def local(config: dict[str, Any]) -> None:
        config["base_model"]["id"] = "/home/somebody/tiny"
        config["calibration"]["dataset"]["dataset"] = "/home/somebody/corpus.txt"
        config["recipe"]["grouping"] = {"file": "/home/somebody/mine.groups.json"}

    edit_json(calibration / "cq_config.json", local)
    text = card_of(calibration)
    files = "a folder that holds `corpus.txt` and `mine.groups.json`:"
    command = "cqtool verify ORG/NAME --rebuild --model PATH/TO/MODEL"
    assert f"compares the bytes, run in {files}\n\n```bash\n{command}\n```" in text
    edit_json(
        calibration / "cq_config.json",
        lambda c: c["base_model"].update(id=DEMO_ID, revision=None),
    )
    assert "cqtool verify ORG/NAME --rebuild --model demo\n" in card_of(calibration)


def test_a_single_window_has_no_standard_error(calibration: Path) -> None:
    nothing = {f"{name}_se": None for name in ("perplexity", "perplexity_increase", "kl", "top1")}
    edit_json(calibration / "reports" / "quality.json", lambda q: q["rows"][1].update(nothing))
    text = card_of(calibration)
    row = next(line for line in text.splitlines() if line.startswith("| **K 4c3b"))
    assert row == "| **K 4c3b, V 8c4b** | 0.625 | 23.891 | +11.92% | 0.0871 | 91.43% |"
    assert "± is the standard error" not in text


def test_the_demo_is_not_passed_off_as_the_published_checkpoint(calibration: Path) -> None:
    edit_json(
        calibration / "cq_config.json",
        lambda c: c["base_model"].update(id=DEMO_ID, revision=None),
    )
    text = card_of(calibration)
    assert "cqtool check demo artifact" in text and 'open_model("demo")' in text
    assert "not those of the published checkpoint" in text


@pytest.mark.parametrize("why", ["no report", "other formats only"])
def test_without_a_measurement_the_card_says_so(calibration: Path, why: str) -> None:
    path = calibration / "reports" / "quality.json"
    if why == "no report":
        path.unlink()
    else:
        edit_json(path, lambda q: q.update(rows=[q["rows"][0], q["rows"][2]]))
    text = card_of(calibration)
    assert "quality of this artifact has not been measured" in text
    assert "±" not in text and "| Cache |" not in text


def test_usage_is_two_lines_that_parse(calibration: Path) -> None:
    text = card_of(calibration, repo_id="org/tiny-cq")
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert 'cache = CQCache.from_pretrained("org/tiny-cq", model)\n' in code
    assert "model.generate(**inputs, past_key_values=cache)" in code


def test_a_mixture_of_texts_is_named_part_by_part(calibration: Path) -> None:
    hostile = "https://x\n```\n# Heading"
    parts = [
        {"dataset": "org/code", "config": "c", "split": "train", "column": "body", "share": 0.7},
        {"dataset": "org/code", "config": hostile, "split": "train", "share": 0.2},
        {"dataset": "demo", "config": None, "split": "train", "column": "text", "share": 0.1},
    ]

    def mix(config: dict[str, Any]) -> None:
        counted = [part | {"sequences": n} for part, n in zip(parts, (4, 2, 1), strict=True)]
        config["calibration"]["dataset"] = {"parts": counted, "order": "random", "seed": 11}

    edit_json(calibration / "cq_config.json", mix)
    text = card_of(calibration)
    assert ModelCard(text).data.datasets == ["org/code"]
    assert "\n# Heading" not in text
    link = "[org/code](https://huggingface.co/datasets/org/code)"
    assert f"7 sequences of 96 tokens: 4 of {link} (c, train), 2 of {link} (https" in text
    assert ", 1 of cqtool's demo text of Wikipedia articles (train), seed 11" in text


def test_names_cannot_break_out_of_the_text(calibration: Path) -> None:
    hostile = "a|b\n\n# Heading <script>`x`"
    edit_json(
        calibration / "reports" / "quality.json",
        lambda q: (q["rows"][1].update(label=hostile), q.update(device=hostile)),
    )
    edit_json(
        calibration / "cq_config.json", lambda c: c["base_model"].update(license="x: y\n--- [z")
    )
    text = card_of(calibration)
    assert "\n# Heading" not in text and not re.search(r"(?<!\\)<script", text)
    assert ModelCard(text).data.license == "x: y\n--- [z"


def test_one_plot_is_shown_and_the_others_are_linked(calibration: Path) -> None:
    reports = calibration / "reports"
    for name in ("quality.png", "quality-window0-sinks0.png", "report.html"):
        (reports / name).write_bytes(b"x")
    text = card_of(calibration)
    assert re.findall(r"!\[.+\]\((.*)\)", text) == ["reports/quality.png"]
    (reports / "quality-pareto.png").write_bytes(b"x")
    text = card_of(calibration)
    assert re.findall(r"!\[.+\]\((.*)\)", text) == ["reports/quality-pareto.png"]
    linked = re.findall(r"\]\((.*?)\)", text.split("## Reports")[1].split("## ")[0])
    assert linked[0] == "reports/report.html"
    assert sorted(linked) == sorted(
        f"reports/{path.name}" for path in reports.iterdir() if path.suffix in (".html", ".png")
    )


def test_where_every_token_is_coded_no_token_is_said_to_stay(calibration: Path) -> None:
    text = card_of(calibration)
    assert "A context of up to 8 tokens is not compressed: the first 3 and the last 5" in text
    edit_json(calibration / "cq_config.json", lambda c: c["cache"].update(window=0, sinks=0))
    edit_json(
        calibration / "reports" / "quality.json",
        lambda q: q["rows"][1].update(window=0, sinks=0),
    )
    text = card_of(calibration)
    assert "with every token coded" in text and "Tokens**: all are coded" in text
    assert "A context of up to" not in text and "the longer the text" not in text


def test_a_change_that_rounds_to_nothing_is_no_decrease(calibration: Path) -> None:
    edit_json(
        calibration / "reports" / "quality.json",
        lambda q: q["rows"][1].update(perplexity_increase=-1e-6, perplexity_increase_se=1e-6),
    )
    assert "perplexity +0.00% ± 0.00%" in card_of(calibration)
