"""ClientErrors: how well each client is served without itself, measured after every round."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dopt import client_errors
from lightning_dopt._checks import check_int
from lightning_dopt.callbacks.measured import measured
from lightning_dopt.strategies.replica import ReplicaStrategy


class ClientErrors(Callback):
    """Measures the errors that ``plans.fedce(errors=...)`` weighs clients by.

    After every round each rank measures ``metric`` of the model that the round would have made without it, on its own validation
    data; the next round sends the value along. Training is left as it is. Costs a pass over the rank's validation data (or
    ``batches`` of it) per round. Logs ``fedce/error`` of the rank.

    Args:
        metric: A name that ``validation_step`` logs with ``self.log``; at least 0, the larger the worse.
        batches: Validation batches of each loader to use; 0 uses all.

    Raises:
        ValueError: an empty name or ``batches < 0``; when training starts, a plan that does not ask for errors; in training, no
            validation data, or a ``validation_step`` that logs nothing under that name.

    Source: FedCE, arXiv 2303.16520.
    """

    measures_client_errors = True

    def __init__(self, metric: str = "val_loss", batches: int = 0) -> None:
        if not isinstance(metric, str) or not metric:
            raise ValueError(f"ClientErrors(metric={metric!r}): must be a name that validation_step logs")
        self.metric = metric
        self.batches = check_int("ClientErrors", "batches", batches, 0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse plans that do not ask for errors."""
        if stage != "fit":
            return
        strategy = trainer.strategy
        if not isinstance(strategy, ReplicaStrategy) or not client_errors.counted(strategy.plan):
            raise ValueError(
                "ClientErrors: the plan asks for no errors, use it with plans.fedce(errors='plus') or 'times'"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure, if a round has just ended."""
        strategy = trainer.strategy
        assert isinstance(strategy, ReplicaStrategy)
        engine = strategy.engine
        if engine is None or not client_errors.due(engine):
            return
        with client_errors.without_own(engine):
            error = float(measured(trainer, pl_module, self.metric, self.batches, "ClientErrors"))
        client_errors.report(engine, error)
        pl_module.log("fedce/error", error)
