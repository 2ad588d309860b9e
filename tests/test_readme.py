"""The Python shown in README.md and docs/ runs, from top to bottom, and what they link to is there.

A block that cannot run here (it needs a download, a GPU, many processes) says why in a comment right above it:
`<!-- not run: why -->`.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->\s*\Z")
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?!https?://|#|mailto:)([^)#\s]+)[^)]*\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_to_run(text: str) -> list[tuple[int, str]]:
    """(line number, code) of the blocks that are not marked."""
    blocks = []
    for match in BLOCK.finditer(text):
        if not NOT_RUN.search(text[: match.start()]):
            line = text.count("\n", 0, match.start("code"))
            indent = len(match["indent"])
            blocks.append((line, "".join(row[indent:] or "\n" for row in match["code"].splitlines(keepends=True))))
    return blocks


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__page__"}
    for line, code in blocks_to_run(page.read_text()):
        # Empty lines in front, so that a traceback names the page's own line.
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_the_readme_shows_code_that_runs():
    assert blocks_to_run((ROOT / "README.md").read_text())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    missing = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not missing


def table_rows(text: str) -> list[list[str]]:
    """Lines of each table, those of fenced code left out."""
    tables: list[list[str]] = [[]]
    for line in FENCED.sub("", text).splitlines():
        if line.lstrip().startswith("|"):
            tables[-1].append(line.strip())
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def cells(line: str) -> list[str]:
    """A bar begins a cell unless a backslash is before it, inside code too."""
    return re.split(r"(?<!\\)\|", line)[1:-1]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_row_of_a_table_has_a_cell_for_each_column(page):
    for table in table_rows(page.read_text()):
        wrong = [line for line in table if len(cells(line)) != len(cells(table[0]))]
        assert not wrong


def test_a_bar_inside_a_cell_is_found_out():
    text = "| a | b |\n|---|---|\n| x | `|y|` |\n\n```\n| code |\n```\n| c |\n|---|\n| \\|y\\| |\n"
    (first, second) = table_rows(text)
    assert [len(cells(line)) for line in first] == [2, 2, 4]
    assert [len(cells(line)) for line in second] == [1, 1, 1]


def test_blocks_are_found_with_their_lines_and_marks():
    text = """a
```python
x = 1
```
<!-- not run: needs a GPU -->
```python
boom
```
- b
  ```python
  y = 2

  z = 3
  ```
"""
    assert blocks_to_run(text) == [(2, "x = 1\n"), (10, "y = 2\n\nz = 3\n")]
