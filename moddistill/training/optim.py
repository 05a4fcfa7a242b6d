"""AdamW with warm-up and cosine decay, over flat `{path: array}` parameters."""

import optax

from moddistill.config import OptimConfig
from moddistill.params import DECAYED_GROUPS, Flat, in_group


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear from 0 to `lr` over `warmup_ratio` of the steps, then a cosine to 0."""
    warmup = round(config.warmup_ratio * steps)
    # optax requires at least one step of decay, also for a run that is all warm-up.
    return optax.warmup_cosine_decay_schedule(0.0, config.lr, warmup, max(steps, warmup + 1))


def decay_mask(params: Flat) -> dict[str, bool]:
    """Mask of weight decay by path: true for matrices, but not for routers and positions."""
    return {path: in_group(path, *DECAYED_GROUPS) for path in params}


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
    # Clipping comes first: moments are those of clipped gradients, and weight decay is not clipped.
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
