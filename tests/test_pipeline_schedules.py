"""Schedules of pipelines: proved by the checker, with the bubbles and peaks that the papers give."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_dopt import pipeline
from lightning_dopt.pipeline import (
    Action,
    Program,
    bitpipe,
    check,
    gpipe,
    interleaved,
    make_program,
    one_f_one_b,
    timeline,
)

RANKS = (1, 2, 3, 4)
COUNTS = (1, 2, 3, 4, 5, 8, 12)
each_rank = pytest.mark.parametrize("ranks", RANKS)


@each_rank
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
def test_bubble_and_peak_of_one_stage_per_rank(schedule: Callable[..., Program], ranks: int, count: int) -> None:
    report = check(schedule(ranks, count))
    assert report.bubble == pytest.approx((ranks - 1) / (count + ranks - 1), abs=1e-12)
    assert report.makespan == 3 * (count + ranks - 1)
    held = [count] * ranks if schedule is gpipe else [min(count, ranks - r) for r in range(ranks)]
    assert list(report.peak) == held
    assert report.messages == 2 * (ranks - 1) * count
    assert report.in_order


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_bubble_and_peak_of_interleaved(ranks: int, chunks: int, groups: int) -> None:
    count = groups * ranks
    report = check(interleaved(ranks, count, chunks))
    assert report.bubble == pytest.approx((ranks - 1) / (chunks * count + ranks - 1), abs=1e-12)
    warmup = [2 * (ranks - 1 - r) + (chunks - 1) * ranks for r in range(ranks)]
    assert list(report.peak) == [min(chunks * count, w + 1) for w in warmup]
    assert report.messages == 2 * (chunks * ranks - 1) * count


@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
@pytest.mark.parametrize("units", [1, 2, 4])
def test_bubble_and_peak_of_bitpipe(ranks: int, units: int) -> None:
    count = units * ranks
    program = bitpipe(ranks, count)
    report = check(program)
    assert report.makespan == 6 * count + (units + 1) * (ranks - 2)
    if units == 1:
        assert report.bubble == pytest.approx((ranks - 2) / (3 * count + ranks - 2), abs=1e-12)
    depth = [min(r, ranks - 1 - r) for r in range(ranks)]
    assert list(report.peak) == [ranks + ranks // 2 + d + 1 for d in depth]
    for r in range(ranks):  # both copies of a stage are on ranks r and D - 1 - r
        assert {s for _, s in program.held(r)} == {r, 2 * ranks - 1 - r, ranks - 1 - r, ranks + r}


def test_bitpipe_is_the_order_of_the_authors() -> None:
    """Their order for four ranks: F or B, direction and half, and the micro-batch of that direction."""
    golden = {
        0: "Fd0.0 Fd0.1 Fu0.0 Fu1.0 Fu0.1 Fu1.1 Fd1.0 Bd1.0 Fd1.1 Bd1.1 Bu1.0 Bu0.0 Bu1.1 Bu0.1 Bd0.0 Bd0.1",
        1: "Fd0.0 Fu0.0 Fd0.1 Fu0.1 Fu1.0 Fd1.0 Fu1.1 Fd1.1 Bd1.0 Bu1.0 Bd1.1 Bu1.1 Bu0.0 Bd0.0 Bu0.1 Bd0.1",
    }
    swap = str.maketrans("du", "ud")
    for rank in range(4):
        words = []
        for action in bitpipe(4, 4).actions[rank]:
            if action.kind in ("forward", "backward"):
                letter, half = "FB"[action.kind == "backward"], int(action.stage >= 4)
                words.append(f"{letter}{'du'[action.pipe]}{half}.{action.microbatch // 2}")
        assert " ".join(words) == (golden[rank] if rank < 2 else golden[3 - rank].translate(swap))


def test_timeline_is_what_runs() -> None:
    lines = timeline(one_f_one_b(2, 3)).splitlines()
    assert lines[0] == "rank 0 (0)(1)......[0][0](2)[1][1]...[2][2]"
    assert lines[1] == "rank 1 ...(0)[0][0](1)[1][1](2)[2][2]......"


def changed(program: Program, rank: int, change: Callable[[list[Action]], None]) -> Program:
    actions = list(program.actions[rank])
    change(actions)
    rows = list(program.actions)
    rows[rank] = tuple(actions)
    return replace(program, actions=tuple(rows))


def swap(first: Action, second: Action) -> Callable[[list[Action]], None]:
    def change(actions: list[Action]) -> None:
        i, j = actions.index(first), actions.index(second)
        actions[i], actions[j] = actions[j], actions[i]

    return change


RIGHT = one_f_one_b(2, 3)
F, B = (lambda s, m: Action("forward", s, m)), (lambda s, m: Action("backward", s, m))
RECV_F, RECV_B = (lambda s, m: Action("recv_activation", s, m)), (lambda s, m: Action("recv_gradient", s, m))
WRONG = {
    "forward of stage 0 on micro-batch 1 happens 0 times": changed(RIGHT, 0, lambda a: a.remove(F(0, 1))),
    "backward of stage 1 on micro-batch 2 happens 2 times": changed(RIGHT, 1, lambda a: a.append(B(1, 2))),
    "rank 1 does F1.0 before RA1.0": changed(RIGHT, 1, swap(F(1, 0), RECV_F(1, 0))),
    "rank 1 does B1.1 before F1.1": changed(RIGHT, 1, swap(F(1, 1), B(1, 1))),
    "rank 0 does SA0.0 before F0.0": changed(RIGHT, 0, swap(F(0, 0), Action("send_activation", 0, 0))),
    "is sent 1 times and received 2 times": changed(RIGHT, 1, lambda a: a.insert(0, RECV_F(1, 2))),
    "is sent 0 times and received 1 times": changed(RIGHT, 0, lambda a: a.remove(Action("send_activation", 0, 2))),
    "deadlock: rank 0 waits in RG0.0 for rank 1; rank 1 waits in RA1.2 for rank 0": changed(
        RIGHT, 1, lambda a: (a.remove(RECV_F(1, 2)), a.insert(0, RECV_F(1, 2)))[0]
    ),
    "but its stage is on rank 1": changed(RIGHT, 0, lambda a: a.append(F(1, 0))),
    "which does not exist": changed(RIGHT, 0, lambda a: a.append(F(0, 3))),
    "but both stages are on this rank": replace(
        gpipe(1, 1),
        placement=((0, 0),),
        actions=((F(0, 0), Action("send_activation", 0, 0), F(1, 0), B(1, 0), B(0, 0)),),
    ),
    "stage 1 of pipe 0 is on rank 2 of 2": replace(RIGHT, placement=((0, 2),)),
    "micro-batch 0 is in the pipes 0 and 1": changed(
        replace(RIGHT, placement=((0, 1), (0, 1))), 0, lambda a: a.append(Action("forward", 0, 0, 1))
    ),
}


I, W = (lambda s, m: Action("backward_input", s, m)), (lambda s, m: Action("backward_weight", s, m))  # noqa: E741
PARTED = Program.of("parted", [[0, 1]], 1, [[F(0, 0), I(0, 0), W(0, 0)], [F(1, 0), I(1, 0), W(1, 0)]])
WRONG |= {
    "rank 1 does W1.0 before I1.0": changed(PARTED, 1, swap(I(1, 0), W(1, 0))),
    "backward_weight of stage 0 on micro-batch 0 happens 0 times": changed(PARTED, 0, lambda a: a.remove(W(0, 0))),
    "backward_input of stage 0 on micro-batch 0 happens 0 times": changed(PARTED, 0, lambda a: a.remove(I(0, 0))),
    "backward of stage 1 on micro-batch 0 happens 2 times": changed(PARTED, 1, lambda a: a.append(B(1, 0))),
    "rank 1 does SG1.0 before B1.0": changed(PARTED, 1, swap(I(1, 0), Action("send_gradient", 1, 0))),
}


def test_backwards_in_two_parts() -> None:
    """The gradient of the input lets the stage before go on; activations are held until that of the parameters is there."""
    report = check(PARTED)
    assert report.makespan == 5 == check(one_f_one_b(2, 1)).makespan - 1, "W of rank 1 beside I of rank 0"
    assert report.peak == (1, 1)
    assert timeline(PARTED) == "rank 0 (0)......[0]{0}\nrank 1 ...(0)[0]{0}..."


@pytest.mark.parametrize("message", WRONG)
def test_wrong_programs_are_caught(message: str) -> None:
    with pytest.raises(ValueError, match=rf"^program '[^\n]*{re.escape(message)}[^\n]*$"):
        check(WRONG[message])


def test_messages_out_of_order_are_told() -> None:
    """They are right with tags, and wrong where messages have none."""
    late = changed(gpipe(2, 2), 1, lambda a: a.__setitem__(slice(0, 4), [RECV_F(1, 1), F(1, 1), RECV_F(1, 0), F(1, 0)]))
    assert check(gpipe(2, 2)).in_order
    assert not check(late).in_order


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gpipe(0, 1), r"gpipe\(ranks=0\)"),
        (lambda: one_f_one_b(2, 0), r"one_f_one_b\(microbatches=0\)"),
        (lambda: interleaved(2, 3), r"interleaved\(microbatches=3\): must be a multiple of the 2"),
        (lambda: interleaved(2, 4, 1), r"interleaved\(chunks=1\)"),
        (lambda: bitpipe(3, 3), r"bitpipe\(ranks=3\): must be even"),
        (lambda: bitpipe(4, 6), r"bitpipe\(microbatches=6\): must be a multiple of the 4"),
        (lambda: make_program("1f1b", 2, 2, chunks=2), r"chunks=2"),
        (lambda: make_program("zigzag", 2, 2), r"schedule='zigzag'"),  # type: ignore[arg-type]
        (lambda: check(RIGHT, forward=0), r"forward=0"),
    ],
)
def test_bad_arguments_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        make()


def test_by_name() -> None:
    assert make_program("gpipe", 2, 4) == gpipe(2, 4)
    assert make_program("1f1b", 2, 4) == one_f_one_b(2, 4)
    assert make_program("interleaved", 2, 4) == interleaved(2, 4, 2)
    assert make_program("interleaved", 2, 4, chunks=3) == interleaved(2, 4, 3)
    assert make_program("bitpipe", 2, 4) == bitpipe(2, 4)


def test_pictures_of_the_documentation() -> None:
    page = (Path(__file__).parent.parent / "docs" / "pipeline.md").read_text()
    pictures = re.findall(r"`timeline\((\w+)\((\d), (\d)\)\)`:\n\n```text\n(.*?)\n```", page, re.DOTALL)
    assert len(pictures) >= 4
    for name, ranks, count, picture in pictures:
        assert timeline(getattr(pipeline, name)(int(ranks), int(count))) == picture
