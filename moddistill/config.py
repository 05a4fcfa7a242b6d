"""The configuration of one training run, as frozen dataclasses.

Experiments are `ml_collections.ConfigDict`s made from these dataclasses by `to_config_dict`, so
names and defaults stand in one place. `from_config_dict` turns them back at start-up: a stray or
misspelt key is an error there, and everything behind it works with typed, frozen fields.
"""

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import ml_collections

from moddistill.setting_names import unknown_setting


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
    template: Literal["vicuna", "chatml", "plain"] = "vicuna"
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
class LossConfig:
    """Weights and variants of the losses; a stage uses those that belong to it."""

    kd_weight: float = 1.0
    ce_weight: float = 1.0
    kd_positions: Literal["response", "all_tokens"] = "response"
    kd_shift: Literal["correct", "reference"] = "correct"  # reference: the original's late mask
    balance_weight: float = 0.01
    router_z_weight: float = 0.0
    preference: Literal["sigmoid", "hinge", "ipo", "kto_pair"] = "kto_pair"
    beta: float = 0.1
    label_smoothing: float = 0.0
    chunk: int = 256  # supervised positions whose logits exist at one time


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """The expert layers a dense student is upcycled to."""

    num_experts: int = 4
    top_k: int = 2
    # sparse | dense | first_half | second_half | indices of layers
    placement: str | tuple[int, ...] = "sparse"
    norm_topk_prob: bool | None = None  # None: renormalise for top_k >= 2, raw for 1
    dispatch: Literal["dropless", "capacity"] = "dropless"
    capacity_factor: float = 1.5
    # How rows travel between devices with different experts, in any stage; ragged on TPU and GPU.
    transport: Literal["ring", "all_to_all", "ragged"] = "ring"
    residual: bool = False
    # copy | noise: added to each copy | drop: part of each copy is drawn anew
    upcycle: Literal["copy", "noise", "drop"] = "copy"
    noise_std: float = 0.0
    drop_fraction: float = 0.0
    moe_intermediate_size: int = 0  # width of an expert; 0: the dense layer's


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
    # Of the teacher's layers: int8 halves them; host memory holds those that fit nowhere else.
    teacher_weights: Literal["dtype", "int8"] = "dtype"
    teacher_memory: Literal["device", "host"] = "device"
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    loss: LossConfig = LossConfig()
    moe: MoeConfig = MoeConfig()


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """Stages after each other. `{workdir}` in a path of a stage stands for the recipe's folder."""

    order: tuple[str, ...] = ()
    stages: Mapping[str, TrainConfig] = dataclasses.field(default_factory=dict)
    benchmark: str = ""  # of moddistill.evals; none if empty
    benchmark_data: str = ""
    evaluated: tuple[str, ...] = ()  # stages whose models answer the benchmark, teacher first


def nearest(name: str, accepted: Iterable[str]) -> str:
    """`; did you mean X?` for the accepted name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(accepted), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """A locked ConfigDict with the fields of a config dataclass."""
    return ml_collections.ConfigDict(_fields(config)).lock()


def _fields(config: Any) -> Any:
    """Nested dicts; a field that is None keeps its other type, or nothing could be put there."""
    if isinstance(config, Mapping):
        return {key: _fields(value) for key, value in config.items()}
    if not dataclasses.is_dataclass(config):
        return config
    fields = {name: _fields(value) for name, value in vars(config).items()}
    for name, kind in typing.get_type_hints(type(config)).items():
        if fields[name] is None:
            [other] = set(typing.get_args(kind)) - {types.NoneType}
            fields[name] = ml_collections.config_dict.placeholder(other)
    return fields


def from_config_dict(cls: type, values: Mapping[str, Any], origin: str = "config") -> Any:
    """An instance of the config dataclass `cls` from nested mappings.

    Raises:
      ValueError: for a key that `cls` does not have, a value of another type or none of the
        accepted ones, naming both.
    """
    for setting in _strays(cls, values):
        raise unknown_setting(origin, setting, _settings(cls, values))
    return _build(cls, values, origin)


def _children(kind: Any, values: Any) -> dict[str, Any]:
    """The type of each setting inside a config dataclass or a mapping; none for other types."""
    for option in _options(kind):
        if dataclasses.is_dataclass(option):
            return typing.get_type_hints(option)
        if typing.get_origin(option) is Mapping and isinstance(values, Mapping):
            return dict.fromkeys(values, typing.get_args(option)[1])
    return {}


def _settings(kind: Any, values: Any) -> Iterator[str]:
    """Dotted names of all settings; inside a mapping, those of the keys that `values` has."""
    for name, child in _children(kind, values).items():
        inside = values.get(name) if isinstance(values, Mapping) else None
        below = [f"{name}.{each}" for each in _settings(child, inside)]
        yield from below or [name]


def _strays(kind: Any, values: Any) -> Iterator[str]:
    """Dotted names of keys in `values` that are not settings."""
    children = _children(kind, values)
    for name, value in values.items() if children and isinstance(values, Mapping) else ():
        if name not in children:
            yield name
        else:
            yield from (f"{name}.{each}" for each in _strays(children[name], value))


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is types.UnionType else (kind,)


def _build(cls: type, values: Mapping[str, Any], origin: str) -> Any:
    fields = typing.get_type_hints(cls)
    required = {
        field.name
        for field in dataclasses.fields(cls)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(values)):
        raise ValueError(f"{origin} lacks {', '.join(missing)}")
    return cls(
        **{key: _convert(fields[key], value, f"{origin}.{key}") for key, value in values.items()}
    )


def _convert(kind: Any, value: Any, origin: str) -> Any:
    options = _options(kind)
    if isinstance(value, Mapping):
        for option in options:
            if dataclasses.is_dataclass(option):
                return _build(option, value, origin)
            if typing.get_origin(option) is Mapping:
                inner = typing.get_args(option)[1]
                return {key: _convert(inner, x, f"{origin}.{key}") for key, x in value.items()}
    if typing.get_origin(kind) is Literal:
        accepted = typing.get_args(kind)
        if value not in accepted:
            hint = nearest(value, accepted) if isinstance(value, str) else ""
            raise ValueError(f"{origin} is {value!r:.200}; accepted: {', '.join(accepted)}{hint}")
        return value
    plain = tuple(typing.get_origin(option) or option for option in options)
    if tuple in plain and isinstance(value, str) and value.startswith("("):
        value = _typed_tuple(value, origin)
    if isinstance(value, list | tuple):
        value = tuple(value)
    if float in plain and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        names = ", ".join(option.__name__ for option in plain)
        raise ValueError(f"{origin} is {value!r:.200}; accepted: a value of type {names}")
    if isinstance(value, tuple):
        [element] = {typing.get_args(option)[0] for option in options if typing.get_args(option)}
        return tuple(_convert(element, item, f"{origin}[{i}]") for i, item in enumerate(value))
    return value


def _typed_tuple(text: str, origin: str) -> Any:
    """A tuple as it is typed on the command line, where such a field is text: `(0, 2)`."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        raise ValueError(
            f"{origin} is {text!r}; accepted: a name, or a tuple such as (0, 2) or ('a', 'b')"
        ) from None
