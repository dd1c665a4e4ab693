import bases
import pytest
from bases import make_with_base, measure_base, scale_all_layers

from lrs_utils import load_lm


@pytest.fixture
def lm():
    return load_lm("small-rope", dtype="float32", device="cpu")


def test_a_factor_of_one_is_no_scaling_under_both_schemes(lm):
    rows = scale_all_layers(lm, [1.0, 2.0], n_contexts=2, seed=1, length=128)
    means = rows.groupby(["scheme", "factor"])[["accuracy", "nll"]].mean()
    assert (means.loc[("pi", 1.0)] == means.loc[("ntk", 1.0)]).all()
    assert means.loc[("pi", 2.0), "nll"] > means.loc[("pi", 1.0), "nll"]
    assert list(rows["context"].unique()) == [0, 1]


def test_a_model_is_made_once(lm, tmp_path, monkeypatch):
    made = []

    def make(folder, **changed):
        made.append(changed)
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        (folder / "losses.csv").write_text("length,step,loss\n")

    monkeypatch.setattr(bases.small, "make", make)
    for _ in range(2):
        make_with_base(1000, 0.5, tmp_path)
    assert made == [{"share": 0.5, "rope_theta": 1000.0}]
    rows = measure_base(1000, 0.5, tmp_path, [1.0], 1, 0, 128)
    assert (rows["base"] == 1000).all()
    assert rows["slowest"].iloc[0] == pytest.approx(2 * 3.14159265 * 10_000 ** (30 / 32) / 256, rel=1e-3)  # the copy's
