"""``python -m recipes.vision.federated``: which federated method stands clients whose data differ?

Eight clients, each with pictures of few classes only (Dirichlet, alpha 0.1), of which half take part in each round of ten
local steps: FedAvg, FedProx, FedAdagrad, FedAdam and FedYogi on the common weights, SCAFFOLD, SCALLION (a compressed
message per round), and FedAvg with 8-bit changes. Every client is a process; ends with a table and pictures of
accuracy against steps and against bytes under ``runs/federated``.

Data: scikit-learn's digits, or the files of Fashion-MNIST or CIFAR-10 in a folder that ``--data`` names.
"""

from __future__ import annotations

import sys

from lightning_dopt import Int8, plans
from lightning_dopt.compress import QSGD
from recipes.vision.comparison import Method, Outcome
from recipes.vision.heterogeneity import parse, run

LR = 0.1
ROUND = 10
SHARE = 0.5


def methods() -> dict[str, Method]:
    """All methods by name, in the order of the table."""
    found = [
        Method("fedavg", plans.fedavg(ROUND, SHARE), LR),
        Method("fedavg_all", plans.fedavg(ROUND), LR),
        Method("fedavg_int8", plans.fedavg(ROUND, SHARE, codec=Int8()), LR),
        Method("fedprox", plans.fedprox(ROUND, 0.1, SHARE), LR),
        Method("fedadagrad", plans.fedadagrad(ROUND, 0.03, fraction=SHARE), LR),
        Method("fedadam", plans.fedadam(ROUND, 0.01, fraction=SHARE), LR),
        Method("fedyogi", plans.fedyogi(ROUND, 0.01, fraction=SHARE), LR),
        Method("scaffold", plans.scaffold(ROUND, fraction=SHARE), LR),
        Method("scallion_qsgd", plans.scallion(QSGD(), ROUND, fraction=SHARE), LR),
    ]
    return {method.name: method for method in found}


def main(arguments: list[str] | None = None) -> list[Outcome]:
    """Train with every method, print and draw."""
    return run(*parse(arguments, methods(), "federated", 600))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
