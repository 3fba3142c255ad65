"""lo-fi: no communication at all until the end."""

from lightning_dopt.plan import Plan, Sync
from lightning_dopt.schedules import AtEnd


def lo_fi() -> Plan:
    """Replicas train on their own; after the last step all become their mean.

    Meant for fine-tuning from a common pre-trained model.

    Source: Wortsman et al., "lo-fi: distributed fine-tuning without communication", arXiv 2210.11948.
    """
    return Plan([Sync(when=AtEnd())])
