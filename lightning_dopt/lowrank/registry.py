"""The methods by name."""

from __future__ import annotations

from lightning_dopt.lowrank.crnet import CRNet
from lightning_dopt.lowrank.method import Factored, Method

METHODS: dict[str, type[Method]] = {"crnet": CRNet, "factored": Factored}
