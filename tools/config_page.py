"""The page of all config fields, docs/config.md, from `moddistill/config.py`.

python -m tools.config_page > docs/config.md
"""

from collections.abc import Iterator

from moddistill.cli.fields import Field, Section, sections, type_name
from moddistill.config import RecipeConfig, TrainConfig

_TOP = """\
# Config fields

Generated from `moddistill/config.py` by `python -m tools.config_page > docs/config.md`.

An experiment file sets these fields ([experiments.md](experiments.md)). On the command line of
`train`, `plan` and `recipe`, `--config.FIELD=VALUE` replaces one, such as `--config.optim.lr=1e-4`.
`NAME` is a name of your choice in the experiment file; on the command line only those of
`data.sources.NAME` and `tasks.NAME` can be new. The `--help` of these commands shows the same
fields.
"""
_RECIPE = """\
Each stage, `config.stages.NAME`, has all the fields above, such as
`--config.stages.d2s.optim.lr=1e-4`.
"""


def page() -> str:
    """Returns the text of docs/config.md."""
    recipe = [each for each in sections(RecipeConfig) if ".stages" not in each.name]
    parts = [_TOP, "## `train` and `plan`\n", *map(_section, sections(TrainConfig))]
    parts += ["## `recipe`\n", *map(_section, recipe), _RECIPE]
    return "\n".join(parts)


def _section(section: Section) -> str:
    return "\n".join([f"### `{section.name}`", section.title, "", *_table(section.fields), ""])


def _table(fields: list[Field]) -> Iterator[str]:
    yield "| field | type | range | default | description |"
    yield "|---|---|---|---|---|"
    for name, kind, default, bounds, description in fields:
        choices = type_name(kind).replace("|", r"\|")
        value = f"`{default}`" if default != "" else ""
        yield f"| `{name}` | `{choices}` | {bounds or ''} | {value} | {description} |"


if __name__ == "__main__":
    print(page(), end="")
