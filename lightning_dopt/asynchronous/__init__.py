"""Ranks without a common step: gossip between pairs, and local updates with a hub; on a virtual clock and in real processes."""

from lightning_dopt.asynchronous.a2cid2 import Acid
from lightning_dopt.asynchronous.async_gossip import AsyncGossip
from lightning_dopt.asynchronous.async_local import AsyncLocal
from lightning_dopt.asynchronous.clock import EventClock
from lightning_dopt.asynchronous.dadao import Dadao, DadaoConstants
from lightning_dopt.asynchronous.edges import Matchings, edges
from lightning_dopt.asynchronous.hub import Hub, Push
from lightning_dopt.asynchronous.hub_desk import Answer, HubDesk
from lightning_dopt.asynchronous.hub_methods import delayed_nesterov, fedasync, fedbuff, fedfix
from lightning_dopt.asynchronous.hub_rules import (
    Arrival,
    Count,
    EqualWeights,
    HubRule,
    HubWeights,
    HubWhen,
    OnArrival,
    StalenessWeights,
    StepWeights,
    TimeCorrected,
    Timer,
)
from lightning_dopt.asynchronous.hub_simulation import HubSimulation
from lightning_dopt.asynchronous.mailbox import MailboxSimulation
from lightning_dopt.asynchronous.pair_exchange import PairExchange
from lightning_dopt.asynchronous.pairwise import Averaging, PairRule, PairState, PairwiseSimulation
from lightning_dopt.asynchronous.virtual import AsyncSimulation, VirtualNode
from lightning_dopt.pace import LocalSteps

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
    "AsyncLocal",
    "PairExchange",
    "HubRule",
    "HubWhen",
    "OnArrival",
    "Count",
    "Timer",
    "HubWeights",
    "EqualWeights",
    "StepWeights",
    "StalenessWeights",
    "TimeCorrected",
    "LocalSteps",
    "delayed_nesterov",
    "fedasync",
    "fedbuff",
    "fedfix",
    "Hub",
    "Push",
    "Arrival",
    "HubDesk",
    "Answer",
    "HubSimulation",
    "EventClock",
    "VirtualNode",
    "Matchings",
    "edges",
]
