"""Every causal language model type that transformers can build tiny: what is measured is right, or refused by name."""

import importlib.util

import pandas as pd
import pytest
from transformers import __version__ as transformers_version

from lrs_utils.notebook import ROOT

_spec = importlib.util.spec_from_file_location("list_families", ROOT / "tools" / "list_families.py")
list_families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(list_families)
SHIPPED = pd.read_csv(list_families.TABLE, comment="#", index_col="type").fillna("")


@pytest.mark.parametrize("model_type", list_families.TYPES)
def test_a_family_is_scaled_exactly_or_refused_by_name(model_type):
    row = list_families.verdicts(model_type)
    found = {name: row.get(name, "").partition(":")[0] for name in list_families.CHECKS}
    assert "wrong" not in found.values(), row
    if f"transformers {transformers_version} " in list_families.TABLE.read_text().partition("\n")[0]:
        assert found == {name: SHIPPED.loc[model_type, name].partition(":")[0] for name in found}


def test_the_table_holds_families_of_every_kind():
    exact = SHIPPED == "exact"
    assert exact[[*list_families.CHECKS]].sum().min() > 50
    assert SHIPPED.loc["phimoe", "factors"] != "exact"
    assert SHIPPED.loc["gpt2", "score"].startswith("refused: GPT2LMHeadModel can't be scaled")
