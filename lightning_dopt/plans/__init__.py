"""Published methods, each a small function that returns a :class:`~lightning_dopt.Plan`."""

from lightning_dopt.plans.compressed_ddp import compressed_ddp
from lightning_dopt.plans.diloco import diloco
from lightning_dopt.plans.gossip import gossip
from lightning_dopt.plans.lo_fi import lo_fi
from lightning_dopt.plans.local_sgd import local_sgd

__all__ = ["compressed_ddp", "diloco", "gossip", "lo_fi", "local_sgd"]
