"""Models of low rank for training from scratch: CR-Net and its peers. Plain ``nn.Module`` surgery, without Lightning."""

from lightning_dopt.lowrank.convert import convert
from lightning_dopt.lowrank.crnet import CRNet
from lightning_dopt.lowrank.lora import LoRA, ReLoRA, merge, restart, rewarm
from lightning_dopt.lowrank.method import Factored, Method
from lightning_dopt.lowrank.peers import CoLA, SLTrain
from lightning_dopt.lowrank.recompute import predicted_error
from lightning_dopt.lowrank.registry import method

__all__ = [
    "CRNet",
    "CoLA",
    "Factored",
    "LoRA",
    "Method",
    "ReLoRA",
    "SLTrain",
    "convert",
    "merge",
    "method",
    "predicted_error",
    "restart",
    "rewarm",
]
