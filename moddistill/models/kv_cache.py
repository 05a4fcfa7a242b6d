"""The key/value cache of decoding: an explicit pytree that each call takes and returns."""

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

KeyValues = dict[str, Array]  # key and value of one layer, each [B, S, K, H]


def write_slots(slots: Array, new: Array, start: Int[Array, "B"]) -> Array:
    """`slots` [B, S, ...] with `new` [B, T, ...] from each row's slot `start` on."""
    return jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))(
        slots, new.astype(slots.dtype), start, 0
    )


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens so far, for decoding.

    Attributes:
      layers: for every block of every segment, keys and values [repeats, B, S, K, H].
      segments: of the token in each slot; 0 in slots that are empty or hold padding.
      length: number of each row's tokens; the next one's slot. Padding on the right of a prompt is
        overwritten by the tokens that follow, so that rows have no gaps.
    """

    layers: list[list[KeyValues]]
    segments: Int[Array, "B S"]
    length: Int[Array, "B"]

    def extend(self, segments: Int[Array, "B T"]) -> "KVCache":
        """The cache with each row's next T slots assigned to tokens of these segments."""
        slots = write_slots(self.segments, segments, self.length)
        count = jnp.sum(segments > 0, axis=1, dtype=jnp.int32)
        return self.replace(segments=slots, length=self.length + count)
