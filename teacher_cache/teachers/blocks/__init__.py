"""What kinds of ViT there are: how their attention is recomputed, how they know positions, which norm is last."""
