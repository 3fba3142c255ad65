"""AsyncLocalStrategy: long rounds of local steps at every worker's own speed, and a hub that nobody has to wait for."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from lightning_dopt._checks import check_choice, check_int
from lightning_dopt.asynchronous.async_local import AsyncLocal
from lightning_dopt.asynchronous.hub import check_hub
from lightning_dopt.asynchronous.hub_messages import check_codec
from lightning_dopt.asynchronous.hub_methods import delayed_nesterov
from lightning_dopt.asynchronous.hub_rules import HubRule
from lightning_dopt.comm.ledger import Ledger
from lightning_dopt.compress.base import Codec
from lightning_dopt.pace import LocalSteps
from lightning_dopt.slots import FlatTensors
from lightning_dopt.strategies.beside import BesideStrategy
from lightning_dopt.strategies.collectives import StartMethod


class AsyncLocalStrategy(BesideStrategy):
    """Asynchronous DiLoCo, FedAsync, FedBuff, FedFix beside the Trainer's loop. See :class:`AsyncLocal`.

    Every rank takes local steps at its own speed, pushes to the hub in rank 0, and goes on from the hub's newest reference.
    Ranks come together for validation and checkpoints only, where each pushes what it has done of its phase; so let these
    be rare, and of equal number: with ``Trainer(max_epochs=-1)`` and ``total_steps`` all ranks stop once they have taken so
    many steps together, whoever took them.

    Args:
        rule: What the hub does; ``None`` means ``delayed_nesterov(n)`` for ``n`` ranks.
        local_steps: Optimizer steps between two pushes: of the fastest rank, others in proportion to their speed, if a number is
            given (``LocalSteps(number, dynamic=True)``).
        codec: How pushes are packed: a compressor, or ``ErrorFeedback`` around one; ``None`` sends floats.
        total_steps: Optimizer steps of all ranks together after which training ends; 0: the Trainer decides.
        inner_state: Whether the optimizer's state stays when a rank is given a new reference, or is forgotten.
        evaluate: See :class:`ReplicaStrategy`, as for all that follow. The consensus is the hub's reference.
        measure_every: See :class:`ReplicaStrategy`; all ranks come together for each measurement.
        timeout: See :class:`ReplicaStrategy`.
        process_group_backend: See :class:`ReplicaStrategy`; pushes always go over gloo.
        start_method: See :class:`ReplicaStrategy`.

    Raises:
        ValueError: an argument outside its range, or a codec that a hub cannot use; shares or speeds for another number of ranks,
            when the Trainer is made.
    """

    def __init__(
        self,
        rule: HubRule | None = None,
        local_steps: LocalSteps | int = 50,
        codec: Codec | None = None,
        total_steps: int = 0,
        inner_state: Literal["keep", "reset"] = "keep",
        evaluate: Literal["consensus", "local"] = "consensus",
        measure_every: int = 0,
        timeout: timedelta = timedelta(minutes=30),
        process_group_backend: str | None = None,
        start_method: StartMethod = "popen",
    ) -> None:
        name = type(self).__name__
        super().__init__(evaluate, measure_every, timeout, process_group_backend, start_method)
        self.rule = rule
        if isinstance(local_steps, int):
            local_steps = LocalSteps(check_int(name, "local_steps", local_steps, 1), dynamic=True)
        self.local_steps = local_steps
        self.codec = codec
        check_codec(name, codec, rule if rule is not None else delayed_nesterov(1))
        self.total_steps = check_int(name, "total_steps", total_steps, 0)
        self.inner_state = check_choice(name, "inner_state", inner_state, ("keep", "reset"))

    def _rule(self, n: int) -> HubRule:
        return self.rule if self.rule is not None else delayed_nesterov(n)

    def set_world_ranks(self) -> None:
        """See :meth:`ReplicaStrategy.set_world_ranks`; also refuses shares and speeds of another number of ranks."""
        super().set_world_ranks()
        n = self.num_nodes * self.num_processes
        check_hub(self._rule(n), n, self.local_steps)

    def make_exchange(self, flat: FlatTensors, ledger: Ledger) -> AsyncLocal:
        """See :meth:`BesideStrategy.make_exchange`."""
        rule = self._rule(self.world_size)
        return AsyncLocal(flat, rule, self.local_steps, self.codec, self.total_steps, self.timeout, ledger)

    def after_local_step(self, found: object) -> None:
        """Forget the inner state if the parameters are the hub's now, and stop where the ranks have done enough."""
        if not found:
            return
        if self.inner_state == "reset":
            for optimizer in self.optimizers:
                optimizer.state.clear()
        self._stop_if_done()

    def settle(self) -> None:
        """See :meth:`BesideStrategy.settle`."""
        super().settle()
        self._stop_if_done()

    def _stop_if_done(self) -> None:
        if isinstance(self.exchange, AsyncLocal) and self.exchange.done:
            self._trainer.should_stop = True
