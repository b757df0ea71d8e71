"""A small flow model: data and noise joined by straight lines, x_s = (1 - s) x_0 + s noise.

s runs from 1 (noise) to 0 (data); the model's velocity is E[noise - x_0 | x_s].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

PIXELS = 64  # of a digit
HIDDEN = 128
SHARPNESS = 0.06  # standard deviation of a mode


def ring(modes: int) -> Tensor:
    """[modes, 2] centres on a circle of radius 1."""
    angle = torch.arange(modes) * (2 * math.pi / modes)
    return torch.stack([angle.cos(), angle.sin()], -1)


def around(centres: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
    """[n, D] points near the centres [modes, D] that `which` [n] names."""
    noise = torch.randn(len(which), centres.shape[-1], generator=generator)
    return centres[which] + SHARPNESS * noise


def digits() -> tuple[Tensor, Tensor]:
    """1797 handwritten digits of 8 x 8 pixels in [-1, 1], [n, 64], and what they are, [n]."""
    from sklearn.datasets import load_digits

    images, names = load_digits(return_X_y=True)
    return torch.from_numpy(images).float() / 8 - 1, torch.from_numpy(names)


def mlp(*widths: int) -> nn.Sequential:
    """Layers of these widths, SiLU between them."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class Net(nn.Module):
    """[n, out] of points x [n, D] at noise level s [n] in [0, 1], of kinds `label` [n]."""

    def __init__(self, dims: int, out: int, labels: int = 1, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.labels = nn.Embedding(labels, hidden)
        self.times = nn.Linear(9, hidden)
        self.points = nn.Linear(dims, hidden)
        self.rest = nn.Sequential(nn.SiLU(), *mlp(hidden, hidden, hidden, out))

    def forward(self, x: Tensor, s: Tensor, label: Tensor) -> Tensor:
        waves = s[..., None] * (math.pi * 2.0 ** torch.arange(4))
        time = torch.cat([s[..., None], waves.sin(), waves.cos()], -1)
        return self.rest(self.points(x) + self.times(time) + self.labels(label))


def read(images: Tensor, names: Tensor) -> nn.Module:
    """A classifier of images [n, 64], which bears some noise in them, from their names [n]."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    net = mlp(PIXELS, 64, int(names.max()) + 1)
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(1500):
        at = torch.randint(len(images), (256,), generator=draw)
        x = images[at] + 0.3 * torch.randn(256, PIXELS, generator=draw)
        adam.zero_grad()
        nn.functional.cross_entropy(net(x), names[at]).backward()
        adam.step()
    return net.requires_grad_(False)


def noised(x: Tensor, s: Tensor, noise: Tensor) -> Tensor:
    """[n, D] between points x and noise [n, D], at level s [n]."""
    return (1 - s[..., None]) * x + s[..., None] * noise


def flow_loss(net: Net, x: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
    """[], flow matching on points x [n, D] at levels drawn evenly."""
    s = torch.rand(len(x), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    return (net(noised(x, s, noise), s, label) - (noise - x)).square().mean()


def fitted(
    net: Net, some: Callable[[int], tuple[Tensor, Tensor]], updates: int, draw: torch.Generator
) -> Net:
    """The net, made a flow of the points [n, D] and labels [n] that `some(n)` gives."""
    adam = torch.optim.Adam(net.parameters(), 2e-3)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, updates)
    for _ in range(updates):
        adam.zero_grad()
        flow_loss(net, *some(256), draw).backward()
        adam.step()
        slower.step()
    return net
