"""Worlds: how ranks talk, what it costs, and how long it would take elsewhere."""

from lightning_dopt.comm.ledger import Ledger
from lightning_dopt.comm.link import Link, LinkClock
from lightning_dopt.comm.process_group import ProcessGroupWorld
from lightning_dopt.comm.simulated import SimulatedWorld, lockstep
from lightning_dopt.comm.world import Pending, SyncError, Talk, World

__all__ = [
    "Ledger",
    "Link",
    "LinkClock",
    "Pending",
    "ProcessGroupWorld",
    "SimulatedWorld",
    "SyncError",
    "Talk",
    "World",
    "lockstep",
]
