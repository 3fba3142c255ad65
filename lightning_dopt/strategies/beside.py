"""Strategies whose ranks have no common step: an exchange beside the Trainer's loop, which settles where all ranks meet."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, Protocol

from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from lightning_dopt.comm.ledger import Ledger
from lightning_dopt.plan import Plan
from lightning_dopt.slots import FlatTensors
from lightning_dopt.strategies import _private
from lightning_dopt.strategies.checkpoints import ReplicaCheckpoints, State, copied
from lightning_dopt.strategies.collectives import StartMethod
from lightning_dopt.strategies.replica import ReplicaStrategy


class Exchange(Protocol):
    """What goes on beside the loop."""

    @property
    def running(self) -> bool:
        """Whether it is between :meth:`start` and :meth:`stop`."""

    @property
    def started(self) -> bool:
        """Whether it has a state."""

    def start(self) -> None:
        """Begin. Collective."""

    def local_step(self) -> object:
        """After an optimizer step."""

    def stop(self) -> None:
        """Complete what is under way and leave the newest weights in the parameters. All ranks come here."""

    def abort(self) -> None:
        """Give up because of a failure elsewhere. Does not wait."""

    def close(self) -> None:
        """Give the connections back. Local."""

    def state_dict(self) -> dict[str, Any]:
        """While it does not run."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """While it does not run."""


class BesideStrategy(ReplicaStrategy):
    """Trains one replica per process; an :class:`Exchange` changes the weights between optimizer steps.

    Between validations and checkpoints no rank waits for another one's step. At these, and at the end of training, all ranks
    come together: what is under way is completed, then the consensus model is validated or every replica saved with
    nothing in flight. A resumed run starts from there; it repeats the uninterrupted one bit by bit only if ranks wait for each
    other, as with a hub whose rule waits for all.

    Args:
        evaluate: See :class:`ReplicaStrategy`, as for all that follow.
        measure_every: See :class:`ReplicaStrategy`; all ranks come together for each measurement.
        timeout: See :class:`ReplicaStrategy`.
        process_group_backend: See :class:`ReplicaStrategy`; the exchange always goes over gloo.
        start_method: See :class:`ReplicaStrategy`.
    """

    def __init__(
        self,
        evaluate: Literal["consensus", "local"],
        measure_every: int,
        timeout: timedelta,
        process_group_backend: str | None,
        start_method: StartMethod,
    ) -> None:
        super().__init__(
            plan=Plan(),
            evaluate=evaluate,
            buffers="local",
            measure_every=measure_every,
            timeout=timeout,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )
        self.exchange: Exchange | None = None
        self._checkpoints: BesideCheckpoints = BesideCheckpoints(self)

    @abstractmethod
    def make_exchange(self, flat: FlatTensors, ledger: Ledger) -> Exchange:
        """The exchange for a fit. Collective."""

    def setup(self, trainer: Any) -> None:
        """Make the exchange beside the engine, which has nothing to do but to know the replicas' mean."""
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        assert self.engine is not None
        assert self.world is not None
        self.exchange = self.make_exchange(self.engine.flat, self.world.ledger)
        self._checkpoints.restore_exchange()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """One optimizer step, then the exchange's."""
        assert self.exchange is not None
        if not self.exchange.running:
            self.exchange.start()
        out = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._index.position(_private.unwrap_optimizer(optimizer)) == self.clock_index:
            self.after_local_step(self.exchange.local_step())
        return out

    def after_local_step(self, found: object) -> None:
        """Something to do with what :meth:`Exchange.local_step` returned."""

    def settle(self) -> None:
        """Complete what is under way and put the newest weights into the module, until the next step. Collective in effect."""
        if self.exchange is not None and self.exchange.running and not self.interrupted:
            self.exchange.stop()

    def on_validation_start(self) -> None:
        """See :meth:`ReplicaStrategy.on_validation_start`."""
        self.settle()
        super().on_validation_start()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """See :meth:`ReplicaStrategy.lightning_module_state_dict`."""
        self.settle()
        return super().lightning_module_state_dict()

    def on_train_end(self) -> None:
        """See :meth:`ReplicaStrategy.on_train_end`."""
        self.settle()
        super().on_train_end()

    def on_exception(self, exception: BaseException) -> None:
        """See :meth:`ReplicaStrategy.on_exception`; the exchange's partners are told as well."""
        super().on_exception(exception)
        if self.exchange is not None:
            self.exchange.abort()

    def teardown(self) -> None:
        """See :meth:`ReplicaStrategy.teardown`."""
        if self.exchange is not None:
            self.exchange.close()
        self.exchange = None
        super().teardown()


class BesideCheckpoints(ReplicaCheckpoints):
    """Replica files that also hold the state of the exchange.

    Args:
        strategy: Whose replicas.
    """

    strategy: BesideStrategy

    def __init__(self, strategy: BesideStrategy) -> None:
        super().__init__(strategy)
        self._exchange: State | None = None

    def _own_state(self) -> State:
        out = super()._own_state()
        exchange = self.strategy.exchange
        resting = exchange is not None and not exchange.running and exchange.started  # a failing run has no whole state
        out["exchange"] = copied(exchange.state_dict()) if exchange is not None and resting else None
        return out

    def restore_engine(self) -> None:
        """See :meth:`ReplicaCheckpoints.restore_engine`; keeps the exchange's state for :meth:`restore_exchange`."""
        if self._restored is not None:
            self._exchange = self._restored.pop("exchange", None)
        super().restore_engine()
        if self.strategy.exchange is not None:
            self.strategy.settle()
            self.restore_exchange()

    def restore_exchange(self) -> None:
        """Give the exchange the state that was read, if any.

        Raises:
            ValueError: it does not suit this one.
        """
        state, self._exchange = self._exchange, None
        if state is not None and self.strategy.exchange is not None:
            self.strategy.exchange.load_state_dict(state)
