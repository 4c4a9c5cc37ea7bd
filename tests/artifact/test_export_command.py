"""`cqtool export` and `cqtool inspect` as a user runs them: as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from synthetic_artifact import edit_json, write_calibration

from cqtool.artifact.export import export
from cqtool.manifest import verify_folder
from cqtool.spec import KINDS

RUN = "from cqtool.cli import main; main()"


def cqtool(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)],
        env=clean | {"COLUMNS": "120"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_export_push_and_pull(hub: HubServer, calibration: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    home = {"HF_HOME": str(tmp_path / "home")}
    done = cqtool(
        "export", calibration, "--out", out, "--push-to-hub", "--repo-id", "org/tiny", "--json",
        **hub.environment(), **home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["hub"]["oid"] == hub.repos["org/tiny"].branches["main"]
    assert len(hub.repos["org/tiny"].commits) == 2
    assert TOKEN not in done.stdout + done.stderr
    snapshot = Path(snapshot_download("org/tiny"))
    verify_folder(snapshot)
    names = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert all((snapshot / name).read_bytes() == (out / name).read_bytes() for name in names)
    assert 'from_pretrained("org/tiny", model)' in (snapshot / "README.md").read_text()

    again = cqtool("export", calibration, "--out", out, "--push-to-hub", "--repo-id", "org/tiny",
                   **hub.environment(), **home)  # fmt: skip
    assert again.returncode == 0 and "Unchanged on the Hub" in again.stdout
    assert len(hub.repos["org/tiny"].commits) == 2


def test_the_repository_is_named_after_model_and_format(
    hub: HubServer, calibration: Path, tmp_path: Path
) -> None:
    done = cqtool("export", calibration, "--out", tmp_path / "a", "--push-to-hub", "--private",
                  **hub.environment(), HF_HOME=str(tmp_path / "home"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hub.repos["tester/Tiny-Model-k-cq-4c3b-v-cq-8c4b"].private


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "error: There is no Hub token. Log in with `hf auth login`"),
        ({"HF_TOKEN": "hf_secret"}, "error: Cannot reach the Hub at http://127.0.0.1:9 "),
    ],
)
def test_a_push_that_cannot_work_ends_in_one_sentence(
    calibration: Path, tmp_path: Path, variables: dict[str, str], says: str
) -> None:
    done = cqtool("export", calibration, "--out", tmp_path / "a", "--push-to-hub",
                  "--repo-id", "org/tiny", HF_ENDPOINT="http://127.0.0.1:9",
                  HF_HOME=str(tmp_path / "home"), **variables)  # fmt: skip
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr and "hf_secret" not in done.stdout + done.stderr


def test_wrong_usage_ends_with_2(calibration: Path, tmp_path: Path) -> None:
    for arguments in (
        ["export", tmp_path / "nowhere", "--out", tmp_path / "a"],
        ["export", calibration, "--out", calibration],
        ["export", calibration, "--out", tmp_path / "a", "--repo-id", "a/b/c"],
        ["export", calibration, "--out", tmp_path / "a", "--private"],
        ["export", calibration, "--out", tmp_path / "a", "--arch", "sm_80", "--no-kernels"],
        ["inspect", tmp_path],
    ):
        done = cqtool(*arguments)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr and done.stdout == ""
    assert not (tmp_path / "a").exists()


def test_an_unmeasured_artifact_is_announced(tmp_path: Path) -> None:
    folder = write_calibration(tmp_path / "calibration", with_quality=False)
    done = cqtool("export", folder, "--out", tmp_path / "a", "--quiet")
    assert (done.returncode, done.stdout) == (0, "")
    assert "has not been measured" in done.stderr


def test_inspect_describes_and_verifies(calibration: Path, artifact: Path) -> None:
    done = cqtool("inspect", artifact, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["kind"], found["verified"], found["problem"]) == ("artifact", True, None)
    assert found["format"] == "k-cq-4c3b-v-cq-8c4b"
    assert found["geometry"]["shapes"] == [
        {"layers": 2, "kv_heads": 2, "key_dim": 16, "value_dim": 16, "sliding_window": None}
    ]
    size = (artifact / "codebooks.safetensors").stat().st_size
    assert found["bytes"]["codebooks.safetensors"] == size
    assert found["quality"]["kl"] == 0.0871

    human = cqtool("inspect", calibration).stdout
    assert "0.625 bits per channel" in human
    assert "perplexity 23.891 ± 0.829" in human
    assert "none to verify" in human

    (artifact / "calibration.json").write_text("{}")
    damaged = cqtool("inspect", artifact)
    assert damaged.returncode == 2
    assert "DAMAGED" in damaged.stdout
    assert "error:" in damaged.stderr and "calibration.json" in damaged.stderr


def test_the_runtime_goes_into_the_artifact_unless_told_otherwise(
    calibration: Path, tmp_path: Path
) -> None:
    """The synthetic format has no kernels, which is said, so nothing is compiled here."""
    done = cqtool("export", calibration, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "No CUDA kernels were compiled: 3-bit codes of 4 channels have no kernel" in done.stderr
    assert (tmp_path / "a" / "build" / "torch-cuda" / "__init__.py").is_file()
    shown = cqtool("inspect", tmp_path / "a").stdout
    assert "included, without compiled kernels" in shown and "all verified" in shown

    bare = cqtool("export", calibration, "--out", tmp_path / "a", "--no-kernels", "--json")
    assert json.loads(bare.stdout)["kernels"] is None
    assert not (tmp_path / "a" / "build").exists()
    assert json.loads(cqtool("inspect", tmp_path / "a", "--json").stdout)["kernels"] is None


def test_an_unknown_architecture_is_named(calibration: Path, tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC")
    done = cqtool("export", calibration, "--out", tmp_path / "a", "--arch", "sm_90,sm_12")
    assert done.returncode == 2
    assert "error: There are no kernels for 'sm_12'; give some of sm_80, " in done.stderr
    assert not (tmp_path / "a").exists()


def test_inspect_and_the_card_say_how_channels_are_grouped(calibration: Path) -> None:
    human = cqtool("inspect", calibration).stdout
    assert "keys of 4 neighbouring channels, values of 8 neighbouring channels" in human
    edit_json(calibration / "cq_config.json", lambda c: c["cache"]["key"].update(grouping="pairs"))
    order = torch.arange(16, dtype=torch.int16).flip(0).repeat(2, 1)
    path = calibration / "codebooks.safetensors"
    save_file(load_file(path) | {f"layers.{i}.key.channels": order.clone() for i in (0, 1)}, path)
    done = cqtool("inspect", calibration, "--json")
    assert done.returncode == 0, done.stderr
    groupings = {kind: json.loads(done.stdout)["cache"][kind]["grouping"] for kind in KINDS}
    assert groupings == {"key": "pairs", "value": "contiguous"}
    human = cqtool("inspect", calibration).stdout
    assert "keys of 4 channels in correlated RoPE pairs, values of 8 neighbouring" in human
    export(calibration, calibration.parent / "grouped")
    card = (calibration.parent / "grouped" / "README.md").read_text()
    keys, values = (line for line in card.splitlines() if line.startswith(("- **K", "- **V")))
    assert "each group of 4 channels in correlated RoPE pairs of a head" in keys
    assert "each group of 8 neighbouring channels of a head" in values
