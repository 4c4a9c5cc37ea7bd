"""Draws the model card of an artifact as an image, roughly as the Hub shows it.

    python docs/render_card.py ARTIFACT              draw docs/images/model-card.png
    python docs/render_card.py ARTIFACT IMAGE.png    draw another image

The image in the documentation is the card of `make demo` (demo/artifact), whose figures are those
of docs/results/demo. Beside cqtool's own dependencies, of which matplotlib brings Pillow and rich
brings markdown-it-py, it needs Chromium on the PATH.
"""

from __future__ import annotations

import html
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parent.parent
IMAGE = ROOT / "docs" / "images" / "model-card.png"
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


def page(artifact: Path) -> str:
    """The card of `artifact` as an HTML page, its metadata as chips above the text."""
    card = ModelCard.load(artifact / "README.md")
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
    return (
        f'<!doctype html><meta charset="utf-8"><base href="{artifact.resolve().as_uri()}/">'
        f"<style>{STYLE}</style><div>{''.join(chips)}</div>{body}"
    )


def photograph(page: str, image: Path) -> None:
    """Write `page` to `image` as a browser shows it, cut off below its last line.

    Raises:
        SystemExit: there is no Chromium, or the page is longer than it is asked to show.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"No {', '.join(BROWSERS)} is on the PATH: install Chromium.")
    with tempfile.TemporaryDirectory() as folder:
        source, shot = Path(folder, "card.html"), Path(folder, "card.png")
        source.write_text(page, encoding="utf-8")
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
    palette.save(image, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    photograph(page(Path(sys.argv[1])), Path(sys.argv[2]) if len(sys.argv) == 3 else IMAGE)
