"""The Wan family (diffusers WanTransformer3DModel): processor, token grid, where attention is."""

from collections.abc import Callable, Iterator

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gossamer.sparse.layout import TokenGrid
from gossamer.sparse.models.context import AttentionContext
from gossamer.sparse.sequence import SequenceParallel

MODEL = WanTransformer3DModel
PARTS = 8  # of the queries of a clip, in the backward of attention to the text
FEW = 8  # times as many queries as keys, from which they are split


def self_attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of each self-attention."""
    for name, module in model.named_modules():
        if name.endswith(".attn1"):
            yield name, module


def text_attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of each attention to text alone that diffusers' processor computes."""
    for name, module in model.named_modules():
        is_text = name.endswith(".attn2") and module.add_k_proj is None
        if is_text and type(module.processor) is WanAttnProcessor:
            yield name, module


def token_grid(model: nn.Module, kwargs: dict[str, Tensor]) -> TokenGrid:
    """Return the grid of the patchified latents [B, C, T, H, W]; Wan keeps text out of it."""
    *_, frames, height, width = kwargs["hidden_states"].shape
    t, h, w = model.config.patch_size  # type: ignore[misc]
    return TokenGrid(frames // t, height // h, width // w)


def share_tokens(model: nn.Module, sequence: SequenceParallel) -> list[RemovableHandle]:
    """Let the blocks work on this process's tokens; the model's input and output stay whole."""

    def cut_hidden(block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, text, timestep, rotary = args
        if timestep.ndim == 4:
            raise ValueError(
                "timestep: allowed is one for each sample with sequence_parallel above 1, not one "
                "for each token; set sequence_parallel=1"
            )
        return sequence.cut(hidden), text, timestep, rotary

    return [
        model.rope.register_forward_hook(lambda _, args, out: tuple(map(sequence.cut, out))),
        model.blocks[0].register_forward_pre_hook(cut_hidden),  # type: ignore[index]
        model.proj_out.register_forward_hook(lambda _, args, out: sequence.join(out)),
    ]


class Processor(nn.Module):
    """Computes q, k, v as Wan does (RMSNorm over all heads, interleaved RoPE), then attends."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, attention: nn.Module, context: AttentionContext) -> None:
        super().__init__()
        self.attention = attention
        self.__dict__["context"] = context  # shared by all layers, not a submodule

    def forward(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the layer's output [B, S, H * D] of hidden_states [B, S, H * D]."""
        if self._parallel_config is not None:
            raise ValueError(
                "parallel_config: diffusers' context parallelism does not work with gossamer's "
                "attention; do not call enable_parallelism"
            )
        if getattr(attn, "fused_projections", False):
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = (p(hidden_states) for p in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            turn = angles(*rotary_emb)
            query, key = rotate(query, *turn), rotate(key, *turn)
        query, key = query.type_as(value), key.type_as(value)  # under autocast the norms give fp32
        out = self.context.attend(self.attention, query, key, value)
        out = out.flatten(2).type_as(query)
        for layer in attn.to_out:
            out = layer(out)
        return out


class TextProcessor(WanAttnProcessor):
    """Attends to the text as diffusers does; where it trains on a GPU, its backward fills the GPU.

    cuDNN divides that by keys: 512 give 48 programs for the 132 multiprocessors of an H100. So the
    queries of a clip become a few clips', whose text is the same.
    """

    def __init__(self, stock: WanAttnProcessor) -> None:
        super().__init__()
        self._attention_backend = stock._attention_backend  # the user may have chosen one

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the layer's output [B, S, H * D] of hidden_states [B, S, H * D]."""
        text = encoder_hidden_states
        query = attn.norm_q(attn.to_q(hidden_states))
        if getattr(attn, "fused_projections", False):
            key, value = attn.to_kv(text).chunk(2, dim=-1)
        else:
            key, value = attn.to_k(text), attn.to_v(text)
        key = attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            backend = self._attention_backend
            out: Tensor = dispatch_attention_fn(q, k, v, attn_mask=attention_mask, backend=backend)
            return out

        trains = torch.is_grad_enabled() and query.is_cuda and attention_mask is None
        out = in_parts(attend, query, key, value) if trains else attend(query, key, value)
        out = out.flatten(2).type_as(query)
        for layer in attn.to_out:
            out = layer(out)
        return out


def in_parts(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Return attend(q, k, v) [B, S, H, D] of q with up to PARTS times as many shorter clips.

    No copy of q: a part is a view. Few queries, and a number of them that no such number divides,
    stay whole.
    """
    tokens = q.shape[1]
    parts = next(n for n in range(PARTS, 0, -1) if tokens % n == 0)
    if parts == 1 or tokens < FEW * k.shape[1]:
        return attend(q, k, v)
    q = q.unflatten(1, (parts, -1)).flatten(0, 1)
    k, v = (x.repeat_interleave(parts, 0) for x in (k, v))
    return attend(q, k, v).unflatten(0, (-1, parts)).flatten(1, 2)


def angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin of each pair, as `rotate` takes them, of cos, sin [1, S, 1, D]."""
    sin = sin[..., 1::2]
    return cos[..., 0::2, None], torch.stack((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x [B, S, H, D] by `angles`: [1, S, 1, D / 2, 1 or 2].

    In whole pairs, without strided writes: one pass where it is compiled, forward and backward.
    """
    pairs = x.unflatten(-1, (-1, 2))
    return (pairs * cos + pairs.flip(-1) * sin).flatten(-2).type_as(x)
