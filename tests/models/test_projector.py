import math

import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.models.projector import Projector, projector_depth
from tests.models import draw


@pytest.mark.parametrize(
    ("kind", "depth"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp12x_gelu", 12)]
)
def test_a_kind_names_its_number_of_layers(kind, depth):
    assert projector_depth(kind) == depth


@pytest.mark.parametrize("kind", ["", "mlp", "mlp0x_gelu", "mlp2x_relu", "mlp2x_gelu2", "Linear"])
def test_an_unknown_kind_is_named_with_what_is_accepted(kind):
    with pytest.raises(ValueError, match=f"'linear' or 'mlpNx_gelu', .*, got '{kind}'"):
        projector_depth(kind)


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"])
def test_exact_gelu_follows_every_layer_but_the_last(kind):
    features = draw.normal(2, 3, 5)
    projector = Projector(kind, 7, jnp.float32)
    params = draw.params(projector, features)
    x = np.asarray(features, np.float64)
    for i in range(projector_depth(kind)):
        if i:
            x = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
        x = x @ np.asarray(params[f"linear_{i}"]["kernel"]) + np.asarray(
            params[f"linear_{i}"]["bias"]
        )
    assert len(params) == projector_depth(kind)
    np.testing.assert_allclose(projector.apply({"params": params}, features), x, atol=1e-5)
