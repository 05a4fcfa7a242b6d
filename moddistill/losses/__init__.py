"""Loss functions: `(params, frozen, teacher, batch, rng) -> (scalar, {name: (sum, weight)})`.

The scalar is a mean over the micro-batch; `metrics["loss"]` carries its sum and weight, by which
micro-batches are combined, so that means over tokens are exact under gradient accumulation.
"""
