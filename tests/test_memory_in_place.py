"""Messages decoded right into a memory, and low-rank sums made in place, give what the long way gives."""

from __future__ import annotations

import pytest
import torch
from test_compress import COMPRESSORS, drive, sample
from torch import Tensor

import lightning_dopt as dopt
from lightning_dopt.compress import EF21, Compressor, Difference, ErrorFeedback, LowRank, Memory, RandK, Sign, TopK
from lightning_dopt.compress import _thin as thin
from lightning_dopt.compress.base import Room


class LongErrorFeedback(ErrorFeedback):
    """Takes note of a decoded vector, as a memory with rules of its own would."""

    def sent(self, own: Tensor, state: dict[str, Tensor]) -> None:
        state["residual"].sub_(own)


class CopiedErrorFeedback(LongErrorFeedback):
    def load(self, signal: Tensor, state: dict[str, Tensor]) -> Tensor:
        return super().load(signal, state).clone()


class LongEF21(EF21):
    def sent(self, own: Tensor, state: dict[str, Tensor]) -> None:
        state["own"].add_(own)


class LongDifference(Difference):
    def sent(self, own: Tensor, state: dict[str, Tensor]) -> None:
        state["own"].add_(own)


@pytest.mark.parametrize("c", [c for c in COMPRESSORS if not c.linear], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding_with_weight_minus_one_subtracts_what_receivers_decode(c: Compressor, dtype: torch.dtype) -> None:
    x = sample("gauss", (37, 29)).to(dtype)
    payload = c.encode(x, 5)
    fast = x.clone()
    c.decode_add(payload, fast, -1.0, 5)
    assert torch.equal(fast, x - c.decode(payload, x.shape, dtype, 5))
    assert torch.equal(-fast, c.decode(payload, x.shape, dtype, 5) - x)


def state_after(codec: Memory, peers: dopt.topology.Topology, what: str, apply: dopt.apply.Apply) -> list[Tensor]:
    """Parameters and memory of four workers after some steps."""
    target = torch.randn(4, 40, 30, generator=torch.Generator().manual_seed(0))

    def backward(rank: int, parameters: dict[str, Tensor], step: int) -> None:
        for name, p in parameters.items():
            goal = target[rank] if name == "m" else target[rank, 0]
            p.grad = (p.detach() - goal) * (1.0 + 0.1 * step)

    delta = what == "parameters" and peers.is_mean(4)
    sync = dopt.Sync(what=what, codec=codec, peers=peers, apply=apply, signal="delta" if delta else "value")
    start = lambda rank: {"m": torch.zeros(40, 30), "v": torch.zeros(30)}  # noqa: E731
    run = dopt.Simulation(dopt.Plan([sync]), 4, start, backward, lambda ps: torch.optim.SGD(ps, lr=0.1)).run(6)
    states = [lane.channel.memory_state for e in run.engines for r in e._all_runners() for lane in r.lanes]
    return [run.stacked("m"), run.stacked("v"), *(t for s in states for t in s.values())]


@pytest.mark.parametrize(
    ("short", "long", "peers", "what"),
    [
        (ErrorFeedback, LongErrorFeedback, dopt.Complete(), "gradients"),
        (ErrorFeedback, LongErrorFeedback, dopt.Complete(), "parameters"),
        (EF21, LongEF21, dopt.Complete(), "gradients"),
        (Difference, LongDifference, dopt.Ring(), "parameters"),
    ],
)
@pytest.mark.parametrize("c", [TopK(0.05), Sign(), dopt.Int8(), RandK(0.3), LowRank(2)], ids=repr)
def test_memories_hold_the_same_either_way(
    short: type[Memory], long: type[Memory], peers: dopt.topology.Topology, what: str, c: Compressor
) -> None:
    fast, slow = (state_after(kind(c), peers, what, dopt.Blocking()) for kind in (short, long))
    for a, b in zip(fast, slow, strict=True):
        if c == LowRank(2):  # a sum of products that begins with the residual rounds differently
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(a, b)
    assert any(bool(t.any()) for t in fast[2:])


def test_a_message_in_flight_is_not_changed_by_the_next() -> None:
    kinds = (ErrorFeedback, CopiedErrorFeedback)  # of the second nothing can be changed
    fast, slow = (state_after(k(LowRank(2)), dopt.Complete(), "parameters", dopt.OneRound()) for k in kinds)
    for a, b in zip(fast, slow, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("r", [1, 3, 4, 5, 8])
def test_thin_products_are_products(r: int) -> None:
    g = torch.Generator().manual_seed(r)
    m, p, q = (torch.randn(2, *shape, generator=g).double() for shape in ((70, 50), (70, r), (50, r)))
    torch.testing.assert_close(thin.times(list(m), q), m @ q)
    torch.testing.assert_close(thin.transposed_times(list(m), p), m.mT @ p)
    for rows in (1 << 18, 500):  # whole, and ten rows at a time
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(thin, "_ROWS", rows)
            added, fresh = m.clone(), torch.full_like(m, 7.0)
            thin.add_products(list(added), p, q, -2.0)
            thin.add_products(list(fresh), p, q, 3.0, clear=True)
        torch.testing.assert_close(added, m - 2.0 * p @ q.mT)
        torch.testing.assert_close(fresh, 3.0 * p @ q.mT)


def test_lowrank_leaves_the_residual_in_place_of_the_signal() -> None:
    xs = [sample("gauss", s, k).double() for k, s in enumerate([(30, 20), (7,), (30, 20)])]
    ((owns, means), *_), _ = drive([LowRank.rounds_many([LowRank(2)] * 3, xs, [{}, {}, {}], 3, 1)])
    places = [x.clone() for x in xs]
    room = Room([torch.full_like(x, torch.nan) for x in xs], places, -1.0)
    ((_, other), *_), _ = drive([LowRank.rounds_many([LowRank(2)] * 3, places, [{}, {}, {}], 3, 1, room)])
    for x, own, mean, place, there in zip(xs, owns, means, places, other, strict=True):
        assert torch.equal(mean, there)
        torch.testing.assert_close(place, x - own, atol=1e-12, rtol=1e-12)
