"""The desk of a hub with a thread per worker: who comes first must make no difference to those that meet."""

from __future__ import annotations

import threading
import time
from itertools import permutations

import pytest
import torch
from torch import Tensor

from lightning_dopt import outer
from lightning_dopt.asynchronous import Answer, Count, Hub, HubDesk, HubRule, LocalSteps, Push

CHANGES = [1e8, 1.0, -1e8]
"""In float32 their sum depends on the order."""


def leaving(order: tuple[int, ...], rule: HubRule) -> tuple[HubDesk, list[Tensor]]:
    """All workers hand in a change and leave, one after the other."""
    desk = HubDesk(Hub(rule, [torch.zeros(1)], len(order), LocalSteps(1)))
    answers: dict[int, Answer] = {}
    desk.open()

    def leave(worker: int) -> None:
        answers[worker] = desk.hand_in(worker, Push(worker, [torch.tensor([CHANGES[worker]])], 0, 1, 0.0), last=True)

    threads = [threading.Thread(target=leave, args=(worker,), daemon=True) for worker in order]
    for came, thread in enumerate(threads):
        thread.start()
        deadline = time.monotonic() + 10.0
        while sum(desk.hub.pushes) + len(desk.hub.gathered) <= came and time.monotonic() < deadline:
            time.sleep(0.001)
    for thread in threads:
        thread.join(10.0)
    assert sorted(answers) == sorted(order), "somebody still waits"
    return desk, [answers[worker].reference[0] for worker in range(len(order))]


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_those_that_wait_for_all_leave_with_one_step_whoever_comes_first(order: tuple[int, ...]) -> None:
    """Momentum tells one step along the sum from three along its parts."""
    rule = HubRule(when=Count(3, wait=True), outer=outer.SGD(0.5, 0.9, nesterov=True))
    desk, references = leaving(order, rule)
    first, expected = leaving((0, 1, 2), rule)
    assert desk.hub.version == first.hub.version == 1
    assert desk.hub.pushes == [1, 1, 1]
    assert all(torch.equal(x, expected[0]) for x in references)
    assert desk.hub.alive == set()


def test_those_that_wait_for_nobody_leave_with_all_pushes_taken() -> None:
    desk, references = leaving((2, 0, 1), HubRule(when=Count(1), outer=outer.SGD(1.0, 0.0, nesterov=False)))
    assert desk.hub.version == 3
    assert len({float(x) for x in references}) == 1


def test_a_worker_without_work_leaves_at_once_and_the_others_do_not_wait_for_it() -> None:
    """Two of three have pushed and wait for the third, which has nothing to hand in."""
    desk = HubDesk(Hub(HubRule(when=Count(3, wait=True)), [torch.zeros(1)], 3, LocalSteps(1)))
    desk.open()
    answers: list[Answer] = []

    def work(worker: int) -> None:
        answers.append(desk.hand_in(worker, Push(worker, [torch.ones(1)], 0, 1, 0.0)))
        desk.hand_in(worker, None, last=True)

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in (0, 1)]
    threads.append(threading.Thread(target=desk.hand_in, args=(2, None, True), daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
    assert not any(thread.is_alive() for thread in threads)
    assert [answer.version for answer in answers] == [1, 1]
