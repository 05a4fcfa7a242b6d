"""Builds the data of the demo from easy-VQA: LLaVA JSON, preference JSON and images.

    pip install easy-vqa==1.0
    python -m tools.easy_vqa --out data/easy_vqa

The published images and questions become LLaVA JSON, preference JSON and PNG files; README.md in
the folder describes each file. Preference pairs follow rules. The same options give the same bytes.
A complete folder of the same options is left unchanged; any other existing folder is an error.
"""

import dataclasses
import json
import random
import tempfile
import time
from pathlib import Path

from moddistill.cli.parser import Parser, user_errors
from moddistill.data import chat_template, tokenizer
from moddistill.errors import invalid
from tools.easy_vqa import images, published, records

VOCAB_SIZE = 512  # an upper bound: the text has fewer words
HELD_OUT = 0.1  # fraction of the train images whose preference pairs are for testing
BUILD = "build.json"

README = """# easy-VQA as LLaVA records

Source: easy-VQA by Victor Zhou (https://github.com/vzhou842/easy-VQA, PyPI `easy-vqa==1.0`),
MIT licence. Built by `python -m tools.easy_vqa`; `build.json` holds the options and counts.
Image names in the records are relative to `images/`.

- `images/train`, `images/test`: the published images, unchanged.
- `images/augmented`: flipped and shifted variants `N_K.png` of train image N; no shape is cut.
- `captions.json`: colour and shape of every train image and variant, as its published answers
  determine them (they name or affirm one, or rule out all others). Other images have no caption.
- `train.json`: the published train questions and answers, on the image or one of its variants.
- `test.json`: the published test questions and answers in their order.
- `preference_train.json`: pairs made by rule from train questions and captions: the published
  answer, and a wrong one of the same kind. In half of them "no" is right and "yes" rejected.
- `preference_test.json`: such pairs for a tenth of the train images, which have none in
  `preference_train.json`. Their captions and questions are in the other train files.
- `text.json`: no images; a caption, a question about its image, and the published answer.
- `tokenizer/`: a byte-level BPE trained on the text of the train files and the chat templates.
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that determine the content of the folder."""

    augmentations: int = 3
    questions_per_record: int = 1
    preference_pairs: int = 12_000
    seed: int = 0

    def __post_init__(self):
        least = {"augmentations": 0, "questions_per_record": 1, "preference_pairs": 1, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise invalid(f"--{name}", getattr(self, name), f">= {bound}")


def make_records(source: Path, options: Options, rng: random.Random) -> dict[str, list[dict]]:
    """Returns the records of every JSON file, by its name without the suffix."""
    groups = published.by_image(published.read_questions(source, "train"))
    known = published.captions(groups)
    variants = options.augmentations + 1
    shuffled = rng.sample(sorted(groups), len(groups))
    tested = set(shuffled[: round(HELD_OUT * len(groups))])
    pairs_tested = round(HELD_OUT * options.preference_pairs)

    def pairs(chosen: set[int], count: int) -> list[dict]:
        of_chosen = {image: questions for image, questions in groups.items() if image in chosen}
        pools = records.preference_pools(of_chosen, known, rng)
        return records.preference_records(pools, count, variants, rng)

    return {
        "captions": records.caption_records(known, variants),
        "train": records.question_records(groups, variants, options.questions_per_record),
        "test": records.test_records(published.read_questions(source, "test")),
        "preference_train": pairs(set(groups) - tested, options.preference_pairs - pairs_tested),
        "preference_test": pairs(tested, pairs_tested),
        "text": records.text_records(groups, known),
    }


def train_tokenizer(files: dict[str, list[dict]]) -> tokenizer.Tokenizer:
    """Trains a tokenizer on the text of the train files and of the conversation templates.

    Without the templates, their fixed sentences would be encoded byte by byte in every prompt.
    """
    train_files = [rows for name, rows in files.items() if "test" not in name]
    texts = [text for rows in train_files for text in records.texts(rows)]
    for template in ("vicuna", "chatml"):
        pieces = chat_template.render(template, [("", "")])
        texts += [piece.text for piece in pieces if not piece.special]
    return tokenizer.train_bpe(texts, vocab_size=VOCAB_SIZE)


def write(out: Path, options: Options) -> dict[str, int]:
    """Writes all files into the empty folder `out`; returns the numbers of images and records."""
    source = published.package_folder()
    rng = random.Random(options.seed)
    files = make_records(source, options, rng)
    counts = images.write_images(source, out / "images", options.augmentations, rng)
    for name, rows in files.items():
        lines = ",\n".join(json.dumps(row) for row in rows)
        (out / f"{name}.json").write_text(f"[\n{lines}\n]\n")
        counts[f"{name}.json"] = len(rows)
    captioned = counts["captions.json"] // (options.augmentations + 1)
    counts["train images without a caption"] = counts["images/train"] - captioned

    train_tokenizer(files).save(str(out / "tokenizer"))
    (out / "README.md").write_text(README)
    options_and_counts = {"options": dataclasses.asdict(options), "counts": counts}
    (out / BUILD).write_text(json.dumps(options_and_counts, indent=2) + "\n")
    return counts


def is_built(out: Path, options: Options) -> bool:
    """Returns True if `out` was built with `options`; UserError if it is another folder."""
    if not out.exists():
        return False
    if not (out / BUILD).is_file():
        raise invalid("--out", str(out), "a new folder, or one that this command built")
    built_with = json.loads((out / BUILD).read_text())["options"]
    expected = dataclasses.asdict(options)
    if built_with != expected:
        raise invalid("--out", str(out), f"a folder built with {expected}, not {built_with}")
    return True


def build(out: Path, options: Options) -> dict[str, int]:
    """Builds the folder `out` atomically; returns the numbers of images and records."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as tmp_dir:
        folder = Path(tmp_dir) / out.name
        folder.mkdir()
        counts = write(folder, options)
        folder.rename(out)
    return counts


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and builds the folder."""
    parser = Parser(__doc__, prog="python -m tools.easy_vqa")
    parser.add_argument("--out", type=Path, required=True, help="folder to build")
    for field in dataclasses.fields(Options):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help="")
    flags = vars(parser.parse_args(argv))
    with user_errors():
        out, options = flags.pop("out"), Options(**flags)
        if is_built(out, options):
            print(f"{out} is complete")
            return
        start = time.monotonic()
        for name, count in build(out, options).items():
            print(f"{count:>7,}  {name}")
        print(f"{out} written in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
