"""Flags of the commands that run a model: `--model`, `--dtype` and `--mesh`."""

import argparse
import dataclasses
import typing

import jax

from moddistill.config import Dtype, MeshConfig


def add_model_flags(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the flags; `args.mesh` is a `MeshConfig`, or None.

    Args:
      required: whether `--model` is; a command may have another flag that names models.
    """
    parser.add_argument(
        "--model", required=required, help="model folder, Hugging Face folder or hub name"
    )
    parser.add_argument(
        "--dtype",
        choices=typing.get_args(Dtype),
        default="float32" if jax.default_backend() == "cpu" else "bfloat16",
        help="of parameters, computation and cache; float32 by default on CPUs only",
    )
    parser.add_argument(
        "--mesh",
        type=_mesh_config,
        metavar="AXIS=SIZE,...",
        help="devices along data, fsdp, expert and tensor, such as fsdp=4,tensor=2",
    )


def _mesh_config(text: str) -> MeshConfig:
    try:
        sizes = dict(item.split("=") for item in text.split(","))
        return MeshConfig(**{axis: int(size) for axis, size in sizes.items()})
    except (ValueError, TypeError):
        names = ", ".join(field.name for field in dataclasses.fields(MeshConfig))
        raise argparse.ArgumentTypeError(
            f"expected AXIS=SIZE,... with axes of {names}, got {text!r}"
        ) from None
