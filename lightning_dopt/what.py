"""What: which tensors a sync is about."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from lightning_dopt._checks import check_float
from lightning_dopt._part import Part


class What(Part):
    """A slot (a family of tensors that each replica has) and the part of it that is selected."""

    slot: str

    @property
    def label(self) -> str:
        """Short name for logs and errors."""
        return self.slot


class Parameters(What):
    """Trainable parameters, synchronised around the optimizer step.

    Args:
        match: Pattern on parameter names as in ``module.named_parameters()`` (``*``, ``?`` and ``[...]`` as in a
            shell), for example ``"*.lora_*"`` or ``"backbone.*"``.

    Raises:
        ValueError: an empty pattern.
    """

    slot = "parameters"

    def __init__(self, match: str = "*") -> None:
        if not isinstance(match, str) or not match:
            raise ValueError(f"{type(self).__name__}(match={match!r}): must be a pattern such as '*' or 'head.*'")
        self.match = match

    @property
    def label(self) -> str:
        """See :attr:`What.label`."""
        return self.slot if self.match == "*" else f"{self.slot}[{self.match}]"

    def selects(self, name: str) -> bool:
        """Whether the tensor called ``name`` is selected."""
        return fnmatchcase(name, self.match)

    def select(self, sizes: Mapping[str, int]) -> list[str]:
        """The selected ones of these parameters, ``{name: number of elements}``, in their order."""
        return [name for name in sizes if self.selects(name)]


class Gradients(Parameters):
    """Gradients, synchronised after backward and before clipping and the optimizer step.

    They are sent in buckets, each as one message to the codec, the first of them at most 2^20 bytes: while backward goes on
    with the first layers, the gradients of the last are under way already. All ranks send the buckets in the same order.

    Args:
        match: Pattern on parameter names.
        bucket_mb: Size of a bucket in 10^6 bytes; one larger tensor is a bucket of its own. 0 sends all in one.

    Raises:
        ValueError: an empty pattern or ``bucket_mb < 0``.
    """

    slot = "gradients"

    def __init__(self, match: str = "*", bucket_mb: float = 25.0) -> None:
        super().__init__(match)
        self.bucket_mb = check_float("Gradients", "bucket_mb", bucket_mb, 0.0)


class OptimizerState(What):
    """One state tensor per parameter of the clock optimizer, for example ``exp_avg`` of Adam.

    Args:
        key: Name of the state as in ``optimizer.state[p]``.
        match: Pattern on parameter names.

    Raises:
        ValueError: an empty key or pattern.
    """

    slot = "optimizer"

    def __init__(self, key: str, match: str = "*") -> None:
        if not isinstance(key, str) or not key:
            raise ValueError(f"OptimizerState(key={key!r}): must name a state of the optimizer, such as 'exp_avg'")
        if not isinstance(match, str) or not match:
            raise ValueError(f"OptimizerState(match={match!r}): must be a pattern such as '*' or 'head.*'")
        self.key = key
        self.match = match

    @property
    def label(self) -> str:
        """See :attr:`What.label`."""
        return f"optimizer.{self.key}" + ("" if self.match == "*" else f"[{self.match}]")

    def selects(self, name: str) -> bool:
        """Whether the state of the parameter called ``name`` is selected."""
        return fnmatchcase(name, self.match)

    def select(self, sizes: Mapping[str, int]) -> list[str]:
        """The parameters whose states are selected, of ``{name: number of elements}``, in their order."""
        return [name for name in sizes if self.selects(name)]


class Tracker(Parameters):
    """What a correction keeps beside the parameters, one tensor like each: sent before the parameters are.

    Args:
        match: Pattern on parameter names.

    Raises:
        ValueError: an empty pattern.
    """

    slot = "tracker"


class Reference(Parameters):
    """Gradients at the reference point of a correction, sent between the two passes of a step.

    Args:
        match: Pattern on parameter names.

    Raises:
        ValueError: an empty pattern.
    """

    slot = "reference"


class Buffers(What):
    """Floating point buffers of the module, such as BatchNorm's running statistics."""

    slot = "buffers"

    def __init__(self) -> None:
        pass


Selectable = Parameters | OptimizerState


def what_of(value: What | str) -> What:
    """Turn the short names into objects.

    Raises:
        ValueError: an unknown name, listing the known ones.
    """
    if isinstance(value, What):
        return value
    if isinstance(value, str) and value.startswith("optimizer.") and len(value) > len("optimizer."):
        return OptimizerState(value.removeprefix("optimizer."))
    known: dict[str, type[What]] = {
        "parameters": Parameters,
        "gradients": Gradients,
        "tracker": Tracker,
        "reference": Reference,
        "buffers": Buffers,
    }
    if value not in known:
        raise ValueError(f"Sync(what={value!r}): must be one of {', '.join(map(repr, known))}, 'optimizer.<state>'")
    return known[value]()
