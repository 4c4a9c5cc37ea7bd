"""Which compiled kernels an artifact can need, and compiling them for GPUs that are not here."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

from cqtool.geometry import KeyRotation, LayerGeometry
from cqtool.kernels import cubins
from cqtool.kernels.build import compile_variant, toolchain
from cqtool.kernels.decode.config import DecodeCase, Pairing, choose
from cqtool.kernels.encode.config import EncodeCase, encode_variant
from cqtool.kernels.variants import KERNELS, OLDEST, Variant, read_sources
from cqtool.layout.codebook_file import Channels
from cqtool.layout.config import CQConfig, channels_name, owner_name
from cqtool.progress import SILENT, Progress
from cqtool.spec import KINDS, CacheSpec, Kind

if TYPE_CHECKING:
    from cqtool.kernels.layout import KeyPlan

_Heads = tuple[tuple[int, ...], ...]
NO_CHANNELS: Channels = MappingProxyType({})
"""Those of an artifact whose groups are all contiguous."""

MAX_QUERY_TOKENS = 8
"""Speculative decoding asks about up to this many tokens at once; more is a prefill."""

DTYPES = ("float16", "bfloat16")
"""What models run in on a GPU. For float32 the kernels are compiled where they are used."""

_SOFT_CAPPED = frozenset({"gemma2"})
"""Model types whose attention caps its scores (attn_logit_softcapping in their configuration)."""

_ARCH = re.compile(r"sm_([0-9]+)")
_ENCODE_SHAPES = ((False, 4), (True, 1), (True, 4))
"""``flat`` and ``tiles`` of launch_shape: a prompt, a decode step of few rows, one of many."""


@dataclass(frozen=True)
class CompiledKernels:
    """What an artifact ships of kernels.

    Attributes:
        files: paths in the runtime's folder, with ``/``, and their bytes.
        architectures: what they were compiled for, such as ``sm_90``.
        cubins: how many there are.
        note: why there are none, for people; None where there are some.
    """

    files: dict[str, bytes]
    architectures: tuple[str, ...] = ()
    cubins: int = 0
    note: str | None = None


def artifact_variants(
    config: CQConfig, arch: str, channels: Channels = NO_CHANNELS
) -> list[Variant]:
    """The variants that a cache of an artifact asks for on one architecture, each once.

    Those for float16 and bfloat16, 1 to 8 query tokens and contiguous storage, without a mask
    beyond padding and without gains: whatever else is asked for is compiled where it is used.
    Architectures differ, because a block of threads has more shared memory on some.

    Args:
        config: the artifact's configuration.
        arch: such as ``sm_90``.
        channels: of its groups, which decide how RoPE's pairs are found and what can be loaded
            together; see :func:`cqtool.layout.codebook_file.read_channels`.

    Returns:
        The variants, sorted; none where the kernels take no such format (see :func:`unsupported`).
    """
    found: set[Variant] = set()
    softcap = config.base_model.fingerprint.get("model_type") in _SOFT_CAPPED
    layouts = (
        _layout(
            layer,
            own,
            len(heads),
            *(_rows(config, channels, index, kind, heads) for kind in KINDS),
        )
        for index, layer in enumerate(config.geometry.layers)
        if _layer_unsupported(config, index) is None
        for own, heads in config.cache.parts(index, layer.kv_heads).items()
    )
    for layout in dict.fromkeys(layouts):
        found |= set(_decode_variants(config, layout, _capability(arch), softcap))
        found |= set(_encode_variants(layout))
    return sorted(found, key=lambda variant: (variant.source, variant.defines))


def _rows(
    config: CQConfig, channels: Channels, layer: int, kind: Kind, heads: Sequence[int]
) -> _Heads | None:
    """The channels of groups of some heads of a layer, None where all groups are contiguous."""
    shape = config.geometry.layers[layer]
    contiguous = tuple(range(shape.dim(kind)))
    rows: list[tuple[int, ...]] = []
    chosen = False
    for owner, _, head in config.cache.owners(layer, kind):
        own = channels.get(channels_name(owner_name(layer, owner)))
        chosen |= own is not None
        rows += own or [contiguous] * (shape.kv_heads if head is None else 1)
    return tuple(rows[head] for head in heads) if chosen else None


def unsupported(config: CQConfig) -> str | None:
    """Why the kernels take no layer of an artifact, None where they take one."""
    reasons = [_layer_unsupported(config, index) for index in range(len(config.geometry.layers))]
    return None if None in reasons else reasons[0]


def _layer_unsupported(config: CQConfig, index: int) -> str | None:
    from cqtool.kernels.layout import CodeFormat

    layer = config.geometry.layers[index]
    for kind in KINDS:
        for code in config.cache.codes_of(index, kind):
            if code.encoding == "ldlq" or code.gain != "none":
                return "error feedback and gains of tokens have no kernel"
            if reason := CodeFormat(layer.dim(kind), code.channels, code.bits).unsupported():
                return reason
    if config.geometry.query_heads % layer.kv_heads:
        return f"{layer.kv_heads} kv heads do not divide {config.geometry.query_heads} query heads"
    return None


@dataclass(frozen=True)
class _Layout:
    """What decides the kernels of a layer's heads of one format.

    Attributes:
        layer: its shapes.
        cache: the format of these heads.
        pairing: of its key plans.
        slow: what :func:`cqtool.kernels.layout.turns_slowly` can say of them.
        neighbours: whether the channels of a vector can be loaded in twos, see Encoder; of keys
            and of values.
    """

    layer: LayerGeometry
    cache: CacheSpec
    pairing: Pairing
    slow: tuple[bool, ...]
    neighbours: tuple[bool, bool]


@lru_cache(maxsize=256)
def _layout(
    layer: LayerGeometry,
    cache: CacheSpec,
    heads: int,
    key_channels: _Heads | None,
    value_channels: _Heads | None,
) -> _Layout:
    import torch

    from cqtool.kernels.decode.tables import key_plans
    from cqtool.kernels.encode.tables import has_neighbours, key_maps, value_maps
    from cqtool.kernels.layout import CodeFormat

    # Every layer of a model can have channels of its own, hence the cache for all architectures.
    key_order, value_order = (
        None if rows is None else torch.tensor(rows) for rows in (key_channels, value_channels)
    )
    format = CodeFormat(layer.key_dim, cache.key.channels, cache.key.bits)
    plans = key_plans(format, layer.rotation, key_order, heads)
    values = value_maps(layer.value_dim, heads, value_order)
    return _Layout(
        # Where the angles come from makes no difference.
        replace(layer, rotation=replace(layer.rotation, source=None)),
        cache,
        plans[0].pairing,
        _slow(plans, layer.rotation),
        (has_neighbours(key_maps(plans, layer.rotation)), has_neighbours(values)),
    )


def _slow(plans: Sequence[KeyPlan], rotation: KeyRotation) -> tuple[bool, ...]:
    """Answers of `turns_slowly` for RoPE bases of 10000 and more, up to 10 ** 8."""
    import torch

    from cqtool.kernels.layout import turns_slowly

    if rotation.style == "none":
        return (False,)
    exponents = torch.arange(0, rotation.dim, 2, dtype=torch.float64) / rotation.dim
    # A larger base turns all pairs more slowly, so that the ends say what lies between.
    answers = {
        all(turns_slowly(base**-exponents, plan) for plan in set(plans)) for base in (1e4, 1e8)
    }
    return tuple(sorted(answers))


def _decode_variants(
    config: CQConfig, layout: _Layout, capability: int, softcap: bool
) -> Iterator[Variant]:
    from cqtool.kernels.decode.op import variants

    key, value, layer = layout.cache.key, layout.cache.value, layout.layer
    heads = config.geometry.query_heads // layer.kv_heads
    for dtype, slow in itertools.product(DTYPES, layout.slow):
        for tokens in range(1, MAX_QUERY_TOKENS + 1):
            case = DecodeCase(
                key_dim=layer.key_dim,
                value_dim=layer.value_dim,
                key_channels=key.channels,
                key_bits=key.bits,
                value_channels=value.channels,
                value_bits=value.bits,
                rows=heads * tokens,
                pairing=layout.pairing,
                rotate=layer.rotation.style != "none",
                slow=slow,
                dtype=dtype,
                softcap=softcap,
            )
            launch = choose(case, capability)
            if launch is not None:
                yield from (variant for _, variant in variants(launch))
                yield Variant("decode/finish.cu", launch.finish_defines())


def _encode_variants(layout: _Layout) -> Iterator[Variant]:
    layer = layout.layer
    for kind, vector in zip(KINDS, layout.neighbours, strict=True):
        code, is_key = layout.cache.code(kind), kind == "key"
        for dtype in DTYPES:
            for flat, tiles in _ENCODE_SHAPES:
                yield encode_variant(
                    EncodeCase(
                        head_dim=layer.dim(kind),
                        channels=code.channels,
                        bits=code.bits,
                        dtype=dtype,
                        is_key=is_key,
                        flat=flat,
                        tiles=tiles,
                        vector=vector,
                        metric=code.encoding == "metric",
                        # The window holds keys after RoPE; what leaves it is turned back first.
                        unrotate=is_key and layer.rotation.style != "none",
                    )
                )


def known_architectures() -> tuple[str, ...]:
    """What kernels can be compiled for on this machine.

    Raises:
        KernelError: there is no compiler.
    """
    oldest = 10 * OLDEST[0] + OLDEST[1]
    return tuple(arch for arch in toolchain().architectures if _capability(arch) >= oldest)


def _capability(arch: str) -> int:
    """Compute capability times ten; 0 for what is none."""
    found = _ARCH.fullmatch(arch)
    return int(found[1]) if found else 0


def compile_kernels(
    config: CQConfig,
    architectures: Sequence[str],
    channels: Channels = NO_CHANNELS,
    progress: Progress = SILENT,
) -> CompiledKernels:
    """Compile what :func:`artifact_variants` lists, on all cores; no GPU is needed.

    The same sources and compiler give the same bytes. What was compiled before is taken from the
    kernel cache of this user.

    Raises:
        KernelError: a variant cannot be compiled, or there is no compiler.
    """
    if reason := unsupported(config):
        return CompiledKernels({}, note=f"{reason}; the torch reference serves it")
    compiler = f"NVRTC {toolchain().nvrtc}"
    text = read_sources(KERNELS)
    names = sorted(set(architectures), key=_capability)
    jobs = [
        (variant, arch) for arch in names for variant in artifact_variants(config, arch, channels)
    ]
    built: list[bytes] = []
    # NVRTC lets go of Python's lock while it compiles.
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        with progress.task("Compiling kernels", len(jobs)) as task:
            for cubin in pool.map(lambda job: _compile_once(job[0], job[1], text, compiler), jobs):
                built.append(cubin)
                task.advance()
    finally:
        pool.shutdown(cancel_futures=True)
    compiled = [(*job, cubin) for job, cubin in zip(jobs, built, strict=True)]
    files = cubins.shipped_files(compiled, text, compiler)
    return CompiledKernels(files, tuple(names), len(jobs))


def _compile_once(variant: Variant, arch: str, text: str, compiler: str) -> bytes:
    # The digest that loading looks for says nothing of the compiler: a kernel that another one
    # compiled runs as well, but would make two exports differ.
    digest = hashlib.sha256(f"{variant.digest(text, arch)} {compiler}".encode()).hexdigest()
    with cubins.compiling(digest):
        cubin = cubins.read_cached(digest)
        if cubin is None:
            cubin = compile_variant(variant, arch).cubin
            cubins.write_cached(digest, cubin)
    return cubin
