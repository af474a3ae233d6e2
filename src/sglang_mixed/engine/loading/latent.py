"""Multi-head latent attention: SGLang multiplies by the two halves of kv_b_proj directly, in 16 bits.

Its models derive the halves from `kv_b_proj.weight` when their `load_weights` has seen it. A compressed kv_b_proj has
no such weight: it is decoded one layer at a time for the model's own `post_load_weights`, and let go again.
"""

from __future__ import annotations

from typing import Any

from .intake import Intake


def derive_latent_weights(model: Any) -> int:
    """Let a model derive what it keeps beside kv_b_proj; returns the bytes of that, which are no planned weights."""
    derived = 0
    for name, attention in model.named_modules():
        projection: Any = getattr(attention, "kv_b_proj", None)
        intake = getattr(getattr(projection, "quant_method", None), "intake", None)
        if not isinstance(intake, Intake) or not hasattr(attention, "w_kc"):
            continue
        (weight,) = intake.weights
        stand_in = projection.weight
        projection.weight = weight.dequantize(stand_in.dtype)
        model.post_load_weights(weight_names=[f"{name}.kv_b_proj.weight"])
        projection.weight = stand_in
        derived += sum(half.untyped_storage().nbytes() for half in (attention.w_kc, attention.w_vc))
    return derived
