import re
from pathlib import Path

import pytest

from lrs_utils import readme

ROOT = Path(__file__).parent.parent


def test_the_readme_shows_what_the_results_say():
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"<!-- table (\w+) -->", text)) == set(readme.TABLES)
    assert readme.filled(text) == text, "run `python -m lrs_utils.readme`"


def test_a_table_is_written_anew_and_an_unknown_one_named(monkeypatch):
    monkeypatch.setitem(readme.TABLES, "test", lambda: [{"way": "a", "gain": "+1.0"}])
    stale = "before\n<!-- table test -->\nold\n<!-- end -->\nafter"
    fresh = "before\n<!-- table test -->\n| way | gain |\n| --- | --- |\n| a | +1.0 |\n<!-- end -->\nafter"
    assert readme.filled(stale) == readme.filled(fresh) == fresh
    with pytest.raises(ValueError, match="the table 'tset'; there are test, front"):
        readme.filled(stale.replace("table test", "table tset"))
