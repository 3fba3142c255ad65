"""Matrices sent as two thin factors (PowerSGD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.compress._thin import add_products, times, transposed_times
from lightning_dopt.compress._wire import as_bytes, check_length, section
from lightning_dopt.compress.base import Compressor, ManyRounds, Room, Rounds, Shape, join, numel, split

_EXTRA, _ITERATIONS = 8, 4  # columns beyond the rank, and rounds, that measure how good a rank would be


class LowRank(Compressor):
    """PowerSGD: a matrix ``M`` (a x b) is sent as ``P`` (a x r, orthonormal columns) and ``Q = M^T P`` (b x r).

    The receiver has ``P Q^T = P P^T M``, an orthogonal projection, so what is not sent is never longer than ``M``. A
    tensor of two or more dimensions counts as the matrix ``(shape[0], rest)`` and takes ``4 r (a + b)`` bytes with
    ``r = min(rank, a, b)``. Vectors, and matrices with ``(a + b) r min_ratio >= a b``, are sent whole in ``4 d`` bytes.

    *One message* (:meth:`encode`): ``P`` spans ``M Q0`` with a Gaussian ``Q0`` drawn from the seed.

    *Sums* (:meth:`rounds`, :meth:`rounds_many`): ``sum P_i`` and then ``sum Q_i`` over the ranks give the mean of the
    projections onto one common subspace, and ``Q0`` is the mean ``Q`` of the call before (warm start): a power
    iteration that follows the leading subspace of the mean. ``own`` is the rank's own projection ``P P^T M_i`` rather
    than the mean, so that an error memory keeps an orthogonal projection of its own input. With the mean in its place
    the residuals would perform a random walk under unequal data.

    Source: Vogels, Karimireddy, Jaggi, "PowerSGD", NeurIPS 2019, algorithm 1; own residual instead of its line 14.

    Args:
        rank: ``r``, at least 1.
        min_ratio: smallest worthwhile compression; a matrix is sent whole unless ``(a + b) r min_ratio < a b``.

    Raises:
        ValueError: ``rank`` below 1 or ``min_ratio`` not positive.
    """

    linear = True
    sums_per_message = 2
    layerwise = True

    def __init__(self, rank: int, min_ratio: float = 2.0) -> None:
        self.rank = check_int("LowRank", "rank", rank, 1)
        self.min_ratio = check_float("LowRank", "min_ratio", min_ratio, 0.0, open_low=True)

    def factors(self, shape: Shape) -> tuple[int, int, int] | None:
        """``(a, b, r)`` of a tensor that is sent as two factors, ``None`` if it is sent whole."""
        if len(shape) < 2 or not numel(shape):
            return None
        a, b = int(shape[0]), numel(shape[1:])
        r = min(self.rank, a, b)
        return (a, b, r) if (a + b) * r * self.min_ratio < a * b else None

    def payload_bytes(self, shape: Shape) -> int:
        """``4 r (a + b)``, or ``4 d`` for what is sent whole."""
        matrix = self.factors(shape)
        return 4 * matrix[2] * (matrix[0] + matrix[1]) if matrix else 4 * numel(shape)

    def contraction(self, shape: Shape) -> float:
        """``r / min(a, b)`` in the mean over the seed, 1 for what is sent whole; of :meth:`encode`, not of warm starts.

        With ``A`` the squared nonzero singular values of ``M`` (n of them) and ``H`` an orthonormal basis of an n x r
        Gaussian matrix, the energy sent is ``tr((H^T A H)^-1 H^T A^2 H)``. As ``H^T A^2 H >= (H^T A H)^2``, it is at
        least ``tr(H^T A H)``, the energy in a uniformly random subspace, whose mean is ``r / n`` of all.
        A warm start is no longer independent of ``M``: then all that holds for every ``M`` is that nothing expands.
        """
        matrix = self.factors(shape)
        return matrix[2] / min(matrix[0], matrix[1]) if matrix else 1.0

    def encode(self, x: Tensor, seed: int = 0) -> Tensor:
        """``P`` then ``Q``, row-major float32.

        Both are scaled by the root of the largest element (``P`` is orthonormal up to that factor), so that any matrix
        of finite elements survives.
        """
        flat = x.detach().to(torch.float32).contiguous()  # products round differently in another layout
        matrix = self.factors(x.shape)
        if matrix is None:
            return as_bytes(flat)
        a, b, r = matrix
        m = flat.reshape(a, b)
        low, high = m.aminmax()
        largest = torch.maximum(-low, high).clamp_(min=torch.finfo(torch.float32).tiny)
        if 2.0**-32 <= float(largest) <= 2.0**32:  # no sum on the way leaves float32, and a copy of the matrix is saved
            unit = torch.ones_like(largest)
        else:
            unit, m = largest, m / largest
        p = orthonormal(times([m], _gaussian(b, r, torch.Generator().manual_seed(seed), m)[None]))
        q = transposed_times([m], p)
        root = largest.sqrt()
        return as_bytes(torch.cat([p.mul(root).reshape(-1), q.mul(unit / root).reshape(-1)]))

    def decode_add(self, payload: Tensor, out: Tensor, weight: float = 1.0, seed: int = 0) -> None:
        """Add ``weight P Q^T``; needs no seed.

        Raises:
            ValueError: the message does not have the length that the shape of ``out`` calls for.
        """
        check_length(self, payload, out.shape)
        matrix = self.factors(out.shape)
        target = out.detach()
        values = section(payload, 0, payload.numel() // 4, torch.float32)
        values = values.to(torch.promote_types(out.dtype, torch.float32))
        if matrix is None:
            target.add_(values.view(out.shape), alpha=weight)
            return
        a, b, r = matrix
        p, q = values[: a * r].view(1, a, r), values[a * r :].view(1, b, r)
        if target.is_contiguous() and target.dtype == values.dtype:
            add_products([target.view(a, b)], p, q, weight)
        else:
            product = values.new_empty(a, b)
            add_products([product], p, q, 1.0, clear=True)
            target.add_(product.view(out.shape), alpha=weight)

    def squared_error(self, x: Tensor, seed: int = 0, scale: float = 1.0) -> Tensor:
        """That of the best approximation of this rank, towards which warm starts converge (``scale`` is 1 for low rank).

        A few iterations with more columns than the rank find the leading subspace.
        """
        matrix = self.factors(x.shape)
        if matrix is None:
            return torch.zeros((), device=x.device)
        a, b, r = matrix
        m = x.detach().reshape(a, b)
        q = _gaussian(b, min(r + _EXTRA, a, b), torch.Generator().manual_seed(seed), m)
        for _ in range(_ITERATIONS):
            p = orthonormal(m @ q)
            q = m.T @ p
        u, s, v = torch.linalg.svd(q, full_matrices=False)
        best = (p @ v[:r].T) @ (u[:, :r] * s[:r]).T
        return torch.sub(m, best, out=best).square_().sum()

    def rounds(self, x: Tensor, state: dict[str, Tensor], seed: int, size: int) -> Rounds:
        """Two sums (``P``, then ``Q``) for a matrix, else one; ``state["q"]`` (b x r) is the warm start."""
        owns, means = yield from self.rounds_many([self], [x], [state], seed, size)
        return owns[0], means[0]

    @classmethod
    def rounds_many(
        cls,
        codecs: Sequence[Compressor],
        xs: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        seed: int,
        size: int,
        room: Room | None = None,
    ) -> ManyRounds:
        """:meth:`rounds` for all tensors of a message in at most two sums; matrices of one shape and rank go together.

        The first sum holds all ``P`` and then all tensors that are sent whole, the second all ``Q`` (it is left out if
        no tensor is sent as factors). All tensors have one dtype, which is that of the sums
        and of the results (float32 for narrower ones).

        Args:
            codecs: a :class:`LowRank` for each tensor.
            xs: the tensors of this rank, which must stay as they are until the end; modified only if they are in ``room``.
            states: a warm start for each tensor: ``state["q"]`` (b x r) of a matrix. Of one with more columns the leading
                ones are used, missing ones are drawn from the seed, so that the rank may change between calls.
            seed: the same on all ranks.
            size: number of ranks in the sums.
            room: where the results go; by default new tensors.

        Yields:
            A vector to be summed over the ranks.

        Returns:
            What this rank contributed and the mean of all contributions, in the order and shapes of ``xs``.
        """
        xs = [x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in xs]
        groups = _groups(codecs, xs, states, torch.Generator().manual_seed(seed))
        factored = {i for group in groups for i in group.members}
        whole = [i for i in range(len(xs)) if i not in factored]
        if room is None:
            room = Room(_empty_like(xs), _empty_like(xs))

        first = [times(group.matrices, group.q) for group in groups] + [xs[i] for i in whole]
        vector = join(first)
        for i in whole:
            room.put(i, xs[i])
        sums = split((yield vector), first)
        for i, total in zip(whole, sums[len(groups) :], strict=True):
            torch.div(total, size, out=room.means[i])
        if not groups:
            return list(room.owns), list(room.means)

        for group, total in zip(groups, sums, strict=False):
            group.p = orthonormal(total)
            group.q = transposed_times(group.matrices, group.p)
            add_products(group.of(room.owns), group.p, group.q, room.factor or 1.0, clear=room.factor is None)
        second = [group.q for group in groups]
        for group, total in zip(groups, split((yield join(second)), second), strict=True):
            group.q = total / size
            add_products(group.of(room.means), group.p, group.q, 1.0, clear=True)
            for i, q in zip(group.members, group.q.unbind(), strict=True):
                states[i]["q"] = q
        return list(room.owns), list(room.means)


class _Group:
    """Tensors of one matrix shape under way: their ``matrices``, ``p`` (count, a, r) and ``q`` (count, b, r)."""

    matrices: list[Tensor]
    p: Tensor
    q: Tensor

    def __init__(self, members: list[int], shape: tuple[int, int]) -> None:
        self.members, self.shape = members, shape

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The members among all tensors of the message, as matrices."""
        return [tensors[i].reshape(self.shape) for i in self.members]


def _groups(
    codecs: Sequence[Compressor], xs: Sequence[Tensor], states: Sequence[dict[str, Tensor]], generator: torch.Generator
) -> list[_Group]:
    """The tensors that are sent as factors, by shape and rank, each group with the ``Q`` to begin with."""
    members: dict[tuple[int, int, int], list[int]] = {}
    for i, (codec, x) in enumerate(zip(codecs, xs, strict=True)):
        assert isinstance(codec, LowRank)
        matrix = codec.factors(x.shape)
        if matrix:
            members.setdefault(matrix, []).append(i)
    groups = []
    for (a, b, r), those in members.items():
        group = _Group(those, (a, b))
        group.matrices = group.of(xs)
        group.q = torch.stack([_start(states[i].get("q"), b, r, xs[i], generator) for i in those])
        groups.append(group)
    return groups


def orthonormal(p: Tensor) -> Tensor:
    """Orthonormal columns whose span contains the columns of ``p`` (tall, possibly batched).

    Where columns depend on each other or vanish, Householder reflections complete the basis with other directions. A
    projection onto it is still one, zero still gives zero, and a direction that is missing in one step can return in
    the next; were such columns set to zero, a warm start could never win back a lost rank.
    """
    return torch.linalg.qr(p).Q


def _start(stored: Tensor | None, b: int, r: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """The ``Q`` to begin with: the stored one with columns of unit length (the span counts), completed by Gaussian ones.

    Repeated iterations order the columns, those of the largest singular values first.
    """
    if stored is None or stored.shape[0] != b:
        return _gaussian(b, r, generator, like)
    q = stored[:, :r].to(like)
    q = q / q.norm(dim=0, keepdim=True).clamp_(min=torch.finfo(q.dtype).tiny)
    return q if q.shape[1] == r else torch.cat([q, _gaussian(b, r - q.shape[1], generator, like)], dim=1)


def _gaussian(b: int, r: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal numbers, drawn on the CPU so that every device gets the same."""
    return torch.randn(b, r, generator=generator).to(like)


def _empty_like(xs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
