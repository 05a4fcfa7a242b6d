"""Converts published data to ArrayRecord shards, which training reads fastest.

    python -m moddistill.prepare json --from data.json --images folder --to DIR
    python -m moddistill.prepare parquet --from 'RLAIF-V/*.parquet' --to DIR
    python -m moddistill.prepare webdataset --from 'shards/{00000..00123}.tar' --to DIR
    python -m moddistill.prepare zip --from images.zip --records data.json --show 3
    python -m moddistill.prepare check 'DIR/*.array_record' --tokenizer MODEL --html check.html

An interrupted conversion continues when it is run again. Records that cannot be used are listed in
DIR/rejected.jsonl, each with its reason. `check` reads a source of training once, images included,
and reports counts, lengths, sizes, duplicates and why records are rejected.
"""

import argparse
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from moddistill.cli.parser import Parser, in_range, user_errors
from moddistill.config import TEMPLATES, ColumnsConfig
from moddistill.data.image_decoding import ImageRules
from moddistill.data.images import PAD_COLOR
from moddistill.data.tokenizer import load_tokenizer
from moddistill.errors import UserError, invalid, one_line
from moddistill.evals.task import Column
from moddistill.prepare.check import check
from moddistill.prepare.check_report import format_sections, write_page
from moddistill.prepare.downloads import DOWNLOADS
from moddistill.prepare.examine import ExamineSpec
from moddistill.prepare.inputs import InputSpec
from moddistill.prepare.packagings import FORMS
from moddistill.prepare.run import REJECTED, prepare
from moddistill.prepare.sections import make_sections
from moddistill.prepare.show import escape, show
from moddistill.reports.table import format_table

_COUNTS = ("records", "usable", "rejected", "left_out", "images", "bytes", "shards")
_HELP = {
    "json": "JSON or JSONL files of records next to images",
    "parquet": "parquet files, with embedded images or next to them",
    "zip": "zip archives of images and records",
    "tar": "tar archives of images and records",
    "webdataset": "tar shards of images with .json or .txt",
    "tsv": "tables of questions with images in base64",
    "moe-llava": "folder of LanguageBind/MoE-LLaVA",
    "mobilevlm": "folder with MobileVLM_V2_FT_Mix2M.json and its images",
}
_RECORDS_HELP = "files of records: members of the archives or folder, or other files"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.prepare`."""
    parser = Parser(__doc__, prog="python -m moddistill.prepare")
    commands = parser.add_subparsers(required=True, metavar="|".join((*FORMS, "check")))
    for form in FORMS:
        _add_flags(commands.add_parser(form, help=_HELP[form]), form)
    _add_check_flags(commands.add_parser("check", help="report what the records of a source are"))
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", force=True)
    with user_errors():
        args.run(args)


def _add_flags(parser: argparse.ArgumentParser, form: str) -> None:
    parser.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="files, or patterns with * and {000..123}" + (", or folders" if "-" in form else ""),
    )
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--to", type=Path, metavar="DIR", help="folder of the shards")
    output.add_argument(
        "--show",
        type=in_range(int, ge=1),
        metavar="N",
        help="print the first N records as they would be, and write nothing",
    )
    parser.set_defaults(run=lambda args: (_show if args.show else _prepare)(args, _spec(args)))
    _add_workers(parser)
    parser.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="[PREFIX=]PATH",
        help="folder, .zip or .tar of images, all or those below PREFIX/; repeat for several",
    )
    parser.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="PREFIX",
        help="leave out records with an image below PREFIX/",
    )
    if form in ("zip", "tar", *DOWNLOADS):
        parser.add_argument("--records", default="", metavar="PATTERN", help=_RECORDS_HELP)
    if form == "webdataset":
        parser.add_argument("--question", default="", help="of captions, after the image")
    if form in ("json", "parquet"):
        _add_columns(parser)
    parser.set_defaults(form=form)


def _add_check_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="file or pattern, as in config.data.sources.NAME.path")
    parser.add_argument("--images", default="", metavar="DIR", help="folder of image names")
    parser.add_argument("--tokenizer", metavar="DIR", help="model whose tokens are counted")
    parser.add_argument("--template", choices=TEMPLATES, default="vicuna", help="of the model")
    parser.add_argument(
        "--max-length", type=in_range(int, ge=1, le=10**6), default=2048, help="of a run"
    )
    parser.add_argument(
        "--image-tokens",
        type=in_range(int, ge=0, le=10**5),
        default=576,
        help="of an image",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="page to write")
    _add_columns(parser)
    _add_workers(parser)
    parser.set_defaults(run=_check)


def _add_columns(parser: argparse.ArgumentParser) -> None:
    for each in fields(ColumnsConfig):
        parser.add_argument(
            f"--columns.{each.name}", default="", metavar="NAME", help="of a table without messages"
        )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=in_range(int, ge=0, le=1000),
        default=os.cpu_count(),
        help="processes; 0 reads in this one",
    )


def _columns(args: argparse.Namespace) -> ColumnsConfig:
    names = {each.name: f"columns.{each.name}" for each in fields(ColumnsConfig)}
    return ColumnsConfig(**{name: getattr(args, flag, "") for name, flag in names.items()})


def _spec(args: argparse.Namespace) -> InputSpec:
    flags = vars(args)
    return InputSpec(
        form=args.form,
        sources=tuple(args.sources),
        images=tuple(args.images),
        records=flags.get("records", ""),
        question=flags.get("question", ""),
        leave_out=tuple(each.rstrip("/") for each in args.leave_out),
        columns=_columns(args),
    )


def _show(args: argparse.Namespace, spec: InputSpec) -> None:
    with tempfile.TemporaryDirectory() as work:
        for text in show(spec, args.show, Path(work)):
            print(text)


def _prepare(args: argparse.Namespace, spec: InputSpec) -> None:
    counts = prepare(spec, args.to, args.workers)
    columns = [Column(name, name.replace("_", " "), ",") for name in _COUNTS]
    print(format_table(columns, [{name: counts[name] for name in _COUNTS}]))
    if counts["reasons"]:
        print(f"\n{args.to / REJECTED} lists the rejected records. The commonest reasons:")
        for reason, found in counts["reasons"].items():
            print(f"{found['count']:>12,}  {one_line(reason)}")
            print(f"{'':14}such as {escape(found['example'])}")
    if not counts["usable"]:
        raise UserError(f"--from: expected a usable record, got {counts['records']} that are not")


def _check(args: argparse.Namespace) -> None:
    if args.html and not args.html.parent.is_dir():
        raise invalid("--html", str(args.html), "a file in an existing folder")
    spec = ExamineSpec(
        images=args.images,
        columns=_columns(args),
        rules=ImageRules(pad_color=PAD_COLOR),
        tokenizer=load_tokenizer(args.tokenizer) if args.tokenizer else None,
        template=args.template,
        image_tokens=args.image_tokens,
    )
    findings = check(args.source, spec, args.workers)
    sections = make_sections(findings, args.max_length if args.tokenizer else 0)
    print(format_sections(sections))
    if args.html:
        write_page(args.html, args.source, sections)
    if not findings.records["is_usable"].any():
        raise UserError(f"{args.source}: expected a usable record, got none")


if __name__ == "__main__":
    main()
