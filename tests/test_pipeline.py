"""Pipelines: exactly the unsplit model without a codec; cutting; refusals; real processes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dopt import SyncError
from lightning_dopt.compress import Int4
from lightning_dopt.pipeline import (
    Clapping,
    Direct,
    Pipeline,
    Program,
    SimulatedPipeline,
    bitpipe,
    cut,
    cut_batch,
    gpipe,
    interleaved,
    mail,
    one_f_one_b,
)
from tests.trainer_tools import on_ranks


def net(modules: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(5 if k == 0 else 6, 6), nn.Tanh()) for k in range(modules - 1)]
    return nn.Sequential(*layers, nn.Linear(6, 2)).to(dtype)


def data(n: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g, dtype=dtype), torch.randn(n, 2, generator=g, dtype=dtype)


def loss(y: Tensor, part: Any) -> Tensor:
    return nn.functional.mse_loss(y, part[1])


def unsplit(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    value = loss(model(batch[0]), batch)
    value.backward()
    return value.detach()


PROGRAMS = [
    *(make(ranks, count) for make in (gpipe, one_f_one_b) for ranks in (1, 2, 3, 4) for count in (1, 2, 4)),
    *(interleaved(ranks, 2 * ranks) for ranks in (2, 3, 4)),
    interleaved(2, 4, 3),
    bitpipe(2, 2),
    bitpipe(2, 4),
    bitpipe(4, 8),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: f"{p.name}-{p.ranks}-{p.stages}-{p.microbatches}")
@pytest.mark.parametrize("size", [16, 13, 1])
def test_equals_the_unsplit_model(program: Program, size: int) -> None:
    """Loss and gradients, with micro-batches of equal and of unequal size, or with fewer of them, summed over two batches."""
    model = net()
    reference = copy.deepcopy(model)
    pipeline = SimulatedPipeline(cut(model, program.stages), program, loss)
    for seed in (1, 2):
        expected = unsplit(reference, data(size, seed))
        assert pipeline.step(data(size, seed)) == pytest.approx(float(expected), abs=1e-10)
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-10, rtol=1e-10)
    for stage, copied in zip(cut(model, program.stages), pipeline._copies, strict=False):
        for mine, other in zip(stage.parameters(), copied.parameters(), strict=True):
            assert mine.grad is not None
            assert mine.grad.equal(other.grad), "both copies of a stage get one gradient, in every bit"


def test_bytes_are_those_of_activations_and_gradients() -> None:
    pipeline = SimulatedPipeline(cut(net(4), at=[1, 2, 3]), one_f_one_b(4, 2), loss)
    pipeline.step(data(10))
    pipeline.step(data(10))
    row = 2 * 10 * 6 * 8  # two steps of ten rows of six doubles
    entries = [ledger.entries for ledger in pipeline.ledgers]
    assert [e["activations"].bytes if "activations" in e else 0 for e in entries] == [row, row, row, 0]
    assert [e["gradients"].bytes if "gradients" in e else 0 for e in entries] == [0, row, row, row]
    assert [e["shapes"].messages if "shapes" in e else 0 for e in entries] == [2, 2, 2, 0], "told once for every shape"


def test_evaluation_changes_nothing() -> None:
    model = net(3)
    pipeline = SimulatedPipeline(cut(model, 3), one_f_one_b(3, 2), loss, activation_link=Clapping("FC", 0.5, Int4()))
    pipeline.step(data(8))
    before = pipeline.state_dict()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    expected = loss(model(data(9, 5)[0]), data(9, 5)).detach()
    assert pipeline.evaluate(data(9, 5)) == pytest.approx(float(expected), abs=1e-12), "links are passed by"
    for rank, state in pipeline.state_dict().items():
        assert state["step"] == before[rank]["step"]
        for name, memory in state["memories"].items():
            assert all(memory[m].equal(before[rank]["memories"][name][m]) for m in memory)
    assert all(p.grad is not None and p.grad.equal(g) for p, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("program", [one_f_one_b(3, 4), interleaved(2, 2), bitpipe(2, 2)], ids=lambda p: p.name)
def test_forward_is_the_whole_output(program: Program) -> None:
    model = net(4)
    pipeline = SimulatedPipeline(cut(model, program.stages), program, loss, activation_link=Direct(Int4()))
    for size in (8, 5, 1):
        x = data(size)[0]
        torch.testing.assert_close(pipeline.forward(x), model(x), atol=1e-12, rtol=0.0)
        sent = [ledger.entries["outputs"].bytes if "outputs" in ledger.entries else 0 for ledger in pipeline.ledgers]
        torch.testing.assert_close(pipeline.forward(x, to=1), model(x), atol=1e-12, rtol=0.0)
        again = [ledger.entries["outputs"].bytes if "outputs" in ledger.entries else 0 for ledger in pipeline.ledgers]
        assert 0 < sum(again) - sum(sent) <= size * 2 * 8 or program.ranks == 2, "to one rank only"
    assert all(p.grad is None for p in model.parameters())


def test_part_of_the_gradients_is_clipped() -> None:
    model = net(3)
    pipeline = SimulatedPipeline(cut(model, 3), one_f_one_b(3, 1), loss)
    pipeline.step(data(4))
    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p.grad.clone() for p in model.parameters() if p.dim() == 1 and p.grad is not None]
    expected = torch.stack([p.grad.norm() for p in weights if p.grad is not None]).norm()
    assert float(pipeline.clip_grad_norm_(1e-3, weights)) == pytest.approx(float(expected), abs=1e-12)
    assert all(p.grad is not None and p.grad.norm() <= 1e-3 for p in weights)
    unclipped = [p.grad for p in model.parameters() if p.dim() == 1]
    assert all(g is not None and g.equal(b) for g, b in zip(unclipped, biases, strict=True))


def test_the_context_is_entered_for_every_forward_but_no_backward() -> None:
    seen: list[torch.dtype] = []

    def watching(y: Tensor, part: Any) -> Tensor:
        seen.append(y.dtype)
        return nn.functional.mse_loss(y.float(), part[1])

    def context() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    model = net(3, dtype=torch.float32)
    runners = SimulatedPipeline(cut(model, 3), one_f_one_b(3, 2), watching)
    for runner in runners.runners:
        runner.context = context
    runners.step(data(4, dtype=torch.float32))
    assert seen == [torch.bfloat16] * 2
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_frozen_stages_and_unused_parameters() -> None:
    model = net(4)
    model[0].requires_grad_(False)
    reference = copy.deepcopy(model)
    pipeline = SimulatedPipeline(cut(model, 4), one_f_one_b(4, 2), loss)
    pipeline.step(data(8))
    unsplit(reference, data(8))
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("program", [one_f_one_b(3, 2), bitpipe(4, 4)], ids=lambda p: p.name)
@pytest.mark.parametrize("limit", [0.05, 100.0])
def test_clipping_is_by_the_norm_over_all_stages(program: Program, limit: float) -> None:
    model = net()
    reference = copy.deepcopy(model)
    pipeline = SimulatedPipeline(cut(model, program.stages), program, loss)
    pipeline.step(data(8))
    unsplit(reference, data(8))
    norm = nn.utils.clip_grad_norm_(reference.parameters(), limit)
    assert float(pipeline.clip_grad_norm_(limit)) == pytest.approx(float(norm), abs=1e-10)
    copies = {id(p): p for p in pipeline.parameters()}
    assert len(copies) == len(list(model.parameters())) * len(program.placement)
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-10, rtol=1e-10)
    for stage, copied in zip(cut(model, program.stages), pipeline._copies, strict=False):
        assert all(a.grad.equal(b.grad) for a, b in zip(stage.parameters(), copied.parameters(), strict=True))  # type: ignore[union-attr,arg-type]
    with pytest.raises(ValueError, match=r"clip_grad_norm_\(max_norm=0\)"):
        pipeline.clip_grad_norm_(0)


# ---------------------------------------------------------------------- cutting


def test_cut_by_index_by_name_and_balanced() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 8), nn.Tanh()), nn.Linear(8, 1))
    assert [s.names for s in cut(model, at=[1, 2])] == [("0",), ("1.0", "1.1"), ("2",)]
    assert [s.names for s in cut(model, at=["1.1"])] == [("0", "1.0"), ("1.1", "2")]
    assert [s.names for s in cut(model, at=["1"])] == [("0",), ("1.0", "1.1", "2")]
    assert [s.names for s in cut(model, 2)] == [("0", "1.0", "1.1"), ("2",)], "30 and 9, not 6 and 33"
    stages = cut(model, at=["1.1"])
    names = [stage.model_name(n) for stage in stages for n, _ in stage.named_parameters()]
    assert names == [n for n, _ in model.named_parameters()], "one checkpoint has the names of the model"
    x = torch.randn(3, 2)
    assert stages[1](stages[0](x)).equal(model(x))


def test_balanced_is_the_smallest_largest_stage() -> None:
    sizes = [5, 1, 1, 1, 4, 2, 7, 1]
    model = nn.Sequential(*(nn.Linear(1, n, bias=False) for n in sizes))

    def largest(starts: tuple[int, ...]) -> int:
        ends = [0, *starts, len(sizes)]
        return max(sum(sizes[a:b]) for a, b in pairwise(ends))

    for stages in range(1, 9):
        best = min(largest(starts) for starts in combinations(range(1, 8), stages - 1))
        made = cut(model, stages)
        assert len(made) == stages
        assert max(sum(p.numel() for p in s.parameters()) for s in made) == best


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cut(nn.Linear(2, 2), 2), r"cut\(stages=2\): the model has 0 modules only"),
        (
            lambda: cut(nn.Linear(2, 2), 2, how="sequential"),
            r"cut\(model=Linear, how='sequential'\): must be an nn.Seq",
        ),
        (lambda: cut(net(3)), r"cut\(stages=None, at=None\): give one of them"),
        (lambda: cut(net(3), 2, at=[1]), r"give one of them"),
        (lambda: cut(net(3), 9), r"cut\(stages=9\): the model has 5 modules only"),
        (lambda: cut(net(3), at=[3]), r"3 is no index from 1 to 2"),
        (lambda: cut(net(3), at=["head"]), r"no module 'head' can begin a stage; there are 0.0, 0.1"),
        (lambda: cut(net(3), at=[2, 1]), r"the stage that begins with '1' would leave none before it"),
        (
            lambda: SimulatedPipeline(cut(tied(), at=[1, 2, 3]), bitpipe(2, 2), loss),
            r"'0.weight' of stage 0 and '2.weight' of stage 2 are one tensor, which 'bitpipe' cannot train",
        ),
        (
            lambda: SimulatedPipeline(cut(net(3), 2), gpipe(3, 2), loss),
            r"SimulatedPipeline\(stages=<2>\): 'gpipe' has 3",
        ),
        (lambda: cut_batch(data(3), 4), r"3 samples cannot be cut into 4"),
        (lambda: cut_batch((torch.ones(3), torch.ones(4)), 2), r"tensors of one length .*, not \[3, 4\]"),
    ],
)
def test_bad_arguments_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        make()


def test_stages_must_give_one_floating_point_tensor() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(ValueError, match="stage 0: its output must be one floating point tensor, not tuple"):
        SimulatedPipeline([Pair(), nn.Tanh()], gpipe(2, 1), loss).step(data(2))


def test_batches_of_any_structure() -> None:
    batch = {"x": torch.arange(5), "more": [(torch.arange(10).view(5, 2), "name")], "scalar": torch.tensor(3)}
    parts, weights = cut_batch(batch, 2)
    assert weights == [0.4, 0.6]
    assert [p["x"].tolist() for p in parts] == [[0, 1], [2, 3, 4]]
    assert [tuple(p["more"][0][0].shape) for p in parts] == [(2, 2), (3, 2)]
    assert all(p["more"][0][1] == "name" and p["scalar"] == 3 for p in parts)


# ---------------------------------------------------------------------- real processes


def train(pipeline: Pipeline | SimulatedPipeline, steps: int, dtype: torch.dtype, device: str = "cpu") -> list[float]:
    optimizer = torch.optim.SGD(pipeline.parameters(), lr=0.1, momentum=0.5)
    losses = []
    for t in range(steps):
        optimizer.zero_grad()
        batch = tuple(x.to(device) for x in data(11, seed=t // 2, dtype=dtype))
        losses.append(float(pipeline.step(batch, fresh=t % 2 == 0)))
        losses.append(float(pipeline.clip_grad_norm_(0.05)))
        optimizer.step()
    return losses


CASES: list[tuple[Program, bool]] = [(one_f_one_b(2, 3), False), (bitpipe(2, 4), False), (interleaved(2, 4), True)]


def make(kind: type, program: Program, packed: bool) -> Any:
    dtype = torch.float32 if packed else torch.float64
    link = Clapping("FU", 0.5, Int4(block=8)) if packed else None
    return kind(cut(net(dtype=dtype), program.stages), program, loss, activation_link=link, gradient_link=link)


def job(rank: int) -> Any:
    results = []
    for program, packed in CASES:
        pipeline = make(Pipeline, program, packed)
        losses = train(pipeline, 4, torch.float32 if packed else torch.float64)
        results.append((losses, [p.detach() for p in pipeline.parameters()], pipeline.state_dict()))
    late = Pipeline(cut(net(), 2), one_f_one_b(2, 2), loss, timeout=timedelta(seconds=1))
    if rank == 1:
        time.sleep(2.0)
        return results, ""
    with pytest.raises(SyncError) as error:
        late.step(data(4))
    return results, str(error.value)


def island(rank: int) -> Any:
    """A pipeline on the ranks 0 and 2, with rank 1 elsewhere."""
    group = dist.new_group([0, 2], timeout=timedelta(seconds=2), backend="gloo")
    if rank == 1:
        with pytest.raises(ValueError, match=r"^Pipeline\(group=...\): rank 1 does not belong to it$"):
            Pipeline(cut(net(), 2), one_f_one_b(2, 3), loss, group=group)
        return None
    pipeline = Pipeline(cut(net(), 2), one_f_one_b(2, 3), loss, group=group)
    losses = train(pipeline, 2, torch.float64)
    shared = pipeline.share(1, torch.arange(3) if rank == 2 else torch.zeros(3, dtype=torch.int64), "numbers")
    if rank == 2:
        return losses, shared, pipeline.forward(data(3)[0]), ""
    output = pipeline.forward(data(3)[0])
    with pytest.raises(SyncError) as error:
        pipeline.step(data(4))
    return losses, shared, output, str(error.value)


def test_a_pipeline_on_some_of_the_processes() -> None:
    answers = on_ranks(island, 3)
    simulated = SimulatedPipeline(cut(net(), 2), one_f_one_b(2, 3), loss)
    losses = train(simulated, 2, torch.float64)
    for rank in (0, 2):
        assert answers[rank][0] == losses
        assert answers[rank][1].tolist() == [0, 1, 2]
        assert answers[rank][2].equal(simulated.forward(data(3)[0]))
    assert "from rank 2 (" in answers[0][3], "ranks are those among all processes"


@pytest.mark.parametrize("by_host", [False, True])
def test_two_processes_equal_one(by_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a codec the unsplit model's training, with one that of the simulation in every bit; who is late is named.

    The same where messages pass through a copy on the host, as they do from and to GPUs.
    """
    if by_host:
        monkeypatch.setattr(mail, "on_host", lambda tensor: tensor.dtype != torch.uint8)
    answers = on_ranks(job, 2)
    for k, (program, packed) in enumerate(CASES):
        simulated = make(SimulatedPipeline, program, packed)
        losses = train(simulated, 4, torch.float32 if packed else torch.float64)
        for rank in range(2):
            got, parameters, state = answers[rank][0][k]
            mine = simulated.runners[rank]
            expected = [p for held in sorted(mine.stages) for p in mine.stages[held].parameters()]
            assert got == losses
            assert all(a.equal(b) for a, b in zip(parameters, expected, strict=True))
            for name, memory in state[str(rank)]["memories"].items():
                assert all(tensor.equal(mine.memories[name][m]) for m, tensor in memory.items())
        if not packed:
            model = net()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
            for t in range(4):
                optimizer.zero_grad()
                assert losses[2 * t] == pytest.approx(float(unsplit(model, data(11, seed=t // 2))), abs=1e-10)
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                assert float(norm) > 0.05, "or nothing is clipped"
                assert losses[2 * t + 1] == pytest.approx(float(norm), abs=1e-10)
                optimizer.step()
    assert "rank 0, step 0, pipeline, gradients: no answer after" in answers[0][1]
    assert "from rank 1" in answers[0][1]
    assert "\n" not in answers[0][1]
