"""Local SGD: train alone for a while, then average."""

from lightning_dopt._checks import check_int
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.schedules import Every


def local_sgd(sync_every: int = 8) -> Plan:
    """Local SGD (FedAvg with all workers): every ``sync_every`` steps all replicas become their mean.

    Args:
        sync_every: Optimizer steps between averages (H).

    Source: Stich, "Local SGD Converges Fast and Communicates Little", arXiv 1805.09767.
    """
    check_int("local_sgd", "sync_every", sync_every, 1)
    return Plan([Sync(when=Every(sync_every))])
