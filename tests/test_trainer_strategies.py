"""The strategies by name, on one device, pickled, compiled; and what is refused, with words."""

from __future__ import annotations

import inspect
import pickle
from datetime import timedelta
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import StrategyRegistry
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from trainer_tools import Regressor, Trace, adam, fit, flat, on_ranks, quiet, regression, sgd, shares, trainer

import lightning_dopt as dopt
from lightning_dopt import Every, Int8, Link, Plan, ReplicaStrategy, Ring, Sync, TopK, plans
from lightning_dopt.strategies import NAMES, register

pytestmark = pytest.mark.trainer


@pytest.mark.parametrize("name", [n for name in NAMES for n in (name, f"{name}_notebook")])
def test_names_construct(name: str) -> None:
    assert name == name.lower()
    assert name in StrategyRegistry
    strategy = trainer(name).strategy
    assert type(strategy) is NAMES[name.removesuffix("_notebook")]
    assert strategy._start_method == ("fork" if name.endswith("_notebook") else "popen")
    assert Trainer(accelerator="cpu", devices=1, strategy=name, logger=False).strategy.launcher is not None


def test_names_train() -> None:
    """By name, with processes forked by Lightning; registering twice changes nothing."""
    register()
    a, b = fit("compressed_ddp_notebook", Regressor(), regression(), max_steps=3)
    assert torch.equal(a["weights"], b["weights"])
    assert a["step"] == 3
    assert float(a["logged"]["comm/bytes"]) == 3 * (49 + 4)


def test_named_strategies_say_what_their_plans_say() -> None:
    """Every argument reaches the plan or the base class, and has the same default as there."""
    base = inspect.signature(ReplicaStrategy.__init__).parameters
    for name, cls in NAMES.items():
        plan = getattr(plans, name)
        own = inspect.signature(plan).parameters
        for key, parameter in inspect.signature(cls.__init__).parameters.items():
            if key != "self":
                assert parameter.default == (own if key in own else base)[key].default, (name, key)
        assert set(own) <= set(inspect.signature(cls.__init__).parameters)
        assert cls().plan == plan()
    given: dict[str, dict[str, Any]] = {
        "local_sgd": {"sync_every": 5},
        "diloco": {"sync_every": 7, "outer_lr": 0.5, "outer_momentum": 0.3, "nesterov": False, "codec": Int8()},
        "gossip": {"topology": Ring(), "codec": TopK(0.5), "correction": "none", "order": "atc"},
        "compressed_ddp": {"codec": TopK(0.5)},
        "lo_fi": {},
    }
    rest = {
        "evaluate": "local", "buffers": "local", "measure_every": 3, "link": Link(mbit=1.0),
        "link_step_seconds": 0.5, "timeout": timedelta(seconds=70), "process_group_backend": "gloo", "start_method": "fork",
    }  # fmt: skip
    for name, options in given.items():
        strategy = NAMES[name](**options, **rest)
        assert strategy.plan == getattr(plans, name)(**options)
        assert (strategy.evaluate, strategy.buffer_policy, strategy.measure_every) == ("local", "local", 3)
        assert (strategy.link, strategy.link_step_seconds) == (Link(mbit=1.0), 0.5)
        assert strategy.timeout == timedelta(seconds=70)
        assert (strategy.process_group_backend, strategy._start_method) == ("gloo", "fork")
    assert NAMES["gossip"](order="cta").plan == plans.gossip(order="cta")
    assert NAMES["gossip"](correction="exact_diffusion").plan == plans.gossip(correction="exact_diffusion")
    assert NAMES["diloco"](topology=Ring(), outer_momentum=0.5).plan == plans.diloco(
        topology=Ring(), outer_momentum=0.5
    )


def test_strategies_pickle() -> None:
    """Before a Trainer has them, and as the launcher sends them to fresh interpreters."""
    for name, cls in NAMES.items():
        strategy = cls(start_method="spawn")
        assert pickle.loads(pickle.dumps(strategy)).plan == strategy.plan
        fitter = trainer(strategy)
        again = pickle.loads(pickle.dumps(fitter.strategy))
        assert again.plan == getattr(plans, name)()


# ---------------------------------------------------------------------- one device


def test_one_device() -> None:
    """Every preset trains; where one worker leaves nothing to average, exactly as plain training does."""

    def alone(strategy: Any, optimizer: Any = adam) -> Tensor:
        trace = Trace()
        fitter = trainer(strategy, 1, max_epochs=1, callbacks=[trace])
        fitter.fit(Regressor(optimizer=optimizer), regression())
        if isinstance(fitter.strategy, ReplicaStrategy):
            assert fitter.strategy.world.ledger.bytes == 0
        return trace.stacked()

    def lookahead() -> Tensor:
        """Nesterov's outer step every two steps, by hand."""
        module, (lr, mu) = Regressor(), (0.7, 0.9)
        optimizer = sgd(module.parameters())
        anchors = [p.detach().clone() for p in module.parameters()]
        momenta = [torch.zeros_like(p) for p in anchors]
        rows = []
        for step, batch in enumerate(shares(regression(), 0, n=1), 1):
            optimizer.zero_grad()
            module.loss(batch).backward()
            optimizer.step()
            if step % 2 == 0:
                for p, anchor, momentum in zip(module.parameters(), anchors, momenta, strict=True):
                    change = anchor - p.detach()
                    momentum.mul_(mu).add_(change)
                    anchor -= lr * (change + mu * momentum)
                    p.data.copy_(anchor)
            rows.append(flat(module))
        return torch.stack(rows)

    def job(rank: int) -> Any:
        plain = alone("ddp")
        for name in ("local_sgd", "gossip", "lo_fi"):
            assert torch.equal(alone(name), plain), name
        tracked = alone(dopt.GossipStrategy(correction="gradient_tracking"))  # forms y + g - g_previous
        torch.testing.assert_close(tracked, plain, rtol=1e-5, atol=1e-6)
        assert torch.equal(alone(dopt.GossipStrategy(order="awc")), plain)
        close = alone("compressed_ddp", sgd), alone("ddp", sgd)
        assert 0.0 < (close[0] - close[1]).abs().max() < 2e-3  # the codec still rounds
        torch.testing.assert_close(alone(dopt.DiLoCoStrategy(2), sgd), lookahead(), rtol=1e-5, atol=1e-6)

    on_ranks(job, 1)


# ---------------------------------------------------------------------- refusals


def test_what_is_refused_before_processes_start() -> None:
    quiet()
    with pytest.raises(ValueError, match=r"^Trainer\(sync_batchnorm=True\): .*buffers='average'$"):
        trainer(dopt.LocalSGDStrategy(), sync_batchnorm=True)
    uneven = Plan([Sync(signal="delta", peers=Ring())])
    with pytest.raises(ValueError, match=r"^Sync\(signal='delta', peers=Ring.*anchors"):
        trainer(ReplicaStrategy(plan=uneven), 4)
    with pytest.raises(ValueError, match="not both"):
        ReplicaStrategy(Sync(), plan=Plan())
    for options in (
        {"evaluate": "mean"}, {"buffers": "sum"}, {"clock": -1}, {"measure_every": -1}, {"start_method": "thread"},
        {"timeout": timedelta(0)}, {"process_group_backend": "foo"}, {"process_group_backend": "cpu:gloo,cuda:foo"},
    ):  # fmt: skip
        (key,) = options
        with pytest.raises(ValueError, match=rf"^ReplicaStrategy\({key}=.*") as error:
            ReplicaStrategy(**options)
        assert "\n" not in str(error.value)
    for seconds, link in ((-0.1, Link(mbit=1.0)), (float("nan"), Link(mbit=1.0)), (0.1, None)):
        with pytest.raises(ValueError, match=r"^DiLoCoStrategy\(link_step_seconds=.*") as error:
            dopt.DiLoCoStrategy(link=link, link_step_seconds=seconds)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="sync_evry"):
        dopt.LocalSGDStrategy(sync_evry=3)


class Uneven(Dataset):
    """Rank 1 has one batch less."""

    def __init__(self, rank: int) -> None:
        self.size = 16 if rank == 0 else 12

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return torch.ones(4), torch.ones(1)


def test_what_is_refused_when_training_starts() -> None:
    class Lbfgs(Regressor):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    class Frozen(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.requires_grad_(False)
            self.make = lambda _: sgd([nn.Parameter(torch.zeros(1))])

    def job(rank: int) -> None:
        loader = DataLoader(Uneven(rank), batch_size=4)
        with pytest.raises(ValueError, match=r"^ranks have unequal numbers of training batches, \[4, 3\]: .*$"):
            trainer("local_sgd", max_epochs=1, use_distributed_sampler=False).fit(Regressor(), loader)
        for module, strategy, words in (
            (Lbfgs(), ReplicaStrategy(Sync()), "LBFGS"),
            (Frozen(), ReplicaStrategy(Sync()), "no trainable parameters"),
            (Regressor(), ReplicaStrategy(Sync(), clock=1), r"clock=1: configure_optimizers returned 1 optimizer"),
            (Regressor(), ReplicaStrategy(Sync(what="optimizer.exp_avg")), r"SGD keeps \[\]"),
            (Regressor(), ReplicaStrategy(Sync(what=dopt.Parameters("head.*"))), "selects none of the 4"),
        ):
            with pytest.raises(ValueError, match=words) as error:
                trainer(strategy, max_epochs=1).fit(module, regression())
            assert "\n" not in str(error.value)
        # and the processes are still fit for work
        trainer("local_sgd", max_epochs=1).fit(Regressor(), regression())

    on_ranks(job)


# ---------------------------------------------------------------------- together with


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_compiled_modules() -> None:
    """As without compiling, up to rounding; with a backend that needs no C++ compiler."""

    def job(rank: int) -> Any:
        out = []
        for compiled in (False, True):
            trace, module = Trace(), Regressor(Double)
            fitter = trainer(ReplicaStrategy(plan=plans.local_sgd(2)), max_epochs=1, callbacks=[trace])
            fitter.fit(torch.compile(module, backend="eager") if compiled else module, regression())
            out.append((trace.stacked(), flat(module)))
        return out

    (a, compiled_a), (b, compiled_b) = on_ranks(job)
    torch.testing.assert_close(a[0], compiled_a[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b[0], compiled_b[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(compiled_a[1], compiled_b[1])


@pytest.mark.skipif(
    Version(lightning.__version__) < Version("2.5"),
    reason="2.4 ends the fit two steps after its finder, with DDP, too",
)
def test_learning_rate_finder() -> None:
    """It trains for a while and puts everything back: training afterwards is as if nothing had been."""

    class Settable(Regressor):
        def __init__(self, lr: float) -> None:
            super().__init__()
            self.lr = lr

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    class Peek(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            starts.append((flat(pl_module), trainer.strategy.engine.step, trainer.strategy.world.ledger.bytes))

    starts: list[Any] = []

    def job(rank: int) -> Any:
        import os
        import tempfile

        os.chdir(tempfile.mkdtemp())
        trace, module = Trace(), Settable(1e-3)
        finder = LearningRateFinder(num_training_steps=30, early_stop_threshold=None)
        fitter = trainer(
            dopt.DiLoCoStrategy(2), max_epochs=1, callbacks=[finder, Peek(), trace], default_root_dir=os.getcwd()
        )
        fitter.fit(module, regression(256))
        plain = Trace()
        trainer(dopt.DiLoCoStrategy(2), max_epochs=1, callbacks=[plain]).fit(Settable(module.lr), regression(256))
        rows = torch.stack([trace.rows[s] for s in range(1, 33)])
        return rows, plain.stacked(), starts, module.lr

    for rows, plain, (*_, (start, step, sent)), lr in on_ranks(job):
        assert lr != 1e-3
        assert (step, sent) == (0, 0)
        assert torch.equal(start, flat(Settable(lr)))
        assert torch.equal(rows, plain)


def test_data_sets_of_tensors_with_one_batch() -> None:
    """An epoch of a single batch, more steps per round than the run has."""

    def job(rank: int) -> Any:
        module = Regressor()
        data = DataLoader(TensorDataset(torch.ones(2, 4), torch.ones(2, 1)), batch_size=1)
        trainer(ReplicaStrategy(Sync(when=Every(100))), max_epochs=3).fit(module, data)
        return flat(module)

    a, b = on_ranks(job)
    assert torch.equal(a, b)
    assert not torch.equal(a, flat(Regressor()))


def test_all_replicas_start_from_rank_0() -> None:
    """Weights, BatchNorm statistics and integer buffers, whatever each rank was made with; frozen parameters, too."""

    class Start(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            starts.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    starts: list[dict[str, Tensor]] = []

    def job(rank: int) -> Any:
        module = Regressor(lambda: nn.Sequential(nn.Linear(4, 1), nn.BatchNorm1d(1)), seed=1 + rank)
        norm = module.net[1]
        norm.running_mean.fill_(float(rank))
        norm.num_batches_tracked.fill_(rank)
        norm.weight.requires_grad_(False).fill_(float(2 - rank))
        before = {k: v.clone() for k, v in module.state_dict().items()}
        trainer(ReplicaStrategy(), max_steps=1, callbacks=[Start()]).fit(module, regression())
        return before, starts[0]

    (a, start_a), (b, start_b) = on_ranks(job)
    for name, value in a.items():
        assert torch.equal(start_a[name], value)
        assert torch.equal(start_b[name], value)
    for name in ("net.0.weight", "net.1.running_mean", "net.1.num_batches_tracked", "net.1.weight"):
        assert not torch.equal(b[name], a[name])
