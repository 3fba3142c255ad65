"""Players that maximise: min-max problems as one descent."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from torch import Tensor

from lightning_dopt.local.base import BoundCorrection, Context, Correction


class Ascend(Correction):
    """Negates the gradients of the matching parameters, so that their optimizer climbs: ``min_x max_y f(x, y)``.

    The loss of a training step is ``f``; with ``y`` matched, what is sent and stepped with is the operator
    ``(grad_x f, -grad_y f)``. It works after every backward pass and before everything else that looks at gradients, so it
    goes with every plan and any optimizer. Several patterns are several ``Ascend``.

    Args:
        match: Pattern on the names of the maximising parameters, such as ``"critic.*"``.

    Raises:
        ValueError: an empty pattern; when training starts, a pattern that matches nothing.
    """

    def __init__(self, match: str) -> None:
        if not isinstance(match, str) or not match:
            raise ValueError(f"Ascend(match={match!r}): must be a pattern such as 'critic.*'")
        self.match = match

    def bind(self, context: Context) -> BoundCorrection:
        """See :meth:`Correction.bind`."""
        chosen = {name: p for name, p in context.parameters.items() if fnmatchcase(name, self.match)}
        if not chosen:
            raise ValueError(f"Ascend(match={self.match!r}): matches none of the {len(context.parameters)} parameters")
        return _BoundAscend(chosen)


class _BoundAscend(BoundCorrection):
    def __init__(self, chosen: dict[str, Tensor]) -> None:
        self.chosen = chosen

    def on_backward(self, names: Collection[str]) -> None:
        for name in names:
            gradient = self.chosen[name].grad if name in self.chosen else None
            if gradient is not None:
                gradient.neg_()
