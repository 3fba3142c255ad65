"""CR-Net: what it computes, what it keeps for backward, and what conversion refuses."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from lightning_dopt.lowrank import CRNet, Factored, convert, predicted_error
from lightning_dopt.lowrank.cross_layer import CrossLinear, coefficient
from lightning_dopt.lowrank.recompute import checkpoints
from recipes.llm import ByteGPT

pytestmark = pytest.mark.filterwarnings(
    r"ignore:.*torch.cpu.amp.autocast:FutureWarning"
)  # of checkpoint() in torch 2.4
NAMES = ["attention.qkv", "attention.out", "up", "down"]
TOKENS = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gpt(n_layer: int = 4, **options) -> ByteGPT:
    torch.manual_seed(0)
    return ByteGPT(**{"n_layer": n_layer, "n_head": 2, "n_embd": 32, "context": 16, **options})


def crnet(n_layer: int = 4, rank=6, dropout: float = 0.0, **options) -> ByteGPT:
    return convert(gpt(n_layer, dropout=dropout), CRNet(**options), "blocks", rank=rank)


def spread(model: nn.Module, low: float = 0.8, high: float = 1.2) -> nn.Module:
    """Give every beta another value."""
    betas = [m.beta for m in model.modules() if isinstance(m, CrossLinear)]
    for beta, value in zip(betas, torch.linspace(low, high, len(betas)), strict=True):
        beta.data.fill_(value)
    return model


def layers(model: ByteGPT, k: int) -> list[nn.Module]:
    return [model.blocks[k].get_submodule(name) for name in NAMES]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def by_hand(model: ByteGPT, tokens: Tensor) -> Tensor:
    """The recursion of the paper, with every linear layer called from here."""
    x, before = model.embedding(tokens), {}
    for k, block in enumerate(model.blocks):

        def apply(name: str, h: Tensor, block=block, first=k == 0) -> Tensor:
            m = block.get_submodule(name)
            if first:
                before[name] = h @ m.weight.T
            else:
                c = m.beta + m.epsilon if m.beta >= 0 else m.beta - m.epsilon
                before[name] = c * before[name] + (h @ m.a.T) @ m.b.T
            return before[name]

        attention = copy.copy(block.attention)
        attention._modules = {"qkv": lambda h: apply("attention.qkv", h), "out": lambda h: apply("attention.out", h)}
        x = x + attention.forward(block.attention_norm(x), model.cos[: x.shape[1]], model.sin[: x.shape[1]])
        gate, value = apply("up", block.mlp_norm(x)).chunk(2, dim=-1)
        x = x + apply("down", nn.functional.silu(gate) * value)
    return model.head(model.norm(x))


def test_outputs_follow_the_recursion():
    model = spread(crnet(), -1.1, 1.3)
    assert torch.allclose(model(TOKENS[:, 1:]), by_hand(model, TOKENS[:, 1:]), atol=1e-14)


def test_one_block_is_the_dense_model():
    assert torch.equal(crnet(1)(TOKENS[:, 1:]), gpt(1)(TOKENS[:, 1:]))


def test_full_rank_without_the_chain_is_the_dense_model():
    dense = gpt()
    model = crnet(rank=1.0, beta=0.0, epsilon=0.0)
    for k in (1, 2, 3):
        for low, name in zip(layers(model, k), NAMES, strict=True):
            weight = dense.blocks[k].get_submodule(name).weight.data
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            low.b.data, low.a.data = u * s, v
    assert torch.allclose(model(TOKENS[:, 1:]), dense(TOKENS[:, 1:]), atol=1e-12)


def test_without_the_chain_it_is_the_plain_low_rank_model():
    model = crnet(beta=0.0, epsilon=0.0)
    plain = convert(gpt(), Factored(first_dense=True), "blocks", rank=6)
    found = {name.replace(".block.", "."): t for name, t in model.state_dict().items() if not name.endswith("beta")}
    plain.load_state_dict(found)
    assert torch.equal(model(TOKENS[:, 1:]), plain(TOKENS[:, 1:]))


def test_without_factors_outputs_are_scaled_copies_of_the_first():
    seen: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    model = spread(crnet())
    scale = dict.fromkeys(NAMES, 1.0)
    for k in range(4):
        for name, module in zip(NAMES, layers(model, k), strict=True):
            if k:
                module.a.data.zero_()
            module.register_forward_hook(lambda m, i, y, name=name: seen[name].append(y))
    model(TOKENS[:, 1:])
    for k in (1, 2, 3):
        for name, module in zip(NAMES, layers(model, k), strict=True):
            scale[name] = scale[name] * module.coefficient().item()
            assert torch.allclose(seen[name][k], scale[name] * seen[name][0], rtol=1e-12)


def test_coefficients_stay_away_from_zero():
    betas = torch.tensor([0.0, -0.0, 1e-9, -1e-9, 2.0, -2.0], requires_grad=True)
    c = coefficient(betas, 1e-6)
    assert c.tolist() == [1e-6, 1e-6, 1e-9 + 1e-6, -1e-9 - 1e-6, 2 + 1e-6, -2 - 1e-6]
    c.sum().backward()
    assert betas.grad.tolist() == [1.0] * 6


def test_initial_values():
    model = convert(gpt(2, n_embd=128), "crnet", "blocks", rank=32)
    for module in layers(model, 1):
        variance = 1 / (32**0.5 * (module.in_features + module.out_features) ** 0.5)
        assert module.a.var().item() == pytest.approx(variance, rel=0.1)
        assert module.b.var().item() == pytest.approx(variance, rel=0.1)
        assert module.beta.item() == 1.0
    dense = gpt(2, n_embd=128).blocks[0]
    for name, module in zip(NAMES, layers(model, 0), strict=True):
        assert torch.equal(module.weight, dense.get_submodule(name).weight)


def test_the_gradient_of_beta_by_differences():
    model = spread(crnet())
    model._loss(TOKENS).backward()
    for module in (layers(model, 1)[0], layers(model, 3)[3]):
        beta, ends = module.beta, []
        for shift in (1e-5, -2e-5):
            beta.data += shift
            ends.append(model._loss(TOKENS).item())
        assert beta.grad.item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)
        beta.data += 1e-5


# ---------------------------------------------------------------------- recomputation


def trained_gradients(
    recompute: str, n_layer: int = 9, segment: int = 4, dropout: float = 0.0, betas: tuple[float, float] = (0.8, 1.2)
):
    model = spread(crnet(n_layer, recompute=recompute, segment=segment, dropout=dropout), *betas)
    torch.manual_seed(3)
    loss = model._loss(TOKENS)
    loss.backward()
    return loss.item(), gradients(model)


def apart(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest relative error of a tensor."""
    assert found.keys() == right.keys()
    return max(((found[n] - right[n]).norm() / right[n].norm()).item() for n in right)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("recompute", ["checkpoint", "inverse", "forward"])
def test_recomputed_gradients_are_those_of_autograd(recompute: str, dropout: float):
    loss, right = trained_gradients("none", dropout=dropout)
    again, found = trained_gradients(recompute, dropout=dropout)
    assert again == loss
    assert apart(found, right) < (1e-12 if recompute == "inverse" else 1e-15)


@pytest.mark.parametrize(("n_layer", "segment"), [(2, 8), (5, 1), (6, 2), (7, 3), (4, 3)])
@pytest.mark.parametrize("recompute", ["inverse", "forward"])
def test_segments_of_any_length(recompute: str, n_layer: int, segment: int):
    _, right = trained_gradients("none", n_layer)
    _, found = trained_gradients(recompute, n_layer, segment)
    assert apart(found, right) < 1e-12


def test_recomputed_gradients_in_single_precision():
    torch.set_default_dtype(torch.float32)
    _, right = trained_gradients("none", betas=(0.95, 1.05))
    _, found = trained_gradients("inverse", betas=(0.95, 1.05))
    assert apart(found, right) < 1e-4


def test_two_backward_passes_through_one_graph():
    model = spread(crnet(6, recompute="inverse", segment=2))
    loss = model._loss(TOKENS)
    loss.backward(retain_graph=True)
    once = {n: g.clone() for n, g in gradients(model).items()}
    loss.backward()
    assert apart(gradients(model), {n: 2 * g for n, g in once.items()}) < 1e-15


def test_the_checkpoint_set():
    assert checkpoints(24, 8) == [7, 15, 23]  # the last and every eighth, counted from 1: 8, 16, 24
    assert checkpoints(6, 8) == [5]
    assert checkpoints(12, 8) == [3, 11]
    assert checkpoints(9, 8) == [8]  # not the dense block 0
    assert checkpoints(1, 8) == []


def kept(model: nn.Module) -> int:
    """Bytes that autograd keeps for backward, parameters apart, each storage once."""
    parameters = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        loss = model._loss(TOKENS)
    del loss
    return sum(found.values())


def test_what_is_kept_for_backward():
    """Per block: the input and the products; per segment: the outputs of one block."""
    tokens, h, wide = 3 * 16, 32, 3 * 32 + 32 + 2 * 80 + 32
    products = 4 * 2
    sizes = {
        (mode, n): kept(crnet(n, rank=2, recompute=mode, segment=8))
        for mode in ("none", "checkpoint", "inverse", "forward")
        for n in (9, 17)
    }
    grown = {
        mode: (sizes[mode, 17] - sizes[mode, 9]) / (8 * tokens) for mode in ("none", "checkpoint", "inverse", "forward")
    }
    assert grown["checkpoint"] == 8 * (h + wide)
    assert grown["inverse"] == grown["forward"] == 8 * (h + products + wide / 8)
    assert grown["none"] > 3 * grown["checkpoint"] / 2 > 6 * grown["inverse"] / 2


@pytest.mark.parametrize(("recompute", "stored"), [("inverse", [2, 4]), ("forward", [0, 2])])
def test_outputs_live_only_where_they_are_needed(recompute: str, stored: list[int]):
    model = crnet(5, recompute=recompute, segment=2)
    seen: list[tuple[int, weakref.ref]] = []
    for k in range(5):
        for module in layers(model, k):
            module.register_forward_hook(lambda m, i, y, k=k: seen.append((k, weakref.ref(y.untyped_storage()))))
    loss = model._loss(TOKENS)
    assert [k for k, ref in seen if ref() is not None] == [k for k in stored for _ in NAMES]
    loss.backward()
    del loss
    assert len(seen) > 5 * 4  # each block ran twice
    assert all(ref() is None for _, ref in seen)


ERRORS = {  # going back through eight coefficients, measured on products of random matrices
    (torch.float64, 1.0): 3e-16,
    (torch.float32, 1.0): 2e-7,
    (torch.float32, 0.5): 1e-5,
    (torch.float32, 0.1): 2.6,
    (torch.bfloat16, 0.9): 2.6e-2,
    (torch.bfloat16, 0.5): 0.62,
}


@pytest.mark.parametrize(("dtype", "beta"), ERRORS)
def test_predicted_and_measured_rounding_errors_agree(dtype: torch.dtype, beta: float):
    g = torch.Generator().manual_seed(0)
    y = torch.randn(64, 64, generator=g).to(dtype)
    start, lows = y, []
    for _ in range(8):
        lows.append((torch.randn(64, 8, generator=g) @ torch.randn(8, 64, generator=g) / 8**0.5).to(dtype))
        y = (beta * y + lows[-1]).to(dtype)
    for low in reversed(lows):
        y = ((y - low) / beta).to(dtype)
    measured = ((y - start).double().norm() / start.double().norm()).item()
    predicted = predicted_error([beta] * 8, dtype)
    assert ERRORS[dtype, beta] / 5 < measured < 5 * ERRORS[dtype, beta]
    assert measured / 5 < predicted < 5 * measured


def test_the_inverse_is_refused_where_rounding_would_spoil_it():
    torch.set_default_dtype(torch.float32)
    _, right = trained_gradients("none", 9, 8, betas=(0.1, 0.1))
    with pytest.warns(UserWarning, match=r"blocks 1 to 8 are recovered forward: going back through attention.qkv"):
        _, found = trained_gradients("inverse", 9, 8, betas=(0.1, 0.1))
    assert apart(found, right) < 1e-5
    model = spread(crnet(9, recompute="inverse", segment=8, tolerance=1e30), 0.1, 0.1)
    model._loss(TOKENS).backward()
    assert apart(gradients(model), right) > 1e-2  # what the guard prevents


def test_a_short_segment_needs_no_guard():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, right = trained_gradients("none", 5, 1, betas=(1e-3, 1e-3))
        _, found = trained_gradients("inverse", 5, 1, betas=(1e-3, 1e-3))  # only block 1 goes back, one step
    assert apart(found, right) < 1e-9


# ---------------------------------------------------------------------- state and surroundings


def test_calls_leave_nothing_behind():
    model = spread(crnet())
    right = model(TOKENS[:, 1:])
    assert model(TOKENS[:1, 1:5]).shape == (1, 4, 256)
    model.blocks[2].block.down.register_forward_hook(lambda m, i, y: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(TOKENS[:, 1:])
    model.blocks[2].block.down._forward_hooks.clear()
    assert torch.equal(model(TOKENS[:, 1:]), right)
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS[:, 1:]), right)
    assert model.generate(b"ab", 5) == model.generate(b"ab", 5)


def test_threads_and_nested_calls_do_not_meet():
    model = spread(crnet())
    inputs = [TOKENS[:, 1:], TOKENS[:1, 1:9], TOKENS[:2, 3:10]]
    right = [model(x) for x in inputs]
    inner: list[Tensor] = []

    def nested(module, args):
        if not inner:
            inner.append(TOKENS)
            inner[0] = model(inputs[1])

    handle = model.blocks[2].block.up.register_forward_pre_hook(nested)
    assert torch.equal(model(inputs[0]), right[0])
    assert torch.equal(inner[0], right[1])
    handle.remove()
    found: dict[int, list[Tensor]] = {}

    def work(k: int) -> None:
        found[k] = [model(inputs[k]).detach() for _ in range(10)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, right[k]) for k in range(3) for y in found[k])


def test_copies_and_pickles():
    model = spread(crnet(recompute="inverse"))
    right = model(TOKENS[:, 1:])
    right.sum().backward()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(TOKENS[:, 1:]), right)
        assert again.blocks[0].block is not model.blocks[0].block


def test_activation_checkpointing_around_blocks():
    model = spread(crnet())
    model._loss(TOKENS).backward()
    right = {n: g.clone() for n, g in gradients(model).items()}
    model.zero_grad()
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    model._loss(TOKENS).backward()
    assert apart(gradients(model), right) < 1e-15


def test_compiles_without_a_break():
    whole = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 14)  # older ones, down to 2.4: with breaks
    model = spread(crnet(3))
    compiled = torch.compile(model, fullgraph=whole, backend="aot_eager")
    x = TOKENS[:, 1:]
    cross_entropy(compiled(x).flatten(0, 1), x.flatten()).backward()
    found = gradients(model)
    model = spread(crnet(3))
    cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    right = gradients(model)
    assert apart(found, right) < 1e-12


def test_autocast_is_repeated_in_the_replay():
    torch.set_default_dtype(torch.float32)
    found = {}
    for mode in ("none", "forward"):
        model = spread(crnet(recompute=mode))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model._loss(TOKENS)
        loss.backward()
        found[mode] = gradients(model)
    assert apart(found["forward"], found["none"]) < 1e-2


def test_beta_keeps_its_precision():
    model = crnet().to(torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert {t for name, t in kinds.items() if name.endswith("beta")} == {torch.float32}
    assert {t for name, t in kinds.items() if not name.endswith("beta")} == {torch.bfloat16}
    assert model(TOKENS[:, 1:]).dtype == torch.bfloat16


def test_every_parameter_gets_a_gradient():
    for model in (crnet(), crnet(first_dense=False)):
        model._loss(TOKENS).backward()
        assert all(g is not None and g.abs().sum() > 0 for g in gradients(model).values())


def test_biases_stay():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x).tanh()

    torch.manual_seed(0)
    x = torch.randn(4, 5)
    found = []
    for mode in ("none", "inverse"):
        torch.manual_seed(1)
        model = convert(nn.Sequential(nn.Sequential(*[Block() for _ in range(4)])), CRNet(recompute=mode), "0", rank=2)
        model(x.clone().requires_grad_()).square().sum().backward()
        found.append(gradients(model))
        assert sum(p.numel() for p in model.parameters()) == 25 + 4 * 5 + 3 * (2 * 10 + 1)
    assert apart(found[1], found[0]) < 1e-12
    y, h = None, x
    for block in model[0]:
        m = block.block.inner
        y = linear(h, m.weight, m.bias) if y is None else m.coefficient() * y + linear(h, m.b @ m.a, m.bias)
        h = h + y.tanh()
    assert torch.allclose(model(x), h)


# ---------------------------------------------------------------------- ranks


def ranks_of(model: ByteGPT) -> list[list[int]]:
    return [[m.rank for m in layers(model, k)] for k in range(1, len(model.blocks))]


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameters_follow_the_formula():
    model = crnet(5, rank=7)
    h, wide, r = 32, 80, 7
    dense = 4 * h * h + 3 * h * wide
    low = r * (4 * h + 2 * h + h + 2 * wide + wide + h) + 4
    assert size(model) == 256 * h + h + 5 * 2 * h + dense + 4 * low
    assert size(crnet(5, rank=7, first_dense=False)) == 256 * h + h + 5 * 2 * h + 5 * low - 4
    assert size(crnet(5, rank=7, learn_beta=False)) == size(model) - 16


def test_ranks_by_layer_and_by_name():
    assert ranks_of(crnet(rank={"attention.*": 0.25, "*": 9.0})) == [[8, 8, 9, 9]] * 3  # as YAML files are read
    assert ranks_of(crnet(rank=[3, 5, 4])) == [[3] * 4, [5] * 4, [4] * 4]
    assert ranks_of(crnet(rank={"attention.*": 3, "*": 9})) == [[3, 3, 9, 9]] * 3
    assert ranks_of(crnet(rank={"attention.*": [1, 2, 3], "*": 9})) == [[k, k, 9, 9] for k in (1, 2, 3)]
    assert ranks_of(crnet(rank=0.25)) == [[8] * 4] * 3


@pytest.mark.parametrize("method", [CRNet(), CRNet(first_dense=False), Factored()])
@pytest.mark.parametrize("profile", ["uniform", "middle"])
@pytest.mark.parametrize("budget", [0.5, 40_000])
def test_a_budget_is_used_up(method, profile: str, budget: float):
    dense = size(gpt(6))
    allowed = budget if budget > 1 else int(budget * dense)
    model = convert(gpt(6), method, "blocks", budget=budget, profile=profile)
    assert size(model) <= allowed
    step = size(convert(gpt(6), method, "blocks", rank=9)) - size(convert(gpt(6), method, "blocks", rank=8))
    assert size(model) > allowed - 2 * step
    rows = [[m.rank for m in block.modules() if hasattr(m, "rank")] for block in model.blocks]
    rows = [row for row in rows if row]
    first, middle, last = rows[0][0], rows[len(rows) // 2][0], rows[-1][0]
    assert first == last
    assert (first < middle) == (profile == "middle")


class Other(nn.Module):
    def __init__(self, *widths: int, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(w, 4, bias=k == 0 or bias)}) for k, w in enumerate(widths)
        )
        self.norm = nn.LayerNorm(4)


REFUSED = {
    "no such module; its stacks are": (lambda: gpt(), {"blocks": "model.layers"}),
    "Attention is no ModuleList": (lambda: gpt(), {"blocks": "blocks.0.attention"}),
    "must be one of 'crnet'": (lambda: gpt(), {"method": "lowrank"}),
    "must be a list of names": (lambda: gpt(), {"targets": "up"}),
    r"blocks.0 has no 'qkv'; its layers are \['attention.qkv'": (lambda: gpt(), {"targets": ["qkv"]}),
    "blocks.0.mlp_norm is of type RMSNorm, only nn.Linear": (lambda: gpt(), {"targets": ["mlp_norm"]}),
    "layers.2.fc and layers.0.fc have weights of different shapes": (lambda: Other(4, 4, 3), {"blocks": "layers"}),
    "only one of layers.1.fc and layers.0.fc has a bias": (lambda: Other(4, 4, bias=False), {"blocks": "layers"}),
    "say one of the two": (lambda: gpt(), {"rank": None}),
    r"blocks.1.attention.qkv is 96 x 32, its rank must be from 1 to 32": (lambda: gpt(), {"rank": 33}),
    r"rank=0\): ": (lambda: gpt(), {"rank": 0}),
    "must be in": (lambda: gpt(), {"rank": 1.5}),
    "one rank for each of the 3 low-rank blocks": (lambda: gpt(), {"rank": [3, 3]}),
    "'qkv' matches none of": (lambda: gpt(), {"rank": {"qkv": 3}}),
    "says nothing of 'attention.out'": (lambda: gpt(), {"rank": {"attention.qkv": 3}}),
    "even ranks of 1 need": (lambda: gpt(), {"rank": None, "budget": 0.01}),
    "a share must be below 1": (lambda: gpt(), {"rank": None, "budget": 1.5}),
    "shares out a budget": (lambda: gpt(), {"profile": "middle"}),
    "is converted already": (lambda: crnet(), {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_in_one_line(message: str):
    make, options = REFUSED[message]
    with pytest.raises(ValueError, match=f"^convert[^\n]*{message}[^\n]*$"):
        convert(make(), **{"method": "crnet", "blocks": "blocks", "rank": 4, **options})


def test_shared_layers_are_refused():
    model = gpt()
    model.blocks[2].up.weight = model.blocks[1].up.weight
    with pytest.raises(ValueError, match=r"^convert: blocks.2.up shares its weight with blocks.1.up$"):
        convert(model, "crnet", "blocks", rank=4)


def test_a_model_that_is_a_stack_with_names_of_its_own():
    torch.manual_seed(0)
    children = {name: nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for name in ("in", "middle", "out")}
    model = convert(nn.Sequential(OrderedDict(children)), "crnet", "", rank=2)
    assert [name for name, _ in model.named_children()] == ["in", "middle", "out"]
    first, second = model[0].block[0], model[1].block[0]
    x = torch.randn(3, 5)
    h = linear(x, first.weight, first.bias)
    right = second.coefficient() * h + linear(h.tanh(), second.b @ second.a, second.bias)
    assert torch.allclose(model[1](model[0](x)), right.tanh())


def test_blocks_must_follow_one_another():
    model = crnet()
    model.blocks[1].register_forward_hook(lambda m, i, y: y + 1)
    with pytest.raises(RuntimeError, match="block 2 must get the very tensor that block 1 returned"):
        model(TOKENS[:, 1:])


def test_a_layer_that_runs_twice_is_refused():
    model = crnet()
    model.blocks[0].block.up.register_forward_hook(lambda m, i, y: m.forward(i[0]))
    with pytest.raises(RuntimeError, match="up ran twice"):
        model(TOKENS[:, 1:])


def test_a_layer_outside_of_its_block_is_refused():
    with pytest.raises(RuntimeError, match="down ran outside of its block"):
        layers(crnet(), 2)[3](torch.randn(2, 80))


def test_a_model_on_the_meta_device_stays_there():
    with torch.device("meta"):
        model = convert(gpt(), "crnet", "blocks", rank=4)
    assert all(p.is_meta for p in model.parameters())
    assert model(TOKENS[:, 1:].to("meta")).shape == (3, 16, 256)
