"""Two servers on one text: what each predicts, how far apart they are, how fast, how large."""

from .report import compare_predictions
from .server import Predictions, Server

__all__ = ["Predictions", "Server", "compare_predictions"]
