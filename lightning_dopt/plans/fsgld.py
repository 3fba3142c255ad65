"""Federated Langevin dynamics: chains that visit one data set after another and sample the posterior of all."""

from __future__ import annotations

from lightning_dopt._checks import check_int
from lightning_dopt.local import ConduciveGradient, Langevin
from lightning_dopt.plan import Plan, Sync
from lightning_dopt.schedules import After, Every, Until
from lightning_dopt.topology import Permute


def fsgld(sync_every: int = 20, fit: int = 200, temperature: float = 1.0, seed: int = 0) -> Plan:
    """As many chains as ranks; every ``sync_every`` steps each moves on to another rank's data. Nothing is averaged.

    For plain SGD and losses that are the rank's share of ``-log p``: ``U_s(x) = -log prior(x) - n sum log p(data of s | x)`` for
    ``n`` ranks, in a mini-batch ``n`` times the size of the rank's data over that of the batch. In the first ``fit`` steps chains
    stay at home and learn a Gaussian of their data; from then on conducive gradients keep long visits from pulling chains apart.
    The weights of a rank are a sample: gather them over time yourself, and train with
    ``ReplicaStrategy(evaluate="local", buffers="local")``.

    Args:
        sync_every: Optimizer steps of a visit.
        fit: Steps before the first visit, at least 4; 0 goes without conducive gradients (DSGLD).
        temperature: Of the samples.
        seed: Of the noise and of the permutations.

    Raises:
        ValueError: an option out of range.

    Source: El Mekkaoui et al., "Federated Stochastic Gradient Langevin Dynamics", UAI 2021; Ahn, Shahbaba, Welling,
    "Distributed Stochastic Gradient MCMC", 2014.
    """
    check_int("fsgld", "sync_every", sync_every, 1)
    check_int("fsgld", "seed", seed, 0)
    if check_int("fsgld", "fit", fit, 0) in (1, 2, 3):
        raise ValueError(f"fsgld(fit={fit}): must be 0 or an integer of at least 4")
    noise = Langevin(temperature, seed)
    visits = Sync(After(fit, Every(sync_every)) if fit else Every(sync_every), signal="value", peers=Permute(seed))
    if not fit:
        return Plan([visits], [noise])
    once = [Sync(Until(fit, Every(fit)), what="tracker") for _ in range(2)]
    return Plan([*once, visits], [noise, ConduciveGradient(fit)])
