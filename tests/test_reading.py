import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import reading

from lrs_utils import LayerScaling
from lrs_utils.scoring.perplexity import token_nll, window_nll

TEXT = " ".join(f"word{i % 37}" for i in range(400))


def test_tokens_of_a_stretch_average_to_its_nll_and_ids_end_with_it(tiny):
    options = {"stride": 16, "n_windows": 3}
    nll, ids = token_nll(tiny, TEXT, [32, 64], **options)
    assert nll.shape == (2, 3, 16)
    assert ids.shape == (3, 64)
    np.testing.assert_allclose(nll.mean(axis=2), window_nll(tiny, TEXT, [32, 64], **options))
    whole = tiny.tokenizer(TEXT)["input_ids"]
    assert ids[0].tolist() == whole[:64]


def test_a_key_token_is_one_that_any_scaling_makes_likely_from_afar(tiny, monkeypatch):
    ids = np.array([[7, 8, 1, 2, 7, 3, 7, 8, 9, 4]])  # the last four are judged; the short context has six
    near = np.array([[[5.0, 5.0, 5.0, 5.0]]])
    long = {"no scaling": [4.0, 1.0, 1.0, 4.0], "found": [1.0, 4.0, 1.0, 2.5]}

    def read(lm, text, lengths, *, scaling=None, **options):
        if lengths == [6]:
            return near, ids[:, 4:]
        return np.array([[long["no scaling" if scaling.is_identity else "found"]]]), ids

    monkeypatch.setattr(reading, "token_nll", read)
    scaling = LayerScaling.uniform(2.0, tiny.num_layers)
    found = reading.find_key_tokens(tiny, "", {"found": scaling}, length=10, short=6, stride=4, n_windows=1)
    # 7 and 8 come before the short context; 9 is likely but stands nowhere; 4 gains more than 2 nats but isn't likely
    assert found["distance"].tolist() == [6, 6]
    assert found["found"].tolist() == [1.0, 4.0]
    assert found["no scaling"].tolist() == [4.0, 1.0]


def test_the_nearest_place_is_preferred_behind_the_same_token():
    ids = np.array([5, 7, 1, 7, 2, 5, 7])
    assert reading._distance(ids, 6, 5) == 5
    assert reading._distance(np.array([4, 7, 1, 7, 2, 5, 7]), 6, 5) == 3
    assert reading._distance(ids, 6, 0) == 0


def test_changes_by_distance_are_of_windows():
    tokens = pd.DataFrame(
        {"text": "book", "window": [0, 0, 1, 1, 2], "distance": [10, 20, 10, 200, 15], "no scaling": 1.0}
    ).assign(found=[0.0, 1.0, 1.0, 3.0, 0.5])
    table = reading.compare_by_distance(tokens, [0, 100, 300])
    assert len(table) == 1  # one window alone has no interval
    assert table["tokens"].item() == 4
    assert table["change"].item() == pytest.approx(np.mean([-0.5, 0.0, -0.5]))


def test_a_figure_says_what_it_draws_also_where_there_is_nothing():
    table = pd.DataFrame(
        {"model": "tiny", "from": [100, 200], "to": [200, 400], "change": [-0.5, 0.1], "low": -1.0, "high": 1.0}
    )
    _, ax = plt.subplots()
    assert reading.draw_by_distance(table, ax) == "tiny: 100 to 200 tokens -0.50, 200 to 400 tokens +0.10"
    assert "tiny" in [text.get_text() for text in ax.texts]
    assert reading.draw_by_distance(table[:0], ax) == ""
    plt.close("all")
