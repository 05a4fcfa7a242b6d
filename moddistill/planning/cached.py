"""The teacher of an existing cache, for a plan."""

from pathlib import Path

from moddistill.config import TrainConfig
from moddistill.errors import at_field
from moddistill.models.batch import CacheShape
from moddistill.models.vlm import ModelConfig
from moddistill.teachers.cache import CACHED, read_settings
from moddistill.teachers.cached import CachedTeacher
from moddistill.training.stages import is_cached


def cached_teacher(config: TrainConfig, student: ModelConfig) -> CachedTeacher | None:
    """Returns the teacher of an existing cache, if the config names one."""
    shape = cache_shape(config)
    return CachedTeacher(shape.kind, student.decoder.real_ids) if shape else None


def cache_shape(config: TrainConfig) -> CacheShape | None:
    """Returns what the cache of a config has of a token, also before the cache is complete."""
    if not is_cached(config):
        return None
    with at_field("config.teacher"):
        entries = read_settings(Path(config.teacher.removeprefix(CACHED))).format
    return CacheShape(entries.kind, entries.ids)
