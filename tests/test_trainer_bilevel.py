"""Bilevel strategies under a Trainer, on real processes."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bilevel_problems import Quadratic
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trainer_tools import Trace, flat, on_ranks, trainer

from lightning_dopt import (
    BilevelModule,
    BilevelStrategy,
    Complete,
    DSOBAStrategy,
    ExactDiffusion,
    Exponential,
    ReplicaStrategy,
    Ring,
    SparkleStrategy,
    SyncError,
    TopK,
    bilevel,
)

pytestmark = pytest.mark.trainer

PROBLEM = Quadratic.drawn(3, h=1.0)


class Two(BilevelModule):
    """The quadratic problem of this rank; batches hold noise."""

    lower_lr, upper_lr = 0.1, 0.05

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.y = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        self.drop = nn.Dropout(dropout)

    def upper_parameters(self) -> list[nn.Parameter]:
        return [self.x]

    def lower_loss(self, batch: tuple[Tensor]) -> Tensor:
        quadratic = PROBLEM.lower_loss(self.global_rank, {"y": self.y}, {"x": self.x}, 0)
        return quadratic + (self.drop(self.y) * batch[0].mean(0)).sum()

    def upper_loss(self, batch: tuple[Tensor]) -> Tensor:
        return PROBLEM.upper_loss(self.global_rank, {"y": self.y}, {"x": self.x}, 0) + (self.x * batch[0][0, :4]).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", PROBLEM.value(self.x.detach()), sync_dist=True)


def noise(count: int, seed: int, size: float = 0.1) -> DataLoader:
    g = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(size * torch.randn(count, 5, generator=g, dtype=torch.float64)), 2, shuffle=True)


def loaders(size: float = 0.1) -> dict[str, DataLoader]:
    """Of different lengths: the shorter one starts again."""
    return {"lower": noise(24, 0, size), "upper": noise(12, 1, size)}


def fitted(strategy: Any, module: BilevelModule, data: Any, devices: int = 2, **options: Any) -> Any:
    made = trainer(strategy, devices, **{"max_epochs": 2, **options})
    made.fit(module, data)
    return made


# ---------------------------------------------------------------------- two ranks


PLANS = (
    bilevel.sparkle(Ring()),
    bilevel.dsoba(order="first", delta=1e-4),
    bilevel.sparkle(upper="gt", codec=TopK(0.5)),
    bilevel.sparkle(upper="non_atc_gt", lower="extra", auxiliary=bilevel.Level("semi_gt", Exponential())),
    bilevel.double_loop(Complete(), 2, 3),
)


def as_simulated(rank: int) -> list[tuple[Tensor, int, dict[str, float]]]:
    answers = []
    for plan in PLANS:
        trace, module = Trace(), Two()
        made = fitted(BilevelStrategy(plan), module, loaders(0.0), 3, callbacks=[trace], max_epochs=1, max_steps=4)
        logged = {k: float(v) for k, v in made.logged_metrics.items()}
        answers.append((trace.stacked(), made.global_step, logged))
    return answers


def test_three_ranks_equal_the_simulation() -> None:
    answers = on_ranks(as_simulated, 3)
    for k, plan in enumerate(PLANS):
        run = PROBLEM.simulate(plan)
        for step in range(4):
            run.run(1)
            for rank in range(3):
                expected = torch.cat([run.stacked("upper", "x")[rank], run.stacked("lower", "y")[rank]])
                assert torch.allclose(answers[rank][k][0][step], expected, atol=1e-10)
        for rank in range(3):
            _, steps, logged = answers[rank][k]
            assert steps == 4  # one per batch, not one per optimizer
            assert logged["comm/bytes"] == run.bytes[rank]
            assert logged["comm/bytes/lower/parameters"] == run.worlds[rank].ledger.entries["lower/parameters"].bytes
            assert {"lower_loss", "upper_loss", "comm/bytes/auxiliary/parameters", "comm/stall_s"} <= set(logged)


class Norm(Two):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5, affine=False).double()

    def lower_loss(self, batch: tuple[Tensor]) -> Tensor:
        return super().lower_loss(batch) + 0.1 * self.norm(batch[0] + self.y).square().mean()


def buffers(rank: int) -> list[Tensor]:
    found = []
    for policy in ("average", "local"):
        module = Norm()
        strategy = BilevelStrategy(bilevel.soba(), evaluate="local", buffers=policy)
        fitted(strategy, module, loaders(), max_epochs=1, max_steps=3)
        assert int(module.norm.num_batches_tracked) == 3  # once per step
        found.append(module.norm.running_mean.clone())
    return found


def test_buffers_are_averaged_with_the_lower_level() -> None:
    (average, local), (other, other_local) = on_ranks(buffers)
    assert torch.allclose(average, other, atol=1e-12)
    assert not torch.allclose(local, other_local, atol=1e-6)


def overflow(rank: int) -> str:
    with pytest.raises((FloatingPointError, SyncError)) as caught:
        fitted(SparkleStrategy(timeout=timedelta(seconds=20)), Overflows(only=1), loaders())
    return str(caught.value)


def test_a_direction_that_is_not_finite_ends_the_run_on_all_ranks() -> None:
    mine, theirs = on_ranks(overflow)
    assert theirs.startswith("step 3: the auxiliary direction of rank 1 is not finite")
    assert "rank 1" in mine


def resumed(rank: int, folder: str) -> list[tuple[Tensor, Tensor, int, int]]:
    answers = []
    kinds = {
        "ed": lambda: SparkleStrategy(Ring()),
        "mixed": lambda: SparkleStrategy(upper=bilevel.Level("gt", Exponential()), auxiliary="extra", sweep="jacobi"),
        "compressed": lambda: SparkleStrategy(Ring(), "gt", "gt", "gt", codec=TopK(0.5), sync_every=2, order="first"),
    }
    for name, make in kinds.items():
        save = ModelCheckpoint(f"{folder}/{name}", "{step}", every_n_train_steps=8, save_top_k=-1)
        whole = Two(dropout=0.3)
        torch.manual_seed(1)
        made = fitted(make(), whole, loaders(), callbacks=[save])
        again = Two(dropout=0.3)
        torch.manual_seed(2)
        other = trainer(make(), max_epochs=2)
        other.fit(again, loaders(), ckpt_path=f"{folder}/{name}/step=8.ckpt")
        sent = [t.strategy.world.ledger.bytes for t in (made, other)]
        answers.append((flat(whole), flat(again), *sent))
    return answers


def test_resume_is_exact() -> None:
    """In the middle of the second epoch, with both loaders shuffled and dropout in the lower loss."""
    with tempfile.TemporaryDirectory() as folder:
        for answers in on_ranks(lambda rank: resumed(rank, folder)):
            for whole, again, sent, sent_again in answers:
                assert whole.abs().max() > 0
                assert torch.equal(whole, again)
                assert sent == sent_again
        state = torch.load(Path(folder, "ed", "step=8.ckpt"), weights_only=True)
        assert set(state["state_dict"]) == {
            "x",
            "y",
        }  # an ordinary checkpoint; the auxiliary variable lies with the replicas


# ---------------------------------------------------------------------- one rank


class Momentum(Two):
    def configure_optimizers(self) -> Any:
        lower = torch.optim.SGD([self.y], lr=0.05, momentum=0.9)
        upper = torch.optim.SGD([self.x], lr=0.05)
        return [lower, upper], [torch.optim.lr_scheduler.StepLR(upper, 3, 0.1)]


class Plateau(Two):
    def configure_optimizers(self) -> Any:
        both = super().configure_optimizers()
        return both, [{"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(both[0])}]


class Frozen(Two):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(1), requires_grad=False)


class Shared(Two):
    def lower_parameters(self) -> list[nn.Parameter]:
        return [self.x, self.y]


class Foreign(Two):
    def upper_parameters(self) -> list[nn.Parameter]:
        return [nn.Parameter(torch.zeros(1))]


class Lost(Two):
    def lower_parameters(self) -> list[nn.Parameter]:
        return []


class Orphan(Two):
    def __init__(self) -> None:
        super().__init__()
        self.orphan = nn.Parameter(torch.zeros(1))

    def lower_parameters(self) -> list[nn.Parameter]:
        return [self.y]


class OneOptimizer(Two):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Swapped(Two):
    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()[::-1]


class Overflows(Two):
    def __init__(self, only: int = 0) -> None:
        super().__init__()
        self.only = only

    def upper_loss(self, batch: Any) -> Tensor:
        bad = self.global_step == 2 and self.global_rank == self.only
        return super().upper_loss(batch) / (0.0 if bad else 1.0)


def refusals(rank: int) -> dict[str, str]:
    single: dict[str, Any] = {"devices": 1, "max_epochs": 1}
    cases: dict[str, Any] = {
        "shared": lambda: fitted(SparkleStrategy(), Shared(), loaders(), **single),
        "foreign": lambda: fitted(SparkleStrategy(), Foreign(), loaders(), **single),
        "lost": lambda: fitted(SparkleStrategy(), Lost(), loaders(), **single),
        "orphan": lambda: fitted(SparkleStrategy(), Orphan(), loaders(), **single),
        "one": lambda: fitted(SparkleStrategy(), OneOptimizer(), loaders(), **single),
        "swapped": lambda: fitted(SparkleStrategy(), Swapped(), loaders(), **single),
        "overflows": lambda: fitted(SparkleStrategy(), Overflows(), loaders(), **single),
        "batch": lambda: fitted(SparkleStrategy(), Two(), noise(8, 0), **single),
        "strategy": lambda: fitted(ReplicaStrategy(), Two(), loaders(), **single),
        "half": lambda: fitted(
            SparkleStrategy(), Two(), loaders(), plugins=[MixedPrecision("16-mixed", "cpu")], **single
        ),
        "plateau": lambda: fitted(SparkleStrategy(), Plateau(), loaders(), **single),
    }
    told = {}
    for name, case in cases.items():
        try:
            case()
        except (ValueError, FloatingPointError, RuntimeError) as error:
            told[name] = str(error)
    module = Momentum()
    with pytest.warns(UserWarning, match=r"lower level: ExactDiffusion\(kappa=1.0\) is for plain SGD"):
        made = fitted(SparkleStrategy(), module, loaders(), **single)
    told["lr"] = str(made.optimizers[1].param_groups[0]["lr"])
    fitted(SparkleStrategy(), frozen := Frozen(), loaders(), **single)
    told["frozen"] = str(float(frozen.extra))
    return told


def test_what_is_no_bilevel_module_is_refused_in_one_line() -> None:
    told = on_ranks(refusals, 1)[0]
    assert all("\n" not in text for text in told.values())
    assert "parameter 'x' is on both levels" in told["shared"]
    assert "upper_parameters gives 1 tensor(s) that are no parameters of the module" in told["foreign"]
    assert "the lower level has no trainable parameters" in told["lost"]
    assert "parameter 'orphan' is on no level" in told["orphan"]
    assert "must return two optimizers, lower then upper, got 1" in told["one"]
    assert "the first optimizer must hold exactly the 1 lower parameters" in told["swapped"]
    assert told["overflows"].startswith("step 3: the auxiliary direction of rank 0 is not finite")
    assert "a batch must have 'lower' and 'upper', got list" in told["batch"]
    assert "ReplicaStrategy cannot train; use strategy='dsoba' or 'sparkle'" in told["strategy"]
    assert "16-mixed" in told["half"]
    assert "ReduceLROnPlateau follows a metric" in told["plateau"]
    assert float(told["lr"]) == pytest.approx(0.05 * 0.1**4)  # 12 steps
    assert told["frozen"] == "0.0"


def test_names_are_registered() -> None:
    known = StrategyRegistry.available_strategies()
    assert {"dsoba", "sparkle", "dsoba_notebook", "sparkle_notebook"} <= set(known)
    assert isinstance(StrategyRegistry.get("sparkle"), SparkleStrategy)
    assert StrategyRegistry.get("dsoba").plan == bilevel.dsoba()


YAML = """
class_path: lightning_dopt.SparkleStrategy
init_args:
  topology: {class_path: lightning_dopt.Ring}
  upper:
    class_path: lightning_dopt.bilevel.Level
    init_args: {correction: gt, topology: {class_path: lightning_dopt.Exponential}}
  lower: extra
"""


def test_strategies_can_be_written_in_yaml() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(BilevelStrategy, "strategy")
    given = parser.parse_object({"strategy": yaml.safe_load(YAML)})
    plan = parser.instantiate_classes(given).strategy.plan
    assert plan == bilevel.sparkle(Ring(), bilevel.Level("gt", Exponential()), "extra")


def test_faces_make_the_plans_of_the_functions() -> None:
    level = bilevel.Level(ExactDiffusion(0.1), Complete())
    options: dict[str, Any] = {"theta": 0.2, "codec": TopK(0.1), "sync_every": 2, "order": "first", "sweep": "jacobi"}
    options |= {"delta": 0.1, "difference": "forward", "auxiliary_lr": 0.3}
    assert DSOBAStrategy(Ring(), **options).plan == bilevel.dsoba(Ring(), **options)
    assert SparkleStrategy(Ring(), "gt", level, "dsgd", **options).plan == bilevel.sparkle(
        Ring(), "gt", level, "dsgd", **options
    )
    assert BilevelStrategy(bilevel.soba()).plan == bilevel.soba()
    with pytest.raises(ValueError, match=r"BilevelStrategy\(plan=.*must be a BilevelPlan"):
        BilevelStrategy(ReplicaStrategy().plan)  # type: ignore[arg-type]
