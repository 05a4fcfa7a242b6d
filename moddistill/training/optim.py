"""AdamW with warm-up and cosine decay, over flat `{path: array}` parameters."""

import optax

from moddistill.config import OptimConfig
from moddistill.params import Flat

# Matrices are decayed; biases, norm scales, routers and position tables are not.
_DECAYED = ("kernel", "embedding", "head", "experts_gate", "experts_up", "experts_down")


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear from 0 to `lr` over `warmup_ratio` of the steps, then a cosine to 0."""
    warmup = round(config.warmup_ratio * steps)
    return optax.warmup_cosine_decay_schedule(0.0, config.lr, warmup, max(steps, warmup + 1))


def decay_mask(params: Flat) -> dict[str, bool]:
    """Which parameters weight decay applies to."""
    return {path: path.split("/")[-1] in _DECAYED for path in params}


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm (none for `clip_norm` 0), then AdamW."""
    adamw = optax.adamw(
        schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
