"""torch's schedules: proved before they run, and on real processes exactly the unsplit model."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dopt import SyncError
from lightning_dopt.compress import Int4
from lightning_dopt.pipeline import (
    Direct,
    Program,
    SimulatedPipeline,
    TorchPipeline,
    bitpipe,
    check,
    cut,
    make_pipeline,
    make_program,
    torch_schedules,
)

pytestmark = pytest.mark.skipif(not torch_schedules.available("zbv"), reason="this torch is too old")
DEEP = ("interleaved", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(5 if k == 0 else 6, 6), nn.Tanh(), nn.Dropout(0.2)) for k in range(7)]
    return nn.Sequential(*layers, nn.Linear(6, 2)).double()


def data(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g, dtype=torch.float64), torch.randn(n, 2, generator=g, dtype=torch.float64)


def loss(y: Tensor, part: Any) -> Tensor:
    return nn.functional.mse_loss(y, part[1])


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def programs(ranks: int) -> list[Program]:
    return [make_program(name, ranks, 2 * ranks) for name in ("gpipe", "1f1b", *DEEP)]  # type: ignore[arg-type]


# ---------------------------------------------------------------------- proofs


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_bubbles_of_the_papers(ranks: int, groups: int) -> None:
    """All of torch's tables are proved, and have the bubbles of the papers where those have a formula."""
    count, warm = groups * ranks, ranks - 1
    bubbles = {name: check(make_program(name, ranks, count)).bubble for name in DEEP[1:3]}  # type: ignore[arg-type]
    assert bubbles["looped_bfs"] == pytest.approx(warm / (2 * count + warm))
    assert bubbles["interleaved_zero_bubble"] == pytest.approx(warm / (6 * count + warm))
    if count >= 2 * ranks:
        assert check(make_program("zbv", ranks, count)).bubble == pytest.approx(warm / (6 * count + warm))
        assert check(make_program("dualpipev", ranks, count)).bubble == pytest.approx(2 * warm / (6 * count + 2 * warm))


def test_torchs_own_table_is_what_is_proved() -> None:
    program = make_program("zbv", 2, 4)
    assert program.placement == ((0, 1, 1, 0),)
    kinds = {action.kind for row in program.actions for action in row}
    assert {"backward_input", "backward_weight"} <= kinds
    assert check(program).peak == (4, 4)
    assert check(program).messages == 2 * 2 * 4, "the turn of the V sends nothing"


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("size", [16, 13])
def test_our_runtime_runs_them_too(name: Any, size: int) -> None:
    """In one process, with micro-batches of unequal size; there a backward in two parts is done in the first."""
    model = without_dropout(net())
    reference = copy.deepcopy(model)
    program = make_program(name, 2, 4)
    pipeline = SimulatedPipeline(cut(model, program.stages), program, loss)
    value = loss(reference(data(size)[0]), data(size))
    value.backward()
    assert float(pipeline.step(data(size))) == pytest.approx(float(value.detach()), abs=1e-10)
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-10, rtol=1e-10)


# ---------------------------------------------------------------------- real processes


def train(pipeline: TorchPipeline | SimulatedPipeline, sizes: list[int]) -> list[float]:
    """Steps that add up two batches each, clip, and are followed by an evaluation."""
    optimizer = torch.optim.SGD(pipeline.parameters(), lr=0.1, momentum=0.5)
    losses = []
    for t, size in enumerate(sizes):
        optimizer.zero_grad()
        losses += [float(pipeline.step(data(size, seed=2 * t + k))) for k in range(2)]
        losses.append(float(pipeline.clip_grad_norm_(0.5)))
        optimizer.step()
        losses.append(float(pipeline.evaluate(data(19))))
    return losses


SIZES = [16, 24, 13, 16]
"""Batches of another shape, one that cannot be cut evenly, and the first shape again."""


def normed() -> nn.Sequential:
    model = net()
    model[2].append(nn.BatchNorm1d(6).double())
    return model


def statistics(runner: Any) -> list[Tensor]:
    return [b.clone() for held in sorted(runner.stages) for b in runner.stages[held].buffers()]


def job(world: Any, ranks: int, sizes: list[int]) -> Any:
    results = []
    for program in programs(ranks):
        pipeline = TorchPipeline(cut(normed(), program.stages), program, loss, seed=3)
        losses = train(pipeline, sizes)
        engines = len(pipeline.runners[0]._engines)  # type: ignore[attr-defined]
        tensors = [p.detach() for p in pipeline.parameters()] + statistics(pipeline.runners[0])
        results.append((losses, tensors, pipeline.report.bubble, engines))
    return results


@pytest.mark.parametrize("count", [2, 4])
def test_processes_equal_one(ranks: Callable[..., list[Any]], count: int) -> None:
    """Every schedule trains as the simulation of it does, which equals the unsplit model (above).

    With masks of dropout, and statistics of batch normalization.
    """
    sizes = SIZES if count == 2 else [21, 16]
    answers = ranks(job, count, count, sizes)
    for k, program in enumerate(programs(count)):
        simulated = SimulatedPipeline(cut(normed(), program.stages), program, loss, seed=3)
        losses = train(simulated, sizes)
        for rank in range(count):
            got, parameters, bubble, engines = answers[rank][k]
            assert engines == len({size for size in sizes if size % program.microbatches == 0}), "torch ran them"
            assert got == pytest.approx(losses, abs=1e-10), program.name
            assert bubble == check(program).bubble
            runner = simulated.runners[rank]
            for mine, other in zip(parameters, [*runner.parameters(), *statistics(runner)], strict=True):
                torch.testing.assert_close(mine, other.detach(), atol=1e-10, rtol=1e-10)


def gradients(world: Any) -> Any:
    """Without dropout, tied and frozen weights: loss and gradients."""
    found = []
    for program in programs(2):
        model = special()
        pipeline = TorchPipeline(cut(model, at=POSITIONS[program.stages]), program, loss)
        value = float(pipeline.step(data(16)))
        held = [s for _, s in program.held(world.rank)]
        found.append((value, {s: [p.grad for p in pipeline.runners[0].stages[0, s].parameters()] for s in held}))
    return found


POSITIONS = {2: [4], 4: [2, 3, 6]}


class View(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)[0]


def special() -> nn.Sequential:
    model = nn.Sequential(*without_dropout(net()))
    model[5][0].weight = model[1][0].weight
    model[0].requires_grad_(False)
    model[2] = nn.Identity()
    model[3].append(View())
    model[5].append(View())
    return model


def test_tied_and_frozen_weights_views_and_empty_stages(ranks: Callable[..., list[Any]]) -> None:
    answers = ranks(gradients, 2)
    reference = special()
    value = loss(reference(data(16)[0]), data(16))
    value.backward()
    for k, program in enumerate(programs(2)):
        stages = cut(reference, at=POSITIONS[program.stages])
        for rank in range(2):
            got, by_stage = answers[rank][k]
            assert got == pytest.approx(float(value.detach()), abs=1e-10)
            for s, found in by_stage.items():
                for mine, p in zip(found, stages[s].parameters(), strict=True):
                    assert (mine is None) == (p.grad is None), program.name
                    if mine is not None:
                        torch.testing.assert_close(mine, p.grad, atol=1e-10, rtol=1e-10)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise KeyError("a fault of the model")
        return x


def told(pipeline: TorchPipeline) -> str:
    try:
        pipeline.step(data(16))
    except (KeyError, SyncError) as error:
        return f"{type(error).__name__} {error}"
    return ""


def faults(world: Any) -> tuple[str, str]:
    """A step with a model that fails on rank 0, and one that rank 1 is late for."""
    program = make_program("zbv", 2, 4)
    stages: list[nn.Module] = [nn.Sequential(Broken(), nn.Linear(5, 6).double()), *cut(net(), 4)[1:]]
    broken = told(TorchPipeline(stages, program, loss, timeout=timedelta(seconds=1)))
    late = TorchPipeline(cut(net(), 4), program, loss, timeout=timedelta(seconds=1))
    late.step(data(16))
    if world.rank == 1:
        time.sleep(2)
        return broken, ""
    return broken, told(late)


def test_faults_are_told(ranks: Callable[..., list[Any]]) -> None:
    first, second = ranks(faults, 2)
    assert first[0] == "KeyError 'a fault of the model'"
    assert first[1].startswith("SyncError rank 0, step 1, pipeline, zbv: no answer after")
    assert "\n" not in first[1]
    assert second[0].startswith("SyncError rank 1, step 0, pipeline")


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: make_program("dualpipev", 4, 6),
            r"schedule='dualpipev': torch .* does not run it with 4 ranks, 6 micro",
        ),
        (
            lambda: make_program("interleaved_zero_bubble", 3, 16),
            r"does not run it with 3 ranks, 16 micro-batches and 2",
        ),
        (lambda: make_program("zbv", 2, 4, chunks=2), r"make_program\(chunks=2\): only interleaved, looped_bfs"),
        (lambda: make_program("zbv", 0, 4), r"make_program\(ranks=0\)"),
        (lambda: make_program("looped_bfs", 2, 4, chunks=0), r"make_program\(chunks=0\)"),
        (
            lambda: TorchPipeline(cut(net(), 4), bitpipe(2, 4), loss),
            r"TorchPipeline\(program='bitpipe'\): torch has gpipe",
        ),
    ],
)
def test_bad_arguments_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        make()


def test_an_older_torch_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_schedules, "OLDEST", (99, 1))
    with pytest.raises(
        ValueError, match=r"^schedule='dualpipev': needs ScheduleDualPipeV of torch >= 99.1, this is [\w.+]+$"
    ):
        make_program("dualpipev", 2, 4)
    assert make_program("interleaved", 2, 4).stages == 4, "ours"


def engines(world: Any) -> Any:
    """Which class runs what, and what is refused."""
    model, link = net(), Direct(Int4())
    found = {}
    for name, chosen, given in [
        ("1f1b", "auto", None),
        ("1f1b", "native", None),
        ("1f1b", "auto", link),
        ("bitpipe", "auto", None),
        ("zbv", "auto", link),
        ("zbv", "torch", link),
        ("bitpipe", "torch", None),
    ]:
        program = make_program(name, 2, 4)  # type: ignore[arg-type]
        try:
            made = make_pipeline(cut(model, program.stages), program, loss, activation_link=given, engine=chosen)  # type: ignore[arg-type]
            found[name, chosen, given is None] = type(made).__name__
        except ValueError as error:
            found[name, chosen, given is None] = str(error)
    return found


def test_engine_is_torchs_where_it_can_be(ranks: Callable[..., list[Any]]) -> None:
    found = ranks(engines, 2)[0]
    assert found.pop(("zbv", "torch", False)).startswith("make_pipeline(engine='torch', activation_link=Direct(")
    assert found.pop(("bitpipe", "torch", True)).startswith("TorchPipeline(program='bitpipe'): torch has gpipe, 1f1b,")
    assert found == {
        ("1f1b", "auto", True): "TorchPipeline",
        ("1f1b", "native", True): "Pipeline",
        ("1f1b", "auto", False): "Pipeline",
        ("bitpipe", "auto", True): "Pipeline",
        ("zbv", "auto", False): "Pipeline",
    }
