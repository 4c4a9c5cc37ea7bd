"""How codes and codebooks lie in GPU memory: tiles of 16 tokens, and tables without bank conflicts.

The order follows the tensor cores' fragments (``mma.m16n8k16``): lane ``4 r + t`` of a warp reads
the codes of tokens r and r + 8 for its own groups of the keys, and of tokens 2t, 2t + 1, 2t + 8 and
2t + 9 for group r of the values, so that a looked-up entry is a fragment as it comes. Everything
here is plain torch and defines what the kernels mean; docs/kernels.md draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from cqtool.geometry import KeyRotation
from cqtool.kernels.decode.config import Pairing

TILE = 16
"""Tokens in a tile."""
ROW_BYTES = 128
"""Bytes of a table row: one code's entries of as many groups as 32 banks hold."""
HEAD_DIMS = (64, 80, 96, 128, 192, 256)


@dataclass(frozen=True)
class CodeFormat:
    """How the vectors of one kind are coded.

    Attributes:
        head_dim: channels of a head.
        channels: channels of a group: 2, 4 or 8.
        bits: bits of a code: 8, and with 8 channels 6 or 10 as well.
    """

    head_dim: int
    channels: int
    bits: int

    def unsupported(self) -> str | None:
        """Why the kernels cannot take this format, None when they can."""
        if (self.channels, self.bits) not in ((2, 8), (4, 8), (8, 6), (8, 8), (8, 10)):
            return (
                f"{self.bits}-bit codes of {self.channels} channels have no kernel (8 bits with 2, "
                "4 or 8 channels, and 6 or 10 bits with 8 channels have)"
            )
        if self.head_dim not in HEAD_DIMS:
            return f"head_dim {self.head_dim} has no kernel (64, 80, 96, 128, 192 and 256 have)"
        return None

    @property
    def groups(self) -> int:
        """Groups of a head."""
        return self.head_dim // self.channels

    @property
    def centroids(self) -> int:
        """Entries of a codebook."""
        return 1 << self.bits

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile of one row and kv head."""
        return TILE * self.groups * self.bits // 8

    @property
    def columns(self) -> int:
        """Groups of which a table row holds one entry each."""
        return ROW_BYTES // (2 * self.channels)

    @property
    def blocks(self) -> int:
        """Tables of :attr:`columns` groups that a head needs."""
        return -(-self.groups // self.columns)

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables of one head."""
        return self.blocks * self.centroids * ROW_BYTES


@dataclass(frozen=True)
class KeyPlan:
    """Which group and channel of a key head the kernels find where.

    Groups are taken in pairs: unit u (slot u // 4, lane u % 4) has a "lo" and a "hi" group.

    Attributes:
        format: of the keys.
        groups: codebook group of each (unit, lo or hi), flat: length `format.groups`.
        channels: model channel of each kernel channel ``(unit * 2 + hi) * c + i``.
        slots: which slot of its group's centroid each kernel channel is.
        pairing: how rotation pairs kernel channels: "paired" (lo i with hi i), "closed" (i with
            i + c/2 of the same group), or "scatter" (anything: the kernel rearranges).
        frequency: for each kernel pair, the index of its frequency, -1 where nothing turns. For
            "scatter", of each natural pair (p, p + head_dim / 2) after `channels` is undone.
    """

    format: CodeFormat
    groups: tuple[int, ...]
    channels: tuple[int, ...]
    slots: tuple[int, ...]
    pairing: Pairing
    frequency: tuple[int, ...]

    @cached_property
    def position(self) -> Tensor:
        """Place of each codebook group in kernel order, int64 ``[groups]``."""
        place = torch.empty(len(self.groups), dtype=torch.long)
        place[torch.tensor(self.groups)] = torch.arange(len(self.groups))
        return place


@lru_cache(maxsize=256)
def plan_keys(
    format: CodeFormat,
    rotation: KeyRotation,
    permutation: tuple[int, ...] | None = None,
    scatter: bool = False,
) -> KeyPlan:
    """Order a key head's groups and channels for the kernels.

    Args:
        format: of the keys.
        rotation: which channels RoPE turns together.
        permutation: model channel of each codebook channel (group by group), None for the identity.
        scatter: make a "scatter" plan even where a better one exists.

    Returns:
        The plan; its pairing is "scatter" when groups cut RoPE's pairs in no useful way.
    """
    c, dim = format.channels, format.head_dim
    channel_of = list(permutation) if permutation is not None else list(range(dim))
    partner, frequency_of = _pairs(rotation, dim)
    members = [channel_of[g * c : (g + 1) * c] for g in range(format.groups)]
    plans = () if scatter else (_paired, _closed)
    for make in plans:
        plan = make(format, members, partner, frequency_of)
        if plan is not None:
            return plan
    return _scattered(format, members, partner, frequency_of)


def _pairs(rotation: KeyRotation, dim: int) -> tuple[list[int], list[int]]:
    """Each channel's partner (itself if not turned; -partner - 1 marks a second) and frequency."""
    partner, frequency = list(range(dim)), [-1] * dim
    for p in range(rotation.dim // 2):
        if rotation.style == "half":
            first, second = p, p + rotation.dim // 2
        else:
            first, second = 2 * p, 2 * p + 1
        first, second = first + rotation.offset, second + rotation.offset
        partner[first], partner[second] = second, -first - 1
        frequency[first] = frequency[second] = p
    return partner, frequency


def _is_free(group: list[int], frequency_of: list[int]) -> bool:
    return all(frequency_of[ch] < 0 for ch in group)


def _paired(
    format: CodeFormat, members: list[list[int]], partner: list[int], frequency_of: list[int]
) -> KeyPlan | None:
    """Groups in twos, the i-th channel of one turning with the i-th of the other."""
    by_first = {tuple(sorted(group)): g for g, group in enumerate(members)}
    lo_hi: list[tuple[int, int]] = []
    free = [g for g, group in enumerate(members) if _is_free(group, frequency_of)]
    for g, group in enumerate(members):
        if g in free:
            continue
        if any(partner[ch] == ch for ch in group):
            return None
        if all(partner[ch] >= 0 for ch in group):
            other = by_first.get(tuple(sorted(partner[ch] for ch in group)))
            if other is None:
                return None
            lo_hi.append((g, other))
    if 2 * len(lo_hi) + len(free) != len(members):
        return None
    lo_hi += [(free[i], free[i + 1]) for i in range(0, len(free), 2)]
    groups: list[int] = []
    channels: list[int] = []
    slots: list[int] = []
    frequency: list[int] = []
    for lo, hi in lo_hi:
        groups += [lo, hi]
        channels += members[lo]
        slots += range(format.channels)
        wanted = members[hi] if lo in free else [partner[ch] for ch in members[lo]]
        channels += wanted
        slots += [members[hi].index(ch) for ch in wanted]
        frequency += [frequency_of[ch] for ch in members[lo]]
    return KeyPlan(format, tuple(groups), tuple(channels), tuple(slots), "paired", tuple(frequency))


def _closed(
    format: CodeFormat, members: list[list[int]], partner: list[int], frequency_of: list[int]
) -> KeyPlan | None:
    """Every group holds whole pairs; its channels are sorted into first and second members."""
    if format.channels < 4:
        return None
    channels: list[int] = []
    slots: list[int] = []
    frequency: list[int] = []
    for group in members:
        firsts = [ch for ch in group if partner[ch] >= 0 and partner[ch] != ch]
        seconds = [partner[ch] for ch in firsts]
        rest = [ch for ch in group if partner[ch] == ch]
        if any(ch not in group for ch in seconds) or len(rest) % 2:
            return None
        if 2 * len(firsts) + len(rest) != len(group):
            return None
        half = len(rest) // 2
        ordered = firsts + rest[:half] + seconds + rest[half:]
        channels += ordered
        slots += [group.index(ch) for ch in ordered]
        frequency += [frequency_of[ch] for ch in ordered[: format.channels // 2]]
    return KeyPlan(
        format,
        tuple(range(format.groups)),
        tuple(channels),
        tuple(slots),
        "closed",
        tuple(frequency),
    )


def _scattered(
    format: CodeFormat, members: list[list[int]], partner: list[int], frequency_of: list[int]
) -> KeyPlan:
    """Any groups: `channels` gives each kernel channel's place in a natural order of pairs."""
    half = format.head_dim // 2
    firsts = [ch for ch in range(format.head_dim) if partner[ch] >= 0 and partner[ch] != ch]
    rest = [ch for ch in range(format.head_dim) if partner[ch] == ch]
    firsts, seconds = (
        firsts + rest[: half - len(firsts)],
        [partner[ch] for ch in firsts] + rest[half - len(firsts) :],
    )
    assert len(firsts) == len(seconds) == half
    return KeyPlan(
        format,
        tuple(range(format.groups)),
        tuple(ch for group in members for ch in group),
        tuple(range(format.channels)) * format.groups,
        "scatter",
        tuple(frequency_of[ch] for ch in firsts),
    )


def natural_pairs(plan: KeyPlan, rotation: KeyRotation) -> tuple[list[int], list[int]]:
    """The first and second model channel of each natural pair of a "scatter" plan."""
    partner, _ = _pairs(rotation, plan.format.head_dim)
    half = plan.format.head_dim // 2
    firsts = [ch for ch in range(2 * half) if partner[ch] >= 0 and partner[ch] != ch]
    rest = [ch for ch in range(2 * half) if partner[ch] == ch]
    split = half - len(firsts)
    return firsts + rest[:split], [partner[ch] for ch in firsts] + rest[split:]


def channel_pairs(plan: KeyPlan, rotation: KeyRotation) -> tuple[list[int], list[int]]:
    """The first and second model channel of each pair, in the order of `plan.frequency`.

    Args:
        plan: of a key head.
        rotation: as the plan was made for.
    """
    if plan.pairing == "scatter":
        return natural_pairs(plan, rotation)
    part = plan.format.channels if plan.pairing == "paired" else plan.format.channels // 2
    firsts: list[int] = []
    seconds: list[int] = []
    for start in range(0, plan.format.head_dim, 2 * part):
        firsts += plan.channels[start : start + part]
        seconds += plan.channels[start + part : start + 2 * part]
    return firsts, seconds


def key_table(codebook: Tensor, plan: KeyPlan) -> Tensor:
    """The kernels' tables of the keys.

    Args:
        codebook: ``[kv_heads, groups, centroids, channels]``.
        plan: the order of groups and of channels in them.

    Returns:
        float16 ``[kv_heads, blocks, centroids, 64]``: a row holds one code's entries, column
        ``(slot % (8/c)) * 8 + hi * 4 + lane``.
    """
    fmt = plan.format
    heads, units = codebook.shape[0], fmt.groups // 2
    slots = torch.tensor(plan.slots).view(fmt.groups, 1, fmt.channels).to(codebook.device)
    ordered = codebook[:, torch.tensor(plan.groups, device=codebook.device)]
    ordered = ordered.gather(3, slots.expand(heads, -1, fmt.centroids, -1))
    table = codebook.new_zeros(heads, fmt.blocks * fmt.columns, fmt.centroids, fmt.channels)
    unit = torch.arange(units)
    column = (unit // 4) * 8 + unit % 4
    table[:, column] = ordered[:, 0::2]
    table[:, column + 4] = ordered[:, 1::2]
    return _image(table, fmt)


def value_table(codebook: Tensor, format: CodeFormat) -> Tensor:
    """The kernels' tables of the values: as :func:`key_table`, column g % columns for group g."""
    table = codebook.new_zeros(
        codebook.shape[0], format.blocks * format.columns, format.centroids, format.channels
    )
    table[:, : format.groups] = codebook
    return _image(table, format)


def _image(table: Tensor, format: CodeFormat) -> Tensor:
    heads = table.shape[0]
    image = table.view(heads, format.blocks, format.columns, format.centroids, format.channels)
    return image.transpose(2, 3).reshape(heads, format.blocks, format.centroids, -1).half()


def _key_words(format: CodeFormat) -> tuple[Tensor, Tensor]:
    """Word in a tile, and code in the word, of each (token, kernel group)."""
    units = format.groups // 2
    unit = torch.arange(units)
    lanes = (units - unit // 4 * 4).clamp(max=4)
    token = torch.arange(TILE)[:, None]
    word = 32 * (unit // 4) + (token % 8) * lanes + unit % 4
    word = torch.stack((word, word), dim=2).flatten(1)
    code = 2 * (token // 8) + torch.arange(2).repeat(units)
    return word, code


def _value_words(format: CodeFormat) -> tuple[Tensor, Tensor]:
    token = torch.arange(TILE)[:, None]
    word = 4 * torch.arange(format.groups) + (token % 8) // 2
    code = (token % 2 + 2 * (token // 8)).expand_as(word)
    return word, code


def _word_order(format: CodeFormat) -> Tensor:
    """The word of each place of a tile of 6-bit codes: two full blocks of 32 words lie in turns.

    A lane reads the same word of both, which is one load then instead of two.
    """
    order = torch.arange(4 * format.groups)
    whole = len(order) // 64 * 64
    order[:whole] = order[:whole].view(-1, 2, 32).transpose(1, 2).flatten()
    return order


def _to_bytes(codes: Tensor, format: CodeFormat) -> Tensor:
    """Tiles of words of codes: int64 ``[..., words, 4]`` to uint8 ``[..., tile_bytes]``."""
    part = torch.arange(4, device=codes.device)
    if format.bits == 6:
        # The upper bits of a word's three bytes are the fourth code.
        three = codes[..., :3] | (codes[..., 3:] >> 2 * part[:3] & 3) << 6
        three = three[..., _word_order(format).to(codes.device), :]
        return torch.cat((three[..., :2].flatten(-2), three[..., 2]), dim=-1).to(torch.uint8)
    tiles = (codes & 255).flatten(-2)
    if format.bits > 8:
        tiles = torch.cat((tiles, (codes >> 8 << 2 * part).sum(dim=-1)), dim=-1)
    return tiles.to(torch.uint8)


def _from_bytes(tiles: Tensor, format: CodeFormat) -> Tensor:
    """Undo :func:`_to_bytes`."""
    words, part = 4 * format.groups, torch.arange(4, device=tiles.device)
    if format.bits == 6:
        halves = tiles[..., : 2 * words].reshape(*tiles.shape[:-1], words, 2)
        three = torch.cat((halves, tiles[..., 2 * words :, None]), dim=-1).long()
        three = three[..., _word_order(format).argsort().to(tiles.device), :]
        last = ((three >> 6) << 2 * part[:3]).sum(dim=-1, keepdim=True)
        return torch.cat((three & 63, last), dim=-1)
    codes = tiles[..., : 4 * words].long().view(*tiles.shape[:-1], words, 4)
    if format.bits > 8:
        codes = codes | (tiles[..., 4 * words :, None].long() >> 2 * part & 3) << 8
    return codes


def _pack(codes: Tensor, format: CodeFormat, word: Tensor, code: Tensor) -> Tensor:
    batch, heads, tokens, groups = codes.shape
    tiles = -(-tokens // TILE)
    padded = codes.new_zeros(batch, heads, tiles * TILE, groups)
    padded[:, :, :tokens] = codes
    flat = padded.view(batch, heads, tiles, TILE * groups).long()
    words = torch.empty_like(flat)
    words[..., (4 * word + code).flatten().to(codes.device)] = flat
    return _to_bytes(words.view(batch, heads, tiles, 4 * groups, 4), format)


def _unpack(tiles: Tensor, format: CodeFormat, word: Tensor, code: Tensor) -> Tensor:
    batch, heads, count, _ = tiles.shape
    place = (4 * word + code).flatten().to(tiles.device)
    codes = _from_bytes(tiles, format).flatten(3)[..., place]
    return codes.view(batch, heads, count * TILE, format.groups)


def pack_keys(codes: Tensor, plan: KeyPlan) -> Tensor:
    """Lay codes out as tiles.

    Args:
        codes: int ``[batch, kv_heads, tokens, groups]`` in codebook order.
        plan: the order of groups.

    Returns:
        uint8 ``[batch, kv_heads, ceil(tokens / 16), tile_bytes]``.
    """
    ordered = codes[..., torch.tensor(plan.groups, device=codes.device)]
    return _pack(ordered, plan.format, *_key_words(plan.format))


def unpack_keys(tiles: Tensor, plan: KeyPlan) -> Tensor:
    """Undo :func:`pack_keys`: int64 ``[batch, kv_heads, 16 * tiles, groups]``."""
    ordered = key_codes_in_order(tiles, plan.format)
    return ordered[..., plan.position.to(tiles.device)]


def key_codes_in_order(tiles: Tensor, format: CodeFormat) -> Tensor:
    """Codes of key tiles ``[batch, kv_heads, tokens, groups]``, groups in kernel order."""
    return _unpack(tiles, format, *_key_words(format))


def value_codes_in_order(tiles: Tensor, format: CodeFormat) -> Tensor:
    """The codes of value tiles: int64 ``[batch, kv_heads, tokens, groups]``."""
    return _unpack(tiles, format, *_value_words(format))


def pack_values(codes: Tensor, format: CodeFormat) -> Tensor:
    """As :func:`pack_keys`, for values."""
    return _pack(codes, format, *_value_words(format))


def unpack_values(tiles: Tensor, format: CodeFormat) -> Tensor:
    """Undo :func:`pack_values`."""
    return value_codes_in_order(tiles, format)


def phase_steps(inv_freq: Tensor, plan: KeyPlan) -> Tensor:
    """Turns a token advances each kernel pair, as 64-bit fixed-point fractions.

    ``position * step`` modulo 2**64 is exact for any position, where float32 loses the angle beyond
    some ten thousand tokens.

    Args:
        inv_freq: ``[dim / 2]`` radians a token.
        plan: the order of pairs.

    Returns:
        int64 ``[head_dim / 2]`` (the bits of an unsigned number), zero where nothing turns.
    """
    turns = (inv_freq.double().cpu() / (2 * torch.pi)).tolist()
    steps = [round(turns[f] * 2.0**64) % 2**64 if f >= 0 else 0 for f in plan.frequency]
    return torch.tensor([s - 2**64 if s >= 2**63 else s for s in steps], dtype=torch.int64)


def _pair_rates(inv_freq: Tensor, plan: KeyPlan) -> Tensor:
    """Radians a token that each kernel pair turns, float64, zero where nothing turns."""
    frequency = torch.tensor(plan.frequency)
    rates = torch.zeros(len(plan.frequency), dtype=torch.float64)
    turning = frequency >= 0
    rates[turning] = inv_freq.double().cpu()[frequency[turning]]
    return rates


def turn_table(inv_freq: Tensor, plan: KeyPlan) -> Tensor:
    """Cosines and sines of the offsets 0 to 15 within a tile, and of 16, 32, ... 112.

    Args:
        inv_freq: ``[dim / 2]`` radians a token.
        plan: the order of pairs.

    Returns:
        float16 ``[23, 2, head_dim / 2]``.
    """
    offsets = torch.cat((torch.arange(TILE), torch.arange(1, 8) * TILE)).double()
    angles = offsets[:, None] * _pair_rates(inv_freq, plan)
    return torch.stack((angles.cos(), angles.sin()), dim=1).half()


def turns_slowly(inv_freq: Tensor, plan: KeyPlan) -> bool:
    """Whether the kernels may take the cosines of the later half of the pairs for 1 in a tile.

    An offset of up to 8 tokens from a tile's middle then leaves a relative error of half the angle
    squared; it may be 3.2e-4 at most, root mean square over all pairs and offsets: as much as half
    precision does to the rest. With full rotary embeddings a base of 10000 is just enough. A pair
    alone may err by ten times as much: the fastest of the later half at the tile's ends.

    Args:
        inv_freq: ``[dim / 2]`` radians a token.
        plan: the order of pairs.
    """
    rates = _pair_rates(inv_freq, plan)
    offsets = torch.arange(-8, 8, dtype=torch.float64)
    later = rates[len(rates) // 2 :]
    errors = ((offsets[:, None] * later) ** 2 / 2).square().mean(0)
    return bool((errors.sum() / len(rates)).sqrt() <= 3.2e-4)
