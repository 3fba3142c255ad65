"""ShardedStrategy under a Trainer, with two processes on gloo."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp as fsdp
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from trainer_tools import Regressor, adam, mlp, on_ranks, regression, trainer

from lightning_dopt import Int4, Int8, ShardedStrategy, sharded
from lightning_dopt.compress import ErrorFeedback, Identity, RandomShift
from lightning_dopt.strategies import WITHOUT_PLAN
from lightning_dopt.strategies.wrapping import units

pytestmark = [
    pytest.mark.trainer,
    pytest.mark.skipif(
        not hasattr(getattr(fsdp, "FSDPModule", None), "set_custom_all_gather"),
        reason="fully_shard takes collectives of others since torch 2.9",
    ),
]


def whole(module: nn.Module) -> Tensor:
    return torch.cat([p.full_tensor().detach().double().flatten() for p in module.parameters()])


class Sharded(Regressor):
    """Shards itself, as ``ModelParallelStrategy`` asks for."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.net, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for part in (self.net[0], self.net[2], self.net):
                fully_shard(part, mesh=mesh)


class Stack(Regressor):
    """A list of blocks, parameters of its own, tied weights, and a forward that the step calls."""

    def __init__(self) -> None:
        super().__init__(optimizer=adam)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.gain = nn.Parameter(torch.ones(4))
            self.tied = nn.Linear(4, 8)
        self.tied.weight = self.net[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x)) * self.gain
        return self.net(x) + self.tied(x).mean(1, keepdim=True)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self(x) - y).square().mean()


def plain() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def fitted(strategy: Any, module: Any = None, val: Any = None, **options: Any) -> tuple[Any, Any]:
    module = module or Sharded(optimizer=adam)
    fitter = trainer(strategy, torch.distributed.get_world_size(), **({"max_steps": 4} | options))
    fitter.fit(module, regression(64), val)
    return module, fitter


OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"precision": "bf16-true"},
    "mixed": {"precision": "bf16-mixed"},
    "accumulated and clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
}


def test_without_compression_it_is_model_parallel_strategy_bit_for_bit() -> None:
    def job(rank: int) -> list[list[Tensor]]:
        return [
            [whole(fitted(s, **o)[0]) for s in (plain(), ShardedStrategy(), ShardedStrategy(Identity(), Identity()))]
            for o in OPTIONS.values()
        ]

    for rows in on_ranks(job):
        for name, (want, exact, identity) in zip(OPTIONS, rows, strict=True):
            assert torch.equal(want, exact), name
            assert torch.equal(want, identity), name


def test_modules_that_do_not_shard_themselves() -> None:
    """However it is cut into units, the training is the same; units that are kept are gathered once."""

    def job(rank: int) -> list[Any]:
        from torch.distributed.fsdp import FSDPModule

        out = []
        cut: list[dict[str, Any]] = [{}, {"wrap": []}, {"wrap": ["blocks.1"]}, {"after_forward": "keep"}]
        for options in cut:
            module, fitter = fitted(ShardedStrategy(**options), Stack())
            parts = [n for n, m in module.named_modules() if isinstance(m, FSDPModule)]
            out.append((parts, whole(module), float(fitter.logged_metrics["comm/bytes/weights"])))
            fitter.validate(module, regression(16), verbose=False)
        return out

    found = on_ranks(job)[0]
    blocks = [f"blocks.{i}" for i in range(3)]
    assert sorted(found[0][0]) == ["", *blocks]
    assert found[1][0] == [""]
    assert sorted(found[2][0]) == ["", "blocks.1"]
    for _, weights, _ in found[1:]:
        assert torch.equal(weights, found[0][1])
    block = 4 * (4 * 4 + 4) // 2  # a share in bytes
    assert found[0][2] - found[3][2] == 4 * 3 * block  # steps, blocks


def test_packed_training_logs_its_bytes_and_learns() -> None:
    def job(rank: int) -> tuple[float, float, dict[str, float]]:
        codecs = sharded.qsdp(block=16)
        losses, logged = [], []
        for strategy in (ShardedStrategy(codecs.weights, codecs.gradients), plain()):
            module, fitter = fitted(strategy, max_epochs=3, max_steps=-1)
            logged.append({k: float(v) for k, v in fitter.logged_metrics.items()})
            losses.append(fitter.validate(module, regression(16), verbose=False)[0]["val_loss"])
        return *losses, logged[0]

    for loss, exact, logged in on_ranks(job):
        assert loss == pytest.approx(exact, rel=0.02)
        # Shares: 4 rows of 4 weights and 4 biases; 1 row of 8 weights and 1 bias. Gathered twice, reduced once.
        message = [16 + 4 + 4 * 4, 8 + 4 + 4]
        assert logged["comm/bytes/gradients"] == 24 * sum(message)
        assert logged["comm/bytes/weights"] == 24 * 2 * sum(message)
        assert logged["comm/bytes"] == logged["comm/bytes/gradients"] + logged["comm/bytes/weights"]
        assert logged["comm/bytes_per_step"] == logged["comm/bytes"] / 24


@pytest.mark.parametrize("folder", [True, False])
def test_resume_is_exact(folder: bool) -> None:
    path = Path(tempfile.mkdtemp()) / "saved.ckpt"

    def strategy() -> ShardedStrategy:
        codecs = sharded.qsdp(4, 16, seed=5)
        return ShardedStrategy(codecs.weights, codecs.gradients, seed=5, save_distributed_checkpoint=folder)

    def job(rank: int) -> list[Any]:
        straight, whole_run = fitted(strategy(), max_epochs=2, max_steps=-1)
        half, fitter = fitted(strategy(), max_epochs=1, max_steps=-1)
        fitter.save_checkpoint(path)
        saved = whole(half)
        module = Sharded(optimizer=adam, seed=9)
        again = trainer(strategy(), max_epochs=2, max_steps=-1)
        again.fit(module, regression(64), ckpt_path=path)
        full = None if folder else torch.load(path, weights_only=True)["state_dict"]
        return [
            whole(straight),
            whole(module),
            saved,
            full,
            [float(t.logged_metrics["comm/bytes"]) for t in (whole_run, again)],
        ]

    for straight, resumed, saved, full, sent in on_ranks(job):
        assert torch.equal(straight, resumed)
        assert not torch.equal(saved, resumed)
        assert sent[0] == sent[1]
        if full is not None:  # one file for any other strategy, with exact weights
            module = Regressor(mlp)
            module.load_state_dict(full)
            assert torch.equal(torch.cat([p.detach().double().flatten() for p in module.parameters()]), saved)


def test_two_nodes_of_two() -> None:
    def job(rank: int) -> list[Any]:
        # Identity in two hops differs by the order of sums only; a secondary copy not at all.
        exact, _ = fitted(ShardedStrategy(), Stack())
        two, fitter = fitted(ShardedStrategy(gradients=Identity(), hops=2, node_size=2, after_forward="node"), Stack())
        return [whole(exact), whole(two), float(fitter.logged_metrics["comm/bytes/secondary"])]

    for exact, two, secondary in on_ranks(job, 4):
        torch.testing.assert_close(two, exact, rtol=1e-5, atol=1e-6)
        # 4 steps; blocks of 4 x 4 weights and 4 biases, whose half is what the other rank of the node lacks
        assert secondary == 4 * 3 * 20 // 2 * 4


# ---------------------------------------------------------------------- names and refusals


def test_names() -> None:
    assert {"sharded", "qsdp", "zeropp"} <= set(WITHOUT_PLAN) <= set(StrategyRegistry.available_strategies())
    for name, codecs in (("sharded", sharded.ShardCodecs()), ("qsdp", sharded.qsdp()), ("zeropp", sharded.zeropp())):
        strategy = trainer(name).strategy
        assert type(strategy) is ShardedStrategy
        assert strategy.codecs == codecs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": ErrorFeedback(Int8())}, "without a memory"),
        ({"after_forward": "node"}, r"ShardedStrategy\(after_forward='node', node_size=0\)"),
        ({"after_forward": "all"}, "must be one of 'free', 'node', 'keep'"),
        ({"node_size": 2}, "has no effect"),
        ({"wrap": "Linear"}, "must be a list of names"),
        ({"timeout": torch.tensor(0)}, "must be longer than zero"),
        ({"hops": 2, "node_size": 3, "gradients": Int4()}, r"node_size=3\): must divide the number of ranks, 4"),
        ({"after_forward": "node", "node_size": 4}, r"node_size=4\): must divide the number of ranks, 4"),
    ],
)
def test_refused_before_processes_start(options: dict[str, Any], message: str) -> None:
    if "timeout" in options:
        from datetime import timedelta

        options = {"timeout": timedelta(0)}
    with pytest.raises(ValueError, match=message) as caught:
        trainer(ShardedStrategy(**options), devices=4)
    assert "\n" not in str(caught.value)


def test_refused_when_the_module_is_known() -> None:
    def job(rank: int) -> str:
        with pytest.raises(ValueError, match="calls fully_shard itself") as caught:
            fitted(ShardedStrategy(wrap=["Linear"]), Sharded())
        return str(caught.value)

    assert "\n" not in on_ranks(job)[0]
    with pytest.raises(ValueError, match=r"^ShardedStrategy\(wrap=\['Conv'\]\): 'Conv' is neither a class nor a name"):
        units(Regressor(), ["Conv"])


def test_units() -> None:
    module = Stack()
    assert units(module, None) == list(module.blocks)
    plain_module = Regressor()
    assert units(plain_module, ["net", "net.0"]) == [plain_module.net[0], plain_module.net]  # inner first
    assert units(plain_module, ["Linear"]) == [plain_module.net[0], plain_module.net[2]]
    with pytest.raises(
        ValueError, match=r"wrap=\['Linear'\]\): net.0.weight is tied to tied.weight, which is in another unit$"
    ):
        units(module, ["Linear"])
    assert units(Regressor(), None) == []


def test_units_need_a_forward() -> None:
    with pytest.raises(ValueError, match=r"wrap=\['blocks'\]\): 'blocks' is a ModuleList, which has no forward$"):
        units(Stack(), ["blocks"])


def test_defaults_are_plain() -> None:
    strategy = ShardedStrategy(RandomShift())
    assert strategy.codecs.weights == RandomShift(8, 1024)
    assert strategy.codecs.gradients is None
