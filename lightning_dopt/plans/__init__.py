"""Published methods, each a small function that returns a :class:`~lightning_dopt.Plan`."""

from lightning_dopt.plans._own_names import own_names
from lightning_dopt.plans.adloco import adloco
from lightning_dopt.plans.beer import beer
from lightning_dopt.plans.cellm import cellm
from lightning_dopt.plans.co2 import co2
from lightning_dopt.plans.compressed_ddp import compressed_ddp
from lightning_dopt.plans.compressed_gossip import choco_sgd, deep_squeeze, moniqua
from lightning_dopt.plans.compressed_rounds import fedzip, scafcom, scaffold, scallion, sketched
from lightning_dopt.plans.controlled import fed_admm, fedspeed, local_gda, proxskip
from lightning_dopt.plans.desloc import desloc, mt_dao
from lightning_dopt.plans.dfedsam import dfedsam
from lightning_dopt.plans.diloco import diloco
from lightning_dopt.plans.dilocox import dilocox
from lightning_dopt.plans.dipaco import dipaco
from lightning_dopt.plans.directed import push_diging, sgp
from lightning_dopt.plans.dprox_sgt import dprox_sgt
from lightning_dopt.plans.eager_diloco import delayed_diloco, eager_diloco
from lightning_dopt.plans.exact import d2, diging, exact_diffusion, extra, gradient_tracking, k_gt
from lightning_dopt.plans.fedce import fedce
from lightning_dopt.plans.federated import apfl, fedadagrad, fedadam, fedavg, fedprox, fedyogi
from lightning_dopt.plans.few_levels import qsgd, sign_sgd, terngrad
from lightning_dopt.plans.fish_mask import fish_mask
from lightning_dopt.plans.fsgld import fsgld
from lightning_dopt.plans.gossip import gossip
from lightning_dopt.plans.l_greco import l_greco
from lightning_dopt.plans.lo_fi import lo_fi
from lightning_dopt.plans.local_sgd import local_sgd
from lightning_dopt.plans.masha import masha
from lightning_dopt.plans.momentum import decentlam, dmsgd, qg_dsgdm
from lightning_dopt.plans.momentum_correction import dgc, gmf
from lightning_dopt.plans.noloco import noloco
from lightning_dopt.plans.powersgd import powersgd
from lightning_dopt.plans.qsr import qsr
from lightning_dopt.plans.relay_sgd import relay_sgd
from lightning_dopt.plans.riemannian import drcgd, riemannian_tracking
from lightning_dopt.plans.robust_tracking import robust_tracking
from lightning_dopt.plans.savic import savic
from lightning_dopt.plans.shifts import diana, econtrol, ef21
from lightning_dopt.plans.single_merge import single_merge
from lightning_dopt.plans.slowmo import post_local_sgd, slowmo
from lightning_dopt.plans.streaming_diloco import streaming_diloco
from lightning_dopt.plans.weighted_gossip import weighted_gossip

__all__ = [  # noqa: RUF022  (by family)
    "compressed_ddp",
    "l_greco",
    "diloco",
    "lo_fi",
    "local_sgd",
    "post_local_sgd",
    "slowmo",
    "qsr",
    "streaming_diloco",
    "eager_diloco",
    "delayed_diloco",
    "dilocox",
    "noloco",
    "co2",
    "adloco",
    "dipaco",
    "desloc",
    "mt_dao",
    "savic",
    "single_merge",
    "powersgd",
    "dgc",
    "gmf",
    "terngrad",
    "qsgd",
    "sign_sgd",
    "ef21",
    "econtrol",
    "diana",
    "fedzip",
    "sketched",
    "scaffold",
    "scallion",
    "scafcom",
    "gossip",
    "dmsgd",
    "decentlam",
    "qg_dsgdm",
    "gradient_tracking",
    "diging",
    "k_gt",
    "exact_diffusion",
    "d2",
    "extra",
    "relay_sgd",
    "sgp",
    "push_diging",
    "weighted_gossip",
    "choco_sgd",
    "deep_squeeze",
    "moniqua",
    "beer",
    "dfedsam",
    "dprox_sgt",
    "robust_tracking",
    "drcgd",
    "riemannian_tracking",
    "masha",
    "fish_mask",
    "fedavg",
    "fedadagrad",
    "fedadam",
    "fedyogi",
    "fedprox",
    "apfl",
    "cellm",
    "fedspeed",
    "proxskip",
    "local_gda",
    "fed_admm",
    "fedce",
    "fsgld",
]

globals().update({name: own_names(globals()[name]) for name in __all__})
