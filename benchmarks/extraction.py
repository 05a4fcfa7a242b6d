"""An extraction with a teacher in JAX, against a plain loop in `transformers` with all logits.

    python -m benchmarks.extraction [--rounds 5] [--json]

- Teacher: CLIP's shape at 336 px with 6 layers of 256, projector, and a Qwen2 with 8 layers of
  1,024 and Qwen's vocabulary of 151,936; float32, the same weights on both sides.
- Records: 32 conversations of LLaVA's lengths (`benchmarks.data_texts`) about an image of 576
  positions, in Qwen's real tokens. The 64 most probable ids of each supervised token are kept.

A timed run of moddistill is a whole `extract`: opening and packing records, decoding images,
loading the teacher, one row of 2,048 tokens at a time, the files of the cache. The loop in
`transformers` has loaded its model and finds tokens and pixels in memory. It reads 8 records at a
time, padded to the longest, takes the log-softmax of all logits and keeps the same numbers.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import head_to_head, models

RECORDS, BATCH, IDS = 32, 8, 64
LENGTH = 2048
VOCABULARY, IMAGE = 151_936, 151_646


def architecture(real_ids: Any) -> Any:
    from moddistill.models.decoder import DecoderConfig
    from moddistill.models.vlm import ModelConfig

    tower = models.small_tower(336)
    decoder = DecoderConfig(VOCABULARY, real_ids, 1024, 2816, 8, 16, 4, 64)
    return ModelConfig(decoder, tower, "mlp2x_gelu", "chatml", IMAGE)


def train_config(folder: Path) -> Any:
    from moddistill.config import DataConfig, SourceConfig, TrainConfig

    source = SourceConfig(path=str(folder / "records.json"), images=str(folder / "images"))
    return TrainConfig(
        stage="d2d",
        student=str(folder / "teacher"),
        teacher=str(folder / "teacher"),
        dtype="float32",
        batch_size=1,
        data=DataConfig(sources={"records": source}, template="chatml", max_length=LENGTH),
    )


def make_files(folder: Path) -> None:
    """Writes the teacher in both formats, the records, and their tokens and pixels for torch."""
    from benchmarks.data_texts import Conversations, qwen_tokenizer
    from benchmarks.photographs import write_jpegs

    tokenizer = qwen_tokenizer(folder / "tokenizer")
    config = architecture(tokenizer.real_ids)
    models.save_both(folder, "teacher", config, models.random_params(config, 0), tokenizer)
    (folder / "images").mkdir()
    write_jpegs(folder / "images", RECORDS)
    conversations = Conversations(tokenizer)
    records = [
        {"image": f"{number:05d}.jpg", "conversations": conversations.make()}
        for number in range(RECORDS)
    ]
    (folder / "records.json").write_text(json.dumps(records))
    save_rows(folder)


def save_rows(folder: Path) -> None:
    """Writes each record as the teacher reads it, in a row of its own."""
    from moddistill.config import CacheConfig
    from moddistill.data.rows import RowMaker
    from moddistill.distributed.sharding import make_mesh
    from moddistill.extraction.plan import ShardPlan, shards_of
    from moddistill.extraction.setup import prepare

    config = train_config(folder)
    lists = folder / "lists"
    lists.mkdir()
    setup = prepare(config, CacheConfig(ids=IDS), make_mesh(config.mesh), lists)
    shards = shards_of(setup.sources[0], 0, "records")
    plan = ShardPlan(setup.sources, shards, LENGTH, packs=False)
    make = RowMaker(plan, setup.sources, setup.tokenizer, setup.spec, image_slots=1)
    rows = [make(number).batch for number in range(RECORDS)]
    np.savez(
        folder / "rows.npz",
        lengths=[(row.segments > 0).sum() for row in rows],
        **{
            name: [getattr(row, name) for row in rows] for name in ("tokens", "loss_mask", "images")
        },
    )


def prepare_moddistill(folder: Path) -> Callable[[], dict[str, float]]:
    import jax

    from moddistill.config import CacheConfig
    from moddistill.extraction.run import extract
    from moddistill.teachers.cache import TeacherCache

    # The warm-up run compiles; a long extraction does so once.
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    config = train_config(folder)

    def run() -> dict[str, float]:
        out = folder / "cache"
        shutil.rmtree(out, ignore_errors=True)
        extract(config, CacheConfig(ids=IDS), out)
        cache = TeacherCache(out)
        targets = [cache.entry("records", number).targets for number in range(RECORDS)]
        return figures(
            np.concatenate([each.label_logprobs for each in targets]),
            np.concatenate([each.log_rest for each in targets]),
        )

    return run


def prepare_torch(folder: Path) -> Callable[[], dict[str, float]]:
    import torch

    model = models.load_in_torch(folder, "teacher").eval()
    rows = dict(np.load(folder / "rows.npz"))

    def read(part: slice) -> tuple[Any, ...]:
        length = rows["lengths"][part].max()
        tokens = torch.from_numpy(rows["tokens"][part, :length]).long()
        logits = model(
            input_ids=tokens,
            attention_mask=torch.arange(length) < torch.from_numpy(rows["lengths"][part, None]),
            pixel_values=models.clip_pixels(rows["images"][part, 0]),
            use_cache=False,
        ).logits
        logits[..., IMAGE:] = -torch.inf  # ids without a token
        log_p = logits.log_softmax(-1)[:, :-1]
        supervised = torch.from_numpy(rows["loss_mask"][part, 1:length])
        labels = log_p.gather(-1, tokens[:, 1:, None])[..., 0]
        kept = log_p.topk(IDS, -1)
        rest = torch.log1p(-kept.values.exp().sum(-1))
        return tuple(x[supervised].numpy() for x in (labels, rest, *kept))

    @torch.inference_mode()
    def run() -> dict[str, float]:
        found = [read(slice(first, first + BATCH)) for first in range(0, RECORDS, BATCH)]
        labels, rest, *_ = (np.concatenate(each) for each in zip(*found, strict=True))
        return figures(labels, rest)

    return run


def figures(label_logprobs: np.ndarray, log_rest: np.ndarray) -> dict[str, float]:
    """Returns figures of a cache, which both sides have to agree on."""
    return {
        "supervised": len(label_logprobs),
        "label": float(label_logprobs.mean()),
        "rest": float(log_rest.mean()),
    }


SIDES = {"moddistill": prepare_moddistill, "torch": prepare_torch}

if __name__ == "__main__":
    head_to_head.main("benchmarks.extraction", __doc__)
