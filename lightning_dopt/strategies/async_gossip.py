"""AsyncGossipStrategy: pairs of ranks average in the background while each trains at its own pace."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from lightning_dopt._checks import check_choice, check_float, check_int
from lightning_dopt.asynchronous.a2cid2 import Acid
from lightning_dopt.asynchronous.async_gossip import AsyncGossip
from lightning_dopt.asynchronous.edges import Matchings
from lightning_dopt.plan import Plan
from lightning_dopt.strategies import _private
from lightning_dopt.strategies.checkpoints import ReplicaCheckpoints, State, copied
from lightning_dopt.strategies.replica import ReplicaStrategy, StartMethod
from lightning_dopt.topology import Ring
from lightning_dopt.topology.base import Topology


class AsyncGossipStrategy(ReplicaStrategy):
    """AD-PSGD, or A2CiD2 with ``momentum="acid"``, beside the Trainer's loop. See :class:`AsyncGossip`.

    Between validations and checkpoints no rank waits for another one's gradients. At these, and at the end of training, all
    ranks come together: meetings are completed, then the consensus model is validated or every replica saved with nothing in
    flight. A resumed run starts from there, but does not repeat the uninterrupted one bit by bit.

    Args:
        topology: Who may meet: undirected, connected, the same at all times. ``None`` means a ring.
        rate: Meetings per optimizer step, averaged over the ranks.
        momentum: ``"none"`` or ``"acid"``.
        max_ahead: How many meetings training may be ahead of the background before it waits.
        seed: Seed of the order of meetings.
        evaluate: See :class:`ReplicaStrategy`, as for all that follow.
        measure_every: See :class:`ReplicaStrategy`; all ranks come together for each measurement.
        timeout: See :class:`ReplicaStrategy`.
        process_group_backend: See :class:`ReplicaStrategy`; meetings always go over gloo.
        start_method: See :class:`ReplicaStrategy`.

    Raises:
        ValueError: an argument outside its range; a graph that pairs cannot use, when the Trainer is made.
    """

    def __init__(
        self,
        topology: Topology | None = None,
        rate: float = 1.0,
        momentum: Literal["none", "acid"] = "none",
        max_ahead: int = 8,
        seed: int = 0,
        evaluate: Literal["consensus", "local"] = "consensus",
        measure_every: int = 0,
        timeout: timedelta = timedelta(minutes=30),
        process_group_backend: str | None = None,
        start_method: StartMethod = "popen",
    ) -> None:
        name = type(self).__name__
        super().__init__(
            plan=Plan(),
            evaluate=evaluate,
            buffers="local",
            measure_every=measure_every,
            timeout=timeout,
            process_group_backend=process_group_backend,
            start_method=start_method,
        )
        self.topology = topology if topology is not None else Ring()
        self.rate = check_float(name, "rate", rate, 0.0, open_low=True)
        self.momentum: Literal["none", "acid"] = momentum
        check_choice(name, "momentum", momentum, ("none", "acid"))
        self.max_ahead = check_int(name, "max_ahead", max_ahead, 1)
        self.seed = check_int(name, "seed", seed, 0)
        self.gossip: AsyncGossip | None = None
        self._checkpoints: AsyncCheckpoints = AsyncCheckpoints(self)

    def set_world_ranks(self) -> None:
        """See :meth:`ReplicaStrategy.set_world_ranks`; also refuses graphs that pairs cannot use."""
        super().set_world_ranks()
        n = self.num_nodes * self.num_processes
        Matchings(self.topology, n)
        if self.momentum == "acid" and n > 1:
            Acid.of(self.topology, n)

    def setup(self, trainer: Any) -> None:
        """Make the pairwise exchange beside the engine, which has nothing to do but to know the replicas' mean."""
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        assert self.engine is not None
        assert self.world is not None
        self.gossip = AsyncGossip(
            self.engine.flat,
            self.topology,
            self.rate,
            self.seed,
            self.timeout,
            self.momentum,
            self.max_ahead,
            self.world.ledger,
        )
        self._checkpoints.restore_gossip()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """One optimizer step, then the exchange of displacements with the background."""
        assert self.gossip is not None
        if not self.gossip.running:
            self.gossip.start()
        out = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._index.position(_private.unwrap_optimizer(optimizer)) == self.clock_index:
            self.gossip.local_step()
        return out

    def settle(self) -> None:
        """Complete all meetings and put the newest weights into the module, until the next step. Collective in effect."""
        if self.gossip is not None and self.gossip.running and not self.interrupted:
            self.gossip.stop()

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
        """See :meth:`ReplicaStrategy.on_exception`; partners are told as well."""
        super().on_exception(exception)
        if self.gossip is not None:
            self.gossip.abort()

    def teardown(self) -> None:
        """See :meth:`ReplicaStrategy.teardown`."""
        if self.gossip is not None:
            self.gossip.close()
        self.gossip = None
        super().teardown()


class AsyncCheckpoints(ReplicaCheckpoints):
    """Replica files that also hold the state of the pairwise exchange.

    Args:
        strategy: Whose replicas.
    """

    strategy: AsyncGossipStrategy

    def __init__(self, strategy: AsyncGossipStrategy) -> None:
        super().__init__(strategy)
        self._gossip: State | None = None

    def _own_state(self) -> State:
        out = super()._own_state()
        gossip = self.strategy.gossip
        resting = gossip is not None and not gossip.running and gossip.started  # a failing run has no whole state
        out["gossip"] = copied(gossip.state_dict()) if gossip is not None and resting else None
        return out

    def restore_engine(self) -> None:
        """See :meth:`ReplicaCheckpoints.restore_engine`; keeps the exchange's state for :meth:`restore_gossip`."""
        if self._restored is not None:
            self._gossip = self._restored.pop("gossip", None)
        super().restore_engine()
        if self.strategy.gossip is not None:
            self.strategy.settle()
            self.restore_gossip()

    def restore_gossip(self) -> None:
        """Give the exchange the state that was read, if any.

        Raises:
            ValueError: it was saved with another momentum, or with other parameters.
        """
        state, self._gossip = self._gossip, None
        if state is not None and self.strategy.gossip is not None:
            self.strategy.gossip.load_state_dict(state)
