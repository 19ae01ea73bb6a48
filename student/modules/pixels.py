"""What the pixels of a student are normalised by."""

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of RGB in 0..1: as in all six methods' pre-training."""

PIXELS = {"mean": list(PIXEL_MEAN), "std": list(PIXEL_STD)}
"""The same as a run's records have it."""
