"""One step of sparse distillation, compared with `transformers`: same models, records and update.

    python -m benchmarks.kd_step [--rounds 5] [--json]

- Teacher: CLIP, projector and a Qwen2 with hidden size 1,024.
- Student: the same vision encoder and a Qwen2 with hidden size 512, with 4 experts, top 2, in every
  second layer.
- Batch: a vocabulary of 151,936, 4 rows of 512 positions, a quarter of them supervised, 64 of them
  an image.
- Update: KL, cross entropy and balance loss; AdamW of experts, routers and projector; float32.

moddistill rematerialises layers, as all full-size experiments do, and computes logits of 64
positions at a time, a quarter of the default. The torch side holds all logits, as the reference
code does.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import head_to_head, models
from moddistill.models.batch import Batch, padded_batch

ROWS, LENGTH, VOCABULARY, IMAGE = 4, 512, 151_936, 151_900
REAL_IDS = ((0, IMAGE), (IMAGE + 1, VOCABULARY))
BALANCE, RATE = 0.01, 1e-4


def architectures():
    from moddistill.config import ExpertConfig
    from moddistill.models.decoder import DecoderConfig
    from moddistill.models.upcycle import upcycle_config
    from moddistill.models.vlm import ModelConfig

    def decoder(width: int, mlp: int, tied: bool) -> DecoderConfig:
        heads = width // 64
        return DecoderConfig(
            VOCABULARY, REAL_IDS, width, mlp, 8, heads, heads // 4, 64, tie_word_embeddings=tied
        )

    tower = models.small_tower(112)
    teacher = ModelConfig(decoder(1024, 2816, False), tower, "mlp2x_gelu", "chatml", IMAGE)
    dense = dataclasses.replace(teacher, decoder=decoder(512, 1408, True))
    return upcycle_config(dense, ExpertConfig()), teacher


def records() -> Batch:
    """Returns a batch as the data pipeline yields it."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 150_000, (ROWS, LENGTH)).astype(np.int32)
    tokens[:, 8:72] = IMAGE
    loss_mask = np.broadcast_to(np.arange(LENGTH) >= LENGTH * 3 // 4, tokens.shape)
    images = rng.integers(0, 256, (ROWS, 1, 112, 112, 3)).astype(np.uint8)
    return padded_batch(tokens, np.full(ROWS, LENGTH), loss_mask, images)


def make_files(folder: Path) -> None:
    """Writes both models with one vision encoder, which moddistill then runs once."""
    student, teacher = architectures()
    params = models.random_params(student, 0)
    models.save_both(folder, "student", student, params)
    taught = models.random_params(teacher, 1) | {"vision": params["vision"]}
    models.save_both(folder, "teacher", teacher, taught)


def prepare_moddistill(folder: Path) -> Callable[[], dict[str, float]]:
    import jax

    from moddistill.config import OptimConfig, RouterLossConfig, TrainConfig
    from moddistill.distributed.sharding import make_mesh, put_batch
    from moddistill.storage.model_folder import load_params
    from moddistill.teachers.live import without_tower
    from moddistill.training.program import make_program

    student, teacher = architectures()
    config = TrainConfig(
        stage="d2s",
        student=str(folder / "student"),
        teacher=str(folder / "teacher"),
        dtype="float32",
        batch_size=ROWS,
        optim=OptimConfig(lr=RATE, warmup_ratio=0.0),
        router=RouterLossConfig(load_balance_weight=BALANCE),
        logits_chunk_size=64,
    )
    mesh = make_mesh(config.mesh)
    program = make_program(config, student, teacher, mesh)
    state = jax.jit(program.make_state, out_shardings=program.state_shardings)(
        load_params(folder / "student", student)
    )
    frozen = without_tower(load_params(folder / "teacher", teacher))
    batch = jax.block_until_ready((state, frozen, put_batch(mesh, records())))[2]

    def run() -> dict[str, float]:
        nonlocal state
        state, metrics = jax.block_until_ready(program.step(state, frozen, batch))
        return {name: float(np.divide(*metrics[name])) for name in ("ce", "balance")}

    return run


def prepare_torch(folder: Path) -> Callable[[], dict[str, float]]:
    import torch
    from torch.nn.functional import cross_entropy, log_softmax, one_hot, softmax

    student = models.load_in_torch(folder, "student").train()
    teacher = models.load_in_torch(folder, "teacher").eval()
    routers = []
    for name, module in student.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _, __, out: routers.append(out))
    for name, x in student.named_parameters():
        x.requires_grad_(
            any(part in name for part in (".experts.", "mlp.gate.", "multi_modal_projector"))
        )
    trained = [x for x in student.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    batch = records()
    tokens = torch.from_numpy(batch.tokens).long()
    inputs = {"input_ids": tokens, "pixel_values": models.clip_pixels(batch.images[:, 0])}
    supervised = torch.from_numpy(batch.loss_mask[:, 1:].copy())
    labels = tokens[:, 1:]

    def run() -> dict[str, float]:
        routers.clear()
        logits = student(**inputs, use_cache=False).logits[:, :-1]
        with torch.no_grad():
            target = softmax(teacher(**inputs, use_cache=False).logits[:, :-1], -1)
        mimic = -(target * log_softmax(logits, -1)).sum(-1)
        ce = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        mimic, ce = ((x * supervised).sum() / supervised.sum() for x in (mimic, ce))
        balance = 0.0
        for scores, _, chosen in routers:
            first = one_hot(chosen[:, 0], scores.shape[1]).float().mean(0)
            balance += scores.shape[1] * (first * softmax(scores, -1).mean(0)).sum()
        (mimic + ce + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"ce": ce.item(), "balance": balance.item() / len(routers)}

    return run


SIDES = {"moddistill": prepare_moddistill, "torch": prepare_torch}

if __name__ == "__main__":
    head_to_head.main("benchmarks.kd_step", __doc__)
