"""Asynchronous gossip under the Trainer: the consensus model, what is saved, and resuming."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from trainer_tools import Regressor, adam, fit, flat, on_ranks, regression, trainer

from lightning_dopt.strategies.async_gossip import AsyncGossipStrategy
from lightning_dopt.topology import Complete, DirectedRing, Ring

pytestmark = pytest.mark.trainer


class Own(Callback):
    """Each replica's vector and the parameters' mean at the end of training."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.mean = torch.zeros(0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, AsyncGossipStrategy)
        final = strategy._checkpoints._final
        assert final is not None
        self.state = final["exchange"]
        self.mean = flat(pl_module)


def names(state: dict[str, torch.Tensor], module: LightningModule) -> torch.Tensor:
    return torch.cat([state[name].double().reshape(-1) for name, _ in module.named_parameters()])


@pytest.mark.parametrize("momentum", ["none", "acid"])
def test_all_ranks_end_with_the_mean_and_validate_it(momentum: Any) -> None:
    strategy = AsyncGossipStrategy(momentum=momentum, start_method="fork", evaluate="consensus")
    a, b = fit(strategy, Regressor(), regression(), regression(seed=3), max_epochs=3)
    assert torch.equal(a["weights"], b["weights"])
    assert a["step"] == 12
    assert float(a["metrics"]["val_loss"]) == float(b["metrics"]["val_loss"])
    module = Regressor()
    module.load_state_dict(a["state_dict"])
    with torch.no_grad():
        losses = [float(module.loss(batch)) for batch in regression(seed=3)]
    assert float(a["metrics"]["val_loss"]) == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    bytes_per_meeting = 49 * 4  # an epoch's meetings are complete when it is validated; the count is logged at steps
    assert float(a["logged"]["comm/bytes"]) % bytes_per_meeting == 0
    assert 8 * bytes_per_meeting <= float(a["logged"]["comm/bytes"]) <= 12 * bytes_per_meeting


def saved_and_resumed(rank: int, folder: str) -> dict[str, Any]:
    module, own = Regressor(optimizer=adam), Own()
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    strategy = AsyncGossipStrategy(momentum="acid", rate=2.0)
    trainer(strategy, max_steps=8, callbacks=[keep, own]).fit(module, regression())
    path = f"{folder}/step=4.ckpt"
    again, second = Regressor(optimizer=adam, seed=9), Own()
    trainer(AsyncGossipStrategy(momentum="acid", rate=2.0), max_steps=8, callbacks=[second]).fit(
        again, regression(), ckpt_path=path
    )
    return {
        "first": names(own.state["x"], module),
        "mean": own.mean,
        "steps": (own.state["steps"], second.state["steps"]),
        "indexes": (own.state["index"], second.state["index"]),
        "resumed": names(second.state["x"], again),
        "resumed_mean": second.mean,
    }


def test_replicas_are_saved_and_resumed(tmp_path: Path) -> None:
    out = on_ranks(lambda rank: saved_and_resumed(rank, str(tmp_path)))
    for first, mean in (("first", "mean"), ("resumed", "resumed_mean")):
        vectors = torch.stack([r[first] for r in out])
        assert torch.allclose(vectors.mean(0), out[0][mean], rtol=0, atol=1e-6)
    assert [r["steps"] for r in out] == [(8, 8), (8, 8)]  # four before the checkpoint, four after it
    assert all(r["indexes"] == (16, 16) for r in out)
    # meetings in between differ in time, not in number: close, but not equal bit by bit
    assert torch.allclose(out[0]["mean"], out[0]["resumed_mean"], rtol=0, atol=0.05)


def test_it_is_plain_data_until_it_runs() -> None:
    strategy = pickle.loads(pickle.dumps(AsyncGossipStrategy(Ring(hops=2), rate=0.5, momentum="acid", seed=3)))
    assert (strategy.topology, strategy.rate, strategy.momentum, strategy.seed) == (Ring(hops=2), 0.5, "acid", 3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rate": 0.0}, r"AsyncGossipStrategy\(rate=0.0\)"),
        ({"momentum": "much"}, r"AsyncGossipStrategy\(momentum='much'\)"),
        ({"max_ahead": 0}, r"AsyncGossipStrategy\(max_ahead=0\)"),
        ({"topology": DirectedRing()}, r"DirectedRing"),
        ({"topology": Complete(), "momentum": "acid"}, r"Complete"),
    ],
)
def test_refused_when_the_trainer_is_made(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*" + text):
        trainer(AsyncGossipStrategy(**options), devices=4)
