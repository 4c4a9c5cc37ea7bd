"""Draws the model card of an artifact as an image, roughly as the Hub shows it.

    python docs/render_card.py                       draw docs/images/model-card.png
    python docs/render_card.py ARTIFACT IMAGE.png    draw another card

The image in the documentation is the card of `make demo`, made anew of the figures in
docs/results/demo: the configuration (cq_config.json) and reports of demo/calibration. speed.json is
what this left there on two cores:

    cqtool bench smollm2-135m demo/calibration --part end-to-end --batch 1,4 --prompt-tokens 512 \\
        --new-tokens 64 --device cpu --keep

The image holds the SHA-256 of the page that it shows, so that a test finds an old one. Beside
cqtool's own dependencies, of which matplotlib brings Pillow and rich brings markdown-it-py, drawing
needs Chromium on the PATH.
"""

from __future__ import annotations

import hashlib
import html
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from cqtool.artifact.card import render_card
from cqtool.artifact.card_content import CardContent
from cqtool.artifact.measured import read_quality
from cqtool.artifact.runtime_kernels import CompiledKernels, artifact_variants
from cqtool.artifact.speed import read_speed
from cqtool.files import sha256_file
from cqtool.kernels.variants import ARCHITECTURES
from cqtool.layout.config import read_config
from cqtool.report.pareto import plot_pareto

ROOT = Path(__file__).resolve().parent.parent
IMAGE = ROOT / "docs" / "images" / "model-card.png"
RESULTS = ROOT / "docs" / "results" / "demo"
REPO = "org/SmolLM2-135M-Instruct-cq-8c8b"
REPORTS = (
    *("correlation.png", "entropy.json", "entropy.png", "quality-pareto.png"),
    *("quality-window0-sinks0-pareto.png", "quality-window0-sinks0.json"),
    *("quality-window0-sinks0.png", "quality.json", "quality.png", "report.html", "speed.json"),
)
"""What lies in demo/artifact/reports; a card links to it."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, TALLEST, MARGIN = 900, 12_000, 32
COLORS = 256
"""Of the image's palette: enough for text and plots, and a small file."""

STYLE = f"""
body {{ margin: 0; padding: {MARGIN}px; background: #fff; color: #1f2328;
  width: {WIDTH - 2 * MARGIN}px; font: 15px/1.55 "Liberation Sans", "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 27px; line-height: 1.25; margin: 18px 0 14px; }}
h2 {{ font-size: 20px; margin: 26px 0 12px; padding-bottom: 5px;
  border-bottom: 1px solid #d8dee4; }}
p, ul, pre, table {{ margin: 0 0 14px; }}
ul {{ padding-left: 24px; }}
a {{ color: #0969da; text-decoration: none; }}
code {{ font: 12.5px/1.45 "Liberation Mono", "DejaVu Sans Mono", monospace; background: #eff1f3;
  padding: 2px 4px; border-radius: 4px; overflow-wrap: anywhere; }}
pre {{ background: #f6f8fa; padding: 12px 14px; border-radius: 6px; overflow: hidden; }}
pre code {{ display: block; background: none; padding: 0; white-space: pre; }}
table {{ border-collapse: collapse; font-size: 13.5px; }}
th, td {{ border: 1px solid #d0d7de; padding: 5px 11px; }}
tr:nth-child(even) td {{ background: #f6f8fa; }}
img {{ max-width: 100%; }}
.chip {{ display: inline-block; border: 1px solid #d0d7de; border-radius: 9px; padding: 1px 9px;
  margin: 0 6px 6px 0; font-size: 12.5px; }}
.chip b {{ color: #656d76; font-weight: normal; }}
"""


def demo_card(folder: Path) -> str:
    """The card of `make demo`; its configuration and reports are left in `folder`.

    Only the codebooks, too large for this repository, are made up: a card tells their bytes alone.
    """
    (folder / "reports").mkdir()
    shutil.copy(RESULTS / "cq_config.json", folder)
    shutil.copy(RESULTS / "quality.json", folder / "reports")
    config = read_config(folder)
    codebooks = folder / "codebooks.safetensors"
    empty = {
        name: torch.zeros(shape, dtype=torch.float16)
        for name, shape in config.codebook_shapes.items()
    }
    save_file(empty, codebooks)
    speed = json.loads((RESULTS / "speed.json").read_text(encoding="utf-8"))
    speed["codebooks_sha256"] = sha256_file(codebooks)
    (folder / "reports" / "speed.json").write_text(json.dumps(speed), encoding="utf-8")
    cubins = sum(len(artifact_variants(config, one)) for one in ARCHITECTURES)
    return render_card(
        CardContent(
            config,
            read_quality(folder),
            codebooks.stat().st_size,
            tuple(f"reports/{name}" for name in REPORTS),
            REPO,
            CompiledKernels({}, ARCHITECTURES, cubins),
            read_speed(folder),
        )
    )


def page(text: str) -> str:
    """The body of an HTML page that shows a card, its metadata as chips above the text."""
    card = ModelCard(text)
    metadata = card.data.to_dict()
    named = ("library_name", "license", "base_model", "datasets")
    chips = [
        f'<span class="chip"><b>{name.removesuffix("_name").replace("_", " ")}</b> '
        f"{html.escape(str(one))}</span>"
        for name in named
        if name in metadata
        for one in (metadata[name] if isinstance(metadata[name], list) else [metadata[name]])
    ]
    chips += [f'<span class="chip">{html.escape(tag)}</span>' for tag in metadata["tags"]]
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(card.text)
    return f"<style>{STYLE}</style><div>{''.join(chips)}</div>{body}"


def digest(page: str) -> str:
    """What an image of `page` holds as its text ``page``."""
    return hashlib.sha256(page.encode()).hexdigest()


def photograph(page: str, image: Path, base: Path) -> None:
    """Write `page`, whose links are relative to the folder `base`, to `image` as a browser shows
    it, cut off below its last line.

    Raises:
        SystemExit: there is no Chromium, or the page is longer than it is asked to show.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"No {', '.join(BROWSERS)} is on the PATH: install Chromium.")
    with tempfile.TemporaryDirectory() as folder:
        source, shot = Path(folder, "card.html"), Path(folder, "card.png")
        head = f'<!doctype html><meta charset="utf-8"><base href="{base.resolve().as_uri()}/">'
        source.write_text(head + page, encoding="utf-8")
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{TALLEST}",
             f"--screenshot={shot}", source.as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        picture = Image.open(shot).convert("RGB")
    drawn = ImageChops.invert(picture).getbbox()
    if drawn is None or drawn[3] == picture.height:
        sys.exit(f"The card is empty or longer than {TALLEST} pixels: change TALLEST.")
    picture = picture.crop((0, 0, WIDTH, drawn[3] + MARGIN))
    # By coverage: few pixels have the colors of a plot, and the median would mix them to grey.
    palette = picture.quantize(COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    said = PngInfo()
    said.add_text("page", digest(page))
    palette.save(image, optimize=True, pnginfo=said)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        artifact = Path(sys.argv[1])
        text = (artifact / "README.md").read_text(encoding="utf-8")
        photograph(page(text), Path(sys.argv[2]), artifact)
    elif len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            text = demo_card(folder)
            report = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))
            plot_pareto(report, folder / "reports" / "quality-pareto.png")
            photograph(page(text), IMAGE, folder)
    else:
        sys.exit(__doc__)
