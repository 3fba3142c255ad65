"""The models of the recipes: a byte-level transformer and a classifier with timm inside."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the recipes are not installed with the package

from recipes.llm import ByteGPT  # noqa: E402
from recipes.llm.model import rotary, rotate, warmup_cosine  # noqa: E402
from recipes.vision import ImageData, TimmClassifier  # noqa: E402


def tiny(**options):
    torch.manual_seed(0)
    return ByteGPT(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "context": 16, "warmup_steps": 2, **options})


def quiet(**options):
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def test_parameter_count_follows_the_formula():
    def count(model):
        return sum(p.numel() for p in model.parameters())

    block = 4 * 32 * 32 + 3 * 32 * 80 + 2 * 32  # attention, SwiGLU of width 80, two norms
    assert count(tiny()) == 256 * 32 + 2 * block + 32
    assert count(tiny(tie_weights=False)) == 2 * 256 * 32 + 2 * block + 32
    assert "cos" not in tiny().state_dict()  # a constant, not a buffer replicas would have to agree on


def test_an_untrained_model_is_close_to_eight_bits_per_byte():
    batch = torch.randint(0, 256, (4, 17), dtype=torch.uint8)
    assert abs(tiny()._loss(batch).item() - math.log(256)) < 0.05


def test_no_position_sees_the_future():
    model, tokens = tiny().eval(), torch.randint(0, 256, (1, 16))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 256
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert difference[:10].max() == 0
    assert difference[10:].min() > 1e-6


def test_attention_scores_depend_on_distances_only():
    cos, sin = rotary(12, 8)
    q, k = torch.randn(8), torch.randn(8)
    turned = rotate(q.expand(12, 8), cos, sin) @ rotate(k.expand(12, 8), cos, sin).T
    for distance in (0, 1, 5):
        diagonal = turned.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    assert not torch.allclose(turned[5, 0], turned[5, 5], atol=1e-3)


def test_learning_rate_by_hand():
    factors = [warmup_cosine(step, 4, 12) for step in range(14)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.55)
    assert factors[12] == factors[13] == pytest.approx(0.1)
    assert warmup_cosine(10**6, 0, math.inf) == 1.0  # an endless training stays at the peak


def test_decay_acts_on_matrices_only_and_on_each_once():
    model = tiny(max_steps=10, weight_decay=0.3)
    groups = model.configure_optimizers()["optimizer"].param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert {p.dim() for p in groups[0]["params"]} == {2}
    assert {p.dim() for p in groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_it_learns_a_pattern_and_writes_it_on():
    text = torch.tensor(list(b"abcdefgh" * 6), dtype=torch.uint8).unfold(0, 17, 1)
    model = tiny(lr=1e-2)
    trainer = quiet(max_steps=60)
    loader = DataLoader(text, batch_size=8, shuffle=True)
    trainer.fit(model, loader, DataLoader(text, batch_size=8))
    values = trainer.callback_metrics
    assert values["val/loss"] < 0.2
    assert values["val/bpb"] == pytest.approx(values["val/loss"].item() / math.log(2), rel=1e-5)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3)  # the cosine ended with the training
    assert model.generate(b"abcd", 12, temperature=0) == b"abcdefghabcdefgh"


def test_generation_is_a_function_of_its_seed():
    model = tiny()
    before = torch.get_rng_state()
    texts = [model.generate(b"x", 24, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert [len(text) for text in texts] == [25, 25, 25]  # longer than the context
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ByteGPT(n_embd=30, n_head=4), "ByteGPT(n_head=4): n_embd=30 must be a multiple of 2 * n_head"),
        (lambda: ByteGPT(dropout=1.0), "ByteGPT(dropout=1.0): must be a number in [0, 1)"),
        (lambda: ByteGPT(max_steps=0), "ByteGPT(max_steps=0): must be an integer of at least 1"),
        (lambda: ByteGPT(lr=0.0), "ByteGPT(lr=0.0): must be a number in (0, inf)"),
        (lambda: tiny().generate(b"", 3), "ByteGPT.generate(prompt=b''): must hold at least one byte"),
        (
            lambda: TimmClassifier("resnet_nope"),
            "TimmClassifier(model_name='resnet_nope'): no such timm model; timm has",
        ),
        (lambda: TimmClassifier(pretrained=True), "there are no weights for model_name='tiny'"),
        (lambda: TimmClassifier(optimizer="adam"), "TimmClassifier(optimizer='adam'): must be one of 'adamw', 'sgd'"),
    ],
)
def test_mistakes_are_named_in_one_line(make, message):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_built_in_classifier_learns_digits():
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    model = TimmClassifier(lr=3e-3)
    assert 1e5 < sum(p.numel() for p in model.parameters()) < 3e5
    assert not list(model.model.buffers())
    trainer = quiet(max_epochs=2)
    trainer.fit(model, ImageData(batch_size=32))
    assert trainer.callback_metrics["val/acc"] > 0.85
    assert trainer.callback_metrics["val/loss"] < 0.6


def test_any_timm_model_with_its_arguments():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = TimmClassifier("resnet18", 7, 3, model_args={"drop_rate": 0.3}, optimizer="sgd", lr=0.1)
    assert tuple(model(torch.randn(2, 3, 32, 32)).shape) == (2, 7)
    assert type(model.model) is type(timm.create_model("resnet18"))
    assert model.model.drop_rate == 0.3
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]


def test_accuracy_counts_over_unequal_batches():
    pytest.importorskip("timm")
    model = TimmClassifier()
    model.forward = lambda images: torch.nn.functional.one_hot(images.long(), 10).float()
    predictions, labels = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([1, 2, 3, 0, 0])
    trainer = quiet()
    trainer.validate(model, DataLoader(TensorDataset(predictions, labels), batch_size=3), verbose=False)
    assert trainer.callback_metrics["val/acc"] == pytest.approx(3 / 5)  # the mean of batch means would be 1/2
    right = -math.log(math.e / (math.e + 9))
    wrong = -math.log(1 / (math.e + 9))
    assert trainer.callback_metrics["val/loss"] == pytest.approx((3 * right + 2 * wrong) / 5, rel=1e-5)
