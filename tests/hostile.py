"""Damaged and hostile files, drawn from a seeded generator."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

NUMBERS = (0, -1, 1, 3, 1.0, 0.5, -0.0, 1e300, 2**31, 2**53, 2**63, 10**40, 10**400, 10**4000)
TEXTS = (
    "", " ", "\0", "a\0b", "../../etc/passwd", "/etc/passwd", "C:\\x", "a\\..\\b", "\ud800",
    "x" * 70_000, "\x1b[2J", "a\nb", "'; rm -rf /", "__import__('os')", "{0}", "%s%n", "\u202eabc",
    "NaN", "<script>", "org/x --revision $(x)", "cq-8c8b", "pairs", "ldlq", "heads", "token", "I16",
)  # fmt: skip
OTHERS = (None, True, False, [], {}, [[]], [{}], {"": {}}, [None] * 1000, {"__proto__": 1})
HOSTILE_PATHS = (
    "..", ".", "", "/", "../x", "a/../../x", "/etc/passwd", "//x", "a//b", "a/", "./a", "a/.",
    "a\\b", "..\\x", "C:\\x", "C:x", "a\0", "a\nb", "\x7f", "nul", "CON", "aux.json", "x/COM1.bin",
    "Lpt9/x", "a.", "a ", "x./y", "README.MD", "Cq_Config.json", "MANIFEST.json", "manifest.json",
    ".git/hooks/post-checkout", ".gitattributes", ".cache/huggingface/x", "\ud800", "~", "~root/x",
    "file:///x", "a" * 5000, "a/" * 2000 + "b", "README.md/x", "reports",
)  # fmt: skip


def damaged(rng: random.Random, content: bytes) -> bytes:
    """`content` with a flipped bit, a piece cut out, doubled, zeroed or exchanged."""
    data = bytearray(content)
    kind = rng.randrange(8)
    if kind <= 2 or len(data) < 4:
        at = rng.randrange(max(1, len(data)))
        data[at : at + 1] = bytes([(data[at] if data else 0) ^ (1 << rng.randrange(8))])
        return bytes(data)
    first, last = sorted(rng.sample(range(len(data) + 1), 2))
    if kind == 3:
        return bytes(data[:first])
    if kind == 4:
        return bytes(data[:first] + data[last:])
    if kind == 5:
        return bytes(data[:last] + data[first:])
    if kind == 6:
        data[first:last] = bytes(last - first)
        return bytes(data)
    return bytes(data[:first] + rng.randbytes(last - first) + data[last:])


def hostile_value(rng: random.Random) -> Any:
    """A value that the field it is put into does not expect."""
    return rng.choice(rng.choice((NUMBERS, TEXTS, OTHERS)))


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything below a JSON value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    below = [place for key, inner in items for place in places(inner, (*at, key))]
    return [(*at, key) for key, _ in items] + below


def with_item(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy with another item at `place`; `...` takes it away."""
    changed = copy.deepcopy(value)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return changed


def hostile_object(rng: random.Random, value: Any) -> Any:
    """A JSON value in which a field is gone, is another, or has moved."""
    place = rng.choice(places(value))
    kind = rng.randrange(5)
    if kind == 0:
        return with_item(value, place, ...)
    if kind == 1:
        other = rng.choice(places(value))
        inner = value
        for key in other:
            inner = inner[key]
        return with_item(value, place, copy.deepcopy(inner))
    return with_item(value, place, hostile_value(rng))


def hostile_json(rng: random.Random, value: Any) -> bytes:
    """A file in which that value once stood."""
    kind = rng.randrange(10)
    if kind < 6:
        return json.dumps(hostile_object(rng, value)).encode("utf-8", "surrogatepass")
    text = json.dumps(value)
    if kind == 6:
        return damaged(rng, text.encode())
    # The text of some value is replaced by what no JSON library would write.
    place = rng.choice(places(value))
    text = json.dumps(with_item(value, place, "@@"))
    depth = rng.choice((60, 70, 500, 5000, 100_000))
    odd = rng.choice(
        (
            "NaN", "-Infinity", "1e999", "-1e999", "1" * 5000, "0x10", "01", "+1", ".5", "'x'",
            '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\x01"', '"\\x41"', "[1,]", "{1: 2}",
            '{"a": 1, "a": 2}', "[" * depth, "[" * depth + "]" * depth, '{"a":' * depth + "1",
            '{"a":' * depth + "1" + "}" * depth, "/* */ 1", "undefined", "\ufeff1", "1" * 4000,
        )
    )  # fmt: skip
    raw = text.replace('"@@"', odd, 1).encode()
    return raw if rng.randrange(8) else raw.replace(b'"', b"\xff", 1)


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file, whose header may claim another length than it has."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def hostile_tensors(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header, swapped tensors, other shapes, NaN, or damaged."""
    header, data = split(content)
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.sample(names, 2)
    kind = rng.randrange(11)
    if kind == 10:
        # NaN, minus infinity, and a channel that no head has.
        odds = {"F16": b"\x00\x7e", "F32": b"\x00\x00\x80\xff", "I16": b"\xff\x7f"}
        odd = odds[header[one]["dtype"]]
        first, last = header[one]["data_offsets"]
        at = first + rng.randrange((last - first) // len(odd)) * len(odd)
        return joined(json.dumps(header).encode(), data[:at] + odd + data[at + len(odd) :])
    if kind == 0:
        return joined(hostile_json(rng, header), data)
    if kind == 1:
        header[one], header[other] = header[other], header[one]
    elif kind == 2:
        field = rng.choice(("dtype", "shape", "data_offsets"))
        header[one][field] = header[other][field]
    elif kind == 3:
        header[one]["shape"] = rng.sample(header[one]["shape"], len(header[one]["shape"]))
    elif kind == 4:
        header[one]["data_offsets"] = [rng.choice((0, -2, 2**63, 10**30)), rng.randrange(len(data))]
    elif kind == 5:
        length = rng.choice((0, 1, 7, len(content), 1 << 20, 1 << 32, 1 << 40, 2**63, 2**64 - 1))
        return joined(json.dumps(header).encode(), data, length)
    elif kind == 6:
        header["__metadata__"] = rng.choice(({"a": "b"}, {"a": 1}, [], "x", {"a": "x" * 10_000}))
    elif kind == 7:
        header[one]["dtype"] = rng.choice(("F16", "BF16", "F32", "F64", "I8", "BOOL", "U4", "", 7))
    elif kind == 8:
        header[rng.choice(("layers.9.key.codebook", "", "../x", "layers.0.key.gains"))] = header[
            one
        ]
    else:
        return damaged(rng, content)
    return joined(json.dumps(header).encode(), data)
