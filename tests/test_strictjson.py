"""JSON of others is read narrowly, and what is refused is refused in one sentence."""

from __future__ import annotations

import json
import time

import pytest

from cqtool.errors import ArtifactError
from cqtool.strictjson import MAX_DEPTH, parse_object


def nested(levels: int) -> bytes:
    return b'{"a":' * (levels - 1) + b"{}" + b"}" * (levels - 1)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": 1e999}', b'{"a": [-1e999]}', b'{"a": NaN}', b'{"a": -Infinity}',
        b'{"a": "\\ud800"}', b'{"\\uDFFF": 1}', b'{"a": ["\\udc00\\ud800"]}',
        b'{"a": 1, "\\u0061": 2}', b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}', b'\xef\xbb\xbf{}', b"{} {}", b"[]", b'"x"', b"",
        b"[" * 100_000, nested(MAX_DEPTH + 1),
        b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
    ],
    ids=lambda text: repr(text)[:24],
)  # fmt: skip
def test_what_is_refused(text: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"^x\.json .*Fetch it again\.$") as caught:
        parse_object(text, "x.json", "Fetch it again.")
    assert len(str(caught.value)) < 300


def test_what_is_read() -> None:
    value = {"a": [1, -0.0, 1e300, None, True, "ä \U0001f600 \\ud800"], "b": {"c": {}}, "": ""}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_object(text.encode(), "x", "") == value
    assert parse_object(nested(MAX_DEPTH), "x", "")


def test_a_million_keys_are_refused_at_once() -> None:
    """The one that stands twice is found in one pass."""
    text = "{" + ",".join(f'"{n}":0' for n in range(500_000)) + ',"499999":0}'
    start = time.perf_counter()
    with pytest.raises(ArtifactError, match="'499999' stands twice"):
        parse_object(text.encode(), "x", "")
    assert time.perf_counter() - start < 30
