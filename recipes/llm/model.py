"""A small decoder-only transformer on bytes: rotary positions, RMSNorm, SwiGLU, no biases."""

from __future__ import annotations

import math
from functools import partial

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional

from lightning_dopt._checks import check_float, check_int
from lightning_dopt.pipeline import Family, register_family

VOCABULARY = 256


def rotary(context: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embedding, each of shape (context, width / 2).

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, equation 15.
    """
    frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(context)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs ``(x[i], x[i + width / 2])`` of every head by the angle of their position; shape (B, H, T, W)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.out = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """From (B, T, C) to (B, T, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, dropout_p=dropout, is_causal=True
        )
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a SwiGLU layer (Shazeer, 2020), each behind an RMSNorm and a residual."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        hidden = 8 * n_embd // 3 // 16 * 16  # three matrices of this size weigh as much as two of 4 n_embd
        self.attention_norm, self.mlp_norm = nn.RMSNorm(n_embd), nn.RMSNorm(n_embd)
        self.attention = Attention(n_embd, n_head, dropout)
        self.up = nn.Linear(n_embd, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, n_embd, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """From (B, T, C) to (B, T, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        gate, value = self.up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.dropout(self.down(functional.silu(gate) * value))


def warmup_cosine(step: int, warmup_steps: int, max_steps: float) -> float:
    """Factor on the learning rate: linear to 1 over ``warmup_steps``, half a cosine down to 0.1 at ``max_steps``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1.0, max_steps - warmup_steps))
    return 0.55 + 0.45 * math.cos(math.pi * progress)


class LanguageModel(LightningModule):
    """What is the same for all models here: the loss of a batch, what is logged, the optimizer and its schedule.

    A batch is an integer tensor of shape (batch, length + 1). Logs ``train/loss`` (nats per token, every step) and, averaged
    over workers, ``val/loss``. Trains with AdamW; weight decay acts on matrices only, not on norms.

    Args:
        lr: peak learning rate.
        weight_decay: decoupled decay of the matrices.
        betas: AdamW's averaging coefficients.
        warmup_steps: optimizer steps of linear warm-up.
        max_steps: optimizer step at which the cosine ends; ``None`` asks the Trainer for the length of the training.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self, lr: float, weight_decay: float, betas: tuple[float, float], warmup_steps: int, max_steps: int | None
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_int(owner, "warmup_steps", warmup_steps, 0)
        check_float(owner, "lr", lr, 0.0, open_low=True)
        check_float(owner, "weight_decay", weight_decay, 0.0)
        if max_steps is not None:
            check_int(owner, "max_steps", max_steps, 1)
        self.lr, self.weight_decay, self.betas = lr, weight_decay, betas
        self.warmup_steps, self.max_steps = warmup_steps, max_steps

    def _loss(self, batch: Tensor) -> Tensor:
        tokens = batch.long()
        return functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean loss of one batch, in nats per token."""
        loss = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Log the loss of one batch, averaged over batches and workers."""
        loss = self._loss(batch)
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW in two groups (matrices with decay, vectors without) and a schedule that moves every step."""
        weights = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in weights if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)
        steps = self.trainer.estimated_stepping_batches if self.max_steps is None else self.max_steps
        factor = partial(warmup_cosine, warmup_steps=self.warmup_steps, max_steps=steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ByteGPT(LanguageModel):
    """Predicts the next byte. A batch is an integer tensor of shape (batch, length + 1), with ``length <= context``.

    Logs ``train/loss`` (nats per byte, every step) and, averaged over workers, ``val/loss`` and ``val/bpb`` (bits per
    byte, ``loss / ln 2``). Trains with AdamW; weight decay acts on matrices only, not on norms.

    Args:
        n_layer: transformer blocks.
        n_head: attention heads; divides ``n_embd`` into heads of even width.
        n_embd: width of the residual stream, at least 16.
        context: longest sequence the model sees, in bytes.
        dropout: on attention weights and on both residual branches.
        lr: peak learning rate.
        weight_decay: decoupled decay of the matrices.
        betas: AdamW's averaging coefficients.
        warmup_steps: optimizer steps of linear warm-up.
        max_steps: optimizer step at which the cosine ends; ``None`` asks the Trainer for the length of the training.
        tie_weights: share one matrix between embedding and output.

    Raises:
        ValueError: an argument out of range.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 256,
        context: int = 128,
        dropout: float = 0.0,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 20,
        max_steps: int | None = None,
        tie_weights: bool = True,
    ) -> None:
        super().__init__(lr, weight_decay, betas, warmup_steps, max_steps)
        for name, value, least in (("n_layer", n_layer, 1), ("n_head", n_head, 1), ("n_embd", n_embd, 16)):
            check_int("ByteGPT", name, value, least)
        check_int("ByteGPT", "context", context, 1)
        check_float("ByteGPT", "dropout", dropout, 0.0, 1.0, open_high=True)
        if n_embd % (2 * n_head):
            raise ValueError(f"ByteGPT(n_head={n_head!r}): n_embd={n_embd} must be a multiple of 2 * n_head")
        self.save_hyperparameters()
        self.context = context
        self.embedding = nn.Embedding(VOCABULARY, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout) for _ in range(n_layer))
        self.norm = nn.RMSNorm(n_embd)
        self.head = nn.Linear(n_embd, VOCABULARY, bias=False)
        self._initialize(n_layer)
        if tie_weights:
            self.head.weight = self.embedding.weight
        cos, sin = rotary(context, n_embd // n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _initialize(self, n_layer: int) -> None:
        """Normal(0, 0.02); layers that write into the residual stream smaller, so that depth does not add variance."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * n_layer) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next byte, shape (B, T, 256), for bytes of shape (B, T)."""
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Log the loss of one batch, averaged over batches and workers."""
        loss = super().validation_step(batch, batch_idx)
        self.log("val/bpb", loss / math.log(2), sync_dist=True)
        return loss

    @torch.no_grad()
    def generate(self, prompt: bytes, length: int, temperature: float = 0.8, seed: int = 0) -> bytes:
        """``prompt`` and ``length`` bytes more, sampled from the model; the same bytes for the same seed.

        Args:
            prompt: at least one byte.
            length: bytes to add.
            temperature: divides the logits; 0 takes the likeliest byte.
            seed: of a private generator.

        Raises:
            ValueError: an empty prompt, or a negative length or temperature.
        """
        if not prompt:
            raise ValueError("ByteGPT.generate(prompt=b''): must hold at least one byte")
        check_int("ByteGPT.generate", "length", length, 0)
        check_float("ByteGPT.generate", "temperature", temperature, 0.0)
        generator = torch.Generator().manual_seed(seed)
        was_training = self.training
        self.eval()
        text = bytearray(prompt)
        for _ in range(length):
            window = torch.tensor(list(text[-self.context :]), device=self.device)[None]
            logits = self(window)[0, -1].float().cpu()
            if temperature == 0:
                text.append(int(logits.argmax()))
            else:
                chances = torch.softmax(logits / temperature, 0)
                text.append(int(torch.multinomial(chances, 1, generator=generator)))
        self.train(was_training)
        return bytes(text)


register_family(ByteGPT, Family("blocks", before=("embedding",), after=("norm", "head")))
