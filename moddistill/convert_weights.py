"""Imports, upcycles, exports, checks and inspects weights.

    python -m tools.convert_weights import --hf DIR_OR_NAME [--vision DIR_OR_NAME] --out DIR
    python -m tools.convert_weights upcycle --model DIR --num_experts 4 --top_k 2 --out DIR
    python -m tools.convert_weights export --model DIR --out DIR [--max_shard_size 5GB]
    python -m tools.convert_weights check DIR --engine vllm
    python -m tools.convert_weights inspect DIR

An existing folder is only replaced with --overwrite; an interrupted command leaves no folder.
"""

import argparse
import json
import logging
import re
import typing
from collections.abc import Sequence
from pathlib import Path

from moddistill.cli.parser import Parser, in_range, user_errors
from moddistill.config import TEMPLATES, UPCYCLE_METHODS, ExpertConfig, Placement, UpcycleConfig
from moddistill.convert.describe import describe
from moddistill.convert.engine_check import ENGINES, check_engine
from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from moddistill.convert.upcycling import upcycle_model
from moddistill.errors import not_one_of
from moddistill.models.flops import parameter_counts
from moddistill.models.vlm import ModelConfig
from moddistill.storage.shards import parse_size


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command of the converter."""
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("moddistill").setLevel(logging.INFO)
    with user_errors():
        args.run(args)


def _parser() -> argparse.ArgumentParser:
    module = "moddistill" if __name__ == "__main__" else "tools"
    parser = Parser(__doc__, prog=f"python -m {module}.convert_weights")
    commands = parser.add_subparsers(required=True, metavar="import|upcycle|export|check|inspect")
    _import_arguments(commands.add_parser("import", help="Hugging Face weights to a model folder"))
    _upcycle_arguments(commands.add_parser("upcycle", help="a dense model folder to a sparse one"))
    _export_arguments(commands.add_parser("export", help="a model folder to Hugging Face weights"))
    _check_arguments(commands.add_parser("check", help="what an engine would refuse of an export"))
    inspect = commands.add_parser("inspect", help="parameters, dtypes and uses of a folder")
    inspect.add_argument("folder", help="model folder, Hugging Face folder or hub name")
    inspect.set_defaults(run=lambda args: print(json.dumps(describe(args.folder), indent=2)))
    return parser


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf", required=True, help="folder or hub name of the model")
    parser.add_argument("--vision", default="", help="folder or hub name of a vision tower")
    parser.add_argument("--projector", default="", help="mm_projector.bin or safetensors")
    parser.add_argument("--template", default="", help=", ".join(TEMPLATES))
    parser.add_argument(
        "--select_layer", type=int, help="hidden state of the vision tower, such as -2"
    )
    parser.add_argument(
        "--seed", type=in_range(int, ge=0, lt=2**32), default=0, help="of an initialised projector"
    )
    _output_arguments(parser)
    parser.set_defaults(run=_import)


def _upcycle_arguments(parser: argparse.ArgumentParser) -> None:
    default = ExpertConfig()
    parser.add_argument("--model", required=True, type=Path, help="dense model folder")
    parser.add_argument("--num_experts", type=int, default=default.num_experts)
    parser.add_argument("--top_k", type=int, default=default.top_k)
    parser.add_argument(
        "--placement",
        default=default.placement,
        help=f"{', '.join(typing.get_args(Placement))}, or indices such as (0,2,5)",
    )
    parser.add_argument("--upcycle", choices=UPCYCLE_METHODS, default="copy")
    parser.add_argument("--noise_std", type=float, default=0.0, help="for --upcycle noise")
    parser.add_argument("--drop_fraction", type=float, default=0.0, help="for --upcycle drop")
    parser.add_argument("--moe_intermediate_size", type=int, default=0, help="splits each expert")
    parser.add_argument(
        "--seed", type=in_range(int, ge=0, lt=2**32), default=0, help="of routers, noise and drops"
    )
    _output_arguments(parser)
    parser.set_defaults(run=_upcycle)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=Path, help="model folder")
    parser.add_argument("--max_shard_size", default="5GB", help="of a weight file")
    parser.add_argument(
        "--dtype", default="", help="float32, bfloat16 or float16; as stored if absent"
    )
    parser.add_argument(
        "--vocabulary",
        default="cut",
        help="cut: without embedding rows that are no tokens, which engines could generate; padded",
    )
    parser.add_argument(
        "--uniform",
        action="store_true",
        help="writes dense layers as equal experts, for engines that know only sparse ones",
    )
    _output_arguments(parser)
    parser.set_defaults(run=_export)


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder that export has written")
    parser.add_argument("--engine", required=True, help=", ".join(ENGINES))
    parser.set_defaults(run=_check)


def _output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def _import(args: argparse.Namespace) -> None:
    config = import_model(
        args.hf,
        args.out,
        vision=args.vision,
        projector=args.projector,
        template=args.template,
        select_layer=args.select_layer,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    _print_written(args.out, config)


def _upcycle(args: argparse.Namespace) -> None:
    moe = ExpertConfig(
        num_experts=args.num_experts,
        top_k=args.top_k,
        placement=_placement(args.placement),
        moe_intermediate_size=args.moe_intermediate_size,
    )
    how = UpcycleConfig(
        method=args.upcycle, noise_std=args.noise_std, drop_fraction=args.drop_fraction
    )
    config = upcycle_model(args.model, args.out, moe, how, seed=args.seed, overwrite=args.overwrite)
    _print_written(args.out, config)


def _placement(text: str) -> str | tuple[int, ...]:
    """Parses a name, or indices of layers; more digits than any model has layers are neither."""
    if re.fullmatch(r"\(?\s*\d{1,9}(\s*,\s*\d{1,9})*\s*,?\s*\)?", text):
        return tuple(int(index) for index in re.findall(r"\d+", text))
    names = typing.get_args(Placement)
    if text not in names:
        raise not_one_of("--placement", text, names)
    return text


def _export(args: argparse.Namespace) -> None:
    fields = export_model(
        args.model,
        args.out,
        max_shard_size=parse_size(args.max_shard_size),
        dtype=args.dtype,
        vocabulary=args.vocabulary,
        uniform=args.uniform,
        overwrite=args.overwrite,
    )
    print(f"{args.out}: {fields['architectures'][0]}, {fields['dtype']}")


def _check(args: argparse.Namespace) -> None:
    rules = check_engine(args.folder, args.engine)
    print(f"{args.folder}: {args.engine} loads it, by {rules} rules")


def _print_written(folder: Path, config: ModelConfig) -> None:
    total, activated = parameter_counts(config)
    print(f"{folder}: {total:,} parameters, {activated:,} activated per token")


if __name__ == "__main__":
    main()
