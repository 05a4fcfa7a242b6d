"""From vision features to decoder width: LLaVA's `linear` and `mlpNx_gelu`."""

import re

from flax import linen as nn
from jaxtyping import Array, Float

from moddistill.errors import invalid
from moddistill.models.layers import DType, Linear, exact_gelu


def projector_depth(kind: str) -> int:
    """Number of linear layers of a projector kind; UserError for an unknown one."""
    if kind == "linear":
        return 1
    match = re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind)
    if not match:
        raise invalid("projector", kind, "'linear' or 'mlpNx_gelu', such as 'mlp2x_gelu'")
    return int(match[1])


class Projector(nn.Module):
    """Linear layers with exact GELU between them, biases everywhere."""

    kind: str
    hidden_size: int
    dtype: DType

    @nn.compact
    def __call__(self, features: Float[Array, "U X W"]) -> Float[Array, "U X D"]:
        x = features
        for i in range(projector_depth(self.kind)):
            x = exact_gelu(x) if i else x
            axes = ("mlp",) if i else ("vision",)
            linear = Linear(
                features=(self.hidden_size,),
                inputs=axes,
                outputs=("embed",),
                use_bias=True,
                dtype=self.dtype,
                name=f"linear_{i}",
            )
            x = linear(x)
        return x
