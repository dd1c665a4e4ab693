import re
from pathlib import Path

import nbformat
import pytest
import readme

ROOT = Path(__file__).parent.parent


def test_the_readmes_show_what_results_and_notebooks_say():
    texts = [path.read_text() for path in readme.READMES]
    assert set(re.findall(r"<!-- table (\w+) -->", "".join(texts))) == set(readme.TABLES)
    assert [readme.filled(text) for text in texts] == texts, "run `python tools/readme.py`"


def test_the_map_links_every_notebook_and_a_figure_that_is_there():
    rows = readme.TABLES["map"]()
    linked = [re.search(r"\((notebooks/\w+\.ipynb)\)", row["notebook"])[1] for row in rows]
    assert [ROOT / path for path in linked] == sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    for row in rows:
        assert (ROOT / re.search(r'src="([^"]+)"', row[""])[1]).exists()
        assert row["question"].endswith("?")


def test_a_table_is_written_anew_and_an_unknown_one_named(monkeypatch):
    monkeypatch.setitem(readme.TABLES, "test", lambda: [{"method": "a", "gain": "+1.0"}])
    stale = "before\n<!-- table test -->\nold\n<!-- end -->\nafter"
    fresh = "before\n<!-- table test -->\n| method | gain |\n| --- | --- |\n| a | +1.0 |\n<!-- end -->\nafter"
    assert readme.filled(stale) == readme.filled(fresh) == fresh
    with pytest.raises(ValueError, match="the table 'tset'; there are best, expect, general, found"):
        readme.filled(stale.replace("table test", "table tset"))


def test_notebooks_are_stamped_with_the_address_that_pyproject_names():
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        before = [cell.source for cell in notebook.cells]
        readme.stamp(notebook, path.name, *readme.address())
        assert [cell.source for cell in notebook.cells] == before, "run `python tools/readme.py`"
        assert notebook.cells[1].metadata["tags"] == ["colab"]


def test_badges_come_and_go_with_the_address():
    plain = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title\n\n**Why?**")])
    readme.stamp(plain, "01_a.ipynb", None, "0.1.0")
    unset = plain.cells[0].source, plain.cells[1].source
    assert "badge" not in unset[0]
    assert "open this notebook in a clone" in unset[1]
    for version in ("0.1.0", "0.2.0"):
        readme.stamp(plain, "01_a.ipynb", "https://github.com/someone/project", version)
        assert plain.cells[0].source.count("colab-badge") == 1
        assert f"github/someone/project/blob/v{version}/notebooks/01_a.ipynb)\n\n**Why?**" in plain.cells[0].source
        assert f"--branch v{version} https://github.com/someone/project " in plain.cells[1].source
    readme.stamp(plain, "01_a.ipynb", None, "0.1.0")
    assert (plain.cells[0].source, plain.cells[1].source) == unset
    assert len(plain.cells) == 2
