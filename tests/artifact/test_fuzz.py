"""Damaged and hostile artifacts end in one sentence, or change nothing that a digest covers.

Everything is seeded. A case fails when a reader raises anything but an error of cqtool's own, takes
what it should refuse, or runs code that lies in the artifact.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import (
    HOSTILE_PATHS,
    damaged,
    hostile_json,
    hostile_object,
    hostile_tensors,
    hostile_value,
    joined,
    split,
)
from safetensors.numpy import load
from safetensors.torch import save
from synthetic_artifact import KEY, config, quality, write_calibration

from cqtool.artifact import provenance as provenance_module
from cqtool.artifact.card import render_card
from cqtool.artifact.card_content import CardContent
from cqtool.artifact.describe import describe
from cqtool.artifact.export import export
from cqtool.artifact.measured import read_quality
from cqtool.artifact.provenance import provenance
from cqtool.errors import ArtifactError, CqtoolError
from cqtool.layout.codebook_file import check_codebooks, read_channels
from cqtool.layout.config import read_config
from cqtool.manifest import parse_manifest, read_manifest, verify_folder, write_manifest

CASES = {
    "damaged files": 2600,
    "codebooks": 3200,
    "configurations": 2400,
    "reports": 1200,
    "manifests": 1600,
    "runtimes and records": 700,
    "links and names": 120,
}
INDEX = "build/torch-cuda/index.json"


MEMORY = Path("/dev/shm")


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has one: a disk waits at every file that is replaced."""
    with tempfile.TemporaryDirectory(
        dir=MEMORY if os.access(MEMORY, os.W_OK) else tmp_path
    ) as name:
        yield Path(name)


@pytest.fixture
def folder(scratch: Path) -> Path:
    """An artifact with a runtime, whose modules leave a mark when they are run."""
    root = scratch / "exported"
    calibration = write_calibration(root / "calibration")
    artifact = export(calibration, root / "artifact").folder
    runtime = artifact / "build" / "torch-cuda"
    runtime.mkdir(parents=True)
    bomb = f"open({str(root / 'ran')!r}, 'w')\n"
    for name in ("__init__.py", "cache.py", "sitecustomize.py"):
        (runtime / name).write_text(bomb)
    (artifact / "custom_generate").mkdir()
    (artifact / "custom_generate" / "generate.py").write_text(bomb)
    entry = {"name": "decode-0", "arch": "sm_90", "source": "decode/decode.cu", "defines": {"C": 8}}
    entry |= {"source_digest": "00" * 32, "sha256": "00" * 32}
    index = {"format": 1, "compiler": "NVRTC 13.0", "cubins": [entry, entry | {"arch": "sm_80"}]}
    (runtime / "index.json").write_text(json.dumps(index))
    write_manifest(artifact, provenance(artifact))
    return artifact


@pytest.fixture(autouse=True)
def no_code_runs(scratch: Path) -> Iterator[None]:
    yield
    assert not list(scratch.rglob("ran"))


@contextmanager
def case(number: int, about: object) -> Iterator[None]:
    """Let errors of cqtool's own pass; say of all others which case they are of."""
    try:
        with suppress(CqtoolError):
            yield
    except Exception as error:
        raise AssertionError(f"case {number}, {about!r:.300}: {error!r:.300}") from error


@contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def bits(tensors: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(one.dtype), one.shape, one.tobytes()) for name, one in tensors.items()}


def rich_calibration(folder: Path) -> Path:
    """Codebooks with everything beside them that a format can have."""
    key = {"channels": 4, "bits": 2, "grouping": "pairs", "encoding": "ldlq", "gain": "token"}
    other = {"channels": 8, "bits": 1, "grouping": "file", "sharing": "heads"}
    own = {"first": 1, "last": 1, "key": other, "value": other}
    return write_drawn(folder, {"key": key, "value": other, "layers": [own]})


def by_head_calibration(folder: Path) -> Path:
    """The same, of a layer whose heads have codes of their own."""
    plain = {"channels": 4, "bits": 3}
    rich = {"channels": 8, "bits": 2, "grouping": "file", "encoding": "ldlq", "gain": "token"}
    other = {"channels": 2, "bits": 1, "grouping": "pairs", "encoding": "metric"}
    own = {"first": 0, "last": 0, "key": [rich, other], "value": [plain, rich]}
    return write_drawn(folder, {"key": plain, "value": plain, "layers": [own]})


def write_drawn(folder: Path, cache: dict[str, Any]) -> Path:
    """Codebooks, and what else a format asks for, drawn at random."""
    value = config()
    value["cache"] |= cache
    folder.mkdir()
    (folder / "cq_config.json").write_text(json.dumps(value))
    generator = torch.Generator().manual_seed(0)
    read = read_config(folder)
    tensors = {
        name: torch.randn(shape, generator=generator).half()
        for name, shape in read.codebook_shapes.items()
    }
    for name, (heads, dim) in read.channels_shapes.items():
        tensors[name] = torch.arange(dim).flip(0).repeat(heads, 1).short()
    for name, shape in read.extra_shapes.items():
        drawn = torch.randn(shape, generator=generator)
        if name.endswith("metric"):
            drawn = torch.eye(shape[-1]).expand(shape).contiguous()
        if name.endswith("gains"):
            drawn = torch.linspace(0.1, 3, 256).repeat(shape[0], 1)
        tensors[name] = drawn
    (folder / "codebooks.safetensors").write_bytes(save(tensors))
    check_codebooks(folder, read)
    return folder


def test_there_are_more_than_ten_thousand_cases(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{sum(CASES.values()):,} damaged or hostile artifacts: {CASES}")
    assert sum(CASES.values()) >= 10_000


def test_damaged_files_are_refused(folder: Path) -> None:
    rng = random.Random(0)
    records = read_manifest(folder)
    names = sorted(records)
    for number in range(CASES["damaged files"]):
        name = rng.choice(names)
        content = (folder / name).read_bytes()
        wrong = damaged(rng, content)
        if wrong == content:
            wrong += b"\0"
        with replaced(folder / name, wrong):
            with pytest.raises(ArtifactError):
                verify_folder(folder)
            if number % 4:
                continue
            with case(number, name):
                assert describe(folder)["problem"] is not None
    verify_folder(folder)


def test_hostile_codebooks_are_refused_or_read_as_they_are(scratch: Path) -> None:
    rng = random.Random(1)
    plain = write_calibration(scratch / "plain")
    folders = [
        plain,
        rich_calibration(scratch / "rich"),
        by_head_calibration(scratch / "by-head"),
    ]
    mark = scratch / "ran"
    refused = 0
    for number in range(CASES["codebooks"]):
        home = folders[number % 3]
        path = home / "codebooks.safetensors"
        content = path.read_bytes()
        wrong = hostile_tensors(rng, content)
        if number % 400 == 0:
            wrong = pickle.dumps(Bomb(str(mark)))
        with replaced(path, wrong):
            read = read_config(home)
            try:
                channels = read_channels(home, read)
            except ArtifactError:
                refused += 1
                continue
        shapes = {**read.codebook_shapes, **read.channels_shapes, **read.extra_shapes}
        header, data = split(wrong)
        assert {name: tuple(header[name]["shape"]) for name in shapes} == shapes
        if any(entry.get("dtype") == "BF16" for entry in header.values()):
            continue  # numpy has no such type
        tensors = load(wrong)
        assert {name: one.shape for name, one in tensors.items()} == shapes
        assert all(np.isfinite(one).all() for one in tensors.values())
        assert {name: tensors[name].tolist() for name in channels} == {
            name: [list(row) for row in rows] for name, rows in channels.items()
        }
        if data == split(content)[1]:
            # The numbers are the stored ones; only a digest could tell whose they are.
            own = bits(load(content))
            assert sorted(one[2] for one in bits(tensors).values()) == sorted(
                one[2] for one in own.values()
            )
    assert refused > 0.6 * CASES["codebooks"]


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def test_hostile_configurations_are_refused_or_usable(scratch: Path) -> None:
    rng = random.Random(2)
    homes = [
        write_calibration(scratch / "plain"),
        rich_calibration(scratch / "rich"),
        by_head_calibration(scratch / "by-head"),
    ]
    taken = 0
    for number in range(CASES["configurations"]):
        home = homes[number % 3]
        path = home / "cq_config.json"
        wrong = hostile_json(rng, json.loads(path.read_text()))
        with replaced(path, wrong), case(number, wrong):
            read = read_config(home)
            taken += 1
            found = describe(home)
            assert math.isfinite(found["bits_per_channel"])
            assert math.isfinite(found["code_bytes_per_token"])
            # Whatever is shown, printed or written down can be.
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
            render_card(CardContent(read, None, 1, (), None)).encode()
    assert 0.05 < taken / CASES["configurations"] < 0.7


def test_hostile_reports_are_refused_or_printable(scratch: Path) -> None:
    rng = random.Random(3)
    home = write_calibration(scratch / "plain")
    path = home / "reports" / "quality.json"
    value = quality()
    score = {"format": "int4", "task": "copy", "measure": "exact", "group": None, "items": 4}
    score |= {"score": 0.5, "score_se": None, "difference": 0.1, "difference_se": 0.1}
    value["generation"] = {"tasks": ["copy"], "items": 4, "seed": 0, "scores": [score]}
    value["tasks"] = value["generation"]
    pair = {"other": "int4", "measure": "kl", "pairs": 6, "difference": 0.1, "better": 2}
    value["paired"] = [pair | {"difference_se": 0.1}]
    read = read_config(home)
    taken = 0
    for number in range(CASES["reports"]):
        wrong = hostile_json(rng, value)
        path.write_bytes(wrong)
        with case(number, wrong):
            report = read_quality(home)
            taken += 1
            content = CardContent(read, report, 1, ("reports/quality.json",), None)
            render_card(content).encode()
            describe(home)
    assert 0.05 < taken / CASES["reports"] < 0.7


def test_hostile_manifests_are_refused_or_say_the_same(folder: Path) -> None:
    rng = random.Random(4)
    path = folder / "manifest.json"
    good = path.read_bytes()
    value, records = json.loads(good), read_manifest(folder)
    taken = 0
    for number in range(CASES["manifests"]):
        kind = number % 4
        if kind == 0:
            changed = json.loads(good)
            name = rng.choice(HOSTILE_PATHS)
            record = changed["files"].pop(rng.choice(sorted(records)), None)
            changed["files"][name] = record
            wrong = json.dumps(changed).encode("utf-8", "surrogatepass")
        elif kind == 1:
            wrong = damaged(rng, good)
        else:
            wrong = hostile_json(rng, value)
        with replaced(path, wrong), case(number, wrong):
            found = parse_manifest(wrong, "manifest.json")
            verify_folder(folder)
            assert found == records
            taken += 1
            described = describe(folder)
            assert described["verified"]
            json.dumps(described, ensure_ascii=False, allow_nan=False).encode()
    # Only what it says of the provenance may differ.
    assert 0 < taken < 0.4 * CASES["manifests"]


def test_what_a_hostile_author_lists_with_digests_is_refused_or_printable(
    folder: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two processes that git runs in, which know nothing of the artifact.
    monkeypatch.setattr(provenance_module, "cqtool_commit", lambda: None)
    rng = random.Random(5)
    home = scratch / "artifact"
    shutil.copytree(folder, home)
    names = [INDEX, "calibration.json", "reports/quality.json", "cq_config.json"]
    values = {name: json.loads((home / name).read_text()) for name in names}
    values["calibration.json"]["versions"] = {"torch": "2.13.0", "python": "3.11.9"}
    for number in range(CASES["runtimes and records"]):
        name = names[number % 4] if number % 3 else INDEX
        wrong = hostile_json(rng, values[name])
        if not number % 10:
            changed = hostile_object(rng, values[name])
            changed["versions"] = hostile_value(rng)
            wrong = json.dumps(changed).encode("utf-8", "surrogatepass")
        with replaced(home / name, wrong), case(number, wrong):
            write_manifest(home)
            verify_folder(home)
            json.dumps(describe(home), ensure_ascii=False, allow_nan=False).encode()
            write_manifest(home, provenance(home))
            verify_folder(home)


def test_hostile_links_and_names_are_refused(folder: Path, scratch: Path) -> None:
    rng = random.Random(6)
    names = sorted(read_manifest(folder))
    outside = scratch / "outside"
    outside.mkdir()

    def link_out(path: Path) -> None:
        shutil.copy(path, outside / "file")
        path.unlink()
        path.symlink_to(outside / "file")

    def link_relative(path: Path) -> None:
        shutil.copy(path, outside / "file")
        path.unlink()
        path.symlink_to(os.path.relpath(outside / "file", path.parent))

    def link_folder(path: Path) -> None:
        (path.parent / "linked").symlink_to(outside)

    def loop(path: Path) -> None:
        path.unlink()
        path.symlink_to(path.name)

    def device(path: Path) -> None:
        path.unlink()
        path.symlink_to("/dev/zero")

    def pipe(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    def directory(path: Path) -> None:
        path.unlink()
        path.mkdir()

    def other_case(path: Path) -> None:
        shutil.copy(path, path.with_name(path.name.swapcase()))

    def odd_name(path: Path) -> None:
        odd = rng.choice((b"\xff\xfe", b"a\\b", b"a\nb", b"con", b"x ", b"c:", b"a" * 255))
        (path.parent / os.fsdecode(odd)).write_bytes(b"")

    def hub_name(path: Path) -> None:
        shutil.copy(path, path.with_name(".gitattributes.json"))

    tricks = [link_out, link_relative, link_folder, loop, device, pipe, directory, other_case]
    tricks += [odd_name, hub_name]
    for number in range(CASES["links and names"]):
        home = scratch / "copy"
        shutil.copytree(folder, home)
        trick = tricks[number % len(tricks)]
        trick(home / rng.choice(names))
        with pytest.raises(ArtifactError):
            verify_folder(home)
        with case(number, trick.__name__):
            assert describe(home)["problem"]
        # Nor does a new manifest make a release of it, unless the name means the same everywhere.
        if trick not in (hub_name, directory, odd_name):
            with pytest.raises(ArtifactError):
                write_manifest(home)
        shutil.rmtree(home)


HUGE = """
import sys
from pathlib import Path
from cqtool.artifact.measured import read_quality
from cqtool.errors import ArtifactError
from cqtool.layout.codebook_file import check_codebooks
from cqtool.layout.config import read_config
from cqtool.manifest import verify_folder

def peak():
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) >> 10

def load(folder):
    check_codebooks(folder, read_config(folder))

before = peak()
for case in sorted(Path(sys.argv[1]).iterdir()):
    read = {"cq_config.json": load, "manifest.json": verify_folder}
    for name in (path.name for path in case.iterdir()):
        try:
            read.get(name, read_quality)(case)
        except ArtifactError:
            pass
print(peak() - before)
"""


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """16 MiB of the most wasteful JSON, and headers that claim to be huge."""
    size = 16 << 20
    good, layer = json.dumps(config()), json.dumps(config()["geometry"]["layers"][0])
    codes = json.dumps({"first": 0, "last": 0, "key": KEY, "value": KEY})
    heads = ",".join(['{"channels":4,"bits":3}'] * 1024)
    by_head = f'{{"first": 0, "last": 0, "key": [{heads}], "value": [{heads}]}}'
    layers = f"[{layer}, {layer}]"
    texts = {
        "arrays": '{"rows":[' + ",".join(["[]"] * (size // 3 - 10)) + "]}",
        "objects": good.replace(layers, f"[{','.join(['{}'] * (size // 3 - 1000))}]"),
        "keys": "{" + ",".join(f'"{n:x}":0' for n in range(size // 11)) + ',"0":0}',
        "digits": '{"a":' + "9" * (size - 10) + "}",
        "deep": '{"a":' * (size // 6),
        "layers": good.replace(layers, f"[{','.join([layer] * 90_000)}]"),
        "codes": good.replace(
            '"window": 5', f'"window": 5, "layers": [{",".join([codes] * 90_000)}]'
        ),
        "codes of heads": good.replace(
            '"window": 5', f'"window": 5, "layers": [{",".join([by_head] * 330)}]'
        ),
    }
    assert all(1 << 20 < len(text) <= size for text in texts.values())
    good_file = (write_calibration(tmp_path / "good") / "codebooks.safetensors").read_bytes()
    header, data = split(good_file)
    home = tmp_path / "cases"
    for name, text in texts.items():
        file = "reports/quality.json" if name == "arrays" else "cq_config.json"
        (home / name / file).parent.mkdir(parents=True)
        (home / name / file).write_text(text)
    for length in (1 << 30, 1 << 40, 2**64 - 1):
        case_home = write_calibration(home / f"header {length}")
        wrong = joined(json.dumps(header).encode(), data, length)
        (case_home / "codebooks.safetensors").write_bytes(wrong)
        with (case_home / "codebooks.safetensors").open("ab") as file:
            file.truncate(2 << 30)  # a hole, so that the claim could be true
    command = f"ulimit -v {2 << 20}; exec {sys.executable} -c '{HUGE}' '{home}'"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) < 800, f"{run.stdout} MiB"


def test_layers_are_few(tmp_path: Path) -> None:
    """What is worked out for each layer may not take hours in a hostile file."""
    home = write_calibration(tmp_path / "plain")
    value = config()
    value["geometry"]["layers"] = value["geometry"]["layers"][:1] * 5000
    (home / "cq_config.json").write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match="at most 4096"):
        read_config(home)
