"""The embedded demo text: real Wikipedia articles that ride along in the package gensim.

gensim's test data holds the first pages of an English Wikipedia dump (CC BY-SA). Its own filter
removes templates, tables and links; what it leaves behind (headings, list marks, captions, rows of
table cells, reference lists) is cleaned here so that running prose remains.
"""

from __future__ import annotations

import bz2
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from cqtool.errors import DataError

TRAIN_ARTICLES = 70
"""Articles of the split ``train``; the rest is ``test``, so that no article is in both."""

_DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_SHORTEST_RAW = 2000  # characters after gensim's filter; drops redirects and disambiguation stubs
_SHORTEST_PROSE = 500
_SHORTEST_LINE = 40
_BACK_MATTER = re.compile(
    r"(see also|references?|notes?|footnotes?|citations?|external links?|further reading|"
    r"bibliography|sources?|works cited|gallery|filmography|discography|"
    r"notes and references|references and notes|explanatory notes|publications|works)",
    re.IGNORECASE,
)
_HEADING = re.compile(r"^(={2,6})\s*(.+?)\s*=+\s*$")
_MARKUP_LEFT = re.compile(r"File:|Image:|https?://|\||alt=|\bthumb$|__|[{}<>]|\bISBN\b")


def demo_articles(split: str) -> Iterator[str]:
    """Yield the articles of a split of the demo text, each as plain paragraphs.

    Args:
        split: ``train`` (the first 70 articles) or ``test`` (all later ones).

    Raises:
        DataError: the split is unknown, or gensim is not installed.
    """
    if split not in ("train", "test"):
        raise DataError(f"The demo text has no split '{split}'; use train or test.")
    pages = _articles()
    for index, article in enumerate(pages):
        if split == "train" and index >= TRAIN_ARTICLES:
            return
        if (index < TRAIN_ARTICLES) == (split == "train"):
            yield article


def _dump_path() -> Path:
    spec = importlib.util.find_spec("gensim")
    path = Path(next(iter(spec.submodule_search_locations or []), "")) / _DUMP if spec else None
    if path is None or not path.is_file():
        raise DataError(
            "The demo text comes with the package gensim, which is not installed here; "
            "run: pip install 'cqtool[demo]'."
        )
    return path


def _articles() -> Iterator[str]:
    path = _dump_path()
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    with bz2.open(path, "rb") as dump:
        for title, raw, _ in extract_pages(dump, ("0",)):
            text = filter_wiki(raw)
            if len(text) < _SHORTEST_RAW or title.startswith("Wikipedia:"):
                continue
            prose = clean_article(text)
            if len(prose) >= _SHORTEST_PROSE:
                yield f"{title}\n\n{prose}"


def clean_article(text: str) -> str:
    """Keep the prose of an article that went through gensim's ``filter_wiki``.

    Sections that only list sources go, and so do lines that are no sentence (captions, table
    cells) or still carry markup; headings stay as lines of their own where prose follows.
    """
    blocks: list[str] = []
    skip_level = 0
    headings: list[str] = []
    for line in text.split("\n"):
        heading = _HEADING.match(line.strip())
        if heading:
            level = len(heading[1])
            if skip_level and level > skip_level:
                continue
            skip_level = level if _BACK_MATTER.fullmatch(heading[2].strip("' ")) else 0
            headings = [*headings[: level - 2], _clean_line(heading[2])]
            continue
        if skip_level:
            continue
        sentence = _clean_line(line)
        if not _is_prose(sentence):
            continue
        blocks.extend(headings)
        headings = []
        blocks.append(sentence)
    return "\n\n".join(blocks)


def _clean_line(line: str) -> str:
    line = line.lstrip("*#:; \t").replace("\u00a0", " ")
    line = re.sub(r"'{2,}", "", line)  # bold and italics
    line = re.sub(r"\(\s*[;,:]*\s*\)", "", line)  # what an emptied template leaves: "()", "(; )"
    line = re.sub(r"\(\s*[;,:\s]+", "(", line)
    line = re.sub(r"\s+([,.;)])", r"\1", line)
    return re.sub(r"[ \t]{2,}", " ", line).strip()


def _is_prose(line: str) -> bool:
    if len(line) < _SHORTEST_LINE or _MARKUP_LEFT.search(line):
        return False
    return line.rstrip("\"')”").endswith((".", "!", "?", ":"))
