"""What an extraction needs: the teacher, the records as it reads them, and the cache's settings."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from moddistill.config import CacheConfig, DataConfig, TrainConfig
from moddistill.convert.resolve import ResolvedModel, resolve
from moddistill.data.rows import RowSpec
from moddistill.data.sources import Source
from moddistill.data.token_texts import TokenTexts, texts_in_template
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.errors import at_field, invalid
from moddistill.models.compute import ComputeConfig
from moddistill.models.vlm import Vlm
from moddistill.models.vocabulary import IdRanges, num_ids
from moddistill.teachers.cache import (
    CacheSettings,
    TeacherIdentity,
    fingerprint_of,
)
from moddistill.teachers.entries import EntryFormat
from moddistill.training.provenance import model_fingerprint
from moddistill.training.stages import is_cached, stage_of
from moddistill.training.streams import HELDOUT, open_and_list, row_spec
from moddistill.training.validation import (
    check_batch_divides_mesh,
    check_cached_positions,
    check_settings,
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """An extraction.

    Attributes:
      texts: of the teacher's tokens.
      names: of the sources.
      rows: of a batch.
    """

    texts: TokenTexts
    settings: CacheSettings
    names: Sequence[str]
    sources: Sequence[Source]
    rows: int

    def record_number(self, source: int, record: int) -> int:
        """Returns a number of a usable record that no other one of any source has."""
        return sum(each.total for each in self.sources[:source]) + record


@dataclasses.dataclass(frozen=True)
class JaxSetup(Setup):
    """An extraction by a teacher in JAX.

    Attributes:
      spec: format of the rows that the teacher reads.
      teacher: its model folder; None for new weights.
    """

    model: Vlm
    tokenizer: Tokenizer
    spec: RowSpec
    teacher: Path | None


def prepare(config: TrainConfig, cache: CacheConfig, mesh: Mesh, folder: Path) -> JaxSetup:
    """Resolves the teacher and opens the records; problems of these are listed in the folder.

    Raises:
      UserError: naming the setting of a teacher or records that do not fit.
    """
    check_settings(config)
    check_stage(config)
    check_batch_divides_mesh(config, mesh)
    teacher, tokenizer = _teacher(config)
    architecture = teacher.config
    if teacher.folder is None:  # new weights have no template of their own
        architecture = dataclasses.replace(architecture, template=config.data.template)
    entries = entry_format(config, cache, architecture.decoder.real_ids)
    data = dataclasses.replace(config.data, template=architecture.template)
    spec = row_spec(config, data, architecture.vision)
    names, opened = open_records(config, data, spec, tokenizer, folder)
    identity = TeacherIdentity(
        config.teacher,
        _digest(config, teacher),
        tokenizer.digest,
        architecture.template,
        {"size": spec.image_size, "tokens": spec.image_tokens, **dataclasses.asdict(spec.images)},
        f"{config.dtype}, quantization {config.teacher_quantization}",
    )
    fingerprint = fingerprint_of(config, spec.kind, dict(zip(names, opened, strict=True)))
    texts = texts_in_template(tokenizer, architecture.template)
    compute = ComputeConfig(
        dtype=jnp.dtype(config.dtype),
        one_segment=not config.data.packing,
        unroll=not config.scan,
        expert_transport=config.expert_transport,
        quantized_layers=config.teacher_quantization != "none" or config.teacher_offload,
    )
    return JaxSetup(
        texts=texts,
        settings=CacheSettings(entries, config.seed, identity, fingerprint),
        names=names,
        sources=opened,
        rows=config.batch_size // config.grad_accum_steps,
        model=Vlm(architecture, compute),
        tokenizer=tokenizer,
        spec=spec,
        teacher=teacher.folder,
    )


def open_records(
    config: TrainConfig, data: DataConfig, spec: RowSpec, tokenizer: Tokenizer, folder: Path
) -> tuple[list[str], list[Source]]:
    """Returns the names of the sources of a run, and these; held-out records are the last one."""
    names = sorted(data.sources)
    opened = open_and_list(data, spec, tokenizer, folder, "config.data.sources")
    if config.heldout_steps:
        names.append(HELDOUT)
        heldout = dataclasses.replace(data, sources={HELDOUT: data.heldout})
        opened += open_and_list(heldout, spec, tokenizer, folder, "config.data")
    return names, opened


def _digest(config: TrainConfig, teacher: ResolvedModel) -> str:
    if teacher.folder is None:
        return f"new weights of seed {config.seed}"
    return model_fingerprint(teacher.folder, teacher.config)


def check_stage(config: TrainConfig) -> None:
    """Raises UserError for a stage that a cache cannot serve."""
    if not stage_of(config).teacher:
        raise invalid("config.stage", config.stage, "a stage with a teacher: d2d, d2s, preference")
    if is_cached(config):
        raise invalid("config.teacher", config.teacher, "a model, whose predictions are extracted")
    check_cached_positions(config)
    if config.heldout_steps and HELDOUT in config.data.sources:
        expected = f"other names than {HELDOUT!r}, that of data.heldout in a cache"
        raise invalid("config.data.sources", sorted(config.data.sources), expected)


def _teacher(config: TrainConfig) -> tuple[ResolvedModel, Tokenizer]:
    """The teacher with the tokenizer of its folder, or that of the config for new weights."""
    with at_field("config.teacher"):
        teacher = resolve(config.teacher)
        if teacher.folder is not None:
            return teacher, load_tokenizer(str(teacher.folder))
    if not config.tokenizer:
        expected = f"a tokenizer folder, since the teacher is {config.teacher!r}"
        raise invalid("config.tokenizer", config.tokenizer, expected)
    tokenizer = load_tokenizer(config.tokenizer)
    return resolve(config.teacher, tokenizer), tokenizer


def entry_format(config: TrainConfig, cache: CacheConfig, real_ids: IdRanges) -> EntryFormat:
    """Returns how entries are written; UserError for more ids than the teacher has."""
    if stage_of(config).records == "preference":
        return EntryFormat("answers", 0, real_ids)
    if cache.kind == "top_k" and cache.ids > num_ids(real_ids):
        raise invalid(
            "ids of the cache", cache.ids, f"<= {num_ids(real_ids)}, the ids of the teacher"
        )
    return EntryFormat(cache.kind, cache.ids, real_ids)
