"""Plan and Sync: what a training method is, as plain data that is checked when it is made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar, get_args

from torch import Tensor
from torch.optim import Optimizer

from lightning_dopt._checks import check_choice, check_flag, check_int
from lightning_dopt._part import Part
from lightning_dopt._random import key
from lightning_dopt.apply import Apply, Blocking, Delay, OneRound
from lightning_dopt.combine import Combine, Median, Mixing, PushSum
from lightning_dopt.compress import Budget, Identity
from lightning_dopt.compress.base import Codec, Compressor
from lightning_dopt.compress.memory import Difference, EControl, Memory
from lightning_dopt.compress.phases import Phases
from lightning_dopt.local.base import Correction
from lightning_dopt.outer import SGD, FromOptimizer, GossipMomentum, LateMomentum, Outer
from lightning_dopt.schedules import Every, When
from lightning_dopt.stability import outer_bound, pairs_bound
from lightning_dopt.topology import Complete, RandomGroups, RandomPairs
from lightning_dopt.topology.base import Topology
from lightning_dopt.transport import Transport, is_plain, may_relay, sums
from lightning_dopt.what import What, what_of

Signal = Literal["value", "delta"]
OnNonfinite = Literal["auto", "raise", "skip", "ignore"]
T = TypeVar("T")
_MANY = 8  # workers, from which on copies of all others are worth a warning


class Sync(Part):
    """One exchange, repeated: eight questions and their answers.

    Args:
        when: On which optimizer steps?
        what: Which tensors? ``"parameters"``, ``"gradients"``, ``"buffers"``, ``"optimizer.<state>"`` or an object of
            :mod:`lightning_dopt.what` that also selects by name.
        signal: What is said about them? ``"value"`` sends the tensor itself; ``"delta"`` sends the change since the
            anchor (``anchor - live``), which all ranks must share. ``None`` picks ``"delta"`` for parameters over the
            complete graph when there is an outer optimizer or a lossy codec, ``"value"`` otherwise.
        codec: How is it put on the wire? A compressor, or a memory around one.
        peers: With whom, with which weights?
        combine: How do messages become one?
        outer: How does the reference move? An optimizer on the anchor; ``None`` takes the combined result as it is.
            A plain function of the anchor tensors that returns a ``torch.optim`` optimizer is accepted, too.
        apply: When and how do the live tensors take the result?
        transport: How do messages travel where all ranks hear all? ``"all_reduce"`` sums linear messages on the way,
            ``"all_gather"`` gives every message to every rank, ``"two_phase"`` averages chunks and packs the mean a second
            time (:class:`~lightning_dopt.transport.TwoPhase`). ``"auto"`` goes by sizes and the link, if one is told, see
            :func:`~lightning_dopt.transport.choose`; over sparser graphs messages go to neighbours.

    Raises:
        ValueError: a combination that cannot work, with the reason and what to use instead.
    """

    def __init__(
        self,
        when: When | None = None,
        what: What | str = "parameters",
        signal: Signal | None = None,
        codec: Codec | None = None,
        peers: Topology | None = None,
        combine: Combine | None = None,
        outer: Outer | Callable[[list[Tensor]], Optimizer] | None = None,
        apply: Apply | None = None,
        transport: Transport = "auto",
    ) -> None:
        self.when = _typed("when", when if when is not None else Every(1), When)
        self.what = what_of(what)
        self.codec = _typed("codec", codec if codec is not None else Identity(), Codec)
        self.peers = _typed("peers", peers if peers is not None else Complete(), Topology)
        self.combine = _typed("combine", combine if combine is not None else Mixing(), Combine)
        self.outer = outer if outer is None or isinstance(outer, Outer) else FromOptimizer(outer)
        self.apply = _typed("apply", apply if apply is not None else Blocking(), Apply)
        if signal is not None:
            check_choice("Sync", "signal", signal, ("value", "delta"))
        self.signal: Signal = signal if signal is not None else self._natural_signal()
        check_choice("Sync", "transport", transport, get_args(Transport))
        self.transport: Transport = transport
        _check_sync(self)

    def _natural_signal(self) -> Signal:
        over_mean = self.peers.agrees and not codes_values(self.codec)
        changes = self.outer is not None or not is_exact(self.codec) or isinstance(self.apply, OneRound)
        return "delta" if self.what.slot == "parameters" and over_mean and changes else "value"

    @property
    def label(self) -> str:
        """Short name for logs and errors."""
        return self.what.label


class Plan(Part):
    """A training method: syncs in the order in which they run, and corrections of the inner step.

    Args:
        syncs: The syncs; with none, replicas train on their own.
        corrections: Changes of the inner step that make biased methods exact, such as exact diffusion.
        seed: Seed of everything random in the plan (random codecs), shared by all ranks.
        checksum: Whether messages that are gathered, or sent to neighbours or in two phases, end with eight bytes by which a
            receiver knows that they are whole, of this rank and of this step. If one is not, a :class:`SyncError` names sync,
            sender and step, and weights and memories are as before the message; the memories are kept twice for that. Sums
            (all-reduce) cannot be checked like that; they must be finite.
        on_nonfinite: What to do in a step in which the gradients of some rank are not finite. ``"raise"``: all ranks raise
            the same ``FloatingPointError``, which names the ranks and the step, with parameters as before the step;
            memories may have taken note of messages that had left during backward, zeros for what was not finite.
            ``"skip"``: all ranks skip the step, their optimizers see no gradients, memories are as before.
            ``"ignore"``: nobody looks.
            ``"auto"`` raises where gradients are compressed and all ranks hear all, and ignores elsewhere, as
            ``DDPStrategy`` does. Looking costs a pass over the gradients and an all-reduce of one number per rank in every
            step; skipping also a second copy of the memories where buckets leave during backward. In a plan without gradient syncs
            every rank looks at its own, and raises or skips alone. With loss scaling all ranks skip, whatever this says.
        compare_every: After every so many optimizer steps all ranks compare a digest of 64 bits of the parameters that the plan
            trains; if they are not equal to the last bit all ranks raise the same ``RuntimeError``, which names the step and
            the ranks. For plans that average gradients in every step and nothing else, whose replicas must be equal. It costs
            reading the parameters once and an all-reduce of 16 bytes per rank; 0 never compares.

    Raises:
        ValueError: an argument out of range, or syncs that contradict each other.
    """

    def __init__(
        self,
        syncs: Sequence[Sync] = (),
        corrections: Sequence[Correction] = (),
        seed: int = 0,
        checksum: bool = False,
        on_nonfinite: OnNonfinite = "auto",
        compare_every: int = 0,
    ) -> None:
        self.syncs = [_typed("syncs", s, Sync, "Plan") for s in syncs]
        self.corrections = [_typed("corrections", c, Correction, "Plan") for c in corrections]
        self.seed = check_int("Plan", "seed", seed, 0)
        self.checksum = check_flag("Plan", "checksum", checksum)
        check_choice("Plan", "on_nonfinite", on_nonfinite, get_args(OnNonfinite))
        self.on_nonfinite: OnNonfinite = on_nonfinite
        self.compare_every = check_int("Plan", "compare_every", compare_every, 0)
        slots = {sync.what.slot for sync in self.syncs}
        if compare_every and ("gradients" not in slots or slots & {"parameters", "tracker", "optimizer"}):
            raise ValueError(
                f"Plan(compare_every={compare_every}): replicas of this plan may differ; only those of plans that average "
                "gradients in every step and nothing else are equal"
            )
        for correction in self.corrections:
            correction.check(self)
        for sync in self.syncs:
            if not any(c.remembers and sync.what.slot in c.slots for c in self.corrections):
                _warn_of_loss(sync)
            if sync.what.slot == "gradients" and codes_values(sync.codec) and not self._tracks(sync):
                raise ValueError(
                    f"Sync(what='gradients', codec={sync.codec!r}): use ErrorFeedback or EF21 for gradients"
                )
            if sync.what.slot in ("tracker", "reference") and not self._tracks(sync):
                raise ValueError(f"Sync(what={sync.what.slot!r}): no correction of the plan sends a {sync.what.slot}")

    def guarded(
        self, checksum: bool = True, on_nonfinite: OnNonfinite = "raise", compare_every: int | None = None
    ) -> Plan:
        """The same method with other guards, for plans that a function has made: ``plans.beer(...).guarded()``.

        ``compare_every`` stays as it is unless it is told.
        """
        compare = self.compare_every if compare_every is None else compare_every
        return Plan(self.syncs, self.corrections, self.seed, checksum, on_nonfinite, compare)

    def nonfinite(self, n: int) -> Literal["raise", "skip", "ignore"]:
        """What ``on_nonfinite`` means with ``n`` workers."""
        if self.on_nonfinite != "auto":
            return self.on_nonfinite
        lossy = any(s.what.slot == "gradients" and s.peers.is_mean(n) and not is_exact(s.codec) for s in self.syncs)
        return "raise" if lossy else "ignore"

    def _tracks(self, sync: Sync) -> bool:
        """Whether a correction puts something else on this sync's wire: a tracked quantity that lives on."""
        own = ("gradients", "tracker", "reference")
        return sync.what.slot in own and any(sync.what.slot in c.slots for c in self.corrections)

    def __iter__(self) -> Iterator[Sync]:
        return iter(self.syncs)

    @property
    def overlaps(self) -> bool:
        """Whether messages travel while training goes on, so that nobody has to wait for the slowest rank at once."""
        return any(sync.apply.delay or isinstance(sync.apply, OneRound) for sync in self.syncs)

    def labels(self) -> list[str]:
        """One name per sync, made unique by numbering repeats."""
        seen: dict[str, int] = {}
        names = []
        for sync in self.syncs:
            seen[sync.label] = seen.get(sync.label, 0) + 1
            names.append(sync.label if seen[sync.label] == 1 else f"{sync.label}#{seen[sync.label]}")
        return names

    def means(self, n: int) -> list[float]:
        """The weight of every replica in the consensus model: what the mixing of the parameters preserves.

        They sum to one, and are ``1/n`` each unless the first sync of the parameters has a weighted topology.
        """
        peers = next((s.peers for s in self.syncs if s.what.slot == "parameters"), None)
        return peers.stationary(n) if peers is not None else [1.0 / n] * n

    def check(self, n: int) -> None:
        """Check that the plan makes sense for ``n`` workers.

        Raises:
            ValueError: it does not, in one line with the reason.
        """
        check_int("Plan.check", "n", n, 1)
        for correction in self.corrections:
            correction.check_size(self, n)
        mixes_parameters = any(s.what.slot == "parameters" for s in self.syncs)
        for sync in self.syncs:
            sync.peers.check(n)
            sync.combine.check_size(sync, n)
            mean = sync.peers.is_mean(n)
            if sync.transport != "auto" and not mean:
                raise ValueError(
                    f"Sync(peers={sync.peers!r}, transport={sync.transport!r}): messages of {n} workers go to neighbours, use "
                    "transport='auto' or peers=Complete()"
                )
            if not sync.peers.row_stochastic(n) and not isinstance(sync.combine, PushSum) and not self._tracks(sync):
                raise ValueError(
                    f"Sync(peers={sync.peers!r}): rows of the matrix do not sum to one with {n} workers; use combine=PushSum()"
                )
            if sync.signal == "delta" and not (mean or sync.peers.agrees):
                raise ValueError(
                    f"Sync(signal='delta', peers={sync.peers!r}): anchors of ranks that do not all hear each other drift "
                    "apart; use signal='value' (with codec=Difference(...) if it is lossy) or peers=Complete()"
                )
            if isinstance(sync.codec, Difference) and sync.peers.period(n) != 1 and not sync.peers.doubly_stochastic(n):
                raise ValueError(
                    f"Sync(codec={sync.codec!r}, peers={sync.peers!r}): over a changing graph Difference needs columns that sum "
                    "to one; use a doubly stochastic topology such as OnePeerExponential(), or an exact codec"
                )
            if isinstance(sync.codec, Memory) and sync.codec.static and sync.peers.period(n) != 1:
                raise ValueError(
                    f"Sync(codec={sync.codec!r}, peers={sync.peers!r}): {type(sync.codec).__name__} needs a graph that does not "
                    "change; use Ring() or another static topology"
                )
            if isinstance(sync.codec, Difference) and sync.peers.period(n) is None and n > _MANY:
                warnings.warn(
                    f"Sync(codec={sync.codec!r}, peers={sync.peers!r}): keeps two copies of the parameters for every other of the "
                    f"{n} workers; OnePeerExponential() meets few, DeepSqueeze(...) keeps one vector",
                    stacklevel=3,
                )
            _check_partial(sync)
            _warn_of_momentum(sync, n)
            if isinstance(sync.apply, OneRound) and sync.apply.inflight == "own_share":
                _warn_of_delay(sync, n, stacklevel=4)
            if sync.what.slot == "gradients" and not mean and not mixes_parameters:
                raise ValueError(
                    f"Sync(what='gradients', peers={sync.peers!r}): replicas would drift apart; use peers=Complete() or add "
                    "a sync of the parameters"
                )

    def sync_seed(self, index: int) -> int:
        """Seed of the random codecs of sync number ``index``."""
        return key(self.seed, index)


def is_exact(codec: Codec) -> bool:
    """Whether the codec changes nothing."""
    return isinstance(codec, Identity)


def codes_values(codec: Codec) -> bool:
    """Whether lossy messages of whole values converge with it."""
    return isinstance(codec, Memory) and codec.codes_values


def _typed(name: str, value: object, kind: type[T], owner: str = "Sync") -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{owner}({name}={value!r}): must be a {kind.__module__}.{kind.__name__} object")
    return value


def _check_sync(sync: Sync) -> None:
    slot, compressor = sync.what.slot, _inner(sync.codec)
    if slot == "gradients":
        _check_gradients(sync)
    if slot != "parameters" and sync.outer is not None:
        raise ValueError(f"Sync(what={sync.what!r}, outer={sync.outer!r}): only parameters have an anchor to move")
    if slot != "parameters" and sync.signal == "delta":
        raise ValueError(
            f"Sync(what={sync.what!r}, signal='delta'): only parameters have an anchor, use signal='value'"
        )
    if slot == "tracker" and sync.apply != Blocking():
        raise ValueError(f"Sync(what='tracker', apply={sync.apply!r}): the tracker is due at once, use Blocking()")
    if slot == "reference" and not (is_exact(sync.codec) and sync.apply == Blocking() and not sync.when.at_end):
        raise ValueError(
            f"Sync(what='reference', when={sync.when!r}, codec={sync.codec!r}, apply={sync.apply!r}): it is exact and due at "
            "once, use Identity() and Blocking()"
        )
    if slot in ("buffers", "optimizer") and not is_exact(sync.codec):
        raise ValueError(f"Sync(what={sync.what!r}, codec={sync.codec!r}): states are sent as they are, use Identity()")
    if codes_values(sync.codec) and sync.signal != "value":
        raise ValueError(
            f"Sync(signal='delta', codec={sync.codec!r}): {type(sync.codec).__name__} codes values, use signal='value'"
        )
    if (
        slot in ("parameters", "tracker")
        and sync.signal == "value"
        and not is_exact(sync.codec)
        and not codes_values(sync.codec)
    ):
        raise ValueError(
            f"Sync(signal='value', codec={sync.codec!r}): packing the weights themselves does not converge; use "
            f"codec=Difference({compressor!r}), or signal='delta' over Complete()"
        )
    if isinstance(sync.codec, Memory) and sync.codec.lr_inside and slot != "gradients":
        raise ValueError(
            f"Sync(what={sync.what!r}, codec={sync.codec!r}): changes of parameters hold the learning rate already, use "
            "lr_inside=False"
        )
    sync.combine.check(sync)
    _check_transport(sync)
    _check_apply(sync)
    _warn(sync)


def _check_gradients(sync: Sync) -> None:
    if sync.apply != Blocking():
        raise ValueError(
            f"Sync(what='gradients', apply={sync.apply!r}): gradients are due before the step, use Blocking()"
        )
    if sync.when != Every(1):
        raise ValueError(f"Sync(what='gradients', when={sync.when!r}): replicas would drift apart, use Every(1)")


def _check_transport(sync: Sync) -> None:
    if sync.transport == "all_reduce" and not sums(sync.codec, sync.combine):
        raise ValueError(
            f"Sync(codec={sync.codec!r}, combine={sync.combine!r}, transport='all_reduce'): only linear messages can be summed, "
            "use 'all_gather' or 'two_phase'"
        )
    if sync.transport == "two_phase" and not may_relay(sync.codec):
        raise ValueError(
            f"Sync(codec={sync.codec!r}, transport='two_phase'): this memory has no second leg, use ErrorFeedback, EF21, EControl "
            "or DGC, or 'all_gather'"
        )
    if sync.transport == "two_phase" and isinstance(_inner(sync.codec), Budget):
        raise ValueError(
            f"Sync(codec={sync.codec!r}, transport='two_phase'): chunks would change with the budget, use 'auto'"
        )
    if sync.transport != "auto" and isinstance(_inner(sync.codec), Phases):
        raise ValueError(
            f"Sync(codec={sync.codec!r}, transport={sync.transport!r}): every phase has a transport of its own, use 'auto'"
        )
    if sync.transport != "auto" and not is_plain(sync.combine):
        raise ValueError(
            f"Sync(combine={sync.combine!r}, transport={sync.transport!r}): this rule sends messages its own way, use 'auto'"
        )


def _check_apply(sync: Sync) -> None:
    delay = sync.apply.delay
    if isinstance(sync.apply, Delay) and (not isinstance(sync.when, Every) or delay >= sync.when.n):
        raise ValueError(
            f"Sync(when={sync.when!r}, apply={sync.apply!r}): the delay must be shorter than the period of an Every"
        )
    if isinstance(sync.apply, OneRound) and sync.signal != "delta":
        raise ValueError(f"Sync(signal='value', apply={sync.apply!r}): OneRound corrects deltas, use signal='delta'")
    if sync.when.measured and (sync.what.slot != "parameters" or sync.apply != Blocking()):
        raise ValueError(
            f"Sync(what={sync.what!r}, when={sync.when!r}, apply={sync.apply!r}): what is measured are parameters after the "
            "step; use what='parameters' and apply=Blocking()"
        )
    if sync.when.in_rounds and sync.what.slot not in ("parameters", "optimizer", "buffers"):
        raise ValueError(
            f"Sync(what={sync.what!r}, when={sync.when!r}): rounds that differ in length are for parameters and states"
        )
    if sync.when.at_end and sync.apply != Blocking():
        raise ValueError(
            f"Sync(when={sync.when!r}, apply={sync.apply!r}): nothing follows the last step, use Blocking()"
        )
    if sync.what.slot in ("buffers", "optimizer") and sync.apply != Blocking():
        raise ValueError(f"Sync(what={sync.what!r}, apply={sync.apply!r}): states are taken at once, use Blocking()")
    if isinstance(sync.apply, Blocking) and sync.apply.order != "atc" and sync.what.slot != "parameters":
        raise ValueError(f"Sync(what={sync.what!r}, apply={sync.apply!r}): an order is for parameters, use Blocking()")
    if (
        getattr(_inner(sync.codec), "layerwise", False)
        and isinstance(sync.apply, OneRound)
        and sync.apply.inflight != 0.0
    ):
        raise ValueError(f"Sync(codec={sync.codec!r}, apply={sync.apply!r}): this codec needs OneRound(inflight=0)")


def _warn_of_loss(sync: Sync) -> None:
    """A contraction that nothing makes up for, and a gain that is too large for one."""
    compressor = _inner(sync.codec)
    shape = (1024, 1024)  # a matrix, since low rank codecs send vectors whole
    if isinstance(sync.codec, Compressor) and sync.combine.linear and sync.what.slot in ("parameters", "gradients"):
        delta = compressor.contraction(shape)
        if delta is not None and delta < 0.5 and compressor.variance(shape) is None:
            warnings.warn(
                f"Sync(codec={compressor!r}): drops much of each message and nothing remembers it, which can diverge; use "
                f"codec=ErrorFeedback({compressor!r})",
                stacklevel=4,
            )
    if isinstance(sync.codec, EControl) and sync.codec.eta > (delta := compressor.contraction(shape) or 1.0):
        warnings.warn(
            f"Sync(codec={sync.codec!r}): eta above the compressor's delta, {delta:.3g}, can diverge; use a third of it",
            stacklevel=4,
        )


def _check_partial(sync: Sync) -> None:
    """What cannot do without the ranks that take no part in a round."""
    if not sync.peers.partial:
        return
    where = f"peers={sync.peers!r}"
    if isinstance(sync.codec, Memory) and (sync.codec.needs_sum or codes_values(sync.codec)):
        raise ValueError(
            f"Sync(codec={sync.codec!r}, {where}): remembers what everybody sent, and some ranks take no part; use "
            "ErrorFeedback(...), whose residual waits"
        )
    if not isinstance(sync.combine, (Mixing, Median)):
        raise ValueError(f"Sync(combine={sync.combine!r}, {where}): needs every rank in every round, use Mixing()")
    if isinstance(sync.apply, OneRound) or getattr(sync.apply, "order", "atc") != "atc":
        raise ValueError(
            f"Sync(apply={sync.apply!r}, {where}): ranks that take no part have no share; use Blocking() or Delay(...)"
        )


def _warn(sync: Sync) -> None:
    if not (isinstance(sync.apply, OneRound) and sync.apply.inflight == "own_share"):  # that depends on the workers
        _warn_of_delay(sync, 1, stacklevel=5)


def _warn_of_delay(sync: Sync, n: int, stacklevel: int) -> None:
    """Outer rate and momentum beyond what is stable in directions in which a round converges."""
    if isinstance(sync.outer, SGD):
        momentum, nesterov = sync.outer.momentum, sync.outer.nesterov
    elif isinstance(sync.outer, LateMomentum) and sync.outer.clip is None and not sync.outer.gap_aware:
        momentum, nesterov = sync.outer.momentum, False
    else:
        return
    rate = sync.outer.lr / (sync.outer.penalty if isinstance(sync.outer, LateMomentum) else 1.0)
    share = sync.apply.share(n) if isinstance(sync.apply, OneRound) else 1.0
    bound = outer_bound(momentum, nesterov, share)
    if rate >= bound - 1e-9 and isinstance(sync.peers, Complete):
        advice = "or use OneRound('own_share')" if share == 0.0 else "or the momentum"
        workers = (
            f" with {n} workers" if isinstance(sync.apply, OneRound) and sync.apply.inflight == "own_share" else ""
        )
        warnings.warn(
            f"Sync(outer={sync.outer!r}, apply={sync.apply!r}): unstable{workers} in directions in which a round "
            f"converges: there lr must stay below {bound:.2f} at momentum {momentum:g}; lower lr, {advice}",
            stacklevel=stacklevel,
        )


def _warn_of_momentum(sync: Sync, n: int) -> None:
    """Outer momentum over random groups: replicas stay together only below a bound (NoLoCo; zero gradients, N workers)."""
    if not isinstance(sync.peers, (RandomPairs, RandomGroups)):
        return
    size = sync.peers.size if isinstance(sync.peers, RandomGroups) else 2
    if isinstance(sync.outer, GossipMomentum):
        alpha, name, pull = sync.outer.alpha, "gamma", sync.outer.gamma
    elif isinstance(sync.outer, SGD):
        alpha, name, pull = sync.outer.momentum, "lr", sync.outer.lr
    else:
        return
    bound = pairs_bound(alpha, n, size)
    if alpha and pull >= bound:
        warnings.warn(
            f"Sync(peers={sync.peers!r}, outer={sync.outer!r}): with {n} workers replicas run apart from {name} {bound:.2f} on at "
            f"momentum {alpha:g}; lower one of them, momentum 0.5 with {name} 0.7 is NoLoCo's choice",
            stacklevel=3,
        )


def _inner(codec: Codec) -> Compressor:
    inner = codec.codec if isinstance(codec, Memory) else codec
    assert isinstance(inner, Compressor)
    return inner
