"""A function of chosen positions in chunks, against the function of all positions at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import MeshConfig
from moddistill.distributed.sharding import make_mesh
from moddistill.models.chunks import map_chunks

POSITIONS, WIDTH, VOCAB = 64, 4, 9


def arrays(share):
    rng = np.random.default_rng(0)
    hidden, head = (
        rng.normal(size=shape).astype(np.float32) for shape in ((POSITIONS, WIDTH), (VOCAB, WIDTH))
    )
    return rng.random(POSITIONS) < share, hidden, head


def values_of(hidden, head):
    """Arrays of several shapes and dtypes, none of them zero at a position of zeros."""
    logits = hidden @ head.T
    return {"best": jnp.argmax(logits, axis=1) + 1, "probs": jax.nn.softmax(logits)}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, tensor=4)], ids=["1", "2x4"])
def test_chosen_positions_have_their_values_and_all_others_zeros(share, chunk, mesh):
    chosen, hidden, head = arrays(share)

    @jax.jit
    def run(chosen, hidden, head):
        return map_chunks(values_of, chosen, hidden, head, chunk_size=chunk)

    if mesh is None:
        found = run(chosen, hidden, head)
    else:
        with jax.set_mesh(make_mesh(mesh)):
            found = jax.device_get(run(chosen, hidden, head))
    expected = values_of(hidden, head)
    np.testing.assert_array_equal(found["best"], np.where(chosen, expected["best"], 0))
    probs = np.where(chosen[:, None], expected["probs"], 0)
    np.testing.assert_allclose(found["probs"], probs, atol=1e-6)
