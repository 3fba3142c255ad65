"""Gradients that several ranks of a pipeline hold, added up; and their norm over all ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lightning_dopt.compress._wire import as_bytes, section
from lightning_dopt.pipeline.mail import Mail, Talk
from lightning_dopt.pipeline.messages import tag
from lightning_dopt.pipeline.program import Program
from lightning_dopt.pipeline.tied import Tie


class Sums:
    """Of one rank.

    Args:
        program: The program, which says where stages are.
        stages: The modules of this rank by ``(pipe, stage)``.
        mail: The way to the other ranks.
    """

    def __init__(self, program: Program, stages: Mapping[tuple[int, int], nn.Module], mail: Mail) -> None:
        self.program, self.stages, self.mail = program, stages, mail
        self.ties: list[Tie] = []
        """Parameters that other ranks train, too."""

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of this rank, each once."""
        return list(dict.fromkeys(p for held in sorted(self.stages) for p in self.stages[held].parameters()))

    def clip(self, max_norm: float, only: Collection[nn.Parameter] | None = None) -> Talk[Tensor]:
        """Scale all gradients such that their norm over all stages is at most ``max_norm``. Result: the norm before."""
        own = torch.zeros(1, dtype=torch.float64)
        chosen = None if only is None else {id(p) for p in only}
        clipped = [p for p in self.parameters() if p.grad is not None and (chosen is None or id(p) in chosen)]
        counted = {id(p) for (pipe, _), stage in self.stages.items() if pipe == 0 for p in stage.parameters()}
        counted -= {id(p) for tie, p in self._tied() if tie.ranks[0] != self.mail.rank}
        for p in clipped:
            if id(p) in counted and p.grad is not None:  # copies of a stage, or of a parameter, count once
                own += p.grad.detach().double().square().sum().cpu()
        number, total = self._tag("norm"), torch.zeros(1, dtype=torch.float64)
        others = [peer for peer in range(self.mail.size) if peer != self.mail.rank]
        for peer in others:
            self.mail.post(peer, number, own, "norms")
        for peer in range(self.mail.size):  # in one order, so that all ranks get the same sum
            total += (yield self.mail.expect(peer, number, torch.zeros_like(own), "norms")) if peer in others else own
        self.mail.finish()
        norm = total.sqrt().view(())
        factor = min(1.0, max_norm / (float(norm) + 1e-6))
        for p in clipped:
            if p.grad is not None and factor < 1.0:
                p.grad.mul_(factor)
        return norm

    def over_copies(self) -> Talk[None]:
        """Both copies of every stage get the sum of their gradients, equal in every bit."""
        flat: dict[tuple[int, int], tuple[list[nn.Parameter], Tensor]] = {}
        for pipe, stage in sorted(self.stages):
            parameters = [p for p in self.stages[pipe, stage].parameters() if p.requires_grad]
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            pieces = [as_bytes(p.grad) for p in parameters if p.grad is not None]
            flat[pipe, stage] = parameters, torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)
            if pieces:
                peer = self.program.rank_of(1 - pipe, stage)
                self.mail.post(peer, self._tag("gradient sum", pipe, stage), flat[pipe, stage][1], "gradient sums")
        for (pipe, stage), (parameters, mine) in flat.items():
            if not len(mine):
                continue
            peer = self.program.rank_of(1 - pipe, stage)
            number = self._tag("gradient sum", 1 - pipe, stage)
            other = yield self.mail.expect(peer, number, torch.empty_like(mine), "gradient sums")
            start = 0
            for p in parameters:
                assert p.grad is not None
                p.grad.add_(section(other, start, p.numel(), p.dtype).view(p.shape))
                start += p.grad.nbytes

    def _tied(self) -> list[tuple[Tie, nn.Parameter]]:
        """The parameters of this rank that others train, too."""
        mine = [(tie, tie.ranks.index(self.mail.rank)) for tie in self.ties if self.mail.rank in tie.ranks]
        return [(tie, self.stages[0, tie.places[k][0]].get_parameter(tie.places[k][1])) for tie, k in mine]

    def over_ties(self) -> Talk[None]:
        """All ranks with a parameter get the sum of its gradients, equal in every bit."""
        tied = [(tie, p) for tie, p in self._tied() if p.requires_grad]
        number = self._tag("tied gradient")
        for tie, p in tied:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            for peer in tie.ranks:
                if peer != self.mail.rank:
                    self.mail.post(peer, number, p.grad.clone(memory_format=torch.contiguous_format), "tied gradients")
        for tie, p in tied:
            assert p.grad is not None
            mine, total = p.grad.clone(), p.grad.zero_()
            for peer in tie.ranks:  # in one order, so that all ranks get the same sum
                if peer == self.mail.rank:
                    total.add_(mine)
                else:
                    box = torch.empty_like(mine, memory_format=torch.contiguous_format)
                    total.add_((yield self.mail.expect(peer, number, box, "tied gradients")))

    def _tag(self, kind: str, pipe: int = 0, place: int = 0) -> int:
        return tag(self.program, kind, pipe, place, 0)
