"""Rounds that workers miss, leave and join, over members that are threads: against sums done by hand."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from problems import Quadratics
from torch import Tensor

from lightning_dopt import (
    AtEnd,
    Complete,
    Delay,
    ElasticDiLoCoStrategy,
    ElasticStrategy,
    ErrorFeedback,
    Every,
    Int8,
    LowRank,
    Median,
    Nesterov,
    Parameters,
    Plan,
    Ring,
    Sync,
    TopK,
    plans,
)
from lightning_dopt.cli import BadInputError, workers_command
from lightning_dopt.comm.elastic import ElasticWorld
from lightning_dopt.compress import Phases
from lightning_dopt.elastic import ElasticEngine, ElasticRounds
from lightning_dopt.elastic_plans import check_elastic
from lightning_dopt.strategies.checkpoints import copied
from lightning_dopt.strategies.elastic import LIGHTHOUSE, WORKER, WORKERS
from lightning_dopt.workers import Workers

H = 3
TARGETS = torch.tensor([[1.0, -2.0, 3.0], [4.0, 1.0, 0.0], [-3.0, 2.0, 5.0], [2.0, 2.0, -6.0]], dtype=torch.float64)


class Table:
    """Where threads put things and take what the others have put; one who dies lets all others fail."""

    def __init__(self) -> None:
        self.posts: dict[Any, dict[int, Any]] = {}
        self.changed = threading.Condition()

    def swap(self, key: Any, who: int, among: list[int], value: Any) -> list[Any]:
        with self.changed:
            posts = self.posts.setdefault(key, {})
            posts[who] = value
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: len(posts) == len(among), 10), (
                f"{who} waits for {key}: {sorted(posts)}"
            )
            if any(isinstance(posted, Exception) for posted in posts.values()):
                raise RuntimeError("[gloo] Connection closed by peer")
            return [posts[j] for j in among]


class Later:
    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait


class Threads:
    """Members as a script has them: by round, who is there, who of them is behind, and who dies while messages travel."""

    def __init__(self, table: Table, me: int, script: list[dict[str, Any]], first: int) -> None:
        self.table, self.me, self.script, self.round = table, me, script, first
        self.rank, self.size, self.calls = 0, 1, 0
        self.state: Callable[[], Any] = lambda: None
        self.received: Any = None

    def meet(self) -> bool:
        act = self.script[self.round]
        self.key, self.round, self.calls = self.round, self.round + 1, 0
        self.there: list[int] = act["there"]
        self.rank, self.size = self.there.index(self.me), len(self.there)
        behind = act.get("behind", [])
        states = self.table.swap(("state", self.key), self.me, self.there, None if self.me in behind else self.state())
        if self.me in behind:
            self.received = next(state for state in states if state is not None)
        return True

    def take(self) -> Any:
        state, self.received = self.received, None
        return state

    def _call(self, tensor: Tensor) -> Callable[[], list[Tensor]]:
        key, self.calls = (self.key, self.calls), self.calls + 1
        dies = self.script[self.key].get("dies") == self.me and self.calls == 2  # after the stamps
        value = RuntimeError("dead") if dies else tensor.clone()
        return lambda: self.table.swap(key, self.me, self.there, value)

    def all_reduce(self, tensor: Tensor, op: Any) -> Later:
        got = self._call(tensor)
        return Later(lambda: tensor.copy_(torch.stack(got()).sum(0)))

    def all_gather(self, out: list[Tensor], tensor: Tensor) -> Later:
        got = self._call(tensor)
        return Later(lambda: [a.copy_(b) for a, b in zip(out, got(), strict=True)] and None)

    def commit(self, ok: bool) -> bool:
        return ok

    def close(self) -> None:
        pass


class Worker(threading.Thread):
    """Gradient steps towards a target of its own; ``seen`` is the live weights and the anchor after every tick."""

    def __init__(
        self, plan: Plan, me: int, script: list[dict[str, Any]], table: Table, steps: int, **options: Any
    ) -> None:
        super().__init__(daemon=True)
        self.first = next(k for k, act in enumerate(script) if me in act["there"])
        self.members = Threads(table, me, script, self.first)
        self.x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        self.plan, self.me, self.script, self.steps = plan, me, script, steps
        self.missed = options.get("missed", "keep")
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.residual: dict[int, Tensor] = {}
        self.warned: list[str] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.train()
        except Exception as error:
            self.error = error

    def train(self) -> None:
        self.world = ElasticWorld(self.members)
        self.engine = ElasticEngine(self.plan, {"x": self.x}, self.world)
        self.rounds = ElasticRounds(self.engine, self.world, self.missed, self.members.take, self.warned.append)
        self.members.state = lambda: copied(self.engine.state_dict())
        if self.first:
            assert self.world.convene()
            self.rounds.join(self.members.take())
            self.note()
        while self.engine.step < self.steps:
            coming = self.script[self.members.round :]
            if coming and self.me not in coming[0]["there"]:
                if not any(self.me in act["there"] for act in coming):
                    return  # it is gone
                self.members.round += 1  # it is late, and the round takes place without it
                continue
            with torch.no_grad():
                self.x.sub_(0.1 * (self.x - TARGETS[self.me]))
            self.engine.run(self.engine.after_step())
            self.rounds.tick()
            self.note()

    def note(self) -> None:
        lane = self.engine.runners[0].lanes[0]
        assert lane.anchor is not None
        self.seen[self.engine.step] = (self.x.detach().clone(), lane.anchor.clone())
        self.residual[self.engine.step] = lane.channel.memory_state.get("residual", torch.zeros(3)).clone()


def train(plan: Plan, script: list[dict[str, Any]], steps: int, **options: Any) -> dict[int, Worker]:
    table = Table()
    everybody = sorted({j for act in script for j in act["there"]})
    workers = {j: Worker(plan, j, script, table, steps, **options) for j in everybody}
    for worker in workers.values():
        worker.start()
    for worker in workers.values():
        worker.join(20)
        assert not worker.is_alive()
        if worker.error is not None:
            raise worker.error
    return workers


def local(x: Tensor, me: int, steps: int = H) -> Tensor:
    """What ``steps`` steps of a worker make of ``x``."""
    return TARGETS[me] + (x - TARGETS[me]) * 0.9**steps


AVERAGE = plans.diloco(H, outer_lr=1.0, outer_momentum=0.0, nesterov=False)


@pytest.mark.parametrize(
    "plan",
    [
        plans.diloco(H),
        plans.diloco(H, codec=Int8()),
        plans.diloco(H, codec=ErrorFeedback(TopK(0.34))),
        Plan([Sync(Every(H), signal="delta", codec=ErrorFeedback(LowRank(1)), outer=Nesterov())]),
        plans.streaming_diloco(H, fragments=1, overlap=1),
    ],
    ids=["dense", "int8", "topk", "lowrank", "delay"],
)
def test_while_nobody_dies_it_is_the_plan_itself(plan: Plan) -> None:
    workers = train(plan, [{"there": [0, 1, 2]}] * 4, 4 * H + 1)
    problem = Quadratics(torch.eye(3).expand(3, 3, 3), TARGETS[:3])
    reference = problem.simulate(plan, 0.1).run(4 * H + 1)
    for j, worker in workers.items():
        torch.testing.assert_close(worker.x.detach(), reference.stacked()[j], rtol=0, atol=1e-12)


def test_a_worker_that_dies_while_messages_travel_costs_the_others_nothing_but_the_average() -> None:
    script = [{"there": [0, 1, 2]}, {"there": [0, 1, 2], "dies": 2}, {"there": [0, 1]}]
    workers = train(AVERAGE, script, 3 * H)
    one = torch.stack([local(torch.zeros(3), j) for j in (0, 1, 2)]).mean(0)
    for j in (0, 1):
        live, anchor = workers[j].seen[2 * H]
        torch.testing.assert_close(anchor, one)  # the round left no trace
        torch.testing.assert_close(live, local(one, j))  # and the steps of this worker are kept
        assert len(workers[j].warned) == 1
        assert "step 6: the round is abandoned, the own change is kept" in workers[j].warned[0]
        expected = (local(one, 0, 2 * H) + local(one, 1, 2 * H)) / 2
        torch.testing.assert_close(workers[j].seen[3 * H], (expected, expected))


def test_restore_goes_back_to_the_anchor() -> None:
    script = [{"there": [0, 1, 2]}, {"there": [0, 1, 2], "dies": 2}, {"there": [0, 1]}]
    workers = train(AVERAGE, script, 3 * H, missed="restore")
    one = torch.stack([local(torch.zeros(3), j) for j in (0, 1, 2)]).mean(0)
    torch.testing.assert_close(workers[0].seen[2 * H], (one, one))
    expected = (local(one, 0) + local(one, 1)) / 2
    torch.testing.assert_close(workers[1].seen[3 * H], (expected, expected))


def test_an_abandoned_round_leaves_memories_as_they_were() -> None:
    """What its message left in the residual is gone with it, or the part that was sent would never arrive."""
    plan = plans.diloco(H, outer_lr=1.0, outer_momentum=0.0, nesterov=False, codec=ErrorFeedback(TopK(0.34)))
    script = [{"there": [0, 1]}, {"there": [0, 1], "dies": 1}, {"there": [0]}]
    alone = train(plan, script, 3 * H)[0]
    assert torch.equal(alone.residual[2 * H], alone.residual[H])
    assert not torch.equal(alone.residual[3 * H], alone.residual[H])
    before, _ = alone.seen[3 * H - 1]
    _, anchor = alone.seen[3 * H]
    torch.testing.assert_close(anchor - alone.residual[3 * H], local(before, 0, 1) - alone.residual[H])


@pytest.mark.parametrize("codec", [None, Int8(), ErrorFeedback(LowRank(1))], ids=["dense", "int8", "lowrank"])
def test_a_worker_that_joins_gets_everything_and_says_nothing(codec: Any) -> None:
    plan = plans.diloco(H, codec=codec)
    script = [{"there": [0, 1]}, {"there": [0, 1, 2], "behind": [2]}, {"there": [0, 1, 2]}]
    without = train(plan, [{"there": [0, 1]}] * 3, 3 * H)
    workers = train(plan, script, 3 * H)
    assert sorted(workers[2].seen) == [6, 7, 8, 9]
    for j in range(3):
        torch.testing.assert_close(workers[j].seen[2 * H], without[0].seen[2 * H])  # nothing was said
        torch.testing.assert_close(workers[j].seen[3 * H][1], workers[0].seen[3 * H][1], rtol=0, atol=0)
    momentum = [w.engine.runners[0].lanes[0].optimizer.state_dict()["state"] for w in workers.values()]  # type: ignore[union-attr]
    for state in momentum[1:]:
        torch.testing.assert_close(state, momentum[0], rtol=0, atol=0)
    if codec is None:
        assert not torch.equal(workers[0].seen[3 * H][1], without[0].seen[3 * H][1])  # in the next round it has its say


@pytest.mark.parametrize("missed", ["keep", "restore"])
def test_a_worker_that_was_late_gets_the_anchor(missed: str) -> None:
    script = [{"there": [0, 1, 2]}, {"there": [0, 1]}, {"there": [0, 1, 2], "behind": [2]}]
    workers = train(AVERAGE, script, 3 * H, missed=missed)
    one = torch.stack([local(torch.zeros(3), j) for j in (0, 1, 2)]).mean(0)
    two = (local(one, 0) + local(one, 1)) / 2
    late = two + (local(one, 2) - one) if missed == "keep" else two  # its round's change on top of the new anchor
    three = (local(two, 0) + local(two, 1) + late) / 3
    for worker in workers.values():
        torch.testing.assert_close(worker.seen[3 * H], (three, three))


def test_members_at_other_steps_or_with_other_plans_are_refused() -> None:
    table = Table()
    workers = [Worker(plan, j, [{"there": [0, 1]}], table, H) for j, plan in enumerate([AVERAGE, plans.diloco(H)])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(10)
        assert "follow other plans, or are at other steps" in str(worker.error)


REFUSED: dict[str, tuple[Callable[[], Plan], str]] = {
    "nothing": (lambda: Plan(), "has no sync"),
    "gossip": (lambda: plans.gossip(), "a graph has a place for each"),
    "noloco": (lambda: plans.noloco(), "a graph has a place for each"),
    "local_sgd": (lambda: plans.local_sgd(4), "signal='value'"),
    "gradients": (lambda: plans.compressed_ddp(), "only parameters"),
    "scaffold": (lambda: plans.scaffold(4), "use a plan without corrections"),
    "tracking": (lambda: plans.gradient_tracking(), "use a plan without corrections"),
    "one_round": (lambda: plans.eager_diloco(4), "a message is always on its way"),
    "at_end": (lambda: Plan([Sync(AtEnd(), signal="delta")]), "use Every"),
    "median": (lambda: Plan([Sync(Every(2), signal="delta", combine=Median())]), "use Mixing"),
    "two_phase": (lambda: Plan([Sync(Every(2), signal="delta", codec=Int8(), transport="two_phase")]), "use 'auto'"),
    "phases": (lambda: Plan([Sync(Every(2), signal="delta", codec=Phases([Int8(), TopK(0.5)], [3]))]), "fixed codec"),
    "overlap": (lambda: plans.streaming_diloco(30, fragments=3, overlap=10), "shorter delay"),
    "periods": (
        lambda: Plan(
            [Sync(Every(n), what=w, signal="delta") for n, w in ((2, Parameters("a*")), (3, Parameters("b*")))]
        ),
        "use one period",
    ),
    "delays": (
        lambda: Plan([Sync(Every(9), signal="delta", apply=Delay(k)) for k in (1, 2)]),
        "use one delay",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_plans_that_have_no_meaning_here_are_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"^ElasticStrategy\(plan=[^\n]*{message}[^\n]*$"):
        check_elastic(make(), "ElasticStrategy")


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (WORKER, WORKERS, LIGHTHOUSE):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match=r"ElasticStrategy\(workers=\.\.\.\): give it, set DOPT_WORKERS"):
        ElasticStrategy()
    with pytest.raises(ValueError, match="where is it"):
        ElasticStrategy(workers=2, worker=1)
    for options, message in (
        ({"worker": 2}, "workers are numbered from 0"),
        ({"min_workers": 3}, "there are only 2 workers"),
        ({"on_missed_round": "retry"}, "on_missed_round"),
        ({"joiner_optimizer": "own"}, "joiner_optimizer"),
        ({"plan": plans.gossip(Ring())}, "a graph has a place"),
    ):
        with pytest.raises(ValueError, match=message):
            ElasticStrategy(**{"workers": 2, "worker": 0, "lighthouse": "http://x:1", **options})  # type: ignore[arg-type]
    monkeypatch.setenv(WORKER, "1")
    monkeypatch.setenv(WORKERS, "4")
    monkeypatch.setenv(LIGHTHOUSE, "http://x:1")
    strategy = ElasticStrategy()
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 4, "rank": 1}
    assert strategy.plan == plans.diloco()
    assert isinstance(strategy.plan.syncs[0].peers, Complete)
    named = ElasticDiLoCoStrategy(10, codec=Int8(), min_workers=2)
    assert (named.plan, named.min_workers) == (plans.diloco(10, codec=Int8()), 2)
    assert isinstance(StrategyRegistry.get("elastic_diloco"), ElasticDiLoCoStrategy)
    with pytest.raises(ValueError, match="every worker is a run of its own"):
        Trainer(strategy=strategy, devices=2, accelerator="cpu", logger=False)


# ---------------------------------------------------------------------- dopt workers

CHILD = """
import os, sys, time
from pathlib import Path
seen = Path(sys.argv[1]) / os.environ["DOPT_WORKER"]
seen.write_text((seen.read_text() if seen.exists() else "") + os.environ["DOPT_WORKERS"] + os.environ["TORCHFT_LIGHTHOUSE"] + ";")
times = seen.read_text().count(";")
if os.environ["DOPT_WORKER"] == "5" and times < 3:
    os.kill(os.getpid(), 9) if times == 1 else sys.exit(7)
while not seen.with_name("5").exists() or seen.with_name("5").read_text().count(";") < 3:
    time.sleep(0.02)
"""


def test_workers_that_end_in_disorder_are_started_again(tmp_path: Path) -> None:
    said: list[str] = []
    workers = Workers([sys.executable, "-c", CHILD, str(tmp_path)], [4, 5], 6, "http://x:1", None, 5)
    workers.say = said.append
    assert workers.run() == 0
    assert (tmp_path / "4").read_text() == "6http://x:1;"
    assert (tmp_path / "5").read_text() == "6http://x:1;" * 3
    assert [line.partition(",")[0] for line in said] == ["worker 5 ended by SIGKILL", "worker 5 ended with status 7"]


def test_workers_are_given_up_after_a_while() -> None:
    said: list[str] = []
    workers = Workers([sys.executable, "-c", "raise SystemExit(3)"], [0], 1, "http://x:1", None, 1)
    workers.say = said.append
    assert workers.run() == 1
    assert said == [
        "worker 0 ended with status 3, is started again (1 of 1)",
        "worker 0 ended with status 3, and is not started again after 1 times",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "2"], "name what each worker runs"),
        (["-n", "0", "--", "x"], "invalid count"),
        (["-n", "2", "--first", "3", "--total", "4", "--", "x"], "workers are numbered"),
        (["-n", "2", "--min-workers", "3", "--", "x"], "only 2 workers"),
        (["-n", "2", "--dead-after", "0", "--", "x"], "--dead-after more than 0"),
    ],
)
def test_bad_command_lines(words: list[str], message: str) -> None:
    with pytest.raises(BadInputError, match=f"^[^\\n]*{message}[^\\n]*$"):
        workers_command(words)


def test_shared_codec_state_is_taken_over_and_own_memories_are_not() -> None:
    """Warm starts must be equal on all members, or their sums mean nothing; residuals are a worker's own."""
    plan = plans.diloco(1, codec=ErrorFeedback(LowRank(1)))
    engines = []
    for seed in range(2):
        x = torch.zeros(8, 8, requires_grad=True)
        world = ElasticWorld(Threads(Table(), 0, [{"there": [0]}], 0))
        engine = ElasticEngine(plan, {"x": x}, world)
        rounds = ElasticRounds(engine, world, "keep", lambda: None, lambda line: None)
        with torch.no_grad():
            x.add_(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)))
        engine.run(engine.after_step())
        rounds.tick()
        engines.append(engine)
    theirs, mine = (engine.runners[0].lanes[0].channel for engine in engines)
    residual = mine.memory_state["residual"].clone()
    assert theirs.codec_state
    assert not all(torch.equal(theirs.codec_state[k], mine.codec_state[k]) for k in theirs.codec_state)
    engines[1].adopt(copied(engines[0].state_dict()), "restore")
    assert all(torch.equal(theirs.codec_state[k], mine.codec_state[k]) for k in theirs.codec_state)
    assert torch.equal(mine.memory_state["residual"], residual)
    assert not torch.equal(theirs.memory_state["residual"], residual)
