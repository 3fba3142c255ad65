"""AsyncGossipStrategy: pairs of ranks average in the background while each trains at its own pace."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from lightning_dopt._checks import check_choice, check_float, check_int
from lightning_dopt.asynchronous.a2cid2 import Acid
from lightning_dopt.asynchronous.async_gossip import AsyncGossip
from lightning_dopt.asynchronous.edges import Matchings
from lightning_dopt.comm.ledger import Ledger
from lightning_dopt.slots import FlatTensors
from lightning_dopt.strategies.beside import BesideStrategy
from lightning_dopt.strategies.collectives import StartMethod
from lightning_dopt.topology import Ring
from lightning_dopt.topology.base import Topology


class AsyncGossipStrategy(BesideStrategy):
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
        super().__init__(evaluate, measure_every, timeout, process_group_backend, start_method)
        self.topology = topology if topology is not None else Ring()
        self.rate = check_float(name, "rate", rate, 0.0, open_low=True)
        self.momentum: Literal["none", "acid"] = momentum
        check_choice(name, "momentum", momentum, ("none", "acid"))
        self.max_ahead = check_int(name, "max_ahead", max_ahead, 1)
        self.seed = check_int(name, "seed", seed, 0)

    def set_world_ranks(self) -> None:
        """See :meth:`ReplicaStrategy.set_world_ranks`; also refuses graphs that pairs cannot use."""
        super().set_world_ranks()
        n = self.num_nodes * self.num_processes
        Matchings(self.topology, n)
        if self.momentum == "acid" and n > 1:
            Acid.of(self.topology, n)

    def make_exchange(self, flat: FlatTensors, ledger: Ledger) -> AsyncGossip:
        """See :meth:`BesideStrategy.make_exchange`."""
        return AsyncGossip(
            flat, self.topology, self.rate, self.seed, self.timeout, self.momentum, self.max_ahead, ledger
        )
