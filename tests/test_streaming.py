"""Fragments, Streaming DiLoCo, eager and delayed updates, against DiLoCo, closed forms and byte identities."""

from __future__ import annotations

import pytest
import torch
from problems import SHAPES, mosaic_simulation, sgd
from torch import nn

from lightning_dopt import (
    BF16,
    Delay,
    Every,
    Fragment,
    Identity,
    Lerp,
    Nesterov,
    OneRound,
    Plan,
    RandomPairs,
    Sync,
    outer,
    plans,
)
from lightning_dopt.compress import E3M0
from lightning_dopt.forecast import forecast, square_layers
from lightning_dopt.fragments import fragments

GPT = nn.ModuleDict(
    {
        "embed": nn.Embedding(50, 16),
        "h": nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(6)),
        "norm": nn.LayerNorm(16),
        "head": nn.Linear(16, 50),
    }
)
SIZES = {name: p.numel() for name, p in GPT.named_parameters()}
PATTERNS = ("strided", "sequential", "balanced")


# ---------------------------------------------------------------------- fragments


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("of", [1, 2, 3, 5, 6, 20, len(SIZES)])
def test_every_parameter_is_in_exactly_one_fragment(pattern: str, of: int) -> None:
    parts = [Fragment(p, of, pattern).select(SIZES) for p in range(of)]  # type: ignore[arg-type]
    assert sorted(name for part in parts for name in part) == sorted(SIZES)
    assert all(parts)
    assert all(part == [name for name in SIZES if name in part] for part in parts)


def blocks(part: list[str]) -> list[int]:
    return sorted({int(name.split(".")[1]) for name in part if name.startswith("h.")})


def test_transformer_blocks_are_dealt_in_turn_or_in_runs() -> None:
    assert [blocks(Fragment(p, 3).select(SIZES)) for p in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert [blocks(Fragment(p, 3, "sequential").select(SIZES)) for p in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert [blocks(Fragment(p, 4, "sequential").select(SIZES)) for p in range(4)] == [[0, 1], [2], [3, 4], [5]]
    lone = {name: p for p in range(3) for name in Fragment(p, 3).select(SIZES) if not name.startswith("h.")}
    assert set(lone) == {"embed.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert lone["embed.weight"] != lone["head.weight"]  # the two largest go to different fragments


@pytest.mark.parametrize("of", [2, 3, 4, 7])
def test_balanced_fragments_differ_by_one_block_at_most(of: int) -> None:
    loads = [sum(SIZES[name] for name in part) for part in fragments(SIZES, of, "balanced")]
    largest = max(sum(size for name, size in SIZES.items() if name.startswith(f"h.{k}.")) for k in range(6))
    assert max(loads) - min(loads) <= largest
    uneven = {"a": 5, "b": 4, "c": 3, "d": 3, "e": 3}
    assert sorted(sum(uneven[n] for n in part) for part in fragments(uneven, 2, "balanced")) == [8, 10]


def test_modules_and_parameters_stand_in_for_blocks() -> None:
    shapes = dict.fromkeys(square_layers(10 * 512 * 512), 1)
    assert Fragment(1, 3).select(shapes) == [f"layer{k}.weight" for k in (1, 4, 7)]
    assert Fragment(0, 2).select({"w": 1, "b": 1}) == ["w"]
    assert Fragment(0, 2, match="*.weight").select({"a.weight": 1, "a.bias": 1, "b.weight": 1}) == ["a.weight"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Fragment(3, 3), r"Fragment\(p=3, of=3\): parts are numbered from 0 to 2"),
        (lambda: Fragment(-1, 3), r"Fragment\(p=-1\)"),
        (lambda: Fragment(0, 3, "even"), r"Fragment\(pattern='even'\)"),  # type: ignore[arg-type]
        (lambda: Fragment(0, 3).select({"a": 1, "b": 1}), "only 2 parameters"),
        (lambda: plans.streaming_diloco(overlap=100), r"streaming_diloco\(overlap=100, sync_every=100\)"),
        (lambda: plans.streaming_diloco(fragments=0), r"streaming_diloco\(fragments=0\)"),
        (lambda: plans.streaming_diloco(3, 4, 1), r"streaming_diloco\(fragments=4, sync_every=3\)"),
        (lambda: plans.streaming_diloco(alpha=1.5), r"streaming_diloco\(alpha=1.5\)"),
        (lambda: plans.eager_diloco(outer_lr=0.0), r"eager_diloco\(outer_lr=0.0\)"),
        (lambda: plans.delayed_diloco(fragments=40), r"delayed_diloco\(fragments=40, sync_every=30\)"),
    ],
)
def test_bad_options_are_refused_in_one_line(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_fragments_of_a_model_cover_it_in_the_engine() -> None:
    """Averaging fragments at different steps moves every parameter; each lane belongs to one fragment."""
    sim = mosaic_simulation(plans.streaming_diloco(4, 3, overlap=1, pattern="balanced"), 4)
    lanes = [lane.lane for runner in sim.engines[0].runners for lane in runner.lanes]
    assert sorted(f.name for lane in lanes for f in lane.fields) == sorted(SHAPES)
    assert [r.label for r in sim.engines[0].runners] == [f"parameters[{k}/3]" for k in (1, 2, 3)]


# ---------------------------------------------------------------------- Streaming DiLoCo


def test_one_fragment_without_overlap_is_diloco_bit_for_bit() -> None:
    mine = plans.streaming_diloco(5, 1, overlap=0, alpha=0.0, outer_lr=0.7, codec=Identity())
    sim, ref = mosaic_simulation(mine, 4).run(23), mosaic_simulation(plans.diloco(5), 4).run(23)
    assert all(torch.equal(sim.stacked(name), ref.stacked(name)) for name in SHAPES)


def test_fragments_do_not_change_what_separable_problems_do() -> None:
    """With offset 0 and plain SGD inside a fragment is DiLoCo of that fragment; others change nothing for it."""
    cut = mosaic_simulation(plans.streaming_diloco(6, 3, overlap=2, codec=Identity()), 4).run(40)
    whole = mosaic_simulation(Plan([Sync(Every(6), outer=Nesterov(0.4), apply=Delay(2, Lerp(0.5)))]), 4).run(40)
    first = Fragment(0, 3).select({n: torch.Size(s).numel() for n, s in SHAPES.items()})
    assert 0 < len(first) < len(SHAPES)
    for name in SHAPES:
        assert torch.equal(cut.stacked(name), whole.stacked(name)) == (name in first)


def test_offsets_are_even_and_distinct() -> None:
    for h, count in ((100, 3), (7, 7), (10, 4)):
        offsets = [s.when.offset for s in plans.streaming_diloco(h, count, overlap=1)]  # type: ignore[attr-defined]
        assert offsets[0] == 0
        gaps = [b - a for a, b in zip(offsets, [*offsets[1:], h], strict=True)]
        assert max(gaps) - min(gaps) <= 1
        assert min(gaps) >= 1


def test_live_weights_that_keep_everything_train_on_their_own() -> None:
    alone = mosaic_simulation(Plan(), 4).run(30)
    sim = mosaic_simulation(plans.streaming_diloco(6, 3, overlap=2, alpha=1.0), 4).run(30)
    for name in SHAPES:
        assert torch.equal(sim.stacked(name), alone.stacked(name))
    start = mosaic_simulation(Plan(), 4).engines[0].flat.lanes[0].live
    anchors = torch.cat([r.lanes[0].anchor for r in sim.engines[0].runners])  # type: ignore[misc]
    assert float((anchors.sort()[0] - start.sort()[0]).abs().max()) > 0.1


def test_a_fragment_is_the_mean_at_its_own_steps() -> None:
    plan = plans.streaming_diloco(6, 3, 0, 0.0, 1.0, 0.0, codec=Identity())
    sim, alone = mosaic_simulation(plan, 4).run(5), mosaic_simulation(Plan(), 4).run(5)
    sizes = {n: torch.Size(s).numel() for n, s in SHAPES.items()}
    for k, step in enumerate((6, 8, 10)):
        sim.run(step - sim.engines[0].step), alone.run(step - alone.engines[0].step)
        for name in Fragment(k, 3).select(sizes):
            torch.testing.assert_close(sim.stacked(name)[2], alone.stacked(name).mean(0), rtol=1e-5, atol=1e-6)


def test_anchors_agree_after_every_apply_and_live_weights_do_not() -> None:
    sim = mosaic_simulation(plans.streaming_diloco(4, 2, overlap=2), 4)
    for _ in range(15):
        sim.run(1)
        for k in range(2):
            rows = [e.runners[k].lanes[0].anchor for e in sim.engines]
            assert all(torch.equal(row, rows[0]) for row in rows)  # type: ignore[arg-type]
    assert sim.distance() > 0.05


def test_bytes_of_a_send_are_those_of_its_fragment() -> None:
    shapes = {f"h.{k}.weight": (256, 256) for k in range(6)}
    told = forecast(plans.streaming_diloco(12, 3, 2, codec=Identity()), 4, shapes, 24)
    whole = forecast(plans.diloco(12), 4, shapes, 24)
    assert told.peak_step_bytes * 3 == whole.peak_step_bytes
    assert {told.sync_bytes(f"parameters[{k}/3]") // told.rounds[f"parameters[{k}/3]"] for k in (1, 2, 3)} == {
        told.peak_step_bytes
    }


@pytest.mark.parametrize("h", [30, 100])
def test_four_bits_send_4_h_times_less_than_data_parallel_training_in_bf16(h: int) -> None:
    """With two workers and one scale per fragment; each block of E3M0 adds its scale."""
    shapes = {f"h.{k}.weight": (512, 512) for k in range(6)}
    mine = forecast(plans.streaming_diloco(h, 3, codec=E3M0(block=2 * 512 * 512)), 2, shapes, 2 * h)
    ddp = forecast(Plan([Sync(what="gradients", codec=BF16())]), 2, shapes, 2 * h)
    sends = sum(mine.rounds.values())
    assert sends == 4  # every fragment has one round, the first two: offsets delay the others
    scales = 4 * sends
    assert (mine.bytes[0] - scales) * 4 * h * 6 == ddp.bytes[0] * sends  # six would be two whole rounds


@pytest.mark.parametrize("n", [2, 4])
def test_streaming_over_random_pairs_with_four_bits_trains(n: int) -> None:
    """Fragments, gossip and coded differences in one plan: close to the exact optimum's neighbourhood."""
    plan = plans.streaming_diloco(4, 3, 1, 0.5, 0.4, 0.3, topology=RandomPairs(), codec=E3M0())
    sim = mosaic_simulation(plan, n, sgd(0.05)).run(400)
    reference = mosaic_simulation(Plan([Sync(Every(4))]), n, sgd(0.05)).run(400)
    for name in SHAPES:
        assert float((sim.stacked(name).mean(0) - reference.stacked(name).mean(0)).abs().max()) < 0.6


# ---------------------------------------------------------------------- eager and delayed


def test_eager_and_delayed_are_configurations() -> None:
    assert plans.eager_diloco() == Plan(
        [Sync(Every(30), outer=outer.SGD(0.4, 0.9, nesterov=True), apply=OneRound("own_share"))]
    )
    assert plans.delayed_diloco().syncs[0].apply == OneRound()


def test_fragments_of_eager_updates_follow_their_own_rounds() -> None:
    cut = mosaic_simulation(plans.eager_diloco(6, fragments=3), 2).run(40)
    whole = mosaic_simulation(plans.eager_diloco(6), 2).run(40)
    first = Fragment(0, 3).select({n: torch.Size(s).numel() for n, s in SHAPES.items()})
    for name in SHAPES:
        assert torch.equal(cut.stacked(name), whole.stacked(name)) == (name in first)


@pytest.mark.filterwarnings("ignore:Sync")
def test_more_in_flight_share_follows_the_mean_more_closely() -> None:
    """Rate 0.7 and momentum 0.9 a round late: w = 0 runs away, an own share stays bounded, w = 1 converges in the mean."""
    from test_local_updates import same_curvature

    problem = same_curvature(2)

    def error(share: float | str) -> float:
        plan = Plan([Sync(Every(10), outer=Nesterov(0.7, 0.9), apply=OneRound(share))])  # type: ignore[arg-type]
        return float((problem.simulate(plan, 0.3).run(800).stacked().mean(0) - problem.optimum()).norm())

    assert error(0.0) > 1e3
    assert error("own_share") < 5.0
    assert error(1.0) < 1e-3
