"""The configuration of one training run, as frozen dataclasses.

Experiments are `ml_collections.ConfigDict`s made from these dataclasses by `to_config_dict`, so
names and defaults stand in one place. `from_config_dict` turns them back at start-up: a stray or
misspelt key is an error there, and everything behind it works with typed, frozen fields.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Literal

Template = Literal["vicuna", "chatml", "plain"]
TEMPLATES: tuple[str, ...] = typing.get_args(Template)
UpcycleMethod = Literal["copy", "noise", "drop"]
UPCYCLE_METHODS: tuple[str, ...] = typing.get_args(UpcycleMethod)
ExpertTransport = Literal["all_gather", "all_to_all", "ragged"]

PreferenceKind = Literal["sigmoid", "hinge", "ipo", "kto_pair"]
PREFERENCE_KINDS: tuple[str, ...] = typing.get_args(PreferenceKind)


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One file of records and the folder its image names are relative to."""

    path: str = ""
    images: str = ""
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and the fixed shapes it is made into."""

    sources: Mapping[str, SourceConfig] = dataclasses.field(default_factory=dict)
    template: Template = "vicuna"
    max_length: int = 2048  # tokens of a sample, image patches included
    max_images: int = 1
    workers: int = 0  # worker processes; 0 reads in threads
    heldout: SourceConfig = SourceConfig()  # measured at the end, for `heldout_steps` batches


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to zero."""

    lr: float = 2e-5
    b1: float = 0.9
    b2: float = 0.98  # the paper's; the reference code keeps 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1 and takes what is left."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Next-token losses: forward KL to the teacher, cross entropy to the records."""

    kd_weight: float = 1.0
    ce_weight: float = 1.0
    kd_positions: Literal["response", "all_tokens"] = "response"
    kd_shift: Literal["correct", "reference"] = "correct"  # reference: mask one position late


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Losses of pairs of answers: `sigmoid` is DPO, `kto_pair` is KTO on pairs."""

    kind: PreferenceKind = "kto_pair"
    beta: float = 0.1
    label_smoothing: float = 0.0  # probability that the labels of a pair are swapped; `sigmoid`


@dataclasses.dataclass(frozen=True)
class RouterLossConfig:
    """Auxiliary losses of the routers of a sparse student."""

    load_balance_weight: float = 0.01
    z_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """The expert layers of a sparse model."""

    num_experts: int = 4
    top_k: int = 2
    # sparse | dense | first_half | second_half | indices of layers
    placement: str | tuple[int, ...] = "sparse"
    norm_topk_prob: bool | None = None  # None: renormalise for top_k >= 2, raw for 1
    dispatch: Literal["dropless", "capacity"] = "dropless"
    capacity_factor: float = 1.5
    residual: bool = False
    moe_intermediate_size: int = 0  # width of an expert; 0: the dense layer's


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    """How experts are initialised from the feed-forward layer of a dense model."""

    # copy | noise: added to each copy | drop: part of each copy is re-initialised
    method: UpcycleMethod = "copy"
    noise_std: float = 0.0
    drop_fraction: float = 0.0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One stage.

    `student` and `teacher` are model folders, Hugging Face folders or hub names, or `random:PRESET`
    for new weights; `vision` is such a model with a tower.
    """

    stage: str = "sft"
    student: str = ""
    teacher: str = ""
    vision: str = ""  # where a text-only student takes its tower from, like `student`
    tokenizer: str = ""  # tokenizer folder, for `random:` students only
    trainable: str | tuple[str, ...] = "paper"  # paper | reference | patterns of parameter paths
    steps: int = 1000
    batch_size: int = 256
    accumulate: int = 1
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    heldout_steps: int = 0
    profile_steps: tuple[int, ...] = ()  # first and last step that the profiler sees
    # Of computation and frozen parameters; trained ones are float32.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # What layers keep for the gradient: all | their matrix products | their inputs alone.
    remat: Literal["none", "products", "full"] = "full"
    scan: bool = True  # layers as a loop; False: compiles longer, runs faster where they are few
    donate: bool = True  # a step takes over the memory of parameters and moments
    # Collective that moves tokens to their experts, in any stage; ragged needs a TPU or GPU.
    expert_transport: ExpertTransport = "all_gather"
    # Of the teacher's layers: int8 halves them; host memory holds those that fit nowhere else.
    teacher_weights: Literal["dtype", "int8"] = "dtype"
    teacher_memory: Literal["device", "host"] = "device"
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    distillation: DistillationConfig = DistillationConfig()
    preference: PreferenceConfig = PreferenceConfig()
    router: RouterLossConfig = RouterLossConfig()
    logits_chunk_size: int = 256  # supervised positions whose logits are in memory at one time
    moe: ExpertConfig = ExpertConfig()  # experts that a sparse stage adds to a dense student
    upcycle: UpcycleConfig = UpcycleConfig()  # how it makes them


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """An evaluation task and its data."""

    task: str = ""  # of moddistill.evals, or a module that defines TASK, such as my_project.chartqa
    data: str = ""  # folder of questions and images


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """Stages in order, and tasks. `{workdir}` in a path of a stage is the recipe's folder."""

    order: tuple[str, ...] = ()
    stages: Mapping[str, TrainConfig] = dataclasses.field(default_factory=dict)
    tasks: Mapping[str, TaskConfig] = dataclasses.field(default_factory=dict)
    evaluated: tuple[str, ...] = ()  # stages whose models are evaluated on all tasks, teacher first
