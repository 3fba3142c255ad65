"""Compressed collectives of fully sharded training, on gloo: exact where they must be, packed as claimed, unbiased."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
from torch import Tensor, nn
from trainer_tools import on_ranks

from lightning_dopt import Int4, Int8, sharded
from lightning_dopt.compress import (
    Compressor,
    DCTTopK,
    ErrorFeedback,
    Identity,
    LowRank,
    RandK,
    RandomShift,
    TopK,
)
from lightning_dopt.sharded import ShardCodecs
from lightning_dopt.sharded.message import Message

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(fsdp, "FSDPModule", None), "set_custom_all_gather"),
    reason="fully_shard takes collectives of others since torch 2.9",
)
WIDTHS = (6, 10, 3)  # 3 does not divide by 2: the last share is padded


class Net(nn.Module):
    """Two matrices with biases in a unit each; a matrix and a vector of its own in the root."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.first, self.second = nn.Linear(a, b), nn.Linear(b, c)
        self.mix, self.gain = nn.Parameter(torch.randn(c, c)), nn.Parameter(torch.randn(c))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) @ self.mix * self.gain


def sharded_net(seed: int = 0, mesh: Any = None, **options: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    net = Net()
    for part in (net.first, net.second):
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh)


def grid(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))


def full(tensors: Any) -> list[Tensor]:
    return [t.full_tensor().detach().clone() for t in tensors]


def watch_first(net: Any, kept: dict[str, Any]) -> None:
    """Keep the first unit's weights as forward sees them, and the gradient of its output."""

    def after(module: Any, _: Any, out: Tensor) -> None:
        kept.update(seen=[module.weight.detach().clone(), module.bias.detach().clone()])
        out.register_hook(lambda g: kept.update(slope=g.clone()))

    net.first.register_forward_hook(after, prepend=True)


def gradients(net: Any, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    net(x).square().mean().backward()
    return full(p.grad for p in net.parameters())


@contextmanager
def wire() -> Iterator[list[tuple[str, torch.dtype, int, int]]]:
    """Name, dtype, bytes of this rank's input and group size of every collective that carries tensors."""
    seen: list[tuple[str, torch.dtype, int, int]] = []
    names = [n for n in ("all_gather_single", "all_gather_into_tensor", "all_to_all_single") if hasattr(dist, n)]
    originals = {name: getattr(dist, name) for name in names}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(out: Tensor, own: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((name, own.dtype, own.numel() * own.itemsize, kwargs["group"].size()))
            return function(out, own, *args, **kwargs)

        return call

    try:
        for name, function in originals.items():
            setattr(dist, name, watched(name, function))
        yield seen
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


# ---------------------------------------------------------------------- one message


def test_a_message_holds_exact_elements_first() -> None:
    parts = [(4, False), (2, True), (3, False), (1, True)]
    message = Message(Int8(block=4), parts, torch.float32)
    share = torch.tensor([1.0, 2.0, 3.0, 127.0, 0.1, 0.2, -254.0, 0.0, 2.0, 0.3])
    payload = message.pack(share, 0)
    assert payload.dtype == torch.uint8
    assert payload.numel() == message.nbytes == 3 * 4 + 7 + 2 * 4
    assert torch.equal(payload[:12].view(torch.float32), share[[4, 5, 9]])
    assert torch.equal(payload[12:20].view(torch.float32), torch.tensor([1.0, 2.0]))
    assert payload[20:].view(torch.int8).tolist() == [1, 2, 3, 127, -127, 0, 1]
    out = torch.ones(10)
    message.unpack_add(payload, out, 0)
    assert torch.equal(out - 1, (share + 1) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_messages_without_one_kind(dtype: torch.dtype) -> None:
    share = torch.arange(6, dtype=dtype)
    for exact in (True, False):
        message = Message(Identity(), [(2, exact), (4, exact)], dtype)
        out = torch.zeros(6, dtype=dtype)
        message.unpack_add(message.pack(share, 0), out, 0)
        assert torch.equal(out, share)
        assert message.nbytes == 6 * (dtype.itemsize if exact else 4)


# ---------------------------------------------------------------------- the random shift


def test_random_shift_by_hand() -> None:
    c = RandomShift(block=2)
    x = torch.tensor([126.5, -63.25, 0.0, 0.0, 253.0])
    payload = c.encode(x, 5)
    assert torch.equal(payload[:12].view(torch.float32), torch.tensor([1.0, 0.0, 2.0]))
    shift = torch.rand(3, generator=torch.Generator().manual_seed(5)) - 0.5
    codes = payload[12:].view(torch.int8)
    expected = torch.stack([126.5 - shift[0], -63.25 - shift[0], shift[1] * 0, shift[1] * 0, 126.5 - shift[2]]).round()
    assert codes.tolist() == expected.tolist()
    decoded = c.decode(payload, x.shape, seed=5)
    torch.testing.assert_close(decoded, torch.tensor([1.0, 1, 0, 0, 2]) * (codes + shift[[0, 0, 1, 1, 2]]))


@pytest.mark.parametrize("bits", [4, 8])
def test_random_shift_errs_by_a_twelfth_of_a_step_squared_whatever_the_value(bits: int) -> None:
    step = 1.0 / (2.0 ** (bits - 1) - 1.5)
    x = torch.cat([torch.ones(1), torch.linspace(-1, 1, 50), torch.arange(5) * step])  # grid points err as much
    draws = torch.stack([RandomShift(bits).roundtrip(x, seed) for seed in range(4000)]) - x
    assert float(draws.abs().max()) <= step / 2 * 1.001
    assert float(draws.mean(0).abs().max()) < 5 * step / math.sqrt(12 * 4000)
    torch.testing.assert_close(draws.square().mean(0) / step**2, torch.full_like(x, 1 / 12), rtol=0.08, atol=0)


def test_random_shift_attains_its_constant() -> None:
    x = torch.zeros(64)
    x[3] = -2.0
    error = sum(float((RandomShift(4).roundtrip(x, s) - x).square().sum()) for s in range(3000)) / 3000 / 4
    assert error == pytest.approx(RandomShift(4).variance((64,)), rel=0.05)


def test_random_shift_refuses() -> None:
    for bits in (3, True):
        with pytest.raises(ValueError, match=rf"^RandomShift\(bits={bits}\): must be 4 or 8$"):
            RandomShift(bits)


# ---------------------------------------------------------------------- collectives


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("codecs", [ShardCodecs(), ShardCodecs(Identity(), Identity())], ids=["none", "identity"])
def test_without_compression_nothing_changes(codecs: ShardCodecs, n: int) -> None:
    def job(rank: int) -> list[list[Tensor]]:
        x = torch.randn(5, WIDTHS[0], generator=torch.Generator().manual_seed(rank))
        plain, net = sharded_net(), sharded_net()
        codecs.attach(net)
        return [gradients(plain, x), gradients(net, x), [plain(x)], [net(x)]]

    for want, got, plain_out, out in on_ranks(job, n):
        assert torch.equal(plain_out[0], out[0])
        for a, b in zip(want, got, strict=True):
            assert torch.equal(a, b) if n == 2 else torch.allclose(a, b, rtol=1e-6, atol=1e-8)  # sums of three in order


def test_weights_and_gradients_are_the_decoded_messages() -> None:
    """Written out for two ranks: the first unit's matrix and bias, whose shares are rows 0-4 and 5-9."""
    codecs = ShardCodecs(RandomShift(block=16), Int4(block=8, stochastic=True), seed=7)

    def job(rank: int) -> dict[str, Any]:
        net = sharded_net()
        counter = codecs.attach(net)
        counter.step = 3
        before = full(net.parameters())
        kept: dict[str, Any] = {"payloads": [], "shares": []}
        pack, unpack = Message.pack, Message.unpack_add

        def spy(self: Message, share: Tensor, seed: int) -> Tensor:
            kept["shares"].append((share.clone(), seed))
            kept["payloads"].append(pack(self, share, seed))
            return kept["payloads"][-1]

        Message.pack = spy  # type: ignore[method-assign]
        watch_first(net, kept)
        x = torch.randn(5, WIDTHS[0], generator=torch.Generator().manual_seed(rank)).requires_grad_()
        with wire() as sent:
            kept["grad"] = gradients(net, x)[2:4]
        Message.pack, Message.unpack_add = pack, unpack  # type: ignore[method-assign]
        after = full(net.parameters())
        return kept | {
            "before": before[2:4],
            "backward": (x.grad, kept["slope"] @ kept["seen"][0]),
            "exact": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
            "sent": sent,
            "ledger": counter.ledger.state_dict(),
        }

    ranks = on_ranks(job)
    share = 5 * WIDTHS[0]
    for got in ranks:
        assert got["exact"]  # the shares themselves
        weight, bias = got["before"]
        rows = weight.view(2, share)
        # units in order of their first gather: root, first, second
        seeds = [ranks[r]["shares"][1][1] for r in range(2)]
        decoded = torch.cat([codecs.weights.roundtrip(rows[r], seeds[r]) for r in range(2)]).view_as(weight)
        assert torch.equal(got["seen"][0], decoded)
        torch.testing.assert_close(*got["backward"])  # the backward gather draws the same shifts
        assert not torch.equal(got["seen"][0], weight)
        assert torch.equal(got["seen"][1], bias)  # vectors travel as they are
    # The last messages of a step are the shares of the first unit's gradients but for those of the root: find them by length.
    chunks = [[(s, seed) for s, seed in got["shares"] if s.numel() == share + 5][-2:] for got in ranks]
    assert all(len(c) == 2 for c in chunks)
    for owner in range(2):
        total = sum(codecs.gradients.roundtrip(chunks[r][owner][0][:share], chunks[r][owner][1]) for r in range(2))
        exact = sum(chunks[r][owner][0][share:] for r in range(2))
        for got in ranks:
            assert torch.equal(got["grad"][0].view(2, share)[owner], total / 2)
            assert torch.equal(got["grad"][1].view(2, 5)[owner], exact / 2)


def test_bytes_on_the_wire_are_those_of_the_packed_messages() -> None:
    codecs = ShardCodecs(Int8(block=16), Int4(block=16))
    a, b, c = WIDTHS
    rows = math.ceil(c / 2)
    units = {"first": (b // 2 * a, b // 2), "second": (rows * b, rows), "root": (rows * c, rows)}  # matrix, vector

    def size(codec: Compressor, unit: str) -> int:
        return codec.payload_bytes((units[unit][0],)) + 4 * units[unit][1]

    def job(rank: int) -> tuple[Any, Any]:
        net = sharded_net()
        counter = codecs.attach(net)
        x = torch.randn(5, a, generator=torch.Generator().manual_seed(rank))
        with wire() as sent:
            gradients(net, x)
        return [s for s in sent if s[1] == torch.uint8], counter.ledger.state_dict()

    gathered = [size(codecs.weights, unit) for unit in ("root", "first", "second", "second", "first")]
    reduced = {2 * size(codecs.gradients, unit) for unit in units}
    for sent, ledger in on_ranks(job):
        assert [s[2] for s in sent if s[0].startswith("all_gather")] == gathered  # the root stays, units come twice
        exchanged = [s[2] for s in sent if s[0] == "all_to_all_single"]
        assert len(exchanged) == 3
        assert set(exchanged) == reduced
        assert ledger["weights"]["bytes"] == sum(gathered)  # n - 1 = 1 copy of its own share
        assert ledger["gradients"]["bytes"] == sum(exchanged) // 2


def test_several_backwards_of_a_step_draw_anew_and_steps_repeat() -> None:
    """Gradients of micro-batches need independent rounding; a resumed step must draw what it drew."""

    def job(rank: int) -> list[Tensor]:
        net = sharded_net()
        counter = ShardCodecs(RandomShift(4), Int4(stochastic=True)).attach(net)
        x = torch.ones(2, WIDTHS[0])
        out = [gradients(net, x)[2] for _ in range(2)]
        counter.step = 1
        out.append(net(x).detach())
        counter.step = 0
        out.append(net(x).detach())
        counter.step = 1
        return [*out, net(x).detach()]

    first, second, later, now, again = on_ranks(job)[0]
    assert not torch.equal(first, second)
    assert torch.equal(later, again)
    assert not torch.equal(later, now)


def test_two_levels_on_four_ranks() -> None:
    """Gradients in two hops, a secondary copy in each node, and replicas of the shares."""

    def job(rank: int) -> dict[str, Any]:
        x = torch.randn(5, WIDTHS[0], generator=torch.Generator().manual_seed(rank))
        out: dict[str, Any] = {}
        out["plain"] = gradients(sharded_net(), x)
        net = sharded_net()
        ShardCodecs(gradients=Identity(), hops=2, node_size=2).attach(net)
        out["two hops"] = gradients(net, x)

        net = sharded_net()
        packed = ShardCodecs(gradients=Int4(block=8, stochastic=True), hops=2, node_size=2).attach(net)
        with wire() as sent:
            gradients(net, x)
        out["hops"] = [s[2:] for s in sent if s[0] == "all_to_all_single"]
        out["hop bytes"] = packed.ledger.entries["gradients"].bytes
        draws = [gradients(net, x) for _ in range(40)]
        out["mean"] = [torch.stack(d).mean(0) for d in zip(*draws, strict=True)]
        out["deviation"] = [torch.stack(d).std(0) / math.sqrt(40) for d in zip(*draws, strict=True)]

        net = sharded_net(reshard_after_forward=2)
        counter = ShardCodecs(RandomShift(4)).attach(net)
        kept: dict[str, Any] = {}
        watch_first(net, kept)
        gradients(net, x.requires_grad_())
        out["backward"] = (x.grad.clone(), kept["slope"] @ kept["seen"][0])
        out["secondary"] = counter.ledger.entries["secondary"].bytes

        net = sharded_net(mesh=grid(2, 2))
        counter = ShardCodecs(Identity(), Identity()).attach(net)
        out["hybrid"], out["replicas"] = gradients(net, x), counter.ledger.entries["replicas"].bytes
        try:
            ShardCodecs(gradients=Int4(), hops=2, node_size=2).attach(sharded_net(mesh=grid(2, 2)))
        except ValueError as error:
            out["refused"] = str(error)
        return out

    a, b, c = WIDTHS
    for out in on_ranks(job, 4):
        for key in ("two hops", "hybrid"):
            for want, got in zip(out["plain"], out[key], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        off = sum(float((got - want).square().sum()) for want, got in zip(out["plain"], out["mean"], strict=True))
        assert off <= 1.5 * sum(float(d.square().sum()) for d in out["deviation"])  # both hops are unbiased
        unit = Message(Int4(block=8), [(math.ceil(b / 4) * a, False), (math.ceil(b / 4), True)], torch.float32).nbytes
        assert (4 * unit, 2) in out["hops"]  # to 2 ranks of the node, the shares of 2 nodes each
        assert (2 * unit, 2) in out["hops"]  # then one share to each of 2 nodes
        assert out["hop bytes"] == sum(nbytes // 2 for nbytes, _ in out["hops"])
        torch.testing.assert_close(*out["backward"])  # the secondary copy is what forward saw
        whole = [(math.ceil(b / 4) * 4, a), (math.ceil(c / 4) * 4, b)]
        assert out["secondary"] == sum(rows * (width + 1) * 4 // 2 for rows, width in whole)
        shares = [math.ceil(b / 2) * (a + 1), math.ceil(c / 2) * (b + 1), math.ceil(c / 2) * (c + 1)]
        assert out["replicas"] == sum(4 * share for share in shares)  # 2 (R - 1) / R of a share, R = 2
        assert out["refused"].startswith("ShardCodecs(hops=2): needs parameters that are sharded over all ranks")


def test_frozen_and_unused_parameters() -> None:
    def job(rank: int) -> list[Any]:
        net = sharded_net()
        net.second.bias.requires_grad_(False)
        net.first.requires_grad_(False)
        ShardCodecs(Int8(), Int8()).attach(net)
        x = torch.randn(5, WIDTHS[0], generator=torch.Generator().manual_seed(rank))
        net(x).square().mean().backward()
        had = [p.grad is not None for p in net.parameters()]
        other = sharded_net()
        ShardCodecs(Int8(), Int8()).attach(other)
        (torch.tanh(other.first(x)).sum()).backward()  # a root of its own: the rest takes no part
        return [had, [p.grad is not None for p in other.parameters()]]

    for had, other in on_ranks(job):
        assert had == [True, True, False, False, True, False]  # mix, gain, first, second
        assert other == [False, False, True, True, False, False]


def test_rounding_to_nearest_stalls_where_a_random_shift_does_not() -> None:
    """Minimise ``|w - target|^2`` on two ranks. The pinned first column fixes the step of the grid.

    Rounded to nearest, workers see only grid points: the exact shares come to rest at the border between two of them, half
    a step from the grid wherever the target is. With the shift they see the shares on average, which reach the target.
    """

    def job(rank: int) -> list[Tensor]:
        from torch.distributed.fsdp import fully_shard

        out = []
        target = torch.tensor([[127.0, 3.2], [127.0, -1.3]])
        for weights in (Int8(block=2), RandomShift(block=2)):
            net = nn.Linear(2, 2, bias=False)
            with torch.no_grad():
                net.weight.copy_(torch.tensor([[127.0, 0.0], [127.0, 0.0]]))
            fully_shard(net)
            counter = ShardCodecs(weights).attach(net)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.08)
            tail = torch.zeros(2)
            for k in range(120):
                optimizer.zero_grad()
                (net(torch.eye(2)).T - target)[:, 1].square().sum().backward()
                optimizer.step()
                counter.step = k + 1
                tail += full(net.parameters())[0][:, 1] / 60 * (k >= 60)
            out.append(tail)
        return out

    nearest, shifted = on_ranks(job)[0]
    torch.testing.assert_close(nearest, torch.tensor([3.5, -1.5]), rtol=0, atol=0.06)
    torch.testing.assert_close(shifted, torch.tensor([3.2, -1.3]), rtol=0, atol=0.1)


# ---------------------------------------------------------------------- refusals and presets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": ErrorFeedback(Int8())}, r"ShardCodecs\(weights=.*without a memory"),
        ({"gradients": "int8"}, r"ShardCodecs\(gradients='int8'\)"),
        ({"gradients": LowRank(2)}, "tensors one by one"),
        ({"gradients": DCTTopK(0.1)}, "tensors one by one"),
        ({"weights": TopK(0.1)}, "would be zero"),
        ({"weights": RandK(0.1)}, "would be zero"),
        ({"hops": 3}, r"ShardCodecs\(hops=3\): must be 1 or 2"),
        ({"hops": 2, "gradients": Int4()}, "ranks per node"),
        ({"hops": 2, "node_size": 2}, r"ShardCodecs\(hops=2, gradients=None\)"),
        ({"node_size": 2}, "no effect"),
        ({"seed": -1}, r"ShardCodecs\(seed=-1\)"),
    ],
)
def test_refused_when_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ShardCodecs(**options)
    assert "\n" not in str(caught.value)


def test_refused_for_the_number_of_ranks() -> None:
    two = ShardCodecs(gradients=Int4(), hops=2, node_size=2)
    two.check(4)
    for size in (2, 5):
        with pytest.raises(ValueError, match=rf"must divide the number of ranks, {size}, into several nodes$"):
            two.check(size)


def test_refused_modules_and_factors() -> None:
    def job(rank: int) -> list[str]:
        from torch.distributed.fsdp import fully_shard

        half = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        fully_shard(half[0])
        divided = sharded_net()
        divided.set_gradient_divide_factor(3.0)
        divided.first.set_gradient_divide_factor(3.0)
        divided.second.set_gradient_divide_factor(3.0)
        ShardCodecs(gradients=Int8()).attach(divided)
        errors = []
        for attempt in (
            lambda: ShardCodecs().attach(nn.Linear(2, 2)),
            lambda: ShardCodecs().attach(half),
            lambda: gradients(divided, torch.ones(2, WIDTHS[0])),
        ):
            with pytest.raises(ValueError, match=r"fully_shard|divide") as caught:
                attempt()
            errors.append(str(caught.value))
        return errors

    unsharded, partly, factor = on_ranks(job)[0]
    assert unsharded == "Linear: no part of it was given to fully_shard"
    assert partly == "Sequential: 1.weight is trained but in no part that was given to fully_shard"
    assert factor.startswith("set_gradient_divide_factor: compressed gradients are summed or averaged, not ")


def test_presets() -> None:
    assert sharded.qsdp() == ShardCodecs(RandomShift(8, 1024), Int8(1024, stochastic=True))
    assert sharded.qsdp(4, 256, seed=3) == ShardCodecs(RandomShift(4, 256), Int4(256, stochastic=True), seed=3)
    assert sharded.zeropp() == ShardCodecs(Int8(2048), Int4(256))
    assert sharded.zeropp(8).hops == 2
