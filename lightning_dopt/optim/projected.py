"""AdamW whose moments live in a small subspace of every matrix's gradient: GaLore and GRASS."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_dopt._checks import check_choice, check_float, check_int
from lightning_dopt._random import key


class _ProjectedAdamW(Optimizer):
    """The common part: a matrix with more than ``rank`` rows and columns is seen through a projection ``P``.

    Every ``every`` steps ``P`` is chosen anew; then ``R = P' G`` drives AdamW's moments and ``W`` moves by
    ``-lr scale P AdamW(R)``. ``P`` acts on the smaller dimension, from the right on tall matrices.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        rank: int,
        every: int,
        scale: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        **more: Any,
    ) -> None:
        owner = type(self).__name__
        check_float(owner, "lr", lr, 0.0)
        check_int(owner, "rank", rank, 1)
        check_int(owner, "every", every, 1)
        check_float(owner, "scale", scale, 0.0, open_low=True)
        for k, beta in enumerate(betas):
            check_float(owner, f"betas[{k}]", beta, 0.0, 1.0, open_high=True)
        check_float(owner, "eps", eps, 0.0)
        check_float(owner, "weight_decay", weight_decay, 0.0)
        defaults = {"lr": lr, "rank": rank, "every": every, "scale": scale, "betas": tuple(betas), "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay, **more})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; a ``closure`` is called first, with gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group, number)
                number += 1
        return loss

    def _move(self, p: Tensor, grad: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[p]
        done = int(state["step"]) if state else 0
        if not state:
            state["step"] = torch.zeros(())
        p.mul_(1 - group["lr"] * group["weight_decay"])
        if p.dim() != 2 or min(p.shape) <= group["rank"]:
            p.add_(self._adam(state, grad, group), alpha=-group["lr"])
            return
        turned = p.shape[0] > p.shape[1]  # tall: P from the right, that is, on rows of the transposed matrix
        grad = grad.t() if turned else grad
        if done % group["every"] == 0:
            self._choose(state, grad, group, (number, done))
        update = self._back(state, self._adam(state, self._project(state, grad), group), grad)
        p.add_(update.t() if turned else update, alpha=-group["lr"] * group["scale"])

    def _adam(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> Tensor:
        """AdamW's direction for a gradient, as in :class:`torch.optim.AdamW`."""
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
            state["age"] = 0
        first, second = group["betas"]
        state["step"] += 1
        state["age"] += 1
        state["exp_avg"].lerp_(grad, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
        bias1, bias2 = 1 - first ** state["age"], 1 - second ** state["age"]
        return (state["exp_avg"] / bias1) / ((state["exp_avg_sq"] / bias2).sqrt() + group["eps"])

    def _choose(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any], counters: tuple[int, int]) -> None:
        raise NotImplementedError

    def _project(self, state: dict[str, Any], grad: Tensor) -> Tensor:
        raise NotImplementedError

    def _back(self, state: dict[str, Any], update: Tensor, grad: Tensor) -> Tensor:
        raise NotImplementedError


class GaLore(_ProjectedAdamW):
    """AdamW on gradients seen through their leading singular vectors.

    ``P``: the ``rank`` left singular vectors of the gradient with the largest singular values, every ``every`` steps; moments
    go on through changes of ``P``. ``W <- (1 - lr weight_decay) W - lr scale P AdamW(P' G)``. Parameters that are no
    matrices, or have at most ``rank`` rows or columns, get plain AdamW; put embeddings and heads into a group with a large
    ``rank`` to exempt them.

    Args:
        params: Tensors, or groups of them, which may have options of their own.
        lr: Learning rate.
        rank: Of the subspace.
        every: Steps between changes of the subspace.
        scale: Factor on the steps of projected matrices (``alpha`` in the paper).
        betas: AdamW's averaging coefficients.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay.

    Raises:
        ValueError: an option out of range.

    Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv 2403.03507,
    algorithm 2; defaults as in its published code.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        rank: int = 128,
        every: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, rank, every, scale, betas, eps, weight_decay)

    def _choose(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any], counters: tuple[int, int]) -> None:
        left = torch.linalg.svd(grad.float() if grad.dtype.itemsize < 4 else grad, full_matrices=False).U
        state["projection"] = left[:, : group["rank"]].to(grad.dtype).contiguous()

    def _project(self, state: dict[str, Any], grad: Tensor) -> Tensor:
        return state["projection"].t() @ grad

    def _back(self, state: dict[str, Any], update: Tensor, grad: Tensor) -> Tensor:
        return state["projection"] @ update


class Grass(_ProjectedAdamW):
    """GRASS: AdamW on a few rows of every gradient (columns of tall matrices), chosen by their norms.

    Every ``every`` steps ``rank`` rows are chosen, and the moments begin anew. With ``sample="top"`` those of the largest norm;
    with ``"norm"`` rows drawn with replacement with chances ``q`` in proportion to their norms and multiplied by
    ``1 / sqrt(rank q)``, so that ``P P' G`` is the gradient on average. ``W`` moves by ``-lr scale P AdamW(P' G)``: only the
    chosen rows do, and no dense projection is stored. Equal seeds and gradients give equal choices, so replicas with averaged
    gradients stay equal.

    Args:
        params: Tensors, or groups of them, which may have options of their own.
        lr: Learning rate.
        rank: Rows that are chosen.
        every: Steps between choices.
        scale: Factor on the steps of projected matrices.
        sample: See above.
        betas: AdamW's averaging coefficients.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, of all rows.
        seed: Of ``sample="norm"``.

    Raises:
        ValueError: an option out of range.

    Source: Muhamed et al., "Grass: Compute Efficient Low-Memory LLM Training with Structured Sparse Gradients",
    arXiv 2406.17660.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        rank: int = 128,
        every: int = 200,
        scale: float = 0.25,
        sample: Literal["top", "norm"] = "top",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_choice("Grass", "sample", sample, ("top", "norm"))
        check_int("Grass", "seed", seed, 0)
        super().__init__(params, lr, rank, every, scale, betas, eps, weight_decay, sample=sample, seed=seed)

    def _choose(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any], counters: tuple[int, int]) -> None:
        norms, rank = grad.norm(dim=1).double(), group["rank"]
        if group["sample"] == "top":
            rows = norms.topk(rank).indices.sort().values
            state["factors"] = torch.ones(rank, 1, dtype=grad.dtype, device=grad.device)
        else:
            chances = (norms / norms.sum()).nan_to_num(1 / len(norms)).cpu()
            generator = torch.Generator().manual_seed(key(group["seed"], *counters))
            rows = torch.multinomial(chances, rank, replacement=True, generator=generator)
            state["factors"] = (1 / (rank * chances[rows]).sqrt()).to(grad)[:, None]
        state["rows"] = tuple(
            rows.tolist()
        )  # numbers, since optimizers cast tensors of their state when they are loaded
        state.pop("exp_avg", None)

    def _project(self, state: dict[str, Any], grad: Tensor) -> Tensor:
        return state["factors"] * grad[self._rows(state, grad)]

    def _back(self, state: dict[str, Any], update: Tensor, grad: Tensor) -> Tensor:
        return torch.zeros_like(grad).index_add_(0, self._rows(state, grad), state["factors"] * update)

    def _rows(self, state: dict[str, Any], grad: Tensor) -> Tensor:
        return torch.tensor(state["rows"], device=grad.device)
