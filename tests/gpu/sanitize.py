"""A small case of every kernel, to be run under compute-sanitizer:

compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from decode_cases import Case, build  # noqa: E402

from cqtool.geometry import KeyRotation  # noqa: E402
from cqtool.kernels.encode.op import Encoder  # noqa: E402
from cqtool.kernels.layout import CodeFormat, plan_keys  # noqa: E402

DECODE = {
    "fused, one row": Case(tokens=150),
    "fused, four rows": Case(tokens=150, group=4),
    "fused, eight rows": Case(tokens=150, group=8),
    "a block's warps together": Case(batch=1, kv_heads=1, tokens=3000),
    "4 channels, paged": Case(tokens=150, key="4c8b", value="4c8b", paged=True, group=2),
    "2 channels": Case(tokens=100, key="2c8b", value="2c8b"),
    "10 bits: scores, then values": Case(tokens=100, key="8c10b", value="8c10b"),
    "10 bits, a part of few groups": Case(tokens=100, key="8c10b", value="8c10b", dim=80),
    "10 bits, scattered": Case(tokens=100, key="8c10b", value="8c10b", permute="all"),
    "6 bits": Case(tokens=100, key="8c6b", value="8c6b"),
    "6 bits, an odd block": Case(tokens=100, key="8c6b", value="8c6b", dim=80, group=4),
    "6 bits, scattered": Case(tokens=100, key="8c6b", value="8c6b", dim=192, permute="all"),
    "one warp, many tiles": Case(batch=64, kv_heads=4, tokens=1200, group=4),
    "scattered groups": Case(tokens=100, permute="all"),
    "everything": Case(
        tokens=100,
        window=9,
        sinks=4,
        padded=True,
        ragged=True,
        gain=True,
        masked=True,
        softcap=9.0,
        length=3,
        sliding=50,
    ),
}


def encode() -> None:
    """Keys and values, a prompt and single tokens, of 6, 8 and 10 bits."""
    for channels, bits in ((8, 8), (8, 10), (4, 8), (8, 6)):
        format = CodeFormat(128, channels, bits)
        book = torch.randn(2, format.groups, format.centroids, channels, device="cuda")
        for plan in (plan_keys(format, KeyRotation("half", 128)), format):
            encoder = Encoder(book, plan)
            storage = torch.zeros(3, 2, 4, format.tile_bytes, dtype=torch.uint8, device="cuda")
            column = torch.tensor([0, 5, 17], dtype=torch.int32, device="cuda")
            for tokens in (33, 1):
                x = torch.randn(3, 2, tokens, 128, device="cuda", dtype=torch.float16)
                encoder.encode(x, storage, column)


if __name__ == "__main__":
    for name, case in DECODE.items():
        answer, expected = build(case, "cuda")
        error = float((answer - expected).norm() / expected.norm())
        print(f"{name}: {error:.1e}")
        assert error < 2e-3, name
    encode()
    torch.cuda.synchronize()
    print("done")
