from pathlib import Path

from tools import config_page


def test_config_page_is_up_to_date():
    """Otherwise: `python -m tools.config_page > docs/config.md`."""
    assert Path("docs/config.md").read_text() == config_page.page()
