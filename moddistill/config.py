"""The configuration of one training run, as frozen dataclasses.

A field says everything about itself: type, default, range and one line of description, from which
`--help` and docs/config.md are generated. An experiment is an `ml_collections.ConfigDict` with the
fields of these dataclasses (`to_config_dict`); `from_config_dict` turns it back at start-up, where
an unknown key or another type is an error, and `check_values` checks ranges and enumerations.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Literal

from moddistill.ranges import Range

StageName = Literal["sft", "init", "d2d", "d2s", "preference"]
Template = Literal["vicuna", "chatml", "plain"]
Dtype = Literal["bfloat16", "float32"]
Remat = Literal["none", "matmuls", "full"]
Divergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "uld"
]
CachedKind = Literal["top_k", "samples", "answers"]
PreferenceKind = Literal["sigmoid", "hinge", "ipo", "kto_pair"]
Placement = Literal["sparse", "every_layer", "dense", "first_half", "second_half"]
Dispatch = Literal["dropless", "capacity"]
UpcycleMethod = Literal["copy", "noise", "drop"]
ExpertTransport = Literal["all_gather", "all_to_all", "ragged"]
TEMPLATES: tuple[str, ...] = typing.get_args(Template)
PREFERENCE_KINDS: tuple[str, ...] = typing.get_args(PreferenceKind)
UPCYCLE_METHODS: tuple[str, ...] = typing.get_args(UpcycleMethod)


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """Names of the fields of a table of questions and answers; empty for all other forms."""

    question: Annotated[str, "field with the question"] = ""
    answer: Annotated[str, "field with the answer, or with a list of which the first counts"] = ""
    image: Annotated[
        str, "field with the image; empty: those of the other forms, if there are any"
    ] = ""


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Records of one kind, in one file or several."""

    path: Annotated[
        str, "JSON, JSONL, parquet or ArrayRecord file, or a pattern such as `data/*.parquet`"
    ] = ""
    images: Annotated[str, "folder that image names in the records are relative to"] = ""
    weight: Annotated[float, Range(gt=0, le=1e6), "uses of each record in an epoch"] = 1.0
    columns: ColumnsConfig = ColumnsConfig()


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Records, their conversation format, and the limits of a sample."""

    sources: Mapping[str, SourceConfig] = dataclasses.field(default_factory=dict)
    template: Annotated[Template, "conversation format of the student"] = "vicuna"
    max_length: Annotated[
        int, Range(ge=1, le=10**6), "tokens of a row and of a sample, image patches included"
    ] = 2048
    packing: Annotated[bool, "several samples in a row"] = True
    max_images: Annotated[int, Range(ge=1, le=1000), "images of a sample"] = 1
    max_pixels: Annotated[
        int, Range(ge=1, le=2**30), "pixels of an image, which is padded to a square first"
    ] = 2**26
    exif: Annotated[
        Literal["apply", "ignore"], "orientation that an image file notes; ignore: the reference"
    ] = "apply"
    max_rejected: Annotated[
        float, Range(ge=0, le=1), "share of a source's records that may be bad, or without targets"
    ] = 0.1
    index: Annotated[str, "folder for the indices of sources; empty: next to their files"] = ""
    workers: Annotated[int, Range(ge=0, le=1000), "worker processes; 0 reads in threads"] = 0
    worker_timeout: Annotated[
        int, Range(ge=1, le=10**6), "seconds without a row after which a run stops and says why"
    ] = 60
    # Evaluated for `heldout_steps` batches.
    heldout: SourceConfig = SourceConfig()


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to zero."""

    lr: Annotated[float, Range(ge=0), "peak learning rate"] = 2e-5
    b1: Annotated[float, Range(ge=0, lt=1), "decay of the first moment"] = 0.9
    # The paper's; the reference code has 0.999.
    b2: Annotated[float, Range(ge=0, lt=1), "decay of the second moment"] = 0.98
    eps: Annotated[float, Range(gt=0, le=1), "added to the root of the second moment"] = 1e-8
    weight_decay: Annotated[float, Range(ge=0), "decoupled decay of kernels"] = 0.0
    warmup_ratio: Annotated[float, Range(ge=0, le=1), "share of `steps` with linear warm-up"] = 0.03
    clip_norm: Annotated[float, Range(ge=0), "largest norm of the gradient; 0: any"] = 1.0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one axis may be -1, which takes all that remain."""

    data: Annotated[int, "samples are sharded, parameters replicated"] = -1
    fsdp: Annotated[int, "samples and parameters are sharded"] = 1
    expert: Annotated[int, "samples and experts are sharded"] = 1
    tensor: Annotated[int, "heads, hidden sizes and the vocabulary are sharded"] = 1


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Next-token losses: a divergence from the teacher, cross entropy to the records."""

    divergence: Annotated[Divergence, "divergence from the teacher, `kd`"] = "forward_kl"
    mix: Annotated[
        float,
        Range(gt=0, lt=1),
        "share of the teacher in the mixture of jsd and skew_kl, of the student in skew_reverse_kl",
    ] = 0.1
    temperature: Annotated[float, Range(gt=0), "of both models; squared, it scales `kd`"] = 1.0
    kd_weight: Annotated[float, Range(ge=0), "weight of the divergence"] = 1.0
    ce_weight: Annotated[float, Range(ge=0), "weight of the cross entropy"] = 1.0
    image_kd_weight: Annotated[float, Range(ge=0), "weight of the divergence at patches"] = 0.0
    relation_weight: Annotated[float, Range(ge=0), "weight of the relation of patches"] = 0.0
    kd_positions: Annotated[
        Literal["response", "all_tokens"], "tokens with a divergence: those of answers, or all"
    ] = "response"
    kd_shift: Annotated[
        Literal["correct", "reference"], "mask of the divergence; reference: one position late"
    ] = "correct"


@dataclasses.dataclass(frozen=True)
class OnPolicyConfig:
    """Answers of the student, made in training, in place of those of some records."""

    share: Annotated[float, Range(ge=0, le=1), "share of rows that the student answers"] = 0.0
    tokens: Annotated[int, Range(ge=1, le=10**6), "tokens of the longest answer"] = 128
    temperature: Annotated[float, Range(ge=1e-4, le=1e4), "divides the student's logits"] = 1.0
    top_p: Annotated[float, Range(gt=0, le=1), "probability of the tokens to sample from"] = 1.0


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Losses of pairs of answers: `sigmoid` is DPO, `kto_pair` is KTO on pairs."""

    kind: Annotated[PreferenceKind, "loss of a pair"] = "kto_pair"
    beta: Annotated[float, Range(gt=0), "scale of the log-ratios to the teacher"] = 0.1
    label_smoothing: Annotated[
        float, Range(ge=0, le=0.5), "probability that the labels of a pair are swapped; sigmoid"
    ] = 0.0


@dataclasses.dataclass(frozen=True)
class RouterLossConfig:
    """Auxiliary losses of the routers of a sparse student."""

    load_balance_weight: Annotated[float, Range(ge=0), "weight of the load-balance loss"] = 0.01
    z_weight: Annotated[float, Range(ge=0), "weight of the z-loss"] = 0.0


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """The expert layers of a sparse model."""

    num_experts: Annotated[int, Range(ge=1, le=1000), "experts of a layer"] = 4
    top_k: Annotated[int, Range(ge=1), "experts of a token"] = 2
    placement: Annotated[
        Placement | tuple[int, ...], "layers with experts: every second, all, a half, or by index"
    ] = "sparse"
    norm_topk_prob: Annotated[
        bool | None, "router weights of a token sum to one; None: where top_k is at least 2"
    ] = None
    dispatch: Annotated[Dispatch, "whether tokens above an expert's capacity are dropped"] = (
        "dropless"
    )
    capacity_factor: Annotated[
        float, Range(gt=0), "slots of an expert over its mean load, for dispatch=capacity"
    ] = 1.5
    residual: Annotated[bool, "adds a dense layer, mixed with the experts by learned weights"] = (
        False
    )
    moe_intermediate_size: Annotated[
        int, Range(ge=0), "width of an expert; 0: that of the dense layer"
    ] = 0


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    """How experts are initialised from the feed-forward layer of a dense model."""

    method: Annotated[
        UpcycleMethod, "copies of the layer, copies with noise, or partly re-initialised copies"
    ] = "copy"
    noise_std: Annotated[float, Range(ge=0, le=1e4), "standard deviation, for method=noise"] = 0.0
    drop_fraction: Annotated[float, Range(ge=0, le=1), "re-initialised share, for method=drop"] = (
        0.0
    )


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """An evaluation task and its data."""

    task: Annotated[str, "a module that defines TASK, or, without data, a task of lmms-eval"] = ""
    data: Annotated[str, "folder of questions and images; empty: those of lmms-eval"] = ""
    limit: Annotated[int, Range(ge=0), "questions that are asked, the first ones; 0: all"] = 0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training stage.

    `student` and `teacher` are model folders, Hugging Face folders or hub names, or `random:PRESET`
    for new weights; `vision` is such a model with a vision encoder.
    """

    stage: Annotated[StageName, "row of moddistill/training/stages.py"] = "sft"
    student: Annotated[str, "model to train: folder, Hugging Face name, or `random:PRESET`"] = ""
    teacher: Annotated[str, "model to distil from, named in the same ways"] = ""
    vision: Annotated[str, "model whose vision encoder a text-only student receives"] = ""
    tokenizer: Annotated[str, "tokenizer folder, for `random:` students only"] = ""
    trainable: Annotated[
        str | tuple[str, ...], "`paper`, `reference`, or a tuple of patterns of parameter paths"
    ] = "paper"
    steps: Annotated[int, Range(ge=0, le=10**9), "optimizer steps; 0: as many as `epochs` take"] = 0
    epochs: Annotated[float, Range(gt=0, le=1e6), "uses of all records, if `steps` is 0"] = 1.0
    batch_size: Annotated[int, Range(ge=1, le=2**20), "rows of a step, over all devices"] = 256
    grad_accum_steps: Annotated[int, Range(ge=1), "micro-batches of a step"] = 1
    seed: Annotated[int, Range(ge=0, le=2**32 - 1), "of new weights and the order of records"] = 0
    log_every: Annotated[int, Range(ge=1), "steps between rows of metrics"] = 10
    save_every: Annotated[int, Range(ge=1), "steps between checkpoints"] = 500
    keep_last: Annotated[int, Range(ge=1), "newest checkpoints that are kept"] = 2
    keep_every: Annotated[int, Range(ge=0), "those at multiples of it are kept too; 0: none"] = 0
    keep_best: Annotated[
        str, "metric of held-out records, such as `loss`, whose lowest checkpoint is kept too"
    ] = ""
    heldout_steps: Annotated[int, Range(ge=0, le=10**6), "batches of `data.heldout` evaluated"] = 0
    heldout_every: Annotated[int, Range(ge=0), "steps between evaluations; 0: the last only"] = 0
    tasks: Mapping[str, TaskConfig] = dataclasses.field(default_factory=dict)
    eval_every: Annotated[int, Range(ge=0), "steps between runs of `tasks`; 0: the last only"] = 0
    on_divergence: Annotated[
        Literal["stop", "skip"], "at a loss or norm not finite or too large; skip: no update"
    ] = "stop"
    divergence_factor: Annotated[
        float, Range(ge=0), "of a loss to its running mean, of parameters in one step; 0: any"
    ] = 5.0
    max_skipped: Annotated[int, Range(ge=1), "steps in a row that may be skipped"] = 20
    profile_steps: Annotated[tuple[int, ...], "first and last step for the profiler"] = ()
    dtype: Annotated[Dtype, "of compute and frozen parameters; trained ones are float32"] = (
        "bfloat16"
    )
    remat: Annotated[
        Remat, "what layers save for the gradient: everything, their matmuls, or their inputs only"
    ] = "full"
    scan: Annotated[bool, "layers as a loop; false compiles longer, runs faster if few"] = True
    donate: Annotated[bool, "a step reuses the memory of parameters and moments"] = True
    logits_chunk_size: Annotated[int, Range(ge=1), "supervised positions with logits at once"] = 256
    expert_transport: Annotated[
        ExpertTransport, "collective that moves tokens to their experts; ragged: no CPU"
    ] = "all_gather"
    teacher_quantization: Annotated[
        Literal["none", "int8"], "of the teacher's layers; int8 halves their memory"
    ] = "none"
    teacher_offload: Annotated[bool, "keep the teacher's layers in host memory"] = False
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    distillation: DistillationConfig = DistillationConfig()
    on_policy: OnPolicyConfig = OnPolicyConfig()
    preference: PreferenceConfig = PreferenceConfig()
    router: RouterLossConfig = RouterLossConfig()
    moe: ExpertConfig = ExpertConfig()  # experts that a sparse stage adds to a dense student
    upcycle: UpcycleConfig = UpcycleConfig()  # how it makes them


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What a cache of a teacher has of each supervised token; of pairs, two sums in any case."""

    kind: Annotated[
        Literal["top_k", "samples"], "the most probable ids, or ids drawn from the distribution"
    ] = "top_k"
    ids: Annotated[int, Range(ge=1, le=10**6), "number of ids"] = 64


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """Stages that run one after the other, and tasks that evaluate their models.

    `{workdir}` in a path of a stage is replaced by the folder of the recipe.
    """

    order: Annotated[tuple[str, ...], "names of the stages, first to last"] = ()
    stages: Mapping[str, TrainConfig] = dataclasses.field(default_factory=dict)
    # Stages that train from a cache of their teacher, which the recipe makes before them.
    caches: Mapping[str, CacheConfig] = dataclasses.field(default_factory=dict)
    tasks: Mapping[str, TaskConfig] = dataclasses.field(default_factory=dict)
    evaluated: Annotated[tuple[str, ...], "stages whose models are evaluated, teacher first"] = ()
