"""The tiny model: its Hugging Face configuration, a fast decoder for training, and growth in depth.

All weights are in a plain `LlavaNextForConditionalGeneration`. `decode` computes the same decoder for many short questions
about one image, and can drop visual tokens as token reduction does.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from data import PINPOINTS, TILE, Layout
from shapes.questions import VOCABULARY
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "user:", "assistant:")
TOKENS: tuple[str, ...] = (*SPECIAL, *VOCABULARY)
TOKEN_ID = {token: index for index, token in enumerate(TOKENS)}
PAD, EOS, IMAGE = TOKEN_ID["<pad>"], TOKEN_ID["</s>"], TOKEN_ID["<image>"]
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def make_config(num_layers: int) -> LlavaNextConfig:
    """Returns the configuration of the model with a number of decoder layers."""
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=TILE,
        patch_size=8, hidden_act="gelu", projection_dim=128,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=128, intermediate_size=288, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-5, tie_word_embeddings=False,
        pad_token_id=PAD, bos_token_id=TOKEN_ID["<s>"], eos_token_id=EOS,
    )  # fmt: skip
    return LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_grid_pinpoints=PINPOINTS, image_seq_length=36,
        tie_word_embeddings=False,
    )  # fmt: skip


def make_model(num_layers: int) -> LlavaNextForConditionalGeneration:
    """Returns a newly initialised model; the head starts as a copy of the word embeddings."""
    model = LlavaNextForConditionalGeneration(make_config(num_layers))
    with torch.no_grad():
        nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.1)
        model.lm_head.weight.copy_(model.model.language_model.embed_tokens.weight)
        for name, weight in model.model.vision_tower.named_parameters():
            if weight.ndim == 2 and "position" not in name:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5 * 0.7)
        for layer in model.model.language_model.layers:
            _init_layer(layer)
    return model


def _init_layer(layer: nn.Module) -> None:
    """Initialises one decoder layer for depth 4 to 16."""
    for name, weight in layer.named_parameters():
        if weight.ndim == 2:
            gain = 0.25 if "o_proj" in name or "down_proj" in name else 1.0
            nn.init.normal_(weight, std=gain * weight.shape[1] ** -0.5)


def grow(
    model: LlavaNextForConditionalGeneration, places: list[int], num_layers: int
) -> LlavaNextForConditionalGeneration:
    """Returns a deeper model that computes the same function: old layer i moves to `places[i]`, new ones add zero."""
    deeper = make_model(num_layers)
    old = model.model.language_model.layers
    layers = deeper.model.language_model.layers
    state = {k: v for k, v in model.state_dict().items() if ".language_model.layers." not in k}
    deeper.load_state_dict(state, strict=False)
    with torch.no_grad():
        for index, layer in enumerate(layers):
            if index in places:
                layer.load_state_dict(old[places.index(index)].state_dict())
            else:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    return deeper


def normalize(tiles: Tensor) -> Tensor:
    """Returns `pixel_values` `[T, 3, 48, 48]` of uint8 tiles `[T, 48, 48, 3]`."""
    mean, std = (torch.tensor(v, device=tiles.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (tiles.permute(0, 3, 1, 2).float() / 255 - mean) / std


def tile_features(model: LlavaNextForConditionalGeneration, tiles: Tensor) -> Tensor:
    """Returns projected patches `[B, T * 36, D]` of uint8 tiles `[B, T, 48, 48, 3]`."""
    hidden = model.model.vision_tower(pixel_values=normalize(tiles.flatten(0, 1))).last_hidden_state[:, 1:]
    return model.model.multi_modal_projector(hidden).view(tiles.shape[0], -1, hidden.shape[-1])


def pack(model: LlavaNextForConditionalGeneration, features: Tensor, layout: Layout) -> Tensor:
    """Returns visual tokens `[B, N, D]`: patches in sequence order with the newline embedding after each row."""
    newline = model.model.image_newline.expand(features.shape[0], 1, -1)
    order = torch.tensor(layout.order, device=features.device)
    order = torch.where(order < 0, features.shape[1], order)
    return torch.cat([features, newline], 1)[:, order]


@dataclass
class Drop:
    """From layer `layer` on only the prefix rows `keep` `[B, K]` stay; positions become 0, 1, 2, ... again."""

    layer: int
    keep: Tensor


@dataclass
class Watch:
    """Collects attention `[B, heads, Q, T, P]` of the first heads of some layers over the prefix."""

    layers: tuple[int, ...]
    heads: int
    seen: list[Tensor]


def _rope(positions: Tensor, theta: float = 1e6, size: int = 32) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines `[S, 32]` of rotary positions."""
    inverse = theta ** (-torch.arange(0, size, 2, device=positions.device).float() / size)
    angles = torch.cat([positions[:, None] * inverse] * 2, -1)
    sign = torch.tensor([-1.0, 1.0], device=positions.device).repeat_interleave(size // 2)
    return angles.cos(), angles.sin() * sign


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Applies rotary positions to the last axis."""
    return torch.addcmul(x * rope[0], x.roll(x.shape[-1] // 2, -1), rope[1])


def decode(
    model: LlavaNextForConditionalGeneration,
    prefix: Tensor,
    question_ids: Tensor,
    *,
    drops: list[Drop] | None = None,
    watch: Watch | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns, after every layer, the hidden states of the questions `[B, Q, T, D]` and of the prefix `[B, P, D]`.

    Args:
        model: the model whose decoder layers are used.
        prefix: embeddings `[B, P, D]` of the text before the image and of the visual tokens.
        question_ids: `[B, Q, T]`, right-padded; each question attends to the prefix and to itself.
        drops: the dropped prefix rows.
        watch: collects the attention of some heads, for guidance.
    """
    B, Q, T = question_ids.shape
    question = model.model.language_model.embed_tokens(question_ids).flatten(1, 2)
    causal = torch.full((T, T), float("-inf"), device=prefix.device).triu(1)
    questions, prefixes = [], []
    ropes = _ropes(prefix.shape[1], Q, T, prefix.device)
    for index, layer in enumerate(model.model.language_model.layers):
        for drop in drops or []:
            if drop.layer == index:
                prefix = prefix.gather(1, drop.keep[..., None].expand(-1, -1, prefix.shape[-1]))
                ropes = _ropes(prefix.shape[1], Q, T, prefix.device)
        seen = watch if watch and index in watch.layers else None
        prefix, question = _layer(layer, prefix, question, (Q, T), ropes, causal, seen)
        questions.append(question.view(B, Q, T, -1))
        prefixes.append(prefix)
    return questions, prefixes


def _ropes(
    P: int, Q: int, T: int, device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns the rotary tables of P prefix rows and of Q questions of T rows after them."""
    ahead = torch.arange(P, device=device)
    return _rope(ahead), _rope((P + torch.arange(T, device=device)).repeat(Q))


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Returns the RMS norm of x."""
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _layer(
    layer: nn.Module, prefix: Tensor, question: Tensor, shape: tuple[int, int],
    ropes: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], causal: Tensor,
    watch: Watch | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns prefix and question rows after one decoder layer."""
    P = prefix.shape[1]
    hidden = torch.cat([prefix, question], 1)
    B, S, D = hidden.shape
    normed = _norm(layer.input_layernorm, hidden)
    attn = layer.self_attn
    rope = (torch.cat([ropes[0][0], ropes[1][0]]), torch.cat([ropes[0][1], ropes[1][1]]))
    qkv = F.linear(normed, torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]))
    q, k, v = qkv.view(B, S, 3, -1, 32).permute(2, 0, 3, 1, 4)
    q, k = _rotate(torch.stack([q, k]), rope)
    seen = F.scaled_dot_product_attention(q[:, :, :P], k[:, :, :P], v[:, :, :P], is_causal=True)
    asked = _attend_questions(q[:, :, P:], k, v, P, shape, causal, watch)
    mixed = torch.cat([seen, asked], 2).transpose(1, 2).reshape(B, S, D)
    hidden = hidden + attn.o_proj(mixed)
    normed = _norm(layer.post_attention_layernorm, hidden)
    mlp = layer.mlp
    hidden = hidden + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
    return hidden[:, :P], hidden[:, P:]


def _attend_questions(
    q: Tensor, k: Tensor, v: Tensor, P: int, shape: tuple[int, int], causal: Tensor,
    watch: Watch | None,
) -> Tensor:  # fmt: skip
    """Returns attention `[B, H, Q * T, E]` of question rows over the prefix and their own question."""
    (Q, T), (B, H, _, E) = shape, q.shape
    scale = E**-0.5
    far = (q @ k[:, :, :P].transpose(-1, -2)).view(B, H, Q, T, P)
    own = [x.reshape(B, H, Q, T, E) for x in (q, k[:, :, P:], v[:, :, P:])]
    near = own[0] @ own[1].transpose(-1, -2)
    weights = torch.cat([far * scale, near * scale + causal], -1).softmax(-1)
    if watch:
        watch.seen.append(weights[:, : watch.heads, ..., :P])
    far_out = (weights[..., :P].reshape(B, H, Q * T, P) @ v[:, :, :P]).view(B, H, Q, T, E)
    return (far_out + weights[..., P:] @ own[2]).view(B, H, Q * T, E)


def head_logits(model: LlavaNextForConditionalGeneration, hidden: Tensor) -> Tensor:
    """Returns next-token logits of hidden states, through the final norm and the head."""
    return model.lm_head(model.model.language_model.norm(hidden))


def clone(model: LlavaNextForConditionalGeneration) -> LlavaNextForConditionalGeneration:
    """Returns an independent copy."""
    return copy.deepcopy(model)
