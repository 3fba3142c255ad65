"""Asynchronous gossip: methods on a virtual clock, and pairwise averaging between real processes."""

from lightning_dopt.asynchronous.a2cid2 import Acid
from lightning_dopt.asynchronous.async_gossip import AsyncGossip
from lightning_dopt.asynchronous.clock import EventClock
from lightning_dopt.asynchronous.dadao import Dadao, DadaoConstants
from lightning_dopt.asynchronous.edges import Matchings, edges
from lightning_dopt.asynchronous.mailbox import MailboxSimulation
from lightning_dopt.asynchronous.pair_exchange import PairExchange
from lightning_dopt.asynchronous.pairwise import Averaging, PairRule, PairState, PairwiseSimulation
from lightning_dopt.asynchronous.virtual import AsyncSimulation, VirtualNode

__all__ = [  # noqa: RUF022  (grouped as they are read: rules, simulations, real processes, tools)
    "PairRule",
    "PairState",
    "Averaging",
    "Acid",
    "AsyncSimulation",
    "PairwiseSimulation",
    "MailboxSimulation",
    "Dadao",
    "DadaoConstants",
    "AsyncGossip",
    "PairExchange",
    "EventClock",
    "VirtualNode",
    "Matchings",
    "edges",
]
