"""DiLoCo: many local steps, then one step of an outer optimizer on the mean change."""

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.compress import Identity
from lightning_dopt.compress.base import Codec, Compressor
from lightning_dopt.compress.memory import Difference
from lightning_dopt.outer import SGD
from lightning_dopt.plan import Plan, Sync, is_exact
from lightning_dopt.schedules import Every
from lightning_dopt.topology import Complete
from lightning_dopt.topology.base import Topology


def diloco(
    sync_every: int = 500,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    nesterov: bool = True,
    codec: Codec | None = None,
    topology: Topology | None = None,
) -> Plan:
    """DiLoCo; defaults of the paper.

    Every ``sync_every`` steps each rank sends ``anchor - live``; the mean is the gradient of the outer optimizer, which
    moves the anchor; training goes on from the anchor. Inner optimizer state and learning rate schedule stay untouched.

    Over the complete graph the change since the shared anchor is what is sent. Over a sparser ``topology`` anchors
    differ between ranks, so the weights themselves are mixed and the outer optimizer gets ``anchor - mixed``, which also
    pulls the anchors together (NoLoCo's single-tensor form); a lossy codec is then wrapped in ``Difference``. There,
    outer momentum must be lower: with random pairs of many workers 0.9 lets the replicas run apart, 0.5 does not.

    Args:
        sync_every: Optimizer steps per round (H).
        outer_lr: Outer learning rate.
        outer_momentum: Outer momentum in [0, 1).
        nesterov: Nesterov momentum instead of heavy-ball; must be false when ``outer_momentum`` is 0.
        codec: What is on the wire; ``None`` sends floats as they are.
        topology: With whom; ``None`` means everybody.

    Source: Douillard et al., "DiLoCo", arXiv 2311.08105; sparse topologies after NoLoCo, arXiv 2506.10911.
    """
    check_int("diloco", "sync_every", sync_every, 1)
    check_float("diloco", "outer_lr", outer_lr, 0.0, open_low=True)
    check_float("diloco", "outer_momentum", outer_momentum, 0.0, 1.0, open_high=True)
    if nesterov and outer_momentum == 0.0:
        raise ValueError(
            "diloco(nesterov=True, outer_momentum=0): Nesterov needs a momentum in (0, 1), use nesterov=False"
        )
    outer = SGD(lr=outer_lr, momentum=outer_momentum, nesterov=nesterov)
    peers, wire = topology or Complete(), codec or Identity()
    if not isinstance(peers, Complete):
        if isinstance(wire, Compressor) and not is_exact(wire):
            wire = Difference(wire)
        return Plan([Sync(when=Every(sync_every), signal="value", codec=wire, peers=peers, outer=outer)])
    return Plan([Sync(when=Every(sync_every), signal="delta", codec=wire, peers=peers, outer=outer)])
