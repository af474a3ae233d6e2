"""How much error each source brings to each part of a model: expected, of its weights, or of the model's output."""

from .nominal import nominal_sensitivity
from .table import Measure, Sensitivity, read_sensitivity, write_sensitivity

__all__ = ["Measure", "Sensitivity", "nominal_sensitivity", "read_sensitivity", "write_sensitivity"]
