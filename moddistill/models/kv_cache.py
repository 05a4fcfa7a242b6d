"""The key/value cache of decoding: an explicit pytree that each call takes and returns."""

import flax
import jax
from jaxtyping import Array, Int

KeyValues = dict[str, Array]  # key and value of one layer, each [B, S, K, H]


def write_slots(slots: Array, new: Array, start: Array) -> Array:
    """`slots` [B, S, ...] with `new` [B, T, ...] from slot `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), start, axis=1)


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens so far, for decoding.

    Attributes:
      layers: for every block of every segment, keys and values [repeats, B, S, K, H].
      segments: of the token in each slot; 0 in slots that are empty or hold padding.
      length: number of slots written; the next token's slot.
    """

    layers: list[list[KeyValues]]
    segments: Int[Array, "B S"]
    length: Int[Array, ""]

    def extend(self, segments: Int[Array, "B T"]) -> "KVCache":
        """The cache with the next T slots assigned to tokens of these segments."""
        slots = write_slots(self.segments, segments, self.length)
        return self.replace(segments=slots, length=self.length + segments.shape[1])
