"""Cache formats for tests, made without fitting anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import DynamicCache
from zoo import random_ids

from cqtool.cache import CacheFormat, CQCodec, LayerCodecs
from cqtool.cache.codec import HeadsCodec
from cqtool.codebooks.grouping import rope_pairs
from cqtool.models.probe import read_geometry
from cqtool.models.rotation import unrotate
from cqtool.models.tap import AttentionTap


class RecordingCache(DynamicCache):
    """transformers' own cache, noting the unrotated keys and the values that go in."""

    def __init__(self, model):
        super().__init__(config=model.config)
        self.geometry, self.tap = read_geometry(model), AttentionTap.of(model)
        self.seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        rotation, keys = self.geometry.layers[layer_idx].rotation, key_states
        if rotation.style != "none":
            step = self.tap.steps[layer_idx]
            keys = unrotate(keys, step.cos, step.sin, rotation)
        self.seen.setdefault(layer_idx, []).append((keys.float(), value_states.float()))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def samples(self, layer):
        """Keys and values ``[rows * tokens, kv_heads, head_dim]``."""
        return tuple(
            torch.cat([entry[part] for entry in self.seen[layer]], dim=2)
            .transpose(1, 2)
            .flatten(0, 1)
            for part in (0, 1)
        )


def random_format(model, *, channels=8, bits=4, window=0, sinks=0, seed=0) -> CacheFormat:
    """Codebooks drawn from a normal distribution of the activations' spread."""
    recorded = RecordingCache(model)
    with torch.no_grad():
        model(input_ids=random_ids(1, 64, seed=99), past_key_values=recorded)
    generator = torch.Generator().manual_seed(seed)

    def codec(samples):
        _, heads, dim = samples.shape
        shape = (heads, dim // channels, 1 << bits, channels)
        return CQCodec(torch.randn(shape, generator=generator) * samples.std())

    geometry = recorded.geometry
    layers = tuple(
        LayerCodecs(*map(codec, recorded.samples(layer))) for layer in range(len(geometry.layers))
    )
    return CacheFormat(f"cq-{channels}c{bits}b", geometry, layers, window, sinks)


def kernel_format(model, *, key=(8, 8), value=(8, 8), window=0, sinks=0) -> CacheFormat:
    """As :func:`random_format`, centroids as float16 holds them: (channels, bits) of each kind."""
    parts = [random_format(model, channels=c, bits=b) for c, b in (key, value)]
    layers = tuple(
        LayerCodecs(*(CQCodec(codec.codebook.half().float()) for codec in (k.key, v.value)))
        for k, v in zip(parts[0].layers, parts[1].layers, strict=True)
    )
    return CacheFormat("kernel", parts[0].geometry, layers, window, sinks)


def regrouped(format: CacheFormat, keys="random", seed=0) -> CacheFormat:
    """The same codebooks for other channels, each head with an order of its own.

    Args:
        format: of coupled codes.
        keys: ``random``; ``pairs`` for groups of whole RoPE pairs; ``partners`` for groups that
            turn with each other; ``mixed`` for the first head contiguous and the others random;
            ``shuffled`` for contiguous groups in any order. Values are always ``random``.
        seed: of the orders.
    """
    generator = torch.Generator().manual_seed(seed)

    def orders(codec):
        heads, groups, _, channels = codec.codebook.shape
        dim = groups * channels
        return torch.stack([torch.randperm(dim, generator=generator) for _ in range(heads)])

    layers = []
    for codecs, layer in zip(format.layers, format.geometry.layers, strict=True):
        order = orders(codecs.key)
        if keys == "mixed":
            order[0] = torch.arange(order.shape[1])
        elif keys == "shuffled":
            groups = torch.arange(layer.key_dim).view(codecs.key.codebook.shape[1::2])
            order = torch.stack(
                [groups[torch.randperm(len(groups), generator=generator)].flatten() for _ in order]
            )
        elif keys in ("pairs", "partners"):
            pairs = rope_pairs(layer.rotation, layer.key_dim)
            mixed = [pairs[torch.randperm(len(pairs), generator=generator)] for _ in order]
            if keys == "partners":
                channels = codecs.key.codebook.shape[3]
                sides = [head.view(-1, channels, 2).transpose(1, 2).flatten(0, 1) for head in mixed]
                mixed = [side[torch.randperm(len(side), generator=generator)] for side in sides]
            order = torch.stack([head.flatten() for head in mixed])
        key = CQCodec(codecs.key.codebook, order)
        layers.append(LayerCodecs(key, CQCodec(codecs.value.codebook, orders(codecs.value))))
    return replace(format, layers=tuple(layers))


def in_metrics(format: CacheFormat, seed=0) -> CacheFormat:
    """The same codebooks and groups, encoded in random metrics."""
    generator = torch.Generator().manual_seed(seed)

    def codec(old):
        heads, groups, _, size = old.codebook.shape
        root = torch.randn(heads, groups, size, size, generator=generator)
        metric = root @ root.mT + 0.1 * torch.eye(size)
        return CQCodec(old.codebook, old.channels, (metric + metric.mT) / 2)

    layers = (LayerCodecs(codec(each.key), codec(each.value)) for each in format.layers)
    return replace(format, layers=tuple(layers))


def by_head(sources: Sequence[Sequence[CacheFormat]]) -> CacheFormat:
    """A format whose heads have codes of their own: those of ``sources[layer][head]``."""

    def codec(layer, name):
        parts = []
        for head, source in enumerate(sources[layer]):
            whole = getattr(source.layers[layer], name)
            own = (whole.codebook, whole.channels, whole.metric, whole.feedback, whole.gains)
            parts.append(CQCodec(*(None if x is None else x[head : head + 1] for x in own)))
        return HeadsCodec(parts)

    layers = (LayerCodecs(codec(i, "key"), codec(i, "value")) for i in range(len(sources)))
    return replace(sources[0][0], name="by-head", layers=tuple(layers))


def by_head_format(model, *, keys=None, **options) -> CacheFormat:
    """Two layers of three heads: heads 0 and 2 of the first share a code, and 0 and 1 of the
    second; `keys` as of :func:`regrouped`, other options as of :func:`kernel_format`."""
    a = kernel_format(model, key=(8, 8), value=(8, 8), **options)
    b = kernel_format(model, key=(4, 8), value=(8, 6), **options)
    if keys is not None:
        a, b = regrouped(a, keys), regrouped(b, keys)
    return by_head([[a, b, a], [b, b, a]])


def exact_format(recorded: RecordingCache, *, window=0, sinks=0) -> CacheFormat:
    """Codebooks that hold every vector of a recorded run: coding loses nothing."""

    def codec(samples):
        vectors = samples.transpose(0, 1).unsqueeze(1)  # [heads, 1, tokens, head_dim]
        size = 1 << max(1, (vectors.shape[2] - 1).bit_length())
        padding = vectors[:, :, :1].expand(-1, -1, size - vectors.shape[2], -1)
        return CQCodec(torch.cat((vectors, padding), dim=2))

    geometry = recorded.geometry
    layers = tuple(
        LayerCodecs(*map(codec, recorded.samples(layer))) for layer in range(len(geometry.layers))
    )
    return CacheFormat("exact", geometry, layers, window, sinks)
