"""The methods by name."""

from __future__ import annotations

from lightning_dopt._checks import check_choice
from lightning_dopt.lowrank.crnet import CRNet
from lightning_dopt.lowrank.lora import LoRA, ReLoRA
from lightning_dopt.lowrank.method import Factored, Method
from lightning_dopt.lowrank.peers import CoLA, SLTrain

METHODS: dict[str, type[Method]] = {
    "crnet": CRNet,
    "factored": Factored,
    "cola": CoLA,
    "sltrain": SLTrain,
    "lora": LoRA,
    "relora": ReLoRA,
}


def method(method: str | Method) -> Method:
    """A method by its name, or as it is.

    Raises:
        ValueError: no such name.
    """
    if isinstance(method, Method):
        return method
    check_choice("convert", "method", method, METHODS)
    return METHODS[method]()
