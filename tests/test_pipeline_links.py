"""Links of pipelines: Clapping, AQ-SGD and direct compression against what defines them; lazy sampling."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import clapping
from benchmarks.clapping import Result
from lightning_dopt.compress import EF21, Compressor, Identity, Int4, Int8, LowRank, RandK, TopK
from lightning_dopt.pipeline import (
    AQSGD,
    Clapping,
    Direct,
    LazyClock,
    LazyLoader,
    Link,
    SimulatedPipeline,
    cut,
    gpipe,
    interleaved,
    one_f_one_b,
)
from lightning_dopt.pipeline.links import Note, Spec

TOP = TopK(0.1)
STAGES = 4


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(STAGES - 1)), nn.Linear(16, 1))


def batch(seed: int, n: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 16, generator=g), torch.randn(n, 1, generator=g)


def loss(y: Tensor, part: Any) -> Tensor:
    return nn.functional.mse_loss(y, part[1])


def pipeline(model: nn.Module, link: Link | None, back: Link | None = None, microbatches: int = 2) -> SimulatedPipeline:
    program = one_f_one_b(STAGES, microbatches)
    return SimulatedPipeline(cut(model, STAGES), program, loss, activation_link=link, gradient_link=back or link)


def lazily(probability: float, steps: int) -> list[tuple[int, bool]]:
    """The number of the batch of each step, and whether it is a new one."""
    clock, number, found = LazyClock(probability, seed=3), -1, []
    for t in range(steps):
        number += clock.fresh(t)
        found.append((number, clock.fresh(t)))
    return found


def train(p: SimulatedPipeline, probability: float = 0.5, steps: int = 20, lr: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD(p.parameters(), lr=lr, momentum=0.9, dampening=0.9)
    losses = []
    for number, fresh in lazily(probability, steps):
        optimizer.zero_grad()
        samples = torch.arange(8) + 8 * number
        losses.append(float(p.step(batch(number), fresh, samples)))
        optimizer.step()
    return losses


# ---------------------------------------------------------------------- the properties of the algorithm


@pytest.mark.parametrize(
    "link", [Clapping("FC", 0.5, Identity()), Clapping("FU", 0.5, Identity()), AQSGD(Identity()), Direct(Identity())]
)
def test_the_identity_equals_no_link(link: Link) -> None:
    plain, linked = train(pipeline(net(), None)), train(pipeline(net(), link))
    assert linked == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("codec", [TOP, Int4(), RandK(0.2)])
def test_fu_with_fresh_samples_only_is_uncompressed(codec: Compressor) -> None:
    assert train(pipeline(net(), Clapping("FU", 1.0, codec)), 1.0) == train(pipeline(net(), None), 1.0)


@pytest.mark.parametrize("variant", ["FC", "FU"])
@pytest.mark.parametrize("codec", [TOP, Int4(stochastic=True), RandK(0.2)])
def test_both_ends_remember_the_same(variant: Any, codec: Compressor) -> None:
    p = pipeline(net(), Clapping(variant, 0.5, codec))
    train(p)
    for boundary, what in itertools.product(range(STAGES - 1), ("activation", "gradient")):
        one, other = (p.runners[r].memories[what, 0, boundary] for r in (boundary, boundary + 1))
        assert one.keys() == other.keys() == {0, 1}, "one buffer per micro-batch"
        assert all(one[m].equal(other[m]) for m in one)
        assert one[0].data_ptr() != other[0].data_ptr()


def send(
    link: Link, x: Tensor, sender: dict[int, Tensor], receiver: dict[int, Tensor], note: Note
) -> tuple[Tensor, int]:
    spec = Spec(tuple(x.shape), x.dtype, x.device)
    expected = link.payload_bytes(spec, receiver, note)
    payload = link.encode(x, sender, note)
    assert len(payload) == expected, "a receiver knows the length beforehand"
    return link.decode(payload, spec, receiver, note), len(payload)


def test_the_error_contracts_while_the_batch_stays() -> None:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    link = Clapping("FC", 0.5, TOP, init="zero")
    ends: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
    delta = TOP.contraction(x.shape)
    assert delta is not None
    error = x.norm()
    for t in range(12):
        got, nbytes = send(link, x, *ends, Note(0, t == 0))
        assert nbytes == TOP.payload_bytes(x.shape)
        assert (got - x).norm() <= (1 - delta) ** 0.5 * error * 1.0001
        error = (got - x).norm()
    assert error < 1e-5, "ten messages of a tenth of the elements each are all of them"
    unpacked, _ = send(Clapping("FU", 0.5, TOP), x, {}, {}, Note(0, True))
    assert unpacked.equal(x)


def test_unbiased_codecs_are_scaled_to_contractions() -> None:
    """RandK multiplies by 1 / 0.2; unscaled, the error would grow fourfold per step in the mean."""
    x = torch.randn(200, generator=torch.Generator().manual_seed(0))
    link = Clapping("FC", 0.5, RandK(0.2), init="zero")
    ends: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
    errors = [float((send(link, x, *ends, Note(0, False, seed=t))[0] - x).norm()) for t in range(20)]
    assert EF21(RandK(0.2)).scale(x.shape) == pytest.approx(0.2)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * float(x.norm())


@pytest.mark.parametrize("probability", [0.2, 0.5])
def test_traffic(probability: float) -> None:
    """FC sends the codec's bytes after the first step, FU the dense ones for new batches, too."""
    shape = (4, 16)
    dense, packed = 4 * 16 * 4, TOP.payload_bytes(shape)
    steps = lazily(probability, 30)
    for variant, count in (("FC", 1), ("FU", sum(fresh for _, fresh in steps))):
        p = pipeline(net(), Clapping(variant, probability, TOP))  # type: ignore[arg-type]
        train(p, probability, 30)
        sent = p.ledgers[1].entries  # an inner rank: one activation and one gradient per micro-batch
        assert sent["activations"].bytes == sent["gradients"].bytes == 2 * (count * dense + (30 - count) * packed)


def test_memory_does_not_grow_with_the_data_unlike_that_of_aqsgd() -> None:
    def held(link: Link, steps: int) -> int:
        p = pipeline(net(), link, Direct(Int8()))
        train(p, 1.0, steps)
        return sum(t.numel() for t in p.runners[1].memories["activation", 0, 1].values())

    for variant in ("FC", "FU"):
        link = Clapping(variant, 1.0, TOP)  # type: ignore[arg-type]
        assert held(link, 2) == held(link, 9) == 8 * 16
    assert held(AQSGD(TOP), 2) == 2 * 8 * 16
    assert held(AQSGD(TOP), 9) == 9 * 8 * 16


def test_another_shape_is_sent_densely() -> None:
    for variant in ("FC", "FU"):
        link = Clapping(variant, 0.5, TOP)  # type: ignore[arg-type]
        ends: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        for rows in (8, 8, 5):
            x = torch.randn(rows, 16)
            got, nbytes = send(link, x, *ends, Note(0, False))
        assert got.equal(x)
        assert nbytes == x.nbytes


def test_aqsgd_is_its_recursion_by_sample() -> None:
    link, codec = AQSGD(Int4()), Int4()
    ends: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    first, nbytes = send(link, x[:4], *ends, Note(0, True, torch.tensor([7, 8, 9, 10])))
    assert first.equal(x[:4])
    assert nbytes == 4 * 16 * 4
    y = x + 0.1
    got, nbytes = send(link, y[2:], *ends, Note(1, False, torch.tensor([9, 10, 11, 12])))
    assert nbytes == 2 * 16 * 4 + codec.payload_bytes((2, 16))
    assert got[:2].equal(x[2:4] + codec.roundtrip(y[2:4] - x[2:4])), "samples 9 and 10 in another micro-batch"
    assert got[2:].equal(y[4:])


# ---------------------------------------------------------------------- the same by one autograd function


class Boundary(torch.autograd.Function):
    """Difference compression in both directions inside an unsplit model, written down once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: dict[str, Any]) -> Tensor:
        ctx.state = state
        return Boundary.move(x, state, "x")

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return Boundary.move(g, ctx.state, "g"), None

    @staticmethod
    def move(t: Tensor, state: dict[str, Any], name: str) -> Tensor:
        if state["direct"]:
            return state["codec"].roundtrip(t)
        new = (
            t.clone()
            if state["dense"] or name not in state
            else state[name] + state["codec"].roundtrip(t - state[name])
        )
        state[name] = new
        return new.clone()


@pytest.mark.parametrize("link", [Clapping("FC", 0.3, TOP), Clapping("FU", 0.3, TOP), Direct(Int4())], ids=str)
def test_pipeline_equals_boundaries_inside_the_model(link: Link) -> None:
    model = net()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, dampening=0.9)
    states: list[dict[str, Any]] = [{"codec": link.codec, "direct": type(link) is Direct} for _ in range(STAGES - 1)]
    expected = []
    for number, fresh in lazily(0.3, 25):
        x, y = batch(number)
        for k, stage in enumerate(reference):
            x = stage(x)
            if k < STAGES - 1:
                states[k]["dense"] = fresh and getattr(link, "variant", "") == "FU"
                x = Boundary.apply(x, states[k])
        value = loss(x, (None, y))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        expected.append(float(value.detach()))
    assert train(pipeline(model, link, microbatches=1), 0.3, 25) == expected


def test_resumed_run_is_the_same_run() -> None:
    link = Clapping("FC", 0.4, Int4(stochastic=True))
    steps = lazily(0.4, 12)

    def go(p: SimulatedPipeline, part: list[tuple[int, bool]]) -> list[float]:
        return [float(p.step(batch(number), fresh)) for number, fresh in part]

    whole = pipeline(net(), link)
    expected = go(whole, steps)
    first = pipeline(net(), link)
    go(first, steps[:5])
    second = pipeline(net(), link)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert go(second, steps[5:]) == expected[5:]
    assert go(pipeline(net(), link), steps[5:]) != expected[5:], "the memories matter"


def test_codecs_for_matrices() -> None:
    """LowRank sees activations in their own shape: a batch whose rows are multiples of one vector needs rank 1."""
    x = torch.randn(8, 1) * torch.randn(1, 16)
    got, nbytes = send(Direct(LowRank(1)), x, {}, {}, Note(0))
    assert nbytes == 4 * (8 + 16)
    torch.testing.assert_close(got, x)


# ---------------------------------------------------------------------- lazy sampling


def test_clock_has_the_rate_and_geometric_lengths() -> None:
    for p in (0.1, 0.5):
        fresh = [LazyClock(p, 5).fresh(t) for t in range(20000)]
        assert fresh[0]
        assert sum(fresh) == pytest.approx(20000 * p, abs=3 * (20000 * p * (1 - p)) ** 0.5)
        starts = [t for t, f in enumerate(fresh) if f]
        lengths = torch.tensor([b - a for a, b in itertools.pairwise(starts)], dtype=torch.float64)
        assert float(lengths.mean()) == pytest.approx(1 / p, rel=0.05)
        assert float(lengths.var()) == pytest.approx((1 - p) / p**2, rel=0.15)
    assert [LazyClock(0.5, 1).fresh(t) for t in range(50)] == [LazyClock(0.5, 1).fresh(t) for t in range(50)]
    assert [LazyClock(0.5, 1).fresh(t) for t in range(50)] != [LazyClock(0.5, 2).fresh(t) for t in range(50)]


def test_loader_repeats_objects_and_knows_its_length() -> None:
    loader = LazyLoader([object() for _ in range(10)], 0.3, seed=2)
    step = 0
    for _ in range(3):
        length, seen = len(loader), []
        for item in loader:
            assert loader.fresh == (not seen or LazyClock(0.3, 2).fresh(step))
            assert loader.fresh == (not seen or item is not seen[-1])
            assert len(loader) == length
            seen.append(item)
            step += 1
        assert len(seen) == length > 10
        assert list(dict.fromkeys(seen)) == loader.loader, "each once or more, in order"
    assert list(LazyLoader([1, 2, 3], 1.0)) == [1, 2, 3]
    assert list(LazyLoader([], 0.5)) == []
    assert len(LazyLoader([], 0.5)) == 0


def test_loader_is_resumable_in_the_middle() -> None:
    whole = LazyLoader(range(6), 0.4, seed=1)
    expected = [list(whole), list(whole)]
    length = len(LazyLoader(range(6), 0.4, seed=1))
    for stop in (0, 1, 4, length - 1, length):
        first = LazyLoader(range(6), 0.4, seed=1)
        head = list(itertools.islice(first, stop))
        second = LazyLoader(range(6), 0.4, seed=1)
        second.load_state_dict(first.state_dict())
        assert len(second) == length or stop == 0
        assert head + list(second) == expected[0]
        assert list(second) == expected[1]


def test_the_link_makes_its_loader() -> None:
    assert list(Clapping("FU", 0.3, TOP).lazy(range(5), seed=4)) == list(LazyLoader(range(5), 0.3, seed=4))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clapping("FX", 0.5, TOP), r"Clapping\(variant='FX'\)"),  # type: ignore[arg-type]
        (lambda: Clapping("FU", 0.0, TOP), r"Clapping\(probability=0.0\): must be a number in \(0, 1\]"),
        (lambda: Clapping("FU", 0.5, EF21(TOP)), r"Clapping\(codec=EF21.*links have memories of their own"),  # type: ignore[arg-type]
        (lambda: Clapping("FU", 0.5, TOP, init="zero"), r"Clapping\(init='zero'\): needs variant='FC'"),
        (lambda: LazyLoader([1], 1.5), r"LazyLoader\(probability=1.5\)"),
        (lambda: pipeline(net(), AQSGD(TOP), Direct(TOP)).step(batch(0)), r"AQSGD: needs the number"),
        (lambda: pipeline(net(), TOP), r"SimulatedPipeline\(activation_link=TopK\(.*must be a link"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        make()


# ---------------------------------------------------------------------- randomness inside stages


def test_masks_are_alike_in_every_schedule_and_while_a_batch_is_repeated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3)) for _ in range(3)), nn.Linear(16, 1)
    ).double()
    x, y = (t.double() for t in batch(0))
    losses = []
    for program in (gpipe(4, 4), one_f_one_b(4, 4), interleaved(2, 4)):
        p = SimulatedPipeline(cut(copy.deepcopy(model), at=[1, 2, 3]), program, loss, seed=5)
        before = torch.get_rng_state()
        losses.append([float(p.step((x, y), fresh)) for fresh in (True, False, True)])
        assert torch.get_rng_state().equal(before), "the global generator is left alone"
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    assert losses[0] == pytest.approx(losses[2], abs=1e-12)
    assert losses[0][0] == losses[0][1], "the same batch, the same masks"
    assert losses[0][0] != losses[0][2], "a new batch, new ones"
    p = SimulatedPipeline(cut(copy.deepcopy(model), at=[1, 2, 3]), gpipe(4, 4), loss, seed=6)
    assert float(p.step((x, y))) != losses[0][0], "another seed, others"


# ---------------------------------------------------------------------- an experiment


@pytest.mark.parametrize("seed", [0, 1])
def test_what_the_links_do_to_training(seed: int) -> None:
    """Teacher and student on four ranks, a tenth of each row sent, equal seeds: none < FU < FC < direct.

    The margins are a third of what was measured. Repeating batches is what costs FU, its compression is almost free.
    """

    def run(name: str, probability: float) -> Result:
        return clapping.train(name, probability, clapping.CODECS["top"], seed, 300)

    none, lazy, direct = run("none", 1.0), run("none", 0.5), run("direct", 1.0)
    fu, fc = run("FU", 0.5), run("FC", 0.1)
    assert none.error < fu.error < 1.4 * none.error
    assert fu.error == pytest.approx(lazy.error, rel=0.2)
    assert 1.2 * fu.error < fc.error < direct.error / 1.3
    assert fc.share == pytest.approx(direct.share, abs=0.01)
    dense = sum(LazyClock(0.5, seed).fresh(step) for step in range(300)) / 300
    assert fu.share == pytest.approx(dense + (1 - dense) * direct.share, abs=1e-9)
    assert fu.memory == fc.memory == 2 * 2 * 3 * 32 * 32 * 4, "both ends, both directions, three links, one batch"
