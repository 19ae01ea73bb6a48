"""What an encoder is worth: features of frozen ones and what is made of them, attention, and results on record."""

from .features import READOUTS, extract_features
from .frozen.knn import KNN, KNNEvaluator, knn_accuracy
from .frozen.linear import LinearProbe
from .frozen.logreg import LogisticRegression
from .frozen.retrieval import Retrieval
from .frozen.segment import Segment
from .subject import Subject, TeacherEncoder, TimmEncoder

__all__ = [
    "KNN",
    "READOUTS",
    "KNNEvaluator",
    "LinearProbe",
    "LogisticRegression",
    "Retrieval",
    "Segment",
    "Subject",
    "TeacherEncoder",
    "TimmEncoder",
    "extract_features",
    "knn_accuracy",
]
