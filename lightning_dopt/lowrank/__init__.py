"""Models of low rank for training from scratch: CR-Net and its peers. Plain ``nn.Module`` surgery, without Lightning."""

from lightning_dopt.lowrank.convert import convert
from lightning_dopt.lowrank.crnet import CRNet
from lightning_dopt.lowrank.method import Factored, Method
from lightning_dopt.lowrank.recompute import predicted_error

__all__ = ["CRNet", "Factored", "Method", "convert", "predicted_error"]
