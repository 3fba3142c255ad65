"""Cuts of all kinds of models: stages one after the other are the model, alone and in a pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dopt.pipeline import (
    Family,
    Program,
    SimulatedPipeline,
    bitpipe,
    cut,
    gpipe,
    interleaved,
    one_f_one_b,
    register_family,
)
from lightning_dopt.pipeline.balance import balanced, measured_times
from recipes.llm.llama import Llama
from recipes.llm.model import ByteGPT
from tests.trainer_tools import on_ranks

EXACT = {"atol": 1e-10, "rtol": 1e-10}


def logits(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y.logits


def loss(y: Any, part: Any) -> Tensor:
    y = logits(y)
    return (y.flatten(1) * part[1][:, : y[0].numel()]).pow(2).mean()


def images(n: int = 4, size: int = 32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, 3, size, size, generator=g, dtype=torch.float64), targets(n, g)


def words(n: int = 4, length: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randint(20, (n, length), generator=g), targets(n, g)


def targets(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, 2000, generator=g, dtype=torch.float64)


def equal_to_the_model(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    make: Callable[[nn.Module], Sequence[nn.Module]],
    programs: Sequence[Program],
) -> None:
    """Stages in a row, and a pipeline of them, have the output, loss and gradients of the model."""
    model.double()
    reference = copy.deepcopy(model)
    expected = reference(batch[0])
    value = loss(expected, batch)
    value.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if programs[0].stages == 4 and len(names) == len(gradients):  # it trains no tied weights
        programs = [*programs, bitpipe(2, 2)]
    for program in programs:
        model.zero_grad()
        stages = make(model)
        x: Any = batch[0]
        for stage in stages:
            x = stage(x)
        assert type(stages[-1].finish(x)) is type(expected)  # type: ignore[operator]
        torch.testing.assert_close(x, logits(expected), **EXACT)
        assert {s.model_name(n) for s in stages for n, _ in s.named_parameters(remove_duplicate=False)} == names  # type: ignore[operator]
        pipeline = SimulatedPipeline(stages, program, loss)
        assert float(pipeline.step(batch)) == pytest.approx(float(value.detach()), abs=1e-10)
        torch.testing.assert_close(logits(pipeline.forward(batch[0])), logits(expected), **EXACT)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], **EXACT)


def programs(stages: int) -> list[Program]:
    several = [interleaved(2, 2)] if stages == 4 else []
    return [gpipe(stages, 2), one_f_one_b(stages, 3), *several]


# ---------------------------------------------------------------------- traced models


def without_statistics(model: nn.Module) -> nn.Module:
    """Batch normalization by its running statistics: micro-batches have others than the batch."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_vision_transformers_are_traced(stages: int) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2)
    equal_to_the_model(model, images(), lambda m: cut(m, stages), programs(stages))
    assert [s.names[0] for s in cut(model, at=["blocks.1", "norm"])] == ["patch_embed", "blocks.1", "norm"]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_convolutional_networks_are_traced(stages: int) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = without_statistics(timm.create_model("resnet10t"))
    equal_to_the_model(model, images(), lambda m: cut(m, stages), programs(stages))


def test_skip_connections_cross_cuts() -> None:
    """Two cuts in one block: its input goes past the stage in the middle; and batch norm has the batches' statistics."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = without_statistics(timm.create_model("resnet10t"))
    x = images()[0]
    where = ["layer2.0.conv2", "layer2.0.bn2", "layer3"]
    equal_to_the_model(model, images(), lambda m: cut(m, at=where, example=x[:2]), programs(4))
    stages = cut(model, at=where, example=x[:2])
    with torch.no_grad():
        between = [x := stage(x) for stage in stages]
    assert between[0].shape == (4, 64 * 8 * 8 + 128 * 4 * 4), "the block's input for its shortcut, and the activation"
    assert between[2].shape == (4, 128, 4, 4), "one tensor stays what it is"
    with pytest.raises(
        ValueError, match=r"^[^\n]*2 tensors cross the cut before 'layer2.0.conv2', give an example[^\n]*$"
    ):
        cut(model, at=where)
    with pytest.raises(
        ValueError, match=r"a tensor of shape \(4, 64, 4, 4\) crosses a cut made for \(batch, \*\(64, 8, 8\)\)"
    ):
        stages[0](images(size=16)[0])


def test_batch_normalization_sees_micro_batches() -> None:
    """Running statistics are those of a model that is given the micro-batches one after the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
    reference = copy.deepcopy(model)
    x = torch.randn(8, 5, dtype=torch.float64)
    SimulatedPipeline(cut(model, at=["1", "3"]), gpipe(3, 2), lambda y, part: y.mean(), lambda part: part).step(x)
    for part in x.split(4):
        reference(part)
    for mine, other in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine, other, **EXACT)


def test_modes_of_traced_modules_stay_alive() -> None:
    """Dropout of a traced model is switched by train and eval, as in the model."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, proj_drop_rate=0.5
    )
    x = images()[0].float()
    stages = cut(model, at=["blocks.1"])
    model.eval()
    assert stages[1](stages[0](x)).equal(model(x))
    model.train()
    assert not stages[0](x).equal(stages[0](x))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("how", ["trace", "blocks"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_our_language_models(how: Any, stages: int, tie: bool) -> None:
    """Traced, and as blocks; rotary tables are computed on each stage; one matrix for embedding and output is trained as one."""
    torch.manual_seed(0)
    model = ByteGPT(n_layer=3, n_head=2, n_embd=16, context=8, tie_weights=tie)
    at = ["blocks.0", "blocks.2", "norm"][: stages - 1]
    equal_to_the_model(model, words(), lambda m: cut(m, at=at, how=how, example=words()[0]), programs(stages))
    stages_made = cut(model, at=at, how=how, example=words()[0])
    x = words(3, 4)[0]
    expected = model(x)
    for stage in stages_made:
        x = stage(x)
    torch.testing.assert_close(x, expected, **EXACT, msg="shorter than the example")


def test_what_traces_must_know() -> None:
    model = ByteGPT(n_layer=2, n_head=2, n_embd=16, context=8)
    with pytest.raises(
        ValueError, match=r"^[^\n]*the size 'getitem' is needed behind the cut before 'blocks.1'[^\n]*$"
    ):
        cut(model, at=["blocks.1"], how="trace")
    equal_to_the_model(
        Llama(vocabulary=20, n_layer=2, n_head=2, n_embd=16, hidden=16, context=8),
        words(),
        lambda m: cut(m, 3),
        programs(3),
    )


# ---------------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tie", [True, False])
def test_llama_of_hugging_face(attention: str, tie: bool) -> None:
    """Masks and rotary positions are the model's own, on each stage."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        tie_word_embeddings=tie, attn_implementation=attention,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for stages in (2, 3, 4):
        at = ["model.layers.0", "model.layers.2", "lm_head"][: stages - 1]
        equal_to_the_model(model, words(), lambda m, at=at: cut(m, at=at), programs(stages))
    assert "model.layers.1" in cut(model, 2)[0].names or "model.layers.1" in cut(model, 2)[1].names


# ---------------------------------------------------------------------- tied weights


def test_tied_copies_stay_equal() -> None:
    """On two ranks each trains its copy; both get the sum, the norm counts it once, and the model stays one model."""
    torch.manual_seed(0)
    model = ByteGPT(n_layer=2, n_head=2, n_embd=16, context=8).double()
    reference = copy.deepcopy(model)
    pipeline = SimulatedPipeline(cut(model, at=["blocks.1"]), one_f_one_b(2, 2), loss)
    copies = [p for p in pipeline.parameters() if p.shape == model.head.weight.shape]
    assert len(copies) == 2
    assert model.head.weight is model.embedding.weight
    optimizers = [torch.optim.AdamW(m, lr=0.01) for m in (pipeline.parameters(), reference.parameters())]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(reference(words()[0]), words()).backward()
        pipeline.step(words())
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 1e-3)
        assert float(pipeline.clip_grad_norm_(1e-3)) == pytest.approx(float(norm), abs=1e-12)
        for optimizer in optimizers:
            optimizer.step()
        assert copies[0].equal(copies[1])
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, other, **EXACT)
    sent = [ledger.entries["tied gradients"].bytes for ledger in pipeline.ledgers]
    assert sent == [3 * copies[0].nbytes] * 2


def test_tied_on_one_rank_is_one_parameter() -> None:
    """With two stages on the same rank nothing is copied or sent."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    model[2].weight = model[0].weight
    batch = torch.randn(4, 3, dtype=torch.float64), targets(4, torch.Generator())
    equal_to_the_model(model, batch, lambda m: cut(m, at=[1, 2, 3]), [interleaved(2, 2), gpipe(4, 2)])
    pipeline = SimulatedPipeline(cut(model, at=[1, 2, 3]), interleaved(2, 2), loss)
    pipeline.step(batch)
    assert len(list(pipeline.parameters())) == len(list(model.parameters()))
    assert all("tied gradients" not in ledger.entries for ledger in pipeline.ledgers)


# ---------------------------------------------------------------------- balance


class Slow(nn.Module):
    """Few parameters, much to do."""

    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.weight, self.repeats = nn.Parameter(torch.eye(64)), repeats

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.repeats):
            x = x @ self.weight
        return x


def slow() -> nn.Sequential:
    return nn.Sequential(
        Slow(200), Slow(1), nn.Linear(64, 640), nn.ReLU(inplace=True), nn.Linear(640, 64), nn.BatchNorm1d(64)
    )


def test_balanced_by_measured_time() -> None:
    """What takes long stands alone; nothing is changed by measuring."""
    model = slow()
    example = torch.randn(64, 64)
    state, draws = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    stages = cut(model, 2, balance="time", example=example)
    assert [s.names for s in stages] == [("0",), ("1", "2", "3", "4", "5")]
    assert cut(model, 2)[0].names == ("0", "1", "2", "3"), "by parameters"
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert torch.random.get_rng_state().equal(draws)
    assert all(p.grad is None for p in model.parameters())
    gpt = ByteGPT(n_layer=3, n_head=2, n_embd=16)
    assert len(cut(gpt, 3, balance="time", example=words()[0])) == 3, "modules that are given several tensors"


def test_equal_weights_are_cut_evenly() -> None:
    assert balanced([1.0] * 6, 3) == [2, 4]
    assert balanced([0.0, 3.0, 0.0, 3.0], 2) == [3]


def times(rank: int) -> list[float]:
    import torch.distributed as dist

    dist.init_process_group("gloo") if not dist.is_initialized() else None
    model = slow()
    return measured_times(model, list(model.named_children()), torch.randn(8, 64), repeats=1)


def test_all_ranks_cut_alike() -> None:
    """The times of rank 0 count: those measured differ in their last bits at least."""
    first, second = on_ranks(times, 2)
    assert first == second


# ---------------------------------------------------------------------- refusals


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)


class ByValue(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) if x.sum() > 0 else self.a(x)


class Indices(Branches):
    def forward(self, x: Tensor) -> Tensor:
        order = x.argsort(dim=1)
        return self.b(self.a(x)).gather(1, order)


class Shared(Branches):
    def forward(self, x: Tensor) -> Tensor:
        total = x.sum(0)
        return self.b(self.a(x)) + total


class ByMode(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if self.training else self.a(x)


class Two(Branches):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b(self.a(x) + y)


def twice_normalized() -> nn.Sequential:
    norm = nn.BatchNorm1d(4)
    return nn.Sequential(norm, nn.Linear(4, 4), norm)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: cut(ByValue(), 2),
            r"cut\(model=ByValue\): cannot be traced \(TraceError: symbolically traced variables .*",
        ),
        (lambda: cut(ByMode(), 2), r"cut\(model=ByMode\): .* computes something else in training than in evaluation"),
        (lambda: cut(Two(), 2), r"cut\(model=Two\): must take one tensor, not x, y"),
        (
            lambda: cut(Indices(), at=["b"], example=torch.randn(3, 4)),
            r"cut\(at='b'\): 'argsort' crosses it and is not floating point but torch.int64",
        ),
        (
            lambda: cut(Shared(), at=["b"], example=torch.randn(3, 4)),
            r"cut\(at='b'\): 'sum_1' crosses it with shape \(4,\), which has no row for each sample",
        ),
        (lambda: cut(Branches(), at=["c"]), r"cut\(model=Branches\): cannot be traced"),
        (lambda: cut(Shared(), at=["c"]), r"no module 'c' can begin a stage; there are a, b"),
        (lambda: cut(Shared(), at=[1]), r"Shared is no nn.Sequential, give names, not 1"),
        (lambda: cut(Shared(), 2, how="blocks"), r"how='blocks'\): must be of a class that register_family knows"),
        (lambda: cut(Shared(), 2, balance="time"), r"cut\(balance='time'\): needs stages=... and example=..."),
        (lambda: cut(Shared(), 2, balance="size"), r"cut\(balance='size'\)"),  # type: ignore[arg-type]
        (
            lambda: cut(twice_normalized(), 3),
            r"'0.running_mean' of stage 0 and '2.running_mean' of stage 2 are one tensor",
        ),
    ],
)
def test_refused_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        make()


def test_families_can_be_registered() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blocks = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.dropout(self.first(x), 0.0 if x.dtype == torch.float64 else 0.5, self.training)
            for block in self.blocks:
                x = torch.tanh(block(x)) if x.sum() < 1e9 else x
            return x

    torch.manual_seed(0)
    batch = torch.randn(4, 4, dtype=torch.float64), targets(4, torch.Generator())
    with pytest.raises(ValueError, match="cannot be traced"):
        cut(Decoder(), 2)
    register_family(Decoder, Family("blocks", ("first",), ()))
    equal_to_the_model(Decoder(), batch, lambda m: cut(m, 3), programs(3))
    model, x = Decoder(), torch.randn(4, 4)
    first, second = cut(model, at=["blocks.1"])
    assert not first(x).equal(first(x)), "the model's own dropout"
    model.eval()
    assert second(first(x)).equal(model(x)), "follows the mode of the model"
