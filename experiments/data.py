"""The paper's data: the published sources of every stage, and where to get them.

    python -m experiments.data

prints the table, says which files are there, and gives the command that downloads a missing one.

A file is expected at `data/NAME/FILE`, with NAME and FILE as on the hub, and is read as published.
Images are expected below `data/images`, in the folders that the records name (docs/data.md).

The paper gives one number of records a stage and names data sets, not files, and the reference code
reads one unnamed file a stage. What follows from neither is noted as unknown.
"""

import dataclasses
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from moddistill.config import SourceConfig
from moddistill.errors import not_one_of

Form = Literal["LLaVA", "RLAIF-V"]  # of docs/data.md
IMAGES = "data/images"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Records of one published file, or of several with one pattern.

    Attributes:
      hub: data set on the Hugging Face hub.
      file: file in it, or a pattern.
      form: form of the records.
      records: their number; in thousands if only the file's name or the authors state it.
      licence: of the records, as the publisher states it; images have licences of their own.
      image_sets: where the images come from.
      images: folder that image names are relative to; empty for images inside of the records.
      weight: uses of each record in an epoch.
      unknown: what the publisher leaves open.
    """

    hub: str
    file: str
    form: Form = "LLaVA"
    records: int
    licence: str
    image_sets: str
    images: str = IMAGES
    weight: float = 1.0
    unknown: str = ""

    @property
    def folder(self) -> str:
        """Folder of the data set."""
        return f"data/{self.hub.split('/')[1]}"

    @property
    def path(self) -> str:
        """Path or pattern of its files."""
        return f"{self.folder}/{self.file}"

    def is_present(self) -> bool:
        """Returns whether there is such a file."""
        return any(map(Path.is_file, map(Path, glob.glob(self.path))))

    def download_command(self) -> str:
        """Returns the command that downloads the files, without images in files of their own."""
        files = f'--include "{self.file}"' if glob.has_magic(self.file) else self.file
        return f"hf download {self.hub} {files} --repo-type dataset --local-dir {self.folder}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageData:
    """The sources of a stage.

    Attributes:
      published: number of records that the paper states (LLaVA-1.5 for `sft`).
      sources: by the name that they have in the config.
      unknown: why the sources have another number, as far as it is known.
    """

    published: int
    sources: dict[str, Source]
    unknown: str = ""

    @property
    def records(self) -> int:
        """Records of an epoch."""
        return round(sum(each.records * each.weight for each in self.sources.values()))


def _moe_llava(name: str, records: int, images: str) -> Source:
    """Returns a source of MoE-LLaVA's packaging, whose names have the number of records."""
    return Source(
        hub="LanguageBind/MoE-LLaVA",
        file=f"train_json/{name}.json",
        records=records,
        licence="apache-2.0",
        image_sets=f"{images}.zip of the same data set",
        unknown="exact number of records",
    )


def _internvl(name: str, records: int, images: str) -> Source:
    return Source(
        hub="OpenGVLab/InternVL-Chat-V1-2-SFT-Data",
        file=f"{name}.jsonl",
        records=records,
        licence="apache-2.0",
        image_sets=images,
        images=f"{IMAGES}/{images}",
    )


# Names of stages are those of the experiments. The teacher's first stage reads what `init` reads;
# its second is `sft`.
STAGES = {
    "init": StageData(
        published=600_000,
        sources={
            "llava_pretrain": Source(
                hub="liuhaotian/LLaVA-Pretrain",
                file="blip_laion_cc_sbu_558k.json",
                records=558_128,
                licence="other (those of CC-3M and BLIP)",
                image_sets="images.zip of the same data set",
                # Where ShareGPT4V's records expect the same images.
                images=f"{IMAGES}/llava/llava_pretrain/images",
            )
        },
    ),
    "sft": StageData(
        published=665_000,
        sources={
            "llava_mix": Source(
                hub="liuhaotian/LLaVA-Instruct-150K",
                file="llava_v1_5_mix665k.json",
                records=665_298,
                licence="cc-by-4.0, and OpenAI's terms of use",
                image_sets="coco, gqa, ocr_vqa, textvqa, vg; 40,688 records have none",
            )
        },
    ),
    "d2d": StageData(
        published=2_400_000,
        sources={
            "sharegpt4v": Source(
                hub="Lin-Chen/ShareGPT4V",
                file="share-captioner_coco_lcs_sam_1246k_1107.json",
                records=1_246_901,
                licence="cc-by-nc-4.0",
                image_sets="coco, llava, sam",
            ),
            "allava": Source(
                hub="FreedomIntelligence/ALLaVA-4V",
                file="allava_laion/ALLaVA-Caption-LAION-4V.json",
                records=468_670,
                licence="cc-by-nc-4.0 or apache-2.0",
                image_sets="allava_laion/image_chunks/*.zip of the same data set",
                unknown="which of the two licences holds, since the publisher has stated both; the "
                "number of records has changed between releases",
            ),
            "svit": _moe_llava("svit_tune_157k", 157_000, "svit_tune"),
            "lvis": _moe_llava("lvis_tune_220k_", 220_000, "lvis_tune"),
            "lrv": _moe_llava("lrv_tune_331k", 331_000, "lrv_tune"),
            "mimic_it": _moe_llava("la_tune_256k", 256_000, "mimicit_tune/LA"),
        },
        unknown="Which 2.4M records of these six sets the paper uses; without mimic_it they have "
        "2.42M. The authors add that about 1M general captions of MobileVLM's mix are in this "
        "stage, without naming them.",
    ),
    "d2s": StageData(
        published=1_400_000,
        sources={
            "mobilevlm": Source(
                hub="mtgv/MobileVLM_V2_FT_Mix2M",
                file="MobileVLM_V2_FT_Mix2M.json",
                records=2_400_000,
                licence="cc-by-4.0, and OpenAI's terms of use",
                image_sets="coco, gqa, iconqa_data, ocr_vqa, sam, SBU, ScienceQA, share_textvqa, "
                "textvqa, vg, web-celebrity, web-landmark, wikiart",
                unknown="exact number of records, and the number of each of its sets",
            ),
            "dvqa": _internvl("dvqa_train_200k", 200_000, "dvqa"),
            "chartqa": _internvl("chartqa_train_18k", 18_317, "chartqa"),
            "ai2d": _internvl("ai2d_train_12k", 12_413, "ai2d"),
            "docvqa": _internvl("docvqa_train_10k", 10_211, "docvqa"),
            "geoqa": _internvl("geoqa+", 72_318, "geoqa+"),
            "synthdog": _internvl("synthdog_en", 29_765, "synthdog-en"),
        },
        unknown="Which records of mobilevlm the paper uses: the authors moved about 1M general "
        "captions to d2d, without naming them. Here the whole file is read.",
    ),
    "preference": StageData(
        published=80_000,
        sources={
            "rlaif_v": Source(
                hub="openbmb/RLAIF-V-Dataset",
                file="RLAIF-V-Dataset_*.parquet",
                form="RLAIF-V",
                records=83_132,
                licence="cc-by-nc-4.0",
                image_sets="inside of the records",
                images="",
            )
        },
        unknown="Which 80k pairs of the release the paper uses.",
    ),
}


def sources(stage: str) -> dict[str, SourceConfig]:
    """Returns `DataConfig.sources` of a stage.

    Raises:
      UserError: the stage is unknown.
    """
    if stage not in STAGES:
        raise not_one_of("stage", stage, STAGES)
    return {
        name: SourceConfig(path=each.path, images=each.images, weight=each.weight)
        for name, each in STAGES[stage].sources.items()
    }


def report() -> str:
    """Returns the table of sources, what is unknown, and commands that download missing files."""
    lines, missing = [], []
    for name, stage in STAGES.items():
        lines += [f"{name}: {stage.records:,} records ({stage.published:,} published)"]
        lines += _aligned([_row(key, each) for key, each in stage.sources.items()])
        notes = {key: each.unknown for key, each in stage.sources.items()} | {name: stage.unknown}
        lines += [f"  unknown, {key}: {note}" for key, note in notes.items() if note]
        missing += [each for each in stage.sources.values() if not each.is_present()]
    if missing:
        lines += ["", "Missing files:", *(f"  {each.download_command()}" for each in missing)]
    return "\n".join(lines)


def _row(name: str, source: Source) -> tuple[str, ...]:
    state = "present" if source.is_present() else "missing"
    count = f"{source.records:,}" + (f" x {source.weight:g}" if source.weight != 1 else "")
    images = f"images: {source.image_sets}"
    return (name, count, state, source.form, source.path, source.licence, images)


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  " + "  ".join(cells).rstrip()


if __name__ == "__main__":
    print(report())
