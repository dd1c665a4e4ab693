"""Bad input is refused with a sentence: the argument, its value, the mend."""

from functools import partial

import numpy as np
import pytest

from lrs_utils import (
    GeneticSearch,
    GradientSearch,
    LayerScaling,
    RandomSearch,
    RefinementSearch,
    TpeSearch,
    find_scaling,
    load_factors,
    load_lm,
    score,
    search,
    tasks,
)
from lrs_utils.arguments import number, whole
from lrs_utils.scoring.perplexity import window_nll
from lrs_utils.searchers.objectives import utilisation_then_nll

TASK = partial(tasks.kv_retrieval, 3, keys="short")
SUITE = tasks.kv_retrieval(3, 1, keys="short")
random = partial(RandomSearch, 4)
genetic = partial(GeneticSearch, 4)
searched = partial(search, suite=SUITE, searcher=RandomSearch(2), budget=2)


def nan(outcomes):
    return [(np.nan,)] * len(outcomes.exact)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda _: random(batch=0), "batch is 0; it must be at least 1"),
        (lambda _: TpeSearch(4, batch=0), "batch is 0; it must be at least 1"),
        (lambda _: RefinementSearch(LayerScaling((1.0, 1.2)), moves=0), "moves is 0; it must be at least 1"),
        (lambda _: RefinementSearch(LayerScaling((1.0, 1.2)), step=0), "step is 0; it must be above 0"),
        (lambda lm: find_scaling(lm, TASK, rate=0, contexts=(2, 2, 2)), "rate is 0; it must be above 0"),
        (lambda _: random(step=0), "step is 0; it must be at least"),
        (lambda _: random(step=-0.1), "step is -0.1; it must be at least"),
        (lambda _: random(step=5), "step is 5; it must be at least .* at most 1"),
        (lambda _: random(step=1e-9), "step is 1e-09; it must be at least 0.0001"),
        (lambda _: random(bounds=(0.5, np.inf)), r"bounds\[1\] is inf; give a finite number above 0"),
        (lambda _: random(bounds=(0, 2)), r"bounds\[0\] is 0; it must be above 0"),
        (lambda _: random(bounds=(2, 1)), r"bounds is \(2.0, 1.0\); factors and temperatures need 0 < low < high"),
        (lambda _: random(first_layer=-1), "first_layer is -1; it must be at least 0"),
        (lambda _: random(first_layer=1.5), "first_layer is 1.5; give a whole number at least 0"),
        (lambda _: genetic(mutations=-1), "mutations is -1; it must be at least 0"),
        (lambda _: genetic(p_gene=7), "p_gene is 7; it must be above 0 and at most 1"),
        (lambda _: genetic(parents=99), "parents is 99; it must be at least 2 and at most 64"),
        (lambda _: genetic(tries=0), "tries is 0; it must be at least 1"),
        (lambda lm: searched(lm, budget=1.5), "budget is 1.5; give a whole number at least 1"),
        (lambda lm: searched(lm, budget=np.nan), "budget is nan; give a whole number at least 1"),
        (lambda lm: searched(lm, budget=True), "budget is True; give a whole number"),
        (lambda lm: searched(lm, ledger="l.sqlite"), r"ledger is 'l.sqlite'; give a Ledger: Ledger\('l.sqlite'\)"),
        (lambda lm: searched(lm, suite=[]), "suite is an empty list; give at least one suite"),
        (lambda lm: searched(lm, suite=[SUITE] * 2), r"2 suites and the default objective .* give an objective of 2"),
        (lambda lm: searched(lm, objective=nan), r"the objective gave \(nan,\) to LayerScaling"),
        (lambda lm: GradientSearch(lm, SUITE, rate=0), "rate is 0; it must be above 0"),
        (lambda lm: GradientSearch(lm, SUITE, rate=np.nan), "rate is nan; give a finite number above 0"),
        (lambda lm: GradientSearch(lm, SUITE, steps=2.5), "steps is 2.5; give a whole number at least 1"),
        (lambda lm: score(lm, SUITE, LayerScaling((1.0, 1.2))), r"scalings is a single scaling; give a list"),
        (lambda lm: LayerScaling((1.0, 1.2)).applied_to(lm).__enter__(), "a LM can't be scaled; give its .model"),
        (lambda _: LayerScaling(["1.0", "1.2"]), r"factors\[0\] is '1.0'; it must be a positive finite number"),
        (lambda _: LayerScaling([True, 1.2]), r"factors\[0\] is True; it must be a positive finite number"),
        (lambda _: LayerScaling([1.0, 1e308]), r"factors\[1\] is 1e\+308; .* at most 1e\+06"),
        (lambda _: LayerScaling({1.0, 1.2}), "factors must be a sequence of numbers, one a layer"),
        (lambda lm: window_nll(lm, "word " * 90, [64], stride=0), "stride is 0; it must be at least 1"),
        (lambda lm: score(lm, SUITE, ["1.2"]), r"scalings\[0\] is '1.2'; give a LayerScaling or a HeadScaling"),
        (lambda lm: score(lm, None, [LayerScaling((1.0, 1.2))]), "suite is None; give a suite"),
        (
            lambda lm: score(lm.model, SUITE, [LayerScaling((1.0, 1.2))]),
            "lm is LlamaFor.*; give what `load_lm`",
        ),
        (lambda _: find_scaling(None, SUITE), "lm is None; give what `load_lm` returns"),
        (lambda lm: find_scaling(lm, None), "task is None; give a function, a suite or the path of a file"),
        (lambda lm: find_scaling(lm, []), r"task is \[\]; give a function, a suite or the path of a file"),
        (lambda _: load_factors(None), "path is None; give a factor file or the name of one that ships"),
        (lambda _: tasks.kv_retrieval("3", 1), "n_pairs is '3'; give a whole number at least 1"),
        (lambda _: tasks.kv_retrieval(3, 0), "n_contexts is 0; it must be at least 1"),
        (lambda _: tasks.kv_retrieval(3, 1, positions=[1.5]), "a position is 1.5; give a whole number"),
        (lambda _: tasks.kv_retrieval(3, 1, positions=[3]), r"position 3 is outside the 3 pairs \(0 to 2\)"),
    ],
)
def test_bad_input_is_refused_with_value_and_mend(tiny, use, message):
    with pytest.raises(ValueError, match=message):
        use(tiny)


def test_numbers_of_any_type_are_taken():
    assert number("n", np.float32(0.5), above=0, most=1) == 0.5
    assert number("n", np.array(2)) == 2.0
    assert whole("n", np.int64(3), least=3) == 3
    assert isinstance(whole("n", np.int64(3)), int)


def test_nothing_stands_before_an_answer():
    lm = load_lm("tiny-llama", dtype="float32", device="cpu")
    probe = tasks.Probe("", (tasks.Question("", "", "answer", 0),), 1)
    with pytest.raises(ValueError, match="nothing stands before the answer 'answer' at position 0 in context 0"):
        score(lm, tasks.Suite("empty", (probe,)), [LayerScaling.identity(2)])


def test_the_default_objective_is_named_as_such():
    assert search.__kwdefaults__["objective"] is utilisation_then_nll
