"""The picture of a model card in the documentation, and the script that draws it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from synthetic_artifact import edit_json

from cqtool.artifact.export import export
from cqtool.artifact.speed import SPEED_NAME
from cqtool.files import sha256_file

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render_card", ROOT / "docs" / "render_card.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_guide_shows_a_picture_that_can_be_read_and_is_small(script: ModuleType) -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    assert f"]({script.IMAGE.relative_to(ROOT / 'docs').as_posix()})" in guide
    assert script.IMAGE.stat().st_size <= 300_000
    with Image.open(script.IMAGE) as picture:
        assert picture.width == script.WIDTH and picture.height > 2 * picture.width


def test_the_picture_is_of_the_card_that_the_code_makes_of_the_figures(
    script: ModuleType, tmp_path: Path
) -> None:
    card = script.demo_card(tmp_path)
    assert "\n## Measured quality\n" in card and "\n## Speed\n" in card
    with Image.open(script.IMAGE) as picture:
        assert picture.text["page"] == script.digest(script.page(card)), (
            "run: python docs/render_card.py, and look at the picture"
        )


def test_the_figures_are_of_the_same_codebooks(script: ModuleType) -> None:
    """The quality report names those that it measured, and their configuration."""
    quality = json.loads((script.RESULTS / "quality.json").read_text(encoding="utf-8"))
    speed = json.loads((script.RESULTS / SPEED_NAME).read_text(encoding="utf-8"))
    measured = quality["rows"][1]["origin"]
    assert speed["codebooks_sha256"] == measured["codebooks.safetensors"]
    assert sha256_file(script.RESULTS / "cq_config.json") == measured["cq_config.json"]


def test_the_page_is_the_card_s_text_and_its_metadata(
    script: ModuleType, calibration: Path, tmp_path: Path
) -> None:
    edit_json(calibration / "cq_config.json", lambda c: c["base_model"].update(license="<script>x"))
    artifact = export(calibration, tmp_path / "artifact").folder
    with (artifact / "README.md").open("a", encoding="utf-8") as card:
        card.write("\n<script>written by hand</script>\n")
    html = script.page((artifact / "README.md").read_text(encoding="utf-8"))
    assert "<strong>K 4c3b, V 8c4b</strong></td>" in html
    assert '<td style="text-align:right">0.0871\u00a0±\u00a00.0023</td>' in html
    assert "<b>datasets</b> Salesforce/wikitext" in html and "base_model:" not in html
    assert "&lt;script&gt;x" in html and "<script" not in html


def test_the_picture_ends_below_the_last_line(script: ModuleType, tmp_path: Path) -> None:
    if not any(map(shutil.which, script.BROWSERS)):
        pytest.skip("needs Chromium")
    # Found by the folder of the card, as its plots are.
    Image.new("RGB", (100, 300), "#d55e00").save(tmp_path / "square.png")
    image = tmp_path / "card.png"
    square = '<body style="margin: 0"><img src="square.png" style="display: block">'
    script.photograph(square, image, tmp_path)
    with Image.open(image) as picture:
        assert picture.size == (script.WIDTH, 300 + script.MARGIN)
        assert picture.text["page"] == script.digest(square)
        seen = picture.convert("RGB")
    assert seen.getpixel((50, 299)) == (0xD5, 0x5E, 0x00)
    assert seen.getpixel((50, 301)) == (255, 255, 255)
    with pytest.raises(SystemExit, match="change TALLEST"):
        script.photograph("", image, tmp_path)
