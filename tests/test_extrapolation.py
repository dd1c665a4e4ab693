import extrapolation
import numpy as np
import pandas as pd
import pytest

from lrs_utils import LM, ExtendedScaling, load_lm
from lrs_utils.scoring.window import context_tokens
from lrs_utils.training.small import training_texts


@pytest.fixture(scope="module")
def small() -> LM:
    return load_lm("small-rope", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def beyond(small):
    return extrapolation.ask_beyond(small, training_texts()[0], 2 * small.window, contexts=2, seed=0)


def test_settings_leave_out_what_is_the_same_or_has_no_gradient():
    settings = extrapolation.list_settings()
    assert len(settings) == len({*settings}) == 19
    assert ("PI", "divide", "GA") not in settings
    assert ("YaRN", "multiply", "gradient") not in settings


def test_a_scheme_is_stretched_beyond_the_window_only(small):
    assert extrapolation.stretch(small, "PI", small.window).is_identity
    assert extrapolation.stretch(small, "no scaling", 4 * small.window).is_identity
    far = {name: extrapolation.stretch(small, name, 4 * small.window) for name in extrapolation.SCHEMES}
    assert {name: scaling.extension for name, scaling in far.items()} == dict.fromkeys(far, 4.0) | {"Dynamic NTK": 1.0}
    found = extrapolation.stretch(small, "NTK", 512, [1.0, 1.1, 1.2, 1.3], "divide")
    assert isinstance(found, ExtendedScaling)
    assert (found.factors, found.combine) == ((1.0, 1.1, 1.2, 1.3), "divide")


def test_each_scheme_slows_its_own_frequencies():
    slow = extrapolation.slow_frequencies
    np.testing.assert_allclose(slow("pi"), 4)
    assert (slow("ntk")[0], slow("yarn")[0]) == (1, 1)
    assert slow("ntk")[-1] == pytest.approx(4)
    multiplied, divided = (slow("ntk", 1.5, combine) for combine in ("multiply", "divide"))
    assert (multiplied[0], divided[0]) == (1, 1.5)
    assert multiplied[-1] == pytest.approx(divided[-1]) == pytest.approx(6)


def test_what_is_judged_fills_the_length_and_lies_beyond_the_window(small, beyond):
    for probe in beyond.probes:
        read, whole = len(small.tokenizer(probe.context)["input_ids"]), context_tokens(small, probe)
        assert small.window < read < whole <= 2 * small.window
        assert whole > 1.8 * small.window


@pytest.mark.parametrize("how", ["one factor", "GA", "gradient"])
def test_a_search_begins_at_the_scheme_alone_and_ends_no_worse(small, beyond, how):
    start = extrapolation.stretch(small, "NTK", 2 * small.window)
    candidates, nll = extrapolation.search_layers(small, beyond, start, how, 4)
    assert candidates[0].factors == (1.0,) * small.num_layers
    assert min(nll) < nll[0]
    assert all(candidate.extension == 2 for candidate in candidates)
    uniform = [len({*candidate.factors}) == 1 for candidate in candidates]
    assert all(uniform) == (how == "one factor")


def found_by(**best: float) -> pd.DataFrame:
    """Rows of a search with two layers, by setting: "PI, multiply, GA" is PI_multiply_GA."""
    rows = []
    for name, nll in best.items():
        scheme, combine, how = name.replace("_", ", ").replace("one, factor", "one factor").split(", ")
        method = f"{scheme}, {combine}, {how}"
        rows += [{"method": method, "scheme": scheme, "combine": combine, "how": how, "best": nll, "factor": 1.5}] * 2
    return pd.DataFrame(rows)


def test_of_each_scheme_the_best_of_both_kinds_is_chosen():
    ntk = {"NTK_divide_GA": 2.0, "NTK_multiply_gradient": 1.0, "NTK_divide_one_factor": 1.5}
    found = found_by(**ntk, NTK_multiply_one_factor=1.6, PI_multiply_GA=4)
    best = extrapolation.choose_best(found)
    assert [*best.index] == ["PI, multiply, GA", "NTK, divide, one factor", "NTK, multiply, gradient"]
    assert [*best["kind"]] == ["layer factors", "one factor", "layer factors"]
    assert [*best["scheme"]] == ["PI", "NTK", "NTK"]


def test_what_is_measured_is_no_scaling_each_scheme_and_what_was_found():
    readings = extrapolation.list_readings(found_by(PI_multiply_GA=4), without=("NTK",))
    assert [*readings] == ["no scaling", *(f"{n} alone" for n in ("PI", "Dynamic NTK", "YaRN")), "PI, multiply, GA"]
    assert readings["no scaling"] == ("no scaling",)
    assert readings["PI, multiply, GA"] == ("PI", "multiply", (1.5, 1.5))


@pytest.fixture
def rows() -> pd.DataFrame:
    """Two texts at two lengths; one factor lowers PI's perplexity by 10 %, layer factors by 20 %."""
    changes = {"no scaling": 3.0, "PI alone": 1.0, "PI, multiply, one factor": 0.9, "PI, multiply, GA": 0.8}
    return pd.DataFrame(
        [
            {"method": method, "text": text, "length": length, "nll": np.log(change * (1 + text) * length)}
            for method, change in changes.items()
            for text in range(2)
            for length in (256, 512)
        ]
    )


def test_changes_are_of_perplexity_in_per_cent_and_paired_by_text(rows):
    table = extrapolation.compare_perplexity(rows).set_index(["method", "length"])
    assert table.loc[("PI, multiply, GA", 512), "change"] == pytest.approx(-20)
    assert table.loc[("PI, multiply, GA", 512), "high"] == pytest.approx(-20), "the same in each text"
    assert table.loc[("PI alone", 256), "perplexity"] == pytest.approx(256 * np.sqrt(2))
    assert table.loc[["no scaling", "PI alone"], "change"].isna().all()
    against = extrapolation.compare_perplexity(rows, extrapolation.name_one_factor).set_index(["method", "length"])
    assert against.loc[("PI, multiply, GA", 256), "change"] == pytest.approx(100 * (0.8 / 0.9 - 1))


def test_the_best_is_compared_with_the_scheme_alone_and_with_one_factor(rows):
    found = found_by(PI_multiply_one_factor=1.2, PI_multiply_GA=1.1)
    alone = extrapolation.compare_best(rows, found)
    assert [*alone["kind"].unique()] == ["one factor", "layer factors"]
    one = extrapolation.compare_best(rows, found, "one factor")
    assert [*one["method"].unique()] == ["PI, multiply, GA"]
    at = one[one["length"] == 512]
    assert extrapolation.list_changes(at) == "-11.1 % [-11.1, -11.1] on PI"
    dots = extrapolation.group_by_scheme(at)
    assert [*dots.index] == [("PI", "layer factors")]
    assert [*dots.columns] == ["mean", "low", "high"]
    assert [*extrapolation.group_by_setting(at).index] == [("PI", "GA")]


def test_only_changes_beyond_chance_are_counted():
    table = pd.DataFrame({"change": [-1.0, -2.0, 3.0, 4.0, 5.0], "p": [0.01, 0.2, 0.04, 0.03, np.nan]})
    assert extrapolation.count_certain(table) == (1, 2)


def test_names_of_rivals():
    assert extrapolation.name_alone("Dynamic NTK, divide, GA") == "Dynamic NTK alone"
    assert extrapolation.name_one_factor("NTK, divide, gradient") == "NTK, divide, one factor"
    assert extrapolation.name_one_factor("NTK alone") == "NTK alone"
    assert extrapolation.name_multiply("YaRN, divide, GA") == "YaRN, multiply, GA"


def test_schemes_alone_are_shown_by_length_and_in_words(rows):
    values = extrapolation.average_alone(rows)
    assert [*values.index] == ["no scaling", "PI"]
    assert values.loc["no scaling", 512] == pytest.approx(3 * 512 * np.sqrt(2))
    assert extrapolation.say_lengths(values[[256]] * 0 + 7) == "no scaling 7.0 at 256; PI 7.0 at 256 tokens."
    names = [
        extrapolation.say_setting(method) for method in ("PI alone", "NTK, divide, GA", "YaRN, divide, one factor")
    ]
    assert names == ["PI alone", "NTK with layer factors", "YaRN with one factor"]


def test_a_panel_for_each_length_that_was_measured(small, rows):
    found = found_by(PI_multiply_one_factor=1.2, PI_multiply_GA=1.1)
    panels = extrapolation.list_panels(small, rows, found, [512, 512, 4096])
    assert [*panels] == ["small-rope, 512 tokens"]
    assert [*panels["small-rope, 512 tokens"]["mean"]] == pytest.approx([-10, -20])


def test_retrieval_is_shown_alone_and_with_the_best():
    best = extrapolation.choose_best(found_by(PI_multiply_GA=1.1))
    right = {"no scaling": 0, "PI alone": 25, "NTK alone": 0, "Dynamic NTK alone": 0, "YaRN alone": 50}
    right["PI, multiply, GA"] = 75
    rows = [
        {"method": method, "task": task, "length": 512, "context": context, "right": value + 10 * context}
        for method, value in right.items()
        for task in ("pass key", "pairs")
        for context in range(2)
    ]
    panels = extrapolation.group_retrieval(pd.DataFrame(rows), best, "pairs", [512])
    assert [*panels] == ["512 tokens"]
    table = panels["512 tokens"]
    assert table.loc[("PI", "layer factors"), "mean"] == 80
    assert [*table.loc[("YaRN", "scheme alone")]] == [55, 50, 60]
    assert table.index[-1] == ("no scaling", "scheme alone")
