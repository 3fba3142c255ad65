"""``python -m recipes.vision.federated``: which federated method stands clients whose data differ?

Eight clients, each with pictures of few classes only (Dirichlet, alpha 0.1), of which half take part in each round of ten
local steps: FedAvg, FedProx, FedAdagrad, FedAdam and FedYogi on the common weights, SCAFFOLD, SCALLION (a compressed
message per round), and FedAvg with 8-bit changes. Every client is a process; ends with a table and pictures of
accuracy against steps and against bytes under ``runs/federated``.

Data: scikit-learn's digits, or the files of Fashion-MNIST or CIFAR-10 in a folder that ``--data`` names.

Measured with ``--steps 300`` (30 rounds) on a machine of 2 cores that ran tests as well: 2.3 min (one run, one seed, rates
not tuned; all clients hold the common weights after a round, so both accuracies are the same)::

    method           accuracy  test loss   sent per worker
    fedavg              0.953      0.173            5.3 MB
    fedavg_all          0.947      0.159            2.1 MB
    fedavg_int8         0.950      0.173            1.3 MB
    fedprox             0.947      0.176            5.3 MB
    fedadagrad          0.958      0.130            5.3 MB
    fedadam             0.961      0.103            5.3 MB
    fedyogi             0.961      0.103            5.3 MB
    scaffold            0.964      0.088            5.3 MB
    scallion_qsgd       0.947      0.194            0.7 MB

Bytes are those of the client that was drawn most often; without a server it sends its change to all others, so that a sample sends
more than the all-reduce over everybody does.
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
