"""Xet, the Hub's storage of large files: as much of it as the real `hf_xet` client needs.

A file is a sequence of chunks, which lie in xorbs; a shard says which. The formats are those of
https://huggingface.co/docs/xet, version 1 of each endpoint. Chunks must come uncompressed, as with
``HF_XET_XORB_COMPRESSION_POLICY=none``, and none is found to be there already.
"""

from __future__ import annotations

import hashlib
import re
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hub.http import Answer, HttpHandler, Refusal, as_json

if TYPE_CHECKING:
    from hub_server import HubServer

PREFIX = "/xet"
TOKENS = {"write": "xet-write-secret", "read": "xet-read-secret"}
_HASH = r"[0-9a-f]{64}"
_HEADER, _ENTRY = 48, struct.Struct("<32s4I")
_VERIFIED, _WITH_SHA256 = 1 << 31, 1 << 30


@dataclass(frozen=True)
class Term:
    """Chunks `first` to before `end` of a xorb, `size` bytes."""

    xorb: str
    size: int
    first: int
    end: int


class Storage:
    """What lies in Xet: xorbs and files by hash, and the hash of a file by its SHA-256."""

    def __init__(self) -> None:
        self.xorbs: dict[str, bytes] = {}
        self.files: dict[str, list[Term]] = {}
        self.hashes: dict[str, str] = {}

    def places(self, xorb: str) -> list[int]:
        """Where the chunks of a xorb begin, and where the last one ends."""
        data, places = self.xorbs[xorb], [0]
        while places[-1] < len(data):
            start = places[-1]
            packed, kind = int.from_bytes(data[start + 1 : start + 4], "little"), data[start + 4]
            if data[start] != 0 or kind != 0:
                raise Refusal(400, {"error": "an unknown version or a compressed chunk"})
            places.append(start + 8 + packed)
        return places

    def content(self, terms: list[Term]) -> bytes:
        parts = []
        for term in terms:
            places = self.places(term.xorb)
            for chunk in range(term.first, term.end):
                parts.append(self.xorbs[term.xorb][places[chunk] + 8 : places[chunk + 1]])
        return b"".join(parts)

    def add(self, shard: bytes) -> dict[str, bytes]:
        """The files of a shard, content by SHA-256."""
        found, at = {}, _HEADER
        while shard[at : at + 32] != b"\xff" * 32:
            name, flags, count, *_ = _ENTRY.unpack_from(shard, at)
            if not flags & _VERIFIED or not flags & _WITH_SHA256:
                raise Refusal(400, {"error": "a file without its digests"})
            terms = []
            for _ in range(count):
                at += _ENTRY.size
                xorb, _, size, first, end = _ENTRY.unpack_from(shard, at)
                terms.append(Term(as_hex(xorb), size, first, end))
            at += count * _ENTRY.size + _ENTRY.size
            sha256, content = as_hex(shard[at : at + 32]), self.content(terms)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise Refusal(400, {"error": "digest mismatch"})
            self.files[as_hex(name)], self.hashes[sha256] = terms, as_hex(name)
            found[sha256] = content
            at += _ENTRY.size
        return found


def as_hex(digest: bytes) -> str:
    """A hash as Xet writes it: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


class XetEndpoints(HttpHandler):
    """The Hub's part, which hands out tokens, and the storage itself below :data:`PREFIX`."""

    hub: HubServer
    xet_routes = (
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/xet-(?P<kind>write|read)-token/.+", "token"),
        ("POST", rf"{PREFIX}/v1/xorbs/default/(?P<name>{_HASH})", "put_xorb"),
        ("POST", rf"{PREFIX}/v1/shards", "put_shard"),
        ("GET", rf"{PREFIX}/v1/reconstructions/(?P<name>{_HASH})", "reconstruction"),
        ("GET", rf"{PREFIX}/v1/data/(?P<name>{_HASH})", "data"),
    )

    def token(self, repo: str, kind: str) -> Answer:
        if self.hub.cas_url is None:
            raise Refusal(404)
        getattr(self, "writer" if kind == "write" else "repo")(repo)
        token, end = TOKENS[kind], int(time.time()) + 3600
        return as_json(
            {"casUrl": self.hub.cas_url, "accessToken": token, "exp": end},
            **{
                "X-Xet-Cas-Url": self.hub.cas_url,
                "X-Xet-Access-Token": token,
                "X-Xet-Token-Expiration": str(end),
            },
        )

    def xet_headers(self, repo: str, commit: str, sha256: str) -> dict[str, str]:
        """How the Hub says of a file that it lies in Xet, nothing where it does not."""
        name = self.hub.xet.hashes.get(sha256)
        if self.hub.cas_url is None or name is None:
            return {}
        route = f"{self.hub.url}/api/models/{repo}/xet-read-token/{commit}"
        return {"X-Xet-Hash": name, "Link": f'<{route}>; rel="xet-auth"'}

    def check_token(self, kind: str) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKENS[kind]}":
            raise Refusal(401)

    def put_xorb(self, name: str) -> Answer:
        self.check_token("write")
        new = name not in self.hub.xet.xorbs
        self.hub.xet.xorbs[name] = self.body
        return as_json({"was_inserted": new})

    def put_shard(self) -> Answer:
        self.check_token("write")
        self.hub.objects |= self.hub.xet.add(self.body)
        return as_json({"result": 1})

    def reconstruction(self, name: str) -> Answer:
        self.check_token("read")
        terms = self.hub.xet.files.get(name)
        if terms is None:
            raise Refusal(404)
        size = sum(term.size for term in terms)
        first = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")
        if first is None or int(first[1]) not in (0, size):
            raise Refusal(400, {"error": "files of tests are fetched as a whole"})
        if int(first[1]) == size:
            raise Refusal(416)
        ranges: dict[str, list[dict[str, Any]]] = {}
        for term in terms:
            places = self.hub.xet.places(term.xorb)
            chunks = {"start": term.first, "end": term.end}
            part = {"start": places[term.first], "end": places[term.end] - 1}
            url = f"{self.hub.cas_url}/v1/data/{term.xorb}"
            ranges.setdefault(term.xorb, []).append(
                {"range": chunks, "url": url, "url_range": part}
            )
        described = [
            {
                "hash": term.xorb,
                "unpacked_length": term.size,
                "range": {"start": term.first, "end": term.end},
            }
            for term in terms
        ]
        return as_json({"offset_into_first_range": 0, "terms": described, "fetch_info": ranges})

    def data(self, name: str) -> Answer:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted is None:
            raise Refusal(403)
        return Answer(self.hub.xet.xorbs[name][int(wanted[1]) : int(wanted[2]) + 1], 206)
