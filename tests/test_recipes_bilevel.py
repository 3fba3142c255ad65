"""The bilevel recipes: their data, their losses, and a few steps of some methods."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recipes.bilevel import DecayTuning, HyperCleaning, TwoLevelData
from recipes.bilevel.__main__ import main, methods
from recipes.bilevel.model import area


def test_area_under_the_curve() -> None:
    scores, wrong = torch.tensor([0.9, 0.8, 0.3, 0.1, 0.3]), torch.tensor([False, False, True, True, False])
    assert float(area(scores, wrong)) == pytest.approx(5.5 / 6)  # one tie of six pairs
    assert float(area(-scores, wrong)) == pytest.approx(0.5 / 6)
    assert float(area(torch.zeros(5), wrong)) == 0.5


def test_labels_of_the_lower_level_are_corrupted_and_no_others() -> None:
    clean, noisy = TwoLevelData(), TwoLevelData(corruption=0.3)
    for data in (clean, noisy):
        data.setup("fit")
    for level in ("upper", "test"):
        assert torch.equal(clean._sets[level].labels, noisy._sets[level].labels)
    differ = clean._sets["lower"].labels != noisy._sets["lower"].labels
    assert torch.equal(differ, noisy.wrong)
    assert 0.25 < float(differ.float().mean()) < 0.35
    assert not clean.wrong.any()
    pictures, labels, numbers = noisy._sets["lower"].__getitems__([7, 3])
    assert torch.equal(pictures, noisy._sets["lower"].pictures[[7, 3]])
    assert (labels.tolist(), numbers.tolist()) == (noisy._sets["lower"].labels[[7, 3]].tolist(), [7, 3])


def test_lower_losses_are_those_of_the_formula() -> None:
    data = TwoLevelData(corruption=0.3, held_out=0.3)
    data.setup("fit")
    batch = data._sets["lower"].__getitems__([0, 5, 9])
    cleaning, tuning = HyperCleaning(decay=0.5), DecayTuning(start=0.1)
    for model in (cleaning, tuning):
        torch.nn.init.constant_(model.net.bias, 2.0)  # the same for all classes: probabilities are 1/10
    with torch.no_grad():
        cleaning.logits[5] = 100.0
    loss = torch.log(torch.tensor(10.0))
    assert cleaning.lower_loss(batch).item() == pytest.approx(float(loss * (0.5 + 1 + 0.5) / 3) + 0.5 * 40)
    assert tuning.lower_loss(batch).item() == pytest.approx(float(loss) + 0.1 * 40)
    assert tuning.upper_loss(batch).item() == pytest.approx(float(loss))


def test_sizes_that_do_not_fit_are_refused() -> None:
    data = TwoLevelData(held_out=0.2)
    data.setup("fit")
    for model, text in ((HyperCleaning(), "samples=1007.*must be 1150"), (DecayTuning(pixels=784), "784.*must be 64")):
        model._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
        with pytest.raises(ValueError, match=text):
            model.setup("fit")
    with pytest.raises(FileNotFoundError, match="no mnist files there"):
        TwoLevelData("mnist", "nowhere")


@pytest.mark.parametrize("arguments", [["cleaning", "--methods", "sgd"], ["tuning", "--workers", "1"], ["other"]])
def test_bad_options_end_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.trainer
@pytest.mark.filterwarnings("ignore")
def test_methods_run_and_are_written_down(tmp_path: Path) -> None:
    chosen = "SOBA,no upper level,D-SOBA-FO,SPARKLE-ED-GT"
    outcomes = main(["cleaning", "--workers", "2", "--steps", "8", "--methods", chosen, "--out", str(tmp_path)])
    assert [(o.graph, o.method) for o in outcomes[:3]] == [
        ("complete", "SOBA"),
        ("complete", "no upper level"),
        ("ring", "D-SOBA-FO"),
    ]
    assert len(outcomes) == 6
    assert all(o.steps == list(range(1, 9)) and len(o.values["val/upper_loss"]) == 8 for o in outcomes)
    assert outcomes[1].values["val/auc"] == [0.5] * 8  # nothing is cleaned
    assert outcomes[0].values["val/auc"][-1] > 0.55
    assert (tmp_path / "cleaning" / "results.json").exists()
    sizes = {m.upper.labels()[0] for m in methods()["ring"].values()}
    assert sizes == {"parameters", "gradients"}
