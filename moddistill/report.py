"""Writes a report on runs and results: one HTML page without other files.

    python -m moddistill.report runs/llava_mod runs/baseline results/published --out report.html

Takes workdirs of recipes and of training runs, and folders of `moddistill.evaluate`, in any number.
The page has training curves, scores with bootstrap intervals, differences from the teacher, the
load of experts by task and modality, and questions with the answers of all models. What cannot be
read is listed there and here, and the rest is shown.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from moddistill.cli.parser import Parser, user_errors
from moddistill.errors import UserError, printable
from moddistill.reports.report import write_report
from moddistill.reports.workdirs import read_workdirs


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.report`."""
    parser = Parser(__doc__, prog="python -m moddistill.report")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="workdirs, results")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page")
    parser.add_argument("--title", help="heading of the page; by default the names of the folders")
    parser.add_argument(
        "--teacher",
        default="",
        metavar="NAME",
        help="model that others are compared with; by default the teacher of most runs",
    )
    args = parser.parse_args(argv)
    with user_errors():
        if not args.out.resolve().parent.is_dir():
            raise UserError(f"--out: expected a file in an existing folder, got {str(args.out)!r}")
        content = read_workdirs(args.folders)
        names = ", ".join(folder.resolve().name for folder in args.folders)
        write_report(args.out, content, args.title or names, args.teacher)
        for problem in content.problems:
            print(printable(f"not read: {problem}"), file=sys.stderr)
        counts = f"{len(content.runs)} runs, {len(content.results)} results"
        print(f"{args.out}: {counts}, {len(content.problems)} problems")


if __name__ == "__main__":
    main()
