"""Results tables as Markdown and as HTML."""

import pytest

from moddistill.evals.task import Column
from moddistill.reports.table import format_table, html_table

COLUMNS = (
    Column("model", "Model", ""),
    Column("accuracy", "Accuracy"),
    Column("yes_no", "Yes/no"),
    Column("other", "Other"),
    Column("false_yes", "False yes"),
    Column("parameters", "Parameters", ","),
    Column("activated", "Activated", ","),
    Column("seconds", "Seconds", ",.0f"),
)
ROW = {
    "model": "teacher",
    "accuracy": 0.95124,
    "yes_no": 0.94,
    "other": 1.0,
    "false_yes": 0.05,
    "parameters": 4_213_440,
    "activated": 1_000,
    "seconds": 261.6,
}


def test_a_markdown_table_is_aligned_and_formatted_by_its_columns():
    small = ROW | {"model": "student", "parameters": 7, "activated": 7}
    assert format_table(COLUMNS, [ROW, small]).splitlines() == [
        "| Model   | Accuracy | Yes/no | Other | False yes | Parameters | Activated | Seconds |",
        "| ------- | -------: | -----: | ----: | --------: | ---------: | --------: | ------: |",
        "| teacher |    0.951 |  0.940 | 1.000 |     0.050 |  4,213,440 |     1,000 |     262 |",
        "| student |    0.951 |  0.940 | 1.000 |     0.050 |          7 |         7 |     262 |",
    ]


def test_the_html_table_has_the_same_cells_escaped():
    html = html_table((Column("model", "<Model>", ""), COLUMNS[1]), [{"model": "&", "accuracy": 1}])
    assert "<tr><th>&lt;Model&gt;</th><th>Accuracy</th></tr>" in html
    assert "<tr><td>&amp;</td><td>1.000</td></tr>" in html


@pytest.mark.parametrize("row", [ROW | {"recall": 1.0}, {"model": "teacher"}])
def test_a_row_with_other_keys_than_the_columns_is_an_error(row):
    with pytest.raises(ValueError, match="expected exactly the keys model, accuracy"):
        format_table(COLUMNS, [row])
