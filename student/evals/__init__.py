"""What a trained backbone is worth. An evaluator's `run(model)` yields (name, value)."""

from .features import READOUTS, extract_features
from .knn import KNNEvaluator, knn_accuracy

__all__ = ["READOUTS", "KNNEvaluator", "extract_features", "knn_accuracy"]
