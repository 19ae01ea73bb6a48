"""From visible tokens to a token for every patch: MAE's decoder, MILAN's prompting decoder, CAE v2's latent regressor.

The three differ in who may look at whom, and in who is updated:

    style      queries                 keys and values                      updated      positions
    self       CLS, visible, hidden    CLS, visible, hidden                 all          added once, before the first block
    prompting  hidden                  CLS, visible as they came; hidden    hidden       added once, before the first block
    regressor  hidden                  visible as they came; hidden         hidden       added to queries and keys, in every block

"hidden" are the patches the encoder did not see: a learned mask token each. Every style ends with one LayerNorm over all tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..batch import Mask, take
from ..config import PredictorConfig
from .initial_weights import init_linear_and_norm, init_narrow
from .positions import sincos_positions

# B batch, N patches, C 1 with CLS else 0, D width of the predictor

NORM_EPS = 1e-6


class Predictor(nn.Module):
    """Predicted tokens for all patches of a grid, from an encoder of width `encoder_dim`. Depth 0 is allowed: no blocks at all.

    From a checkpoint of the public code, MAE (models_mae.py) and MILAN (models_milan.py):

        decoder_embed, mask_token, decoder_blocks.I, decoder_norm   ->   embed, mask_token, blocks.I, norm
        decoder_pos_embed                                           ->   none: rebuilt; its row of zeros for CLS is left out
        decoder_pred                                                ->   the objective's `head`

    and CAE v2 (models/modeling_cae.py):

        encoder_to_regresser, encoder_to_regresser_norm             ->   embed, embed_norm (only where the widths differ)
        mask_token, regresser.regressor_blocks.I                    ->   mask_token, blocks.I
        rd_pos_embed                                                ->   none: rebuilt
        regresser.norm                                              ->   none: CAE v2 does not use it
        decoder.norm, decoder.head                                  ->   norm, the objective's `head`

    Inside blocks.I names are the public ones, but for those that `RegressorBlock` lists.
    """

    def __init__(self, config: PredictorConfig, encoder_dim: int, grid: tuple[int, int]):
        super().__init__()
        self.style = config.style
        regressor = config.style == "regressor"

        # CAE v2 has its bridge only for ViT-T, whose regressor is narrower (modeling_cae.py:130-133); visible tokens and CLS go
        # through it as well.
        bridged = not regressor or encoder_dim != config.dim
        self.embed = nn.Linear(encoder_dim, config.dim) if bridged else nn.Identity()
        self.embed_norm = nn.LayerNorm(config.dim, eps=NORM_EPS) if bridged and regressor else nn.Identity()

        self.mask_token = nn.Parameter(torch.empty(1, 1, config.dim))
        positions = sincos_positions(config.dim, grid, "moco" if regressor else "mae")
        self.register_buffer("positions", positions[1:], persistent=False)  # [N, D]: that of CLS is zero

        drop_path = [config.drop_path * block / max(config.depth - 1, 1) for block in range(config.depth)]
        self.blocks = nn.ModuleList([_BLOCKS[config.style](config, rate) for rate in drop_path])
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)

        init_linear_and_norm(self)
        if regressor:
            init_narrow(self.mask_token)
        else:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, mask: Mask) -> Tensor:
        """Tokens [B, C+N, D], CLS first and patches row by row, from the encoder's [B, C+n_keep, encoder width]."""
        tokens = self.embed_norm(self.embed(tokens))  # [B, C+n_keep, D]
        cls, visible = tokens.tensor_split([tokens.shape[1] - mask.keep.shape[1]], dim=1)
        hidden = self.mask_token.expand(*mask.drop.shape, -1)  # [B, n_drop, D]
        at_visible, at_hidden = self.positions[mask.keep], self.positions[mask.drop]

        if self.style == "regressor":
            for block in self.blocks:
                hidden = block(hidden, visible, at_hidden, at_visible)
        else:
            visible, hidden = visible + at_visible, hidden + at_hidden
            known = torch.cat([cls, visible], dim=1)
            if self.style == "prompting":
                for block in self.blocks:
                    hidden = block(hidden, known)
            else:
                mixed = torch.cat([known, hidden], dim=1)
                for block in self.blocks:
                    mixed = block(mixed)
                cls, visible, hidden = mixed.tensor_split([cls.shape[1], known.shape[1]], dim=1)

        patches = take(torch.cat([visible, hidden], dim=1), mask.restore)  # [B, N, D]
        return self.norm(torch.cat([cls, patches], dim=1))


def _self_block(config: PredictorConfig, drop_path: float) -> Block:
    """timm's pre-norm block, whose queries, keys and values are one Linear."""
    layer_scale = config.layer_scale
    return Block(config.dim, config.heads, config.mlp_ratio, qkv_bias=True, init_values=layer_scale, drop_path=drop_path)


class _Block(nn.Module):
    """What the blocks with prompts share: the factors and the random dropping of their two branches, and the MLP."""

    def __init__(self, config: PredictorConfig, drop_path: float):
        super().__init__()
        scaled = config.layer_scale is not None
        self.ls1 = LayerScale(config.dim, config.layer_scale) if scaled else nn.Identity()
        self.ls2 = LayerScale(config.dim, config.layer_scale) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.mlp = Mlp(config.dim, int(config.dim * config.mlp_ratio))
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)


class PromptingBlock(_Block):
    """Hidden tokens look at the prompts, which no norm touches, and at each other (MILAN models_milan.py:15-74).

    The paper's equation 2 puts prompts into keys and values as they are; with several heads only the code's reading
    works: prompts, too, go through the Linear of keys and values.
    """

    def __init__(self, config: PredictorConfig, drop_path: float):
        super().__init__(config, drop_path)
        self.norm1 = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.attn = PromptingAttention(config.dim, config.heads)

    def forward(self, hidden: Tensor, prompts: Tensor) -> Tensor:
        """hidden: [B, n_drop, D]; prompts: [B, C+n_keep, D], the same for every block."""
        normed = self.norm1(hidden)
        mixed = self.attn(normed, torch.cat([prompts, normed], dim=1))
        hidden = hidden + self.drop_path1(self.ls1(mixed))
        return hidden + self.drop_path2(self.ls2(self.mlp(self.norm2(hidden))))


class RegressorBlock(_Block):
    """Hidden tokens look at visible ones and at each other; positions come with each look (CAE modeling_cae_helper.py:156-186).

    The second norm is not a branch's: what it gives replaces the stream. The public names norm2_cross, cross_attn, mlp_cross are
    norm2, attn, mlp here; cross_attn.q_bias and .v_bias are attn.q.bias and attn.v.bias; gamma_1_cross and gamma_2_cross are
    ls1.gamma and ls2.gamma.
    """

    def __init__(self, config: PredictorConfig, drop_path: float):
        super().__init__(config, drop_path)
        self.norm1_q = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.norm1_k = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.norm1_v = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.attn = RegressorAttention(config.dim, config.heads)

    def forward(self, hidden: Tensor, visible: Tensor, at_hidden: Tensor, at_visible: Tensor) -> Tensor:
        """hidden: [B, n_drop, D]; visible: [B, n_keep, D], the same for every block; at_*: the positions of both."""
        context = torch.cat([visible, hidden], dim=1)
        at_context = torch.cat([at_visible, at_hidden], dim=1)
        mixed = self.attn(self.norm1_q(hidden + at_hidden), self.norm1_k(context + at_context), self.norm1_v(context))
        hidden = self.norm2(hidden + self.drop_path1(self.ls1(mixed)))
        return hidden + self.drop_path2(self.ls2(self.mlp(hidden)))


class PromptingAttention(nn.Module):
    """Keys and values from one Linear of the same tokens."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)  # one Linear: its initial bound depends on its height
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        """[B, n, D] for queries [B, n, D] and what they look at, [B, m, D]."""
        k, v = self.kv(context).chunk(2, dim=-1)
        return self.proj(_attend(self.q(query), k, v, self.heads))


class RegressorAttention(nn.Module):
    """Queries, keys and values of three different tensors; no bias for keys (modeling_cae_helper.py:72-80)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, n, D] for queries [B, n, D], keys and values [B, m, D]."""
        return self.proj(_attend(self.q(query), self.k(key), self.v(value), self.heads))


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k / sqrt(D / heads)) v, head by head: [B, n, D] from [B, n, D] and twice [B, m, D]."""
    q, k, v = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (q, k, v))  # [B, heads, tokens, D / heads]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


_BLOCKS = {"self": _self_block, "prompting": PromptingBlock, "regressor": RegressorBlock}
