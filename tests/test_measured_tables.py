"""The tables of README.md and docs/ are those of the measured files and of the registry, not typed by hand."""

import pytest

import xhead
from benchmarks import readme


@pytest.mark.parametrize("page", readme.pages(), ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page):
    text = page.read_text()
    assert readme.rendered(text) == text, "run python -m benchmarks.readme"


def test_an_unknown_table_is_named():
    with pytest.raises(ValueError, match=r"no table is called 'speed'; known are cpu.training"):
        readme.rendered("<!-- measured: speed -->\n<!-- end -->")


def test_the_table_of_losses_has_them_all():
    text = (readme.ROOT / "README.md").read_text()
    assert "<!-- listed: losses -->" in text
    assert all(f"| `{name}` |" in text for name in xhead.list_losses())
