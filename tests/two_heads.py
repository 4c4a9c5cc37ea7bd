"""Samples of a layer of two heads, in place of a sample store."""

from __future__ import annotations

import torch


class Store:
    """Two heads of eight channels with samples, gradients and metrics that differ in size."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        mix = torch.randn(2, 8, 8, generator=generator)
        plain = torch.randn(300, 2, 8, generator=generator)
        self.samples = torch.einsum("thd,hde->the", plain, mix)
        self.gradients = torch.randn(300, 2, 8, generator=generator) * torch.tensor([[1.0], [3.0]])
        root = torch.randn(2, 8, 8, generator=generator)
        self.moment = root @ root.mT

    def load(self, layer: int, kind: str) -> torch.Tensor:
        return self.samples

    def load_gradients(self, layer: int, kind: str) -> torch.Tensor:
        return self.gradients

    def load_moment(self, layer: int, kind: str) -> torch.Tensor:
        return self.moment
