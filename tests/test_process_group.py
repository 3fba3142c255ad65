"""What the package needs from gloo, asked of the installed version: outstanding rounds, survivors, time limits."""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from broken import Processes
from torch import Tensor

from lightning_dopt import ProcessGroupWorld, SyncError

Ranks = Callable[..., list[Any]]


def message(source: int, target: int, turn: int, length: int = 5000) -> Tensor:
    g = torch.Generator().manual_seed(10_000 * turn + 100 * source + target)
    return torch.randint(0, 256, (length,), dtype=torch.uint8, generator=g)


def rounds(world: ProcessGroupWorld, first_tag: int, order: list[int]) -> int:
    """Start one exchange with both ring neighbours per entry of ``order``, then wait for them in that order."""
    world._tag = first_tag
    peers = [(world.rank - 1) % world.size, (world.rank + 1) % world.size]
    pending = []
    for turn in range(len(order)):
        send = {j: message(world.rank, j, turn) for j in peers}
        pending.append(world.exchange(send, dict.fromkeys(peers, 5000), "ring"))
    del send
    gc.collect()
    torch.full((40_000,), 7, dtype=torch.uint8)  # would take the place of a buffer that nobody kept alive
    right = 0
    for turn in order:
        got = pending[turn].wait()
        assert sorted(got) == sorted(peers)
        right += sum(torch.equal(got[j], message(j, world.rank, turn)) for j in peers)
    return right


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_rounds_under_way_at_once_do_not_mix(ranks: Ranks, order: list[int]) -> None:
    assert ranks(rounds, 4, 0, order) == [8] * 4


def test_tags_start_again(ranks: Ranks) -> None:
    assert ranks(rounds, 4, 65534, [2, 1, 0]) == [6] * 4


def uneven(world: ProcessGroupWorld) -> list[int]:
    """A directed path 0 -> 1 -> 2 with lengths that differ by rank; rank 3 has nobody to talk to."""
    send = {world.rank + 1: message(world.rank, world.rank + 1, 0, 10 + world.rank)} if world.rank < 2 else {}
    receive = {world.rank - 1: 10 + world.rank - 1} if world.rank in (1, 2) else {}
    got = world.exchange(send, receive, "path").wait()
    for j, payload in got.items():
        assert torch.equal(payload, message(j, world.rank, 0, 10 + j))
    return [*got, world.ledger.bytes]


def test_directed_and_idle_ranks(ranks: Ranks) -> None:
    assert ranks(uneven, 4) == [[10], [0, 11], [1, 0], [0]]


def sums(world: ProcessGroupWorld) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(world.rank)
    mine = torch.randn(1001, generator=g)
    gathered = world.all_gather(mine.view(torch.uint8), "x").wait().view(torch.float32)
    return world.all_reduce(mine, "x").wait(), gathered


def test_sums_have_the_same_bits_everywhere(ranks: Ranks) -> None:
    answers = ranks(sums, 4)
    for total, gathered in answers:
        assert torch.equal(total, answers[0][0])
        torch.testing.assert_close(total, gathered.sum(0))


def between(rank: int, job: Callable[[ProcessGroupWorld], None]) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    job(ProcessGroupWorld(timeout=timedelta(seconds=1)))


def test_survivors_can_still_exchange() -> None:
    """After a rank has died, messages between the others arrive; what includes it fails at once."""

    def job(world: ProcessGroupWorld) -> None:
        world.step = 7
        if world.rank == 2:
            os._exit(3)
        time.sleep(0.5)
        other = 1 - world.rank
        for turn in range(3):
            got = world.exchange({other: message(world.rank, other, turn)}, {other: 5000}, "pair").wait()
            assert torch.equal(got[other], message(other, world.rank, turn))
        start = time.monotonic()
        with pytest.raises(SyncError, match=rf"^rank {world.rank}, step 7, sync 'all': no answer .* from some rank \("):
            world.all_reduce(torch.ones(3), "all").wait()
        with pytest.raises(SyncError, match=r"sync 'dead': no answer after .* s from rank\(s\) 2 \(.*"):
            world.exchange({2: message(0, 2, 0)}, {2: 5000}, "dead").wait()
        assert time.monotonic() - start < 2.0

    with Processes(lambda rank: between(rank, job), 3) as processes:
        ended = processes.join(20)
    assert {r: e.code for r, e in ended.items()} == {0: 0, 1: 0, 2: 3}, ended


def test_a_peer_that_does_not_answer() -> None:
    """The wait ends after ``timeout`` of the world, not of the default group."""

    def job(world: ProcessGroupWorld) -> None:
        if world.rank == 1:
            time.sleep(2.5)
            return
        world.step = 3
        start = time.monotonic()
        with pytest.raises(SyncError) as error:
            world.exchange({1: message(0, 1, 0)}, {1: 5000}, "pair").wait()
        assert 0.8 < time.monotonic() - start < 2.2
        assert re.fullmatch(
            r"rank 0, step 3, sync 'pair': no answer after 1\.\d s from rank\(s\) 1 \(Timed out .*\)", str(error.value)
        )

    with Processes(lambda rank: between(rank, job), 2) as processes:
        ended = processes.join(20)
    assert {r: e.code for r, e in ended.items()} == {0: 0, 1: 0}, ended
