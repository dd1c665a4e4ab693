import re
from pathlib import Path

import pytest

from lrs_utils import readme

ROOT = Path(__file__).parent.parent


def test_the_readmes_show_what_results_and_notebooks_say():
    texts = [path.read_text() for path in readme.READMES]
    assert set(re.findall(r"<!-- table (\w+) -->", "".join(texts))) == set(readme.TABLES)
    assert [readme.filled(text) for text in texts] == texts, "run `python -m lrs_utils.readme`"


def test_the_map_links_every_notebook_and_a_figure_that_is_there():
    rows = readme.TABLES["map"]()
    linked = [re.search(r"\((notebooks/\w+\.ipynb)\)", row["notebook"])[1] for row in rows]
    assert [ROOT / path for path in linked] == sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    for row in rows:
        assert (ROOT / re.search(r'src="([^"]+)"', row[""])[1]).exists()
        assert row["question"].endswith("?")


def test_a_table_is_written_anew_and_an_unknown_one_named(monkeypatch):
    monkeypatch.setitem(readme.TABLES, "test", lambda: [{"way": "a", "gain": "+1.0"}])
    stale = "before\n<!-- table test -->\nold\n<!-- end -->\nafter"
    fresh = "before\n<!-- table test -->\n| way | gain |\n| --- | --- |\n| a | +1.0 |\n<!-- end -->\nafter"
    assert readme.filled(stale) == readme.filled(fresh) == fresh
    with pytest.raises(ValueError, match="the table 'tset'; there are test, front"):
        readme.filled(stale.replace("table test", "table tset"))
