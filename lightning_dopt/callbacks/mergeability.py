"""Mergeability: how good the average of all replicas would be, beside how good the replicas are."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dopt._checks import check_int
from lightning_dopt.callbacks.measured import measured
from lightning_dopt.strategies.replica import ReplicaStrategy


class Mergeability(Callback):
    """Measures, at every validation, a metric on each replica's own weights and on the average of all replicas.

    Logs ``merge/local/<metric>``, the mean over ranks of what ``validation_step`` logs under that name with the rank's own
    weights, ``merge/merged/<metric>``, the same with the counterfactual average, and ``merge/gain/<metric>``, local minus
    merged. Training is left as it is: weights, buffers, random numbers, and metric objects of the module come back as they
    were. Costs two more passes over the validation data (or ``batches`` of it).

    Args:
        metric: A name that ``validation_step`` logs with ``self.log``.
        batches: Validation batches of each loader to use; 0 uses all.

    Raises:
        ValueError: an empty name or ``batches < 0``; in validation, a strategy that is no :class:`ReplicaStrategy`, or a
            ``validation_step`` that logs nothing under that name.

    Source: "A single merging suffices", arXiv 2507.06542.
    """

    def __init__(self, metric: str = "val_loss", batches: int = 0) -> None:
        if not isinstance(metric, str) or not metric:
            raise ValueError(f"Mergeability(metric={metric!r}): must be a name that validation_step logs")
        self.metric = metric
        self.batches = check_int("Mergeability", "batches", batches, 0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other strategies before training starts."""
        if stage == "fit" and not isinstance(trainer.strategy, ReplicaStrategy):
            raise ValueError(
                f"Mergeability: needs a strategy with replicas, such as ReplicaStrategy, got {type(trainer.strategy).__name__}"
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log, within ``fit``."""
        strategy = trainer.strategy
        if trainer.sanity_checking or not isinstance(strategy, ReplicaStrategy):
            return
        if not strategy.fitting or strategy.consensus is None:
            return
        with strategy.consensus.own():
            local = measured(trainer, pl_module, self.metric, self.batches, "Mergeability")
            with strategy.consensus.model():
                merged = measured(trainer, pl_module, self.metric, self.batches, "Mergeability")
        for name, value in (("local", local), ("merged", merged), ("gain", local - merged)):
            pl_module.log(f"merge/{name}/{self.metric}", value, sync_dist=True)
