"""The ready workflow files: valid, and what they run is what cqtool understands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from typer.main import get_command
from yamllint import linter
from yamllint.config import YamlLintConfig

from cqtool.cli.app import app

CI = Path(__file__).parents[2] / "docs" / "ci"
GITHUB, GITLAB = CI / "github-release.yml", CI / "gitlab-ci.yml"
SCHEMAS = {GITHUB: "vendor.github-workflows", GITLAB: "vendor.gitlab-ci"}
STYLE = """
extends: default
rules: {line-length: {max: 100}, comments: {min-spaces-from-content: 1}}
"""


def validate(path: Path, schema: str) -> subprocess.CompletedProcess[str]:
    """Against the schema of SchemaStore, as check-jsonschema carries it."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_the_files_keep_to_the_published_schemas_and_to_yamllint(path, tmp_path):
    done = validate(path, SCHEMAS[path])
    assert done.returncode == 0, done.stdout
    assert list(linter.run(path.read_text(), YamlLintConfig(STYLE))) == []
    wrong = tmp_path / path.name
    wrong.write_text(
        path.read_text()
        .replace("    timeout", "    time-out", 1)
        .replace("  id_tokens:", "  id_tokens: 3\n  other:", 1)
    )
    assert validate(wrong, SCHEMAS[path]).returncode != 0


def tool(name: str, *options: str, text: str) -> subprocess.CompletedProcess[str]:
    """A linter that came with a wheel; actionlint finds shellcheck beside itself for `run`."""
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        [folder / name, *options, "-"],
        input=text,
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )


def test_actionlint_finds_nothing_and_would():
    text = GITHUB.read_text()
    done = tool("actionlint", "-no-color", text=text)
    assert done.returncode == 0, done.stdout
    for right, wrong, said in (
        ("github.ref", "github.reff", "reff"),
        ('if [ -n "$TAG" ]', "if [ -n $TAG ]", "shellcheck"),
    ):
        assert right in text
        done = tool("actionlint", "-no-color", text=text.replace(right, wrong, 1))
        assert done.returncode == 1 and said in done.stdout


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing_and_would(path):
    done = tool("shellcheck", "-s", "bash", text=script(path))
    assert done.returncode == 0, done.stdout
    done = tool("shellcheck", "-s", "bash", text=script(path).replace('"$MODEL"', "$MODEL"))
    assert done.returncode == 1 and "SC2086" in done.stdout


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_what_they_install_is_cqtool_at_a_commit(path, tmp_path):
    content = yaml.safe_load(path.read_text())
    if path == GITLAB:
        (command,) = content["release-cache"]["before_script"]
    else:
        (command,) = (
            step["run"]
            for step in content["jobs"]["release"]["steps"]
            if step.get("name") == "Install"
        )
    stub = tmp_path / "pip"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables(path)}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, check=True
    )
    verb, wanted = done.stdout.splitlines()
    requirement, url = Requirement(wanted), str(Requirement(wanted).url)
    assert (verb, requirement.name, requirement.extras) == ("install", "cqtool", {"cpu", "kernels"})
    assert url.startswith("git+https://") and url.endswith("@COMMIT")
    project = tomllib.loads((CI.parents[1] / "pyproject.toml").read_text())["project"]
    assert requirement.extras <= project["optional-dependencies"].keys()


def script(path: Path) -> str:
    content = yaml.safe_load(path.read_text())
    if path == GITLAB:
        return "\n".join(content["release-cache"]["script"])
    (text,) = (s["run"] for s in content["jobs"]["release"]["steps"] if s.get("name") == "Release")
    return text


def variables(path: Path) -> dict[str, str]:
    content = yaml.safe_load(path.read_text())
    found = content["release-cache"]["variables"] if path == GITLAB else content["env"]
    return {name: str(value) for name, value in found.items() if "$" not in str(value)}


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("code", [0, 3])
def test_they_call_cqtool_as_it_wants_to_be_called(path, dry, code, tmp_path):
    stub = tmp_path / "bin" / "cqtool"
    stub.parent.mkdir()
    stub.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" > asked\necho "$HF_OIDC_RESOURCE" > resource\n'
        f"exit {code}\n"
    )
    stub.chmod(0o755)
    given = {"DRY_RUN": "true" if dry else "false", "TAG": "v1.0", "CI_COMMIT_TAG": "v1.0"}
    environment = {"PATH": f"{stub.parent}:{os.environ['PATH']}", **variables(path), **given}
    done = subprocess.run(["bash", "-e", "-c", script(path)], cwd=tmp_path, env=environment)
    assert done.returncode == code  # a missed gate fails the job
    name, *words = (tmp_path / "asked").read_text().splitlines()
    context: Any = get_command(app)
    asked = context.commands[name].make_context(name, words).params
    assert (asked["model"], asked["repo_id"]) == ("Qwen/Qwen3-0.6B", "ORG/NAME")
    assert (asked["dry_run"], asked["tag"], asked["json"]) == (dry, "v1.0", True)
    if path == GITLAB:
        resource = (tmp_path / "resource").read_text().strip()
        assert resource == ("" if dry else "ORG/NAME")


def cached(path: Path) -> list[str]:
    """The paths of the release folder that a workflow keeps between jobs."""
    content = yaml.safe_load(path.read_text())
    if path == GITLAB:
        return content["release-cache"]["cache"][1]["paths"]
    lists = [
        step["with"]["path"].split()
        for step in content["jobs"]["release"]["steps"]
        if step.get("uses", "").startswith("actions/cache/")
    ]
    # Another list would be another cache.
    assert len(lists) == 2 and lists[0] == lists[1]
    return lists[0]


@pytest.fixture(scope="module")
def finished(cqtool: Any, tiny_model_dir: Path, tuned_recipe: Path, tmp_path_factory: Any) -> Any:
    folder = tmp_path_factory.mktemp("job")
    command = ["release", tiny_model_dir, tuned_recipe, "--repo-id", "org/ci", "--no-kernels"]
    run = cqtool(*command, folder=folder)
    assert run.code == 0, run.stderr
    return folder, command


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_what_they_cache_spares_the_next_job_all_work(path, finished, cqtool, tmp_path):
    folder, command = finished
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        kept = any(
            name.startswith(f"{one}/") or (fnmatch(name, one) and name.count("/") == one.count("/"))
            for one in cached(path)
        )
        if file.is_file() and kept:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / name)
    assert not (tmp_path / "release/calibration/samples").exists()
    run = cqtool(*command, "--json", folder=tmp_path)
    assert set(run.statuses.values()) == {"same", "done"} and not run.json["changed"]


def test_the_page_of_a_github_job_gets_the_summary(finished, cqtool, monkeypatch, tmp_path):
    from typer.testing import CliRunner

    page = tmp_path / "page"
    page.write_text("# What other steps said\n")
    result = CliRunner().invoke(
        app,
        ["release", "nothing", "demo", "--out", str(tmp_path / "out"), "--dry-run"],
        env={"GITHUB_STEP_SUMMARY": str(page)},
    )
    assert result.exit_code == 2
    text = page.read_text()
    assert text.startswith("# What other steps said\n## KV cache release: demo")
    assert "**Not released.**" in text


def test_a_page_that_cannot_be_written_does_not_hide_what_failed(tmp_path):
    from typer.testing import CliRunner

    result = CliRunner().invoke(
        app,
        ["release", "nothing", "demo", "--out", str(tmp_path / "out"), "--dry-run", "--json"],
        env={"GITHUB_STEP_SUMMARY": str(tmp_path / "missing" / "page")},
    )
    assert result.exit_code == 2 and json.loads(result.stdout)["error"] in result.stderr
    assert "page was not written (No such file or directory)" in result.stderr


def test_the_documentation_links_them_and_names_every_field(finished, cqtool):
    docs = (CI.parent / "ci.md").read_text()
    for path in SCHEMAS:
        assert f"](ci/{path.name})" in docs
    folder, command = finished
    result = cqtool(*command, "--json", folder=folder).json
    for name in (*result, *result["steps"][0]):
        assert f"`{name}`" in docs, name
