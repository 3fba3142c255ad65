"""A training_step as it is, in two halves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn

from lightning_dopt.pipeline import Replay, SimulatedPipeline, bitpipe, cut, one_f_one_b


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)
        )
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch["x"].flatten(1) / 2, batch["y"]
        try:
            logits = self.model(input=images)
        except Exception:  # must not catch what ends the first half
            return None
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        self.log("loss", loss)
        self.log_dict({"accuracy": (logits.argmax(1) == labels).float().mean()})
        return {"loss": loss, "logits": logits}


def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {"x": torch.randn(10, 2, 2, generator=g, dtype=torch.float64), "y": torch.randint(3, (10,), generator=g)}


@pytest.mark.parametrize("program", [one_f_one_b(3, 4), bitpipe(2, 2)], ids=lambda p: p.name)
def test_an_untouched_module_trains_in_stages(program: Any) -> None:
    module = Classifier().double()
    reference = copy.deepcopy(module)
    replay = Replay(module)
    pipeline = SimulatedPipeline(cut(module.model, program.stages), program, replay.loss, replay.inputs)
    logits = reference.model(batch()["x"].flatten(1) / 2)
    expected = nn.functional.cross_entropy(logits, batch()["y"], label_smoothing=0.1)
    expected.backward()
    assert pipeline.step(batch()) == pytest.approx(float(expected.detach()), abs=1e-10)
    for mine, other in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-10, rtol=1e-10)
    assert "forward" not in vars(module.model), "everything is put back"
    assert "log" not in vars(module)
    assert module.model(batch()["x"].flatten(1) / 2).equal(logits)


class Bad(nn.Module):
    def __init__(self, calls: int = 1, extra: bool = False, result: Any = None) -> None:
        super().__init__()
        self.model = nn.Linear(2, 2)
        self.other = nn.Linear(2, 2) if extra else None
        self.calls, self.result = calls, result

    def training_step(self, batch: Tensor) -> Any:
        for _ in range(self.calls):
            y = self.model(batch)
        return y.sum() if self.calls and self.result is None else self.result

    def pair(self, batch: Tensor) -> Any:
        return self.model(batch, batch)


def test_steps_that_cannot_be_halved_are_told() -> None:
    x = torch.ones(3, 2)
    cases = {
        r"Replay\(network='net'\): Bad has no such module": lambda: Replay(Bad(), "net"),
        r"Replay\(step='validation_step'\): Bad has no such method": lambda: Replay(Bad(), step="validation_step"),
        r"'other.weight' is outside of it and would not be trained": lambda: Replay(Bad(extra=True)),
        r"Bad.training_step: does not call 'model'": lambda: Replay(Bad(0)).inputs(x),
        r"Bad.training_step: must call 'model' once, not 2 times": lambda: Replay(Bad(2)).loss(x, x),
        r"Bad.training_step: must return a loss, .* not str": lambda: Replay(Bad(1, result="done")).loss(x, x),
        r"Bad.pair: must call 'model' with one tensor": lambda: Replay(Bad(), step="pair").inputs(x),
    }
    for message, make in cases.items():
        with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
            make()
    assert Replay(Bad()).inputs(x).equal(x)
    assert Replay(Bad()).loss(x, x) == 6.0, "a step without batch_idx"
