"""Tables about the records of a source, for the terminal and the page."""

import itertools
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from moddistill.errors import one_line
from moddistill.evals.task import Column
from moddistill.prepare.check import Findings

_QUANTILES = {"5 %": 0.05, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "95 %": 0.95}
_BINS = 16  # of lengths up to the longest that is used
_MOST_ROWS = 20  # of a table
_SHARE = Column("share", "Share", ".1%")
_EXAMPLES = 3  # of the records that occur most often


class Section(NamedTuple):
    """A table with a title.

    Attributes:
      bars: (label, count) of a histogram.
      items: lines below the table.
    """

    title: str
    note: str
    columns: tuple[Column, ...]
    rows: list[dict[str, Any]]
    bars: tuple[tuple[str, int], ...] = ()
    items: tuple[str, ...] = ()


def make_sections(findings: Findings, max_length: int = 0) -> list[Section]:
    """Returns the tables.

    Args:
      max_length: longest sample of a run; 0 if tokens were not counted.
    """
    sections = [_counts(findings), _files(findings), _distributions(findings, max_length)]
    if max_length:
        sections.append(_lengths(findings, max_length))
    sections += [_formats(findings), _duplicates(findings), _rejected(findings)]
    return [section for section in sections if section.rows]


def _counts(findings: Findings) -> Section:
    usable = findings.records[findings.records["is_usable"]]
    pairs = int(np.count_nonzero(usable["is_pair"]))
    with_images = int(np.count_nonzero(usable["images"]))
    counts = {
        "records": len(findings.records),
        "usable": len(usable),
        "rejected": len(findings.records) - len(usable),
        "conversations": len(usable) - pairs,
        "preference pairs": pairs,
        "with images": with_images,
        "without images": len(usable) - with_images,
        "turns": int(usable["turns"].sum(dtype=np.int64)),
        "images": len(findings.images),
    }
    columns = (Column("name", "Records", ""), Column("count", "Number", ","))
    rows = [{"name": name, "count": count} for name, count in counts.items()]
    return Section("Records", "All but the first three count usable records only.", columns, rows)


def _files(findings: Findings) -> Section:
    columns = (
        Column("name", "File", ""),
        Column("records", "Records", ","),
        Column("usable", "Usable", ","),
        Column("images", "Images", ","),
    )
    rows, start = [], 0
    for piece in findings.pieces:
        records = findings.records[start : start + len(piece)]
        start += len(piece)
        row = {
            "name": one_line(piece.records.name),
            "records": len(records),
            "usable": int(np.count_nonzero(records["is_usable"])),
            "images": int(records["images"].sum(dtype=np.int64)),
        }
        rows.append(row)
    if len(rows) > _MOST_ROWS:
        others = rows[_MOST_ROWS - 1 :]
        total = {key: sum(row[key] for row in others) for key in ("records", "usable", "images")}
        rows = [*rows[: _MOST_ROWS - 1], {"name": f"{len(others)} others"} | total]
    return Section("Files", "", columns, rows)


def _distributions(findings: Findings, max_length: int) -> Section:
    records = findings.records[findings.records["is_usable"]]
    images = findings.images
    quantities = {"turns of a record": records["turns"], "images of a record": records["images"]}
    if max_length:
        quantities["tokens of a sample"] = records["tokens"]
    quantities |= {
        "width of an image": images["width"],
        "height of an image": images["height"],
        "bytes of an image": images["bytes"],
    }
    rows = [
        {"name": name} | _percentiles(values) for name, values in quantities.items() if len(values)
    ]
    names = ("least", *_QUANTILES, "most", "mean")
    columns = tuple(Column(name, name, ",.1f" if name == "mean" else ",.0f") for name in names)
    return Section("Distributions", "", (Column("name", "Of usable records", ""), *columns), rows)


def _percentiles(values: np.ndarray) -> dict[str, float]:
    quantiles = np.quantile(values, list(_QUANTILES.values())).tolist()
    ends = {"least": float(values.min()), "most": float(values.max())}
    return ends | {"mean": float(values.mean())} | dict(zip(_QUANTILES, quantiles, strict=True))


def _lengths(findings: Findings, max_length: int) -> Section:
    records = findings.records[findings.records["is_usable"]]
    long = records["tokens"] > max_length
    left_out = records["needed"] > max_length
    counts = {
        f"up to {max_length:,} tokens": np.count_nonzero(~long),
        "longer, truncated": np.count_nonzero(long & ~left_out),
        "longer, left out": np.count_nonzero(left_out),
    }
    rows = [
        {"name": name, "count": int(count), "share": count / max(1, len(records))}
        for name, count in counts.items()
    ]
    columns = (Column("name", "Samples", ""), Column("count", "Number", ","), _SHARE)
    note = (
        "Tokens include the patches of images; of a pair, those of the longer side. A sample is "
        "left out if an image, all answer tokens or a part of a pair would be truncated."
    )
    return Section("Lengths", note, columns, rows, _histogram(records["tokens"], max_length))


def _histogram(tokens: np.ndarray, max_length: int) -> tuple[tuple[str, int], ...]:
    step = -(-max_length // _BINS)
    edges = [*range(0, max_length, step), max_length]
    # A bin has the lengths above its first edge and up to its last one.
    counts = np.bincount(np.searchsorted(edges[1:], tokens), minlength=len(edges)).tolist()
    labels = [f"{low + 1:,} to {high:,}" for low, high in itertools.pairwise(edges)]
    return tuple(zip([*labels, "more"], counts, strict=True))


def _formats(findings: Findings) -> Section:
    counts = Counter(findings.images["format"].tolist())
    rows = [
        {"name": name.decode(), "count": count, "share": count / len(findings.images)}
        for name, count in counts.most_common()
    ]
    columns = (Column("name", "Format", ""), Column("count", "Images", ","))
    return Section("Images", "", (*columns, _SHARE), rows)


def _duplicates(findings: Findings) -> Section:
    numbers = np.flatnonzero(findings.records["is_usable"])
    digests = {
        "records": (findings.records["digest"][numbers], numbers),
        "images": (findings.images["digest"], findings.images["record"]),
    }
    rows, items = [], []
    for name, (digest, owner) in digests.items():
        if not len(digest):
            continue
        unique, first, counts = np.unique(digest, return_index=True, return_counts=True)
        repeated = len(digest) - len(unique)
        row = {"name": name, "count": len(digest), "distinct": len(unique), "repeated": repeated}
        rows.append(row)
        for i in np.argsort(-counts, kind="stable")[:_EXAMPLES].tolist():
            if counts[i] > 1:
                place = findings.place(int(owner[first[i]]))
                items.append(f"{counts[i]:,} equal {name}: first in {one_line(place)}")
    columns = (
        Column("name", "Equal", ""),
        Column("count", "All", ","),
        Column("distinct", "Distinct", ","),
        Column("repeated", "Repeated", ","),
    )
    note = "Records are equal if their texts and images are, whatever their ids."
    return Section("Duplicates", note, columns, rows, items=tuple(items))


def _rejected(findings: Findings) -> Section:
    found = findings.reasons.commonest(_MOST_ROWS)
    rows = [{"reason": one_line(each), "count": found[each]["count"]} for each in found]
    columns = (Column("reason", "Reason", ""), Column("count", "Records", ","))
    items = tuple(one_line(each["example"]) for each in found.values())
    return Section("Rejected", "An example of each reason follows.", columns, rows, items=items)
