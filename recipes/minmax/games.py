"""Two games between parameters: one whose saddle point is known, and a GAN on real pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_dopt.data import PartitionSampler, dirichlet
from recipes.vision.files import digits

HALF, LATENT, SAMPLES = 50, 8, 2000


class Game(LightningModule):
    """A module that trains ``min max f`` with plain SGD and knows how far it is from its goal.

    Args:
        lr: learning rate of both players.
    """

    maximise: str
    """Pattern on the names of the parameters that maximise."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, as the theory asks for."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def batches(self, rank: int, workers: int, steps: int) -> DataLoader[tuple[Tensor, ...]]:
        """What this rank trains on."""
        raise NotImplementedError

    def distance(self) -> float:
        """From the goal; smaller is better."""
        raise NotImplementedError


class Bilinear(Game):
    """``f_i = |x|^2 / 2 + x' A_i y - |y|^2 / 2 + b_i' x - c_i' y`` with ``||A_i|| = 3``; ranks differ much.

    :meth:`distance` is that to the saddle point of the mean, relative to its norm.
    """

    maximise = "y"

    def __init__(self, lr: float, workers: int) -> None:
        super().__init__(lr)
        generator = torch.Generator().manual_seed(1)
        a = torch.randn(workers, HALF, HALF, generator=generator, dtype=torch.float64)
        self.A = 3 * a / torch.linalg.matrix_norm(a, 2)[:, None, None]
        self.b, self.c = 3 * torch.randn(2, workers, HALF, generator=generator, dtype=torch.float64)
        self.x = nn.Parameter(torch.zeros(HALF, dtype=torch.float64))
        self.y = nn.Parameter(torch.zeros(HALF, dtype=torch.float64))

    def batches(self, rank: int, workers: int, steps: int) -> DataLoader[tuple[Tensor, ...]]:
        """The number of the rank: its loss has no noise."""
        return DataLoader(TensorDataset(torch.full((steps,), rank)), batch_size=1)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """``f_i``."""
        i = int(batch[0])
        value: Tensor = (self.x @ self.x - self.y @ self.y) / 2 + self.x @ self.A[i] @ self.y
        return value + self.b[i] @ self.x - self.c[i] @ self.y

    def distance(self) -> float:
        """See the class."""
        A, one = self.A.mean(0), torch.eye(HALF, dtype=torch.float64)
        matrix = torch.cat([torch.cat([one, A], 1), torch.cat([-A.T, one], 1)])
        best = -torch.linalg.solve(matrix, torch.cat([self.b.mean(0), self.c.mean(0)]))
        return float((torch.cat([self.x, self.y]).detach() - best).norm() / best.norm())


class Pictures(Game):
    """A GAN on scikit-learn's digits: ``f = E log s(D(x)) + E log(1 - s(D(G(z)))) - penalty / 2 E |grad D(x)|^2``.

    Each rank has pictures of few classes. :meth:`distance` is the Frechet distance between pixels of generated and of held
    out pictures, that of two Gaussians with their means and covariances.

    Args:
        lr: learning rate of both players.
        penalty: on the critic's slope at real pictures (R1), without which the game goes round in circles.
    """

    maximise = "critic.*"

    def __init__(self, lr: float, penalty: float = 0.1) -> None:
        super().__init__(lr)
        self.penalty = penalty
        self.generator = nn.Sequential(nn.Linear(LATENT, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
        self.critic = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))

    def batches(self, rank: int, workers: int, steps: int) -> DataLoader[tuple[Tensor, ...]]:
        """Pictures of this rank with noise for the generator, both fixed: a second pass sees the same."""
        train, _ = digits()
        data = TensorDataset(pixels(train.pictures), noise(len(train.labels), 10 + rank))
        parts = dirichlet(train.labels, workers, alpha=0.3, seed=0)
        sampler = PartitionSampler(parts[rank], length=len(data) // workers)
        return DataLoader(data, batch_size=32, sampler=sampler, drop_last=True)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """``f`` on one batch."""
        real = batch[0].clone().requires_grad_()
        truth, forged = self.critic(real), self.critic(self.generator(batch[1]))
        (slope,) = torch.autograd.grad(truth.sum(), real, create_graph=True)
        value: Tensor = -functional.softplus(-truth).mean() - functional.softplus(forged).mean()
        return value - self.penalty / 2 * slope.square().sum(1).mean()

    @torch.no_grad()
    def distance(self) -> float:
        """See the class."""
        _, test = digits()
        return frechet(self.generator(noise(SAMPLES, 1)), pixels(test.pictures))


def pixels(pictures: Tensor) -> Tensor:
    """In [0, 1], shape (n, 64)."""
    return pictures.flatten(1) / 255


def noise(count: int, seed: int) -> Tensor:
    """Inputs of the generator."""
    return torch.randn(count, LATENT, generator=torch.Generator().manual_seed(seed))


def frechet(a: Tensor, b: Tensor) -> float:
    """``|m - n|^2 + tr(S + T - 2 (S T)^(1/2))`` of the means ``m``, ``n`` and covariances ``S``, ``T`` of two sets of rows."""
    a, b = a.double(), b.double()
    if not bool(a.isfinite().all()):
        return math.inf
    s, t = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(s)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ t @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + s.trace() + t.trace() - 2 * overlap)
