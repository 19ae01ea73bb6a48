"""What a trained student's CLS token attends to."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

# B batch, N patches, D width, H heads


@torch.no_grad()
def cls_attention(backbone: nn.Module, images: Tensor) -> Tensor | None:
    """float32 [B, N]: CLS to patches in the last block, mean over heads, all patches visible; None for a backbone without that.

    As a teacher's is stored: the softmax runs over all tokens, CLS too, so a row sums to less than 1.
    images: float [B, 3, H, W], normalised for the student.
    """
    if not isinstance(backbone, VisionTransformer) or not backbone.has_class_token:
        return None
    block = backbone.blocks[-1]
    if type(block) is not Block or type(block.attn) is not Attention:
        return None
    seen = []
    hook = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        backbone.forward_features(images)
    finally:
        hook.remove()
    attn = block.attn
    query, key, _ = attn.qkv(block.norm1(seen[0])).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, 1+N, .]
    query, key = attn.q_norm(query[:, :, :1]), attn.k_norm(key)
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # [B, H, 1, 1+N]
    return logits.float().softmax(-1).mean(1)[:, 0, backbone.num_prefix_tokens :]
