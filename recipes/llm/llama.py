"""A LLaMA-style transformer on tokens, with one matrix for each of its seven linear maps."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from lightning_dopt._checks import check_int
from lightning_dopt.pipeline import Family, register_family
from recipes.llm.model import LanguageModel, rotary, rotate


class LlamaBlock(nn.Module):
    """Attention and a SwiGLU layer, each behind an RMSNorm and a residual; no biases."""

    def __init__(self, n_embd: int, hidden: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.attention_norm, self.mlp_norm = nn.RMSNorm(n_embd), nn.RMSNorm(n_embd)
        self.q, self.k, self.v, self.o = (nn.Linear(n_embd, n_embd, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(n_embd, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """From (B, T, C) to (B, T, C)."""
        a = self.attention_norm(x)
        q, k, v = (p(a).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        m = self.mlp_norm(x)
        return x + self.down(functional.silu(self.gate(m)) * self.up(m))


class Llama(LanguageModel):
    """Predicts the next token, of at most ``context``. Trained and logged as :class:`LanguageModel` says.

    All matrices start normal with standard deviation 0.02, as in LLaMA's published configurations.

    Args:
        vocabulary: number of tokens.
        n_layer: transformer blocks.
        n_head: attention heads; divides ``n_embd`` into heads of even width.
        n_embd: width of the residual stream.
        hidden: width of the SwiGLU layer.
        context: longest sequence, in tokens.
        lr: see :class:`LanguageModel`, as for the rest.
        weight_decay: see there.
        betas: see there.
        warmup_steps: see there.
        max_steps: see there.

    Raises:
        ValueError: an argument out of range.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        vocabulary: int = 32000,
        n_layer: int = 8,
        n_head: int = 8,
        n_embd: int = 512,
        hidden: int = 1376,
        context: int = 256,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 1000,
        max_steps: int | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, betas, warmup_steps, max_steps)
        sizes = {"vocabulary": vocabulary, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "hidden": hidden}
        for name, value in {**sizes, "context": context}.items():
            check_int("Llama", name, value, 1)
        if n_embd % (2 * n_head):
            raise ValueError(f"Llama(n_head={n_head!r}): n_embd={n_embd} must be a multiple of 2 * n_head")
        self.save_hyperparameters()
        self.embedding = nn.Embedding(vocabulary, n_embd)
        self.layers = nn.ModuleList(LlamaBlock(n_embd, hidden, n_head) for _ in range(n_layer))
        self.norm = nn.RMSNorm(n_embd)
        self.head = nn.Linear(n_embd, vocabulary, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
        cos, sin = rotary(context, n_embd // n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token, shape (B, T, vocabulary), for tokens of shape (B, T)."""
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = self.embedding(tokens)
        for block in self.layers:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


register_family(Llama, Family("layers", before=("embedding",), after=("norm", "head")))
