"""What the ranks of a pipeline, and of several ones, are to each other."""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dopt.comm import ProcessGroupWorld
from lightning_dopt.pipeline import Pipeline
from lightning_dopt.strategies.collectives import Collectives
from lightning_dopt.strategies.pipeline_replicas import Islands
from lightning_dopt.strategies.rng import rng_state, set_rng_state


class PipelineRanks(Collectives):
    """Processes that are one or several pipelines: data, reductions and failures. Each pipeline is one replica of a model."""

    pipeline: Pipeline | None = None
    pipeline_size: int | None = None
    _islands: Islands | None = None

    # ------------------------------------------------------------------ layout

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """All ranks of a pipeline read the same batches: they are one replica."""
        return {"num_replicas": self._pipelines, "rank": self.global_rank // (self.world_size // self._pipelines)}

    @property
    def _pipelines(self) -> int:
        size = self.num_nodes * self.num_processes
        return size // (self.pipeline_size or size)

    def _make_groups(self) -> None:
        if self._islands is None:
            size = self.world_size // self._pipelines
            self._islands = Islands(size, self.timeout, self._process_group_backend)
            if self._islands.count > 1:
                self.world = ProcessGroupWorld(group=self._islands.replicas)
                self.world.diagnose = self._diagnose

    def _share_random_numbers(self) -> None:
        """All ranks of a pipeline go on from one state."""
        islands = self._islands
        assert islands is not None
        box = [rng_state()]
        with self._answers("start of random numbers"):
            dist.broadcast_object_list(box, islands.ranks(islands.island)[0], group=islands.pipeline)
        set_rng_state(box[0])

    # ------------------------------------------------------------------ reductions

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Over replicas: the tensor itself if there is one, as all its ranks have one value."""
        if self._islands is None or self._islands.count == 1:
            return tensor
        return super().reduce(tensor, group or self._islands.metrics, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks, or any, decided so."""
        total = torch.tensor(int(decision), device=self.root_device)
        with self._answers("decision"):
            dist.all_reduce(total)
        return int(total) == self.world_size if all else bool(total)

    # ------------------------------------------------------------------ failures

    @property
    def interrupted(self) -> bool:
        """Whether the run has failed; not after SIGTERM, where all ranks end together and can still write a checkpoint."""
        return super().interrupted and not isinstance(sys.exc_info()[1], SIGTERMException)

    @property
    def _step(self) -> int:
        return self.pipeline.runners[0].step if self.pipeline is not None else 0

    def _diagnose(self, label: str, step: int) -> str:
        """Who is missing, with the stages that they hold."""
        who = self._watch.diagnose(label, step) if self._watch is not None else ""
        named = re.match(r"rank(?:\(s\))? (\d+)", who)
        if named is None or self.pipeline is None:
            return who
        held = sorted({stage for _, stage in self.pipeline.program.held(int(named[1]) % self.pipeline.mail.size)})
        return f"{who}; rank {named[1]} has stage {', '.join(map(str, held))}"

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other ranks."""
        super().on_exception(exception)
        if self._watch is not None:
            self._watch.failed(exception, self._step)

    def teardown(self) -> None:
        """The run is over, in whatever way."""
        if self._watch is not None:
            self._watch.stop()
        super().teardown()
