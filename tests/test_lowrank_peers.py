"""The methods CR-Net is compared with, each against something simpler; models of other libraries."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from lightning_dopt.lowrank import CoLA, CRNet, Factored, LoRA, ReLoRA, SLTrain, convert, merge, restart, rewarm
from lightning_dopt.optim import GaLore, Grass
from recipes.llm import ByteGPT

TOKENS = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gpt(n_layer: int = 3) -> ByteGPT:
    torch.manual_seed(0)
    return ByteGPT(n_layer=n_layer, n_head=2, n_embd=32, context=16)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Net(nn.Module):
    """Two layers in a stack of one block."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(7, 5, bias=bias), nn.Tanh(), nn.Linear(5, 6, bias=bias)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def net(method, rank: int = 2, bias: bool = True) -> Net:
    return convert(Net(bias), method, "layers", rank=rank)


X = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_plain_low_rank():
    model = net(Factored())
    first, _, last = model.layers[0]
    right = (X @ first.a.T @ first.b.T + first.bias).tanh() @ (last.b @ last.a).T + last.bias
    assert torch.allclose(model(X), right)
    assert size(model) == 2 * (7 + 5) + 5 + 2 * (5 + 6) + 6
    assert size(net(Factored(first_dense=True))) == size(Net())


@pytest.mark.parametrize(("activation", "s"), [("silu", silu), ("relu", torch.relu)])
def test_cola(activation, s):
    model = net(CoLA(activation))
    first, _, last = model.layers[0]
    h = (s(X @ first.a.T) @ first.b.T + first.bias).tanh()
    assert torch.allclose(model(X), s(h @ last.a.T) @ last.b.T + last.bias)
    assert size(model) == size(net(Factored()))


@pytest.mark.parametrize("bias", [True, False])
def test_sltrain_is_a_dense_layer_with_that_matrix(bias: bool):
    model = net(SLTrain(density=0.2, alpha=6.0), bias=bias)
    layer = model.layers[0][0]
    layer.b.data.normal_()
    flat = (3.0 * layer.b @ layer.a).flatten().index_add(0, layer.support, layer.values)
    y = X @ flat.view(5, 7).T + (layer.bias if bias else 0)
    assert torch.allclose(layer(X), y)
    parameters = list(layer.parameters())
    right = torch.autograd.grad(y.square().sum(), parameters)
    x = X.clone().requires_grad_()
    found = torch.autograd.grad(layer(x).square().sum(), [*parameters, x])
    assert all(torch.allclose(a, b) for a, b in zip(found, right, strict=False))
    assert torch.allclose(found[-1], 2 * y @ flat.view(5, 7))
    assert len(layer.support.unique()) == len(layer.support) == int(0.2 * 35)
    assert layer.values.abs().max() <= 7**-0.5


def test_sltrain_keeps_no_dense_matrix_for_backward():
    layer = net(SLTrain(density=0.2)).layers[0][0]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(X)
    assert sorted(kept) == sorted([X.numel(), 14, 10, 7, 7])


def test_sltrain_trains_within_its_budget():
    dense = size(gpt())
    model = convert(gpt(), SLTrain(), "blocks", budget=0.5)
    step = size(convert(gpt(), SLTrain(), "blocks", rank=5)) - size(convert(gpt(), SLTrain(), "blocks", rank=4))
    assert int(0.5 * dense) - step < size(model) <= int(0.5 * dense)


@pytest.mark.parametrize("method", [Factored(), Factored(first_dense=True), SLTrain(density=0.1)])
def test_merging_gives_a_dense_model_that_computes_the_same(method):
    model = convert(gpt(), method, "blocks", rank=4)
    for p in model.parameters():
        p.data += 0.01 * torch.randn_like(p)
    right = model(TOKENS[:, 1:])
    dense = merge(model)
    assert list(dense.state_dict()) == list(gpt().state_dict())
    assert torch.allclose(dense(TOKENS[:, 1:]), right, atol=1e-13)
    assert all(p.requires_grad for p in dense.parameters())


@pytest.mark.parametrize("method", [CRNet(), CoLA()])
def test_what_no_dense_matrix_can_express_is_not_merged(method):
    with pytest.raises(ValueError, match=r"^merge: blocks\..*attention.qkv is a \w+, which is no product"):
        merge(convert(gpt(), method, "blocks", rank=4))


def test_nothing_to_merge_or_restart():
    with pytest.raises(ValueError, match=r"^merge: ByteGPT has no low-rank layers$"):
        merge(gpt())
    with pytest.raises(ValueError, match=r"^restart: ByteGPT has no LoRA layers$"):
        restart(gpt())


# ---------------------------------------------------------------------- LoRA and ReLoRA


def lora(method=None, rank=4) -> ByteGPT:
    pytest.importorskip("peft")
    return convert(gpt(), method or LoRA(alpha=8.0), "blocks", rank=rank)


def adam_steps(model: nn.Module, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model.zero_grad()
        model._loss(TOKENS).backward()
        optimizer.step()
    return optimizer


def test_lora_trains_factors_and_what_is_not_replaced():
    model, dense = lora(), gpt()
    assert torch.equal(model(TOKENS[:, 1:]), dense(TOKENS[:, 1:]))  # B starts at zero
    adam_steps(model, 3)
    layer, weight = model.blocks[1].up, dense.blocks[1].up.weight
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (4, 32)
    assert torch.equal(layer.base_layer.weight, weight)
    assert not torch.equal(model.norm.weight, dense.norm.weight)
    x = torch.randn(5, 32)
    assert torch.allclose(layer(x), x @ (weight + 2.0 * b @ a).T)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 256 * 32 + 7 * 32 + 3 * 4 * (32 + 96 + 32 + 32 + 32 + 160 + 80 + 32)


def test_lora_folds_back():
    model = lora(rank=[4, 3, 2])
    adam_steps(model, 3)
    right = model(TOKENS[:, 1:])
    dense = merge(model)
    assert list(dense.state_dict()) == list(gpt().state_dict())
    assert torch.allclose(dense(TOKENS[:, 1:]), right, rtol=0, atol=1e-13)
    change = dense.blocks[1].up.weight - gpt().blocks[1].up.weight
    assert torch.linalg.matrix_rank(change, atol=1e-10) == 3


def test_relora_adds_up_ranks():
    model = lora(ReLoRA(every=4))
    for round_ in range(3):
        optimizer = adam_steps(model, 4)
        before = model(TOKENS[:, 1:])
        moment = optimizer.state[model.blocks[1].up.lora_A["default"].weight]["exp_avg"].clone()
        other = optimizer.state[model.norm.weight]["exp_avg"].clone()
        restart(model, [optimizer], keep=0.1)
        assert torch.allclose(model(TOKENS[:, 1:]), before, atol=1e-13)
        assert model.blocks[1].up.lora_B["default"].weight.abs().max() == 0
        pruned = optimizer.state[model.blocks[1].up.lora_A["default"].weight]["exp_avg"]
        kept = pruned != 0
        assert kept.sum() == 13  # a tenth of 4 x 32
        assert moment[kept].abs().min() > moment[~kept].abs().max()
        assert torch.equal(optimizer.state[model.norm.weight]["exp_avg"], other)
        change = model.blocks[1].up.base_layer.weight - gpt().blocks[1].up.weight
        assert torch.linalg.matrix_rank(change, atol=1e-10) == 4 * (round_ + 1)


def test_learning_rates_rise_again_after_restarts():
    assert [rewarm(t, 10, 4) for t in (0, 9, 10, 11, 13, 14, 19, 20, 22)] == [1, 1, 0, 0.25, 0.75, 1, 1, 0, 0.5]
    assert rewarm(30, 10, 0) == 0.0 or rewarm(31, 10, 0) == 1.0


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^LoRA needs the library peft: pip install 'lightning_dopt\[lowrank\]'$"
    ):
        convert(gpt(), "lora", "blocks", rank=4)


# ---------------------------------------------------------------------- GaLore and GRASS


def quadratic(shape, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(shape, generator=g))
    target, curvature = torch.randn(shape, generator=g), 1 + torch.rand(shape, generator=g)
    return p, lambda: (curvature * (p - target).square()).sum() / 2


def path(optimizer, p, loss, steps: int = 12) -> Tensor:
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        found.append(p.detach().clone())
    return torch.stack(found)


@pytest.mark.parametrize("kind", [GaLore, Grass])
@pytest.mark.parametrize("shape", [(6, 9), (7,), (2, 3, 4)])
def test_what_is_not_projected_gets_adamw(kind, shape):
    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    p, loss = quadratic(shape)
    right = path(torch.optim.AdamW([p], **options), p, loss)
    p, loss = quadratic(shape)
    assert torch.allclose(path(kind([p], rank=6, **options), p, loss), right, atol=1e-14)


def adam_by_hand(gradients, betas=(0.9, 0.999), eps=1e-8) -> Tensor:
    m = v = 0.0
    for g in gradients:
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    t = len(gradients)
    return (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)


@pytest.mark.parametrize("tall", [False, True])
def test_galore_by_hand(tall: bool):
    shape = (9, 5) if tall else (5, 9)
    p, loss = quadratic(shape)
    found = path(GaLore([p], lr=0.1, rank=2, every=3, scale=0.5), p, loss, 7)
    p, loss = quadratic(shape)
    low: list[Tensor] = []
    for t in range(7):
        p.grad = None
        loss().backward()
        g = p.grad.T if tall else p.grad
        if t % 3 == 0:
            projection = torch.linalg.svd(g).U[:, :2]
        low.append(projection.T @ g)
        step = 0.5 * projection @ adam_by_hand(low)
        p.data -= 0.1 * (step.T if tall else step)
        assert torch.allclose(found[t], p.data, atol=1e-12)


def test_galore_moves_within_the_subspace():
    p, loss = quadratic((8, 20))
    start = p.detach().clone()
    path(GaLore([p], lr=0.1, rank=3, every=100), p, loss)
    assert torch.linalg.matrix_rank(p.detach() - start, atol=1e-9) == 3


@pytest.mark.parametrize("tall", [False, True])
def test_grass_moves_the_rows_with_the_largest_gradients(tall: bool):
    shape = (9, 5) if tall else (5, 9)
    p, loss = quadratic(shape)
    found = path(Grass([p], lr=0.1, rank=2, every=3, scale=0.5), p, loss, 7)
    p, loss = quadratic(shape)
    for t in range(7):
        p.grad = None
        loss().backward()
        g, w = (p.grad.T, p.data.T) if tall else (p.grad, p.data)
        if t % 3 == 0:
            rows, seen = g.norm(dim=1).topk(2).indices, []
        seen.append(g[rows])
        w[rows] -= 0.1 * 0.5 * adam_by_hand(seen)
        assert torch.allclose(found[t], p.data, atol=1e-12)


def test_sampled_rows_are_right_on_average():
    g = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    total, n = torch.zeros_like(g), 3000
    for seed in range(n):
        optimizer = Grass([nn.Parameter(torch.zeros(6, 4))], rank=2, sample="norm", seed=seed)
        state: dict = {}
        optimizer._choose(state, g, optimizer.param_groups[0], (0, 0))
        total += optimizer._back(state, optimizer._project(state, g), g) / n
    assert (total - g).norm() < 0.08 * g.norm()


@pytest.mark.parametrize(
    "make", [lambda ps: GaLore(ps, rank=2, every=3), lambda ps: Grass(ps, rank=2, every=3, sample="norm")]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_resumes_where_it_stopped(make, dtype, tmp_path):
    p, loss = quadratic((300, 9))
    p.data = p.data.to(dtype)
    optimizer = make([p])
    path(optimizer, p, loss, 4)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    q = nn.Parameter(p.detach().clone())
    other = make([q])
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for _ in range(5):
        for x, o in ((p, optimizer), (q, other)):
            x.grad = (x.detach() * 1.5 + 0.2).cos()
            o.step()
    assert torch.equal(p, q)


def test_states_are_small():
    p, loss = quadratic((64, 256))
    for optimizer, kept in ((GaLore([p], rank=4), 64 * 4 + 2 * 4 * 256), (Grass([p], rank=4), 4 + 2 * 4 * 256)):
        path(optimizer, p, loss, 2)
        numbers = sum(t.numel() for t in optimizer.state[p].values() if isinstance(t, Tensor) and t.dim())
        assert numbers == kept


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ps: GaLore(ps, rank=0), r"GaLore\(rank=0\)"),
        (lambda ps: GaLore(ps, every=0), r"GaLore\(every=0\)"),
        (lambda ps: Grass(ps, scale=0.0), r"Grass\(scale=0.0\)"),
        (lambda ps: Grass(ps, sample="svd"), r"Grass\(sample='svd'\)"),
        (lambda ps: Grass(ps, betas=(0.9, 1.0)), r"Grass\(betas\[1\]=1.0\)"),
    ],
)
def test_options_of_optimizers(make, message):
    with pytest.raises(ValueError, match=f"^{message}: must be"):
        make([nn.Parameter(torch.zeros(2))])


# ---------------------------------------------------------------------- models of other libraries


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_llama_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(config).double()
    x, targets = TOKENS[:, :12] % 64, ["self_attn.*_proj", "mlp.*_proj"]
    found = {}
    for mode in ("none", "checkpoint", "inverse"):
        torch.manual_seed(1)
        model = convert(
            copy.deepcopy(dense), CRNet(beta=0.9, recompute=mode, segment=2), "model.layers", targets, rank=4
        )
        found[mode] = gradients(model, model(x, labels=x, use_cache=False).loss)
        for name, right in found["none"].items():
            assert torch.allclose(found[mode][name], right, rtol=1e-10, atol=1e-13), name
    with pytest.raises(ValueError, match=r"^CRNet\(recompute='inverse'\): cannot fill past_key_values twice"):
        model(x, labels=x)
    model.eval()
    with torch.no_grad():
        right = model(x).logits
        out = model(x[:, :5], use_cache=True)
        logits = [out.logits]
        for t in range(5, 12):
            out = model(x[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    assert torch.allclose(torch.cat(logits, 1), right, atol=1e-12)
    assert len(model(x, output_hidden_states=True).hidden_states) == 6
    model.train().gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="as under activation checkpointing within blocks; use recompute= instead"):
        model(x, labels=x, use_cache=False).loss.backward()


def test_a_vision_transformer_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
    dense = timm.create_model("vit_tiny_patch16_224", **options).double()
    x, found = torch.randn(2, 3, 32, 32), {}
    for mode in ("none", "inverse"):
        torch.manual_seed(1)
        model = convert(copy.deepcopy(dense), CRNet(recompute=mode), "blocks", rank=0.25)
        found[mode] = gradients(model, model(x).square().sum())
    assert all(torch.allclose(found["inverse"][n], g, rtol=1e-10, atol=1e-13) for n, g in found["none"].items())
    torch.manual_seed(1)
    model = convert(dense, CRNet(), "blocks", rank=0.25)
    model.set_grad_checkpointing(True)
    again = gradients(model, model(x).square().sum())
    assert all(torch.allclose(again[n], g) for n, g in found["none"].items())
    assert len(model.get_intermediate_layers(x, n=3)) == 3
