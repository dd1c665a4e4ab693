import copy
import json
import math
import re
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache, partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lrs_utils import LM, HeadScaling, LayerScaling, Ledger, Outcomes, find_scaling, load_factors, load_lm, tasks
from lrs_utils.finding import free_text, recipe
from lrs_utils.finding import parts as dividing
from lrs_utils.finding import plan as planning
from lrs_utils.finding import stages as running
from lrs_utils.finding.found import FIFTHS
from lrs_utils.finding.parts import LEAST_CONTEXTS, Part, divide
from lrs_utils.finding.plan import NOTES
from lrs_utils.finding.stages import Run
from lrs_utils.progress import SilentProgress
from lrs_utils.scaling.files import read_factors
from lrs_utils.searchers import descent
from lrs_utils.searchers.learned import SPACES, is_of_layer, numbers_of
from lrs_utils.tasks import Probe, Question, Suite

# words that say where in a text they stand; thirds of it begin and end between words
TEXTS = {name: "".join(f"{name[0]}{at:04d} " for at in range(300)) for name in ("book", "play")}
KV = partial(tasks.kv_retrieval, 3, keys="short")
PLANTED = HeadScaling(gains=[[1.8, 0.5, 1.0, 2.5], [0.5, 2.0, 0.4, 1.1]])
SMALL = {"texts": TEXTS, "steps": 2, "contexts": (2, 2, 3), "stretches": 2}


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr(dividing, "_STRETCH", {"words": 12, "judged": 6})
    monkeypatch.setattr(free_text, "OPENINGS", free_text.OPENINGS[:2])


@pytest.fixture
def find(tiny, tmp_path):
    def found(task=KV, lm=tiny, ledger=None, **options):
        ledger = Ledger(tmp_path / "ledger.sqlite") if ledger is None else ledger
        return find_scaling(lm, task, ledger=ledger, **(SMALL | options))

    return found


@pytest.fixture
def mine(tmp_path):
    """Writes a file of so many contexts, as a user might: both forms, any depths, any number of questions."""

    def write(n, name="mine.jsonl"):
        lines = []
        for day in range(n):
            goods = {f"good {i}": f"{day}.{i}{i}" for i in range(3 + day % 3)}
            text = f"Day {day}.\n" + "\n".join(f"{good} {price}" for good, price in goods.items())
            asked = [
                {"question": f"How much was {good}?\nAnswer:", "answer": price, "position": i}
                for i, (good, price) in enumerate(goods.items())
            ]
            line = {"context": text, "questions": asked[: 1 + day % 4], "n_items": len(goods)}
            if day % 5 == 4:
                line = {"prompt_before": f"{text}\n\nHow much was good 1?", "answer": goods["good 1"], "depth": 0.7}
            lines.append(json.dumps(line) + "\n")
        (tmp_path / name).write_text("".join(lines))
        return tmp_path / name

    return write


@lru_cache
def planted(lm, n_contexts, seed):
    """A task whose answers are what the model says under `PLANTED`."""
    probes = []
    with PLANTED.applied_to(lm.model), torch.no_grad():
        for probe in tasks.kv_retrieval(5, n_contexts, seed=seed, keys="short").probes:
            prompts = [probe.context + question.prompt + question.answer_prefix for question in probe.questions]
            tokens = [lm.model(**lm.tokenizer(p, return_tensors="pt")).logits[0, -1].argmax() for p in prompts]
            answers = lm.tokenizer.batch_decode([[token] for token in tokens])
            questions = (replace(q, answer=a) for q, a in zip(probe.questions, answers, strict=True))
            probes.append(replace(probe, questions=tuple(questions)))
    return Suite("planted", tuple(probes))


@pytest.fixture(scope="module")
def helped(tiny, tmp_path_factory):
    """Found where the search led to `PLANTED`, which answers every question."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dividing, "_STRETCH", {"words": 12, "judged": 6})
        patched.setattr(running, "_LOOPS", 1.0)
        patched.setattr(Run, "search", lambda *_: [PLANTED, LayerScaling.identity(2)])
        ledger = Ledger(tmp_path_factory.mktemp("helped") / "ledger.sqlite")
        options = {"contexts": (2, 12, 14), "max_perplexity_rise": 1e6, "seed": 3}
        return find_scaling(tiny, partial(planted, tiny), ledger=ledger, **(SMALL | options))


# The whole recipe

# those of "auto" and "layers" are tried by these names; a tiny head has four frequencies
UNFIT = {"heads", "both", "bands_8", "bands_32"}


@pytest.mark.parametrize("space", ["auto", "layers", *sorted(SPACES.keys() - UNFIT)])
def test_every_space_is_searched_and_moves_only_its_own_numbers(tiny, find, monkeypatch, space):
    stopped, choose = [], Run.choose
    monkeypatch.setattr(Run, "choose", lambda run, stops: stopped.extend(stops) or choose(run, stops))
    before = [module._forward_hooks | module._forward_pre_hooks for module in tiny.model.modules()]
    result = find(space=space)
    learned = {"auto": recipe.AUTO[0], "layers": "both"}.get(space, space)
    names = {name.removeprefix("=") for name in SPACES[learned]}
    bare = numbers_of(LayerScaling.identity(2), tiny, [*names])
    assert len(stopped) == 2, "after half of the steps, and after all"
    for stop in stopped:
        values = numbers_of(stop, tiny, [*names])
        assert {name for name in values if not np.array_equal(values[name], bare[name])} == names
    moved = [max(np.abs(np.log(v)).max() for v in numbers_of(stop, tiny).values()) for stop in stopped]
    assert moved[0] > moved[1], "the last stop first"
    schemes = {stop.scheme for stop in stopped if isinstance(stop, LayerScaling)}
    scheme = "pi" if space == "pi_factors" else "ntk"
    assert schemes == ({scheme} if all(map(is_of_layer, names)) else set())
    assert result.about["space"] == learned
    assert (result.scaling.is_identity, len(result.judged.outcomes)) == (True, 2)  # two contexts prove nothing
    assert [module._forward_hooks | module._forward_pre_hooks for module in tiny.model.modules()] == before


MEASURES = ["accuracy", *(FIFTHS[i] for i in (0, 2, 4)), "U", "nll"]  # of three questions: no second and fourth fifth
ABOUT_TEXT = [f"perplexity, {kind}" for kind in ("seen", "not seen", "not seen: book", "not seen: play")]
ABOUT_FREE_TEXT = [f"{n}, {kind}" for n in ("near repeats", "trigrams seen before") for kind in ("greedy", "drawn")]


@pytest.mark.parametrize("kind", ["suite", "two"])
def test_any_task_gives_a_table_of_what_changed(tiny, find, mine, kind):
    path = mine(20)
    result = find({"suite": KV(n_contexts=20, seed=9), "two": [KV, path]}[kind], contexts=(3, 4, 5))
    table = result.table
    assert [*table.columns] == ["task", "measure", "no scaling", "found", "change", "low", "high", "p"]
    names = [suite.name for suite in result.judged.tasks]
    assert list(dict.fromkeys(table["task"])) == [*names, "text", "free text", "search"]
    assert len(names) == (2 if kind == "two" else 1)
    for name in names:
        rows = table[table["task"] == name]
        if name == names[0]:
            assert rows["measure"].tolist() == MEASURES
        else:  # of a file whose contexts ask at any depths there is no U
            assert rows["measure"].tolist() == ["accuracy", *FIFTHS[:4], "nll"]
        judged = rows.set_index("measure")
        assert judged.loc["nll", "no scaling"] > 1
        assert (judged["p"].dropna() == 1).all(), "nothing was found, so nothing changed"
    of_text = table[table["task"] == "text"].set_index("measure")
    assert of_text.index.tolist() == ABOUT_TEXT
    assert (of_text["no scaling"] > 10).all()
    assert table[table["task"] == "free text"]["measure"].tolist() == ABOUT_FREE_TEXT
    assert [result.row("search", m)["found"] > 0 for m in ("seconds", "answers")] == [True, True]
    np.testing.assert_allclose(table["change"], table["found"] - table["no scaling"])
    valid = result.about["valid for"]
    assert [entry["task"] for entry in valid] == names
    assert all(0 < entry["tokens"][0] <= entry["tokens"][1] < 2048 for entry in valid)
    assert {len(suite.probes) for suite in result.judged.tasks} == {5}
    assert result.about["text_weight"] == 2 * len(names)


def test_where_nothing_helps_there_is_no_scaling_and_the_sentence_says_so(tiny, find, tmp_path):
    result = find()
    assert result.scaling == LayerScaling.identity(2)
    assert re.fullmatch(
        r"No head gains and temperatures helped tiny-llama on kv-short-3 within the limits, so the result is no "
        r"scaling\.",
        str(result),
    )
    assert set(result.choices["verdict"]) == {"gain within chance"}
    plt.close(result.plot())
    result.save(tmp_path / "nothing.json")
    assert load_factors(tmp_path / "nothing.json").is_identity


def test_what_helps_is_found_and_judged_on_the_test(tiny, helped):
    assert helped.scaling == PLANTED
    accuracy = helped.row("planted", "accuracy")
    bare = [o.exact[0] for o in helped.judged.outcomes[0]]
    assert accuracy["no scaling"] == pytest.approx(np.mean(bare))
    assert accuracy["found"] == 1
    assert 0 < accuracy["low"] <= accuracy["change"] <= accuracy["high"]
    assert accuracy["p"] < 0.05
    assert [helped.row("planted", fifth)["found"] for fifth in FIFTHS] == [1] * 5
    assert helped.row("planted", "U")["found"] == 1
    assert helped.row("planted", "nll")["change"] < 0
    text = [np.concatenate([o]) for o in helped.judged.text["test"]]
    assert helped.row("text", "perplexity, not seen")["found"] == pytest.approx(np.exp(text[1].mean()))
    by_kind = helped.judged.kinds == "play"
    assert helped.row("text", "perplexity, not seen: play")["found"] == pytest.approx(np.exp(text[1][by_kind].mean()))
    admitted = helped.choices[helped.choices["verdict"] == "admitted"]
    assert (admitted["stop"].tolist(), admitted["dose"].tolist()) == ([2], [1.0])
    assert "gain within chance" in set(helped.choices["verdict"])  # of the other stop, which is no scaling


def test_what_was_found_is_one_plain_sentence_with_the_numbers(helped):
    sentence = str(helped)
    row = helped.row("planted", "accuracy")
    assert sentence.startswith(
        f"tiny-llama gets 100 % of planted right instead of {100 * row['no scaling']:.0f} % "
        f"({100 * row['change']:+.0f} points [{100 * row['low']:+.0f}, {100 * row['high']:+.0f}], "
        "14 held-out contexts), and the perplexity of text "
    )
    assert re.search(r"changes by [+-]\d+\.\d %: 8 head gains, found in \d+\.\d minutes\.$", sentence)
    assert not re.search(r"[.!?]\s", sentence), "one sentence"


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (HeadScaling([[1.2] * 4, [1.0] * 4], PLANTED.gains), "8 head gains and 8 head temperatures"),
        (HeadScaling(gains=PLANTED.gains, mlp_gains=[1.2, 1.0]), "8 head gains and 2 gains of MLPs"),
        (LayerScaling((1.2, 1.0), "ntk", (1.1, 1.0)), "2 factors and temperatures of layers"),
        (HeadScaling(layers=LayerScaling((1.2, 1.0))), "2 factors of layers"),
    ],
    ids=["heads", "outputs", "layers", "layers alone"],
)
def test_every_kind_of_scaling_is_told_and_drawn(helped, scaling, words):
    other = replace(helped, scaling=scaling)
    assert f"%: {words}, found in" in str(other)
    figure = other.plot()
    left, right = figure.axes[:2]
    assert left.get_title(loc="left") == "tiny-llama, planted"
    labels = [" ".join(text.get_text().split()) for text in left.texts]
    assert labels == [f"no scaling, {100 * helped.row('planted', 'accuracy')['no scaling']:.0f} %", "found, 100 %"]
    assert [len(line.get_xdata()) for line in left.lines] == [5, 5]
    np.testing.assert_allclose(left.lines[1].get_ydata(), 1)
    if isinstance(scaling, HeadScaling) and scaling.gains:
        assert right.get_title(loc="left") == "one gain per head"
        np.testing.assert_allclose(right.collections[0].get_array(), np.log2(scaling.gains).T)
    else:
        np.testing.assert_allclose(right.lines[0].get_ydata(), (1.2, 1.0))
    plt.close(figure)


def test_the_file_keeps_scaling_search_and_test(helped, tmp_path):
    helped.save(tmp_path / "mine.json")
    assert load_factors(tmp_path / "mine.json") == helped.scaling
    content = read_factors(tmp_path / "mine.json")
    assert (content["model"], content["fingerprint"]) == ("tiny-llama", helped.lm.fingerprint)
    assert content["found"] == helped.about
    assert content["found"]["valid for"] == [{"task": "planted", "tokens": helped.about["valid for"][0]["tokens"]}]
    assert (content["found"]["seed"], content["found"]["test"], content["found"]["texts"]) == (3, 14, ["book", "play"])
    rows = {(row["task"], row["measure"]): row for row in content["test"]}
    assert rows["planted", "accuracy"]["found"] == 1
    assert rows["planted", "U"]["p"] is None, "what has no interval is null"
    assert len(rows) == len(helped.table)


def test_an_exported_model_is_an_ordinary_checkpoint_that_computes_the_same(helped, tmp_path):
    folder = tmp_path / "new" / "folder"
    helped.export(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("A key, and its value: ", return_tensors="pt")["input_ids"]
    assert torch.equal(ids, helped.lm.tokenizer("A key, and its value: ", return_tensors="pt")["input_ids"])
    with torch.no_grad():
        with helped.scaling.applied_to(helped.lm.model):
            expected = helped.lm.model(ids).logits
        torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(helped.lm.model(ids).logits, expected, atol=1e-2)
    with pytest.raises(ValueError, match="folder is not empty; give a new folder"):
        helped.export(folder)


def test_what_is_found_is_exported_with_what_the_test_measured(helped, tmp_path):
    other = replace(helped, scaling=LayerScaling((1.2, 1.0), "ntk"))
    with pytest.raises(ValueError, match="the factor of layer 0 changes cos and sin"):
        other.export(tmp_path / "folder", "stock")
    assert other.export(tmp_path / "folder").form == "granite"
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "| planted, accuracy |" in card
    assert "| perplexity of text, play |" in card
    assert "Tested: planted, 228 to 228 tokens." in card
    assert (tmp_path / "folder" / "scaling.png").exists()


def test_where_nothing_helped_nothing_is_exported(helped, tmp_path, capsys):
    nothing = replace(helped, scaling=LayerScaling.identity(2))
    assert nothing.export(tmp_path / "folder") is None
    assert "the result is no scaling. Nothing is written to" in capsys.readouterr().out
    assert not (tmp_path / "folder").exists()


# Killed, and run again


class Mortal(Ledger):
    """Dies before it writes for so many more times."""

    writes, dies_at = 0, math.inf

    def _survive(self):
        if self.writes == self.dies_at:
            raise KeyboardInterrupt
        self.writes += 1

    def record(self, *args):
        self._survive()
        return super().record(*args)

    def record_gradient(self, *args):
        self._survive()
        return super().record_gradient(*args)

    def record_texts(self, model, scaling, *args):
        if scaling != NOTES:  # of a plan or of seconds: what stands there stays
            self._survive()
        return super().record_texts(model, scaling, *args)


def told(found):
    """All of a result that doesn't depend on the clock."""
    table = found.table[found.table["measure"] != "seconds"]
    return found.scaling.key, found.about, found.choices.to_json(), table.to_json(), [
        [(o.exact.tolist(), o.nll.tolist()) for o in outcomes] for outcomes in found.judged.outcomes
    ]  # fmt: skip


def test_a_search_killed_anywhere_ends_as_an_undisturbed_one(tiny, find, tmp_path, monkeypatch):
    search = Run.search  # as it is, and one stop more, so that something is found
    monkeypatch.setattr(Run, "search", lambda run, *options: [PLANTED, *search(run, *options)])
    monkeypatch.setattr(running, "_LOOPS", 1.0)
    options = {"task": partial(planted, tiny), "contexts": (2, 8, 3), "max_perplexity_rise": 1e6}
    undisturbed = Mortal(tmp_path / "undisturbed.sqlite")
    found = find(ledger=undisturbed, **options)
    expected, writes = told(found), undisturbed.writes
    assert found.scaling == PLANTED
    assert writes > 30
    for share in (0.25, 0.7, 1.0):
        ledger = Mortal(tmp_path / f"killed-{share}.sqlite")
        ledger.dies_at = round(share * (writes - 1))
        with pytest.raises(KeyboardInterrupt):
            find(ledger=ledger, **options)
        ledger.dies_at = math.inf
        resumed = find(ledger=ledger, **options)
        assert told(resumed) == expected
        assert ledger.writes == writes  # none lost, none twice
    again = find(ledger=ledger, **options)
    assert ledger.writes == writes
    assert again.table.equals(resumed.table), "the seconds are those of the search, not of looking it up"


# The choice


@pytest.fixture(scope="module")
def choosing(tiny):
    """Lets a run choose where measurements are made up: functions of stop and dose.

    Of five questions, each in its own fifth of the depths, the model alone answers the first.
    """

    def stop(number):
        return HeadScaling(gains=np.where(np.arange(2)[:, None] == number, 2.0, 1.0) * np.ones(4))

    def point(scaling):
        gains = np.array(scaling.gains)
        return int(gains.max(axis=1).argmax()), round(math.log2(gains.max()), 1)

    def chosen(rise=lambda *_: 0.0, fifths=lambda *_: BETTER, free=lambda *_: False, *, n_stops=1, contexts=8):
        asked = defaultdict(list)

        def scored(_, suite, scalings, **__):
            [scaling] = scalings
            bare = scaling.is_identity
            asked[suite.name] += [] if bare else [point(scaling)]
            if suite.name == "text":
                rises = np.broadcast_to(0.0 if bare else rise(*point(scaling)), 8)[: len(suite.probes)]
                nll = 3 + np.log1p(rises)[None, :, None]
                return Outcomes(np.zeros(nll.shape, bool), nll, suite.depths, 0)
            right = [1, 0, 0, 0, 0] if bare else fifths(*point(scaling))
            exact = np.tile(np.array(right, bool), (1, len(suite.probes), 1))
            return Outcomes(exact, np.ones(exact.shape), suite.depths, 0)

        def continued(_, scaling, **__):
            turning = not scaling.is_identity and free(*point(scaling))
            return np.tile(np.arange(64) % (2 if turning else 64), (2, 2, 1))

        questions = tuple(Question(f"{n}?", "", "a", n) for n in range(5))
        task = Suite("task", tuple(Probe(f"context {n} ", questions, 5) for n in range(contexts)))
        text = Suite("text", tuple(Probe(f"stretch {n} ", (Question("", "", "a", 0),), 1) for n in range(8)))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(running, "score", scored)
            patched.setattr(free_text, "continue_freely", continued)
            parts = {"validation": Part([task], text, np.array(["book", "play"] * 4))}
            run = Run(tiny, parts, {"max_perplexity_rise": 0.01, "seed": 0}, None, SilentProgress())
            run.measure_unscaled()
            best, table = run.choose([stop(number) for number in range(n_stops)])
        return None if best.is_identity else point(best), table, asked

    return chosen


BETTER, WORSE = [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]
tenths = st.integers(0, 10).map(lambda n: n / 10)


@settings(max_examples=40, deadline=None)
@given(text=tenths, fifth=tenths, free=tenths)
def test_the_largest_dose_within_every_limit_is_chosen(choosing, text, fifth, free):
    chosen, table, asked = choosing(
        rise=lambda _, dose: 0.0099 if dose <= text else 0.0101,
        fifths=lambda _, dose: BETTER if dose <= fifth else WORSE,
        free=lambda _, dose: dose > free,
    )
    largest = min(text, fifth, free)
    assert chosen == ((0, largest) if largest else None)
    judged = {dose for _, dose in asked["task"]}
    assert judged == {dose for dose in np.arange(1, 11) / 10 if largest <= dose <= text}
    assert len({dose for _, dose in asked["text"]} - judged) <= 4, "doses are halved, not tried one by one"
    assert table["dose"].is_monotonic_decreasing
    for row in table.itertuples():
        reasons = {"perplexity rises": text, "1 fifths of the depths worse": fifth, "free text repeats itself": free}
        assert row.verdict == next((reason for reason, limit in reasons.items() if row.dose > limit), "admitted")
        assert row.chosen == (row.verdict == "admitted")


def test_of_two_stops_the_one_that_gains_more_is_chosen(choosing):
    for more in (0, 1):
        chosen, table, _ = choosing(
            rise=lambda stop, dose: 0.0 if dose <= (0.9, 0.4)[stop] else 1.0,
            fifths=lambda stop, _, more=more: BETTER if stop == more else [1, 0, 1, 0, 0],
            n_stops=2,
        )
        assert chosen == (more, (0.9, 0.4)[more])
        assert table["chosen"].tolist() == [more == 0, more == 1]
        assert table["stop"].tolist() == [2, 1]  # as they were reached: the first given is the last
        assert sorted(table["points"].round().tolist()) == [20, 80]


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        ({"fifths": lambda *_: [1, 0, 0, 0, 0]}, "gain within chance"),
        ({"fifths": lambda *_: [0, 0, 0, 0, 0]}, "gain within chance"),
        ({"fifths": lambda *_: WORSE}, "1 fifths of the depths worse"),
        ({"free": lambda *_: True}, "free text repeats itself"),
        ({"rise": lambda *_: 0.5}, "perplexity rises"),
        ({"rise": lambda *_: 1e9}, "perplexity rises"),
    ],
    ids=["gain within chance", "a loss", "a fifth worse", "free text", "perplexity", "perplexity without end"],
)
def test_what_breaks_a_limit_at_every_dose_is_not_chosen(choosing, measured, verdict):
    chosen, table, _ = choosing(**measured)
    assert chosen is None
    assert set(table["verdict"]) == {verdict}
    assert not table["chosen"].any()
    assert len(table) == {"perplexity rises": 1, "gain within chance": 1}.get(verdict, 10)


@pytest.mark.parametrize("contexts", [LEAST_CONTEXTS, 5, 6])  # 5: what the example file leaves
def test_contexts_that_all_gain_everything_are_a_gain(choosing, contexts):
    assert choosing(contexts=contexts)[0] == (0, 1.0)


@pytest.mark.parametrize(("mean", "spread", "kept"), [(0.005, 0.005, True), (0.005, 0.03, False), (0.011, 0.0, False)])
def test_a_rise_of_perplexity_is_taken_with_its_error(choosing, mean, spread, kept):
    chosen, _, asked = choosing(rise=lambda *_: mean + spread * np.array([1, -1] * 4))
    assert chosen == ((0, 1.0) if kept else None)
    assert bool(asked["task"]) == kept


# Contexts that nothing has seen


@pytest.mark.parametrize("kind", ["suite", "two"])
def test_search_validation_and_test_share_nothing_and_the_test_is_scored_once(find, mine, monkeypatch, kind):
    step, seen = ["before"], defaultdict(list)

    def entering(name, original):
        def entered(run, *args):
            step[0] = name
            return original(run, *args)

        return entered

    for name in ("measure_unscaled", "search", "choose", "test"):
        monkeypatch.setattr(Run, name, entering(name, getattr(Run, name)))
    score, nll_gradient = running.score, descent.nll_gradient

    def scored(lm, suite, scalings, **options):
        seen[step[0]] += [(suite.name, probe.context, scaling.key) for probe in suite.probes for scaling in scalings]
        text[step[0]] += [p.context + p.questions[0].answer for p in suite.probes if suite.name == "text"]
        return score(lm, suite, scalings, **options)

    def differentiated(lm, probe, scaling, *args, **options):
        name = "text" if re.match(r"[bp]\d{4}", probe.context) else "task"
        seen[step[0]].append((name, probe.context, scaling.key))
        text[step[0]] += [probe.context + probe.questions[0].answer] if name == "text" else []
        return nll_gradient(lm, probe, scaling, *args, **options)

    text = defaultdict(list)
    monkeypatch.setattr(running, "score", scored)
    monkeypatch.setattr(planning, "score", scored)
    monkeypatch.setattr(descent, "nll_gradient", differentiated)
    task = {"suite": KV(n_contexts=20, seed=9), "two": [KV, str(mine(20))]}[kind]
    result = find(task, steps=8, contexts=(4, 4, 5), stretches=6)

    contexts = {name: [c for suite, c, _ in rows if suite != "text"] for name, rows in seen.items()}
    validation = {*contexts["measure_unscaled"], *contexts["choose"]}
    n_tasks = 2 if kind == "two" else 1
    sizes = [len({*contexts["search"]}), len(validation), len({*contexts["test"]})]
    assert sizes == [4 * n_tasks, 4 * n_tasks, 5 * n_tasks]
    assert len({*contexts["search"], *validation, *contexts["test"]}) == sum(sizes)
    assert {*contexts["before"]} < validation, "the speed is measured on a context that is no secret"
    assert {*contexts["test"]} == {probe.context for suite in result.judged.tasks for probe in suite.probes}
    # once for no scaling and once for what was found: here the same
    assert len(contexts["test"]) == 2 * sizes[2]

    def thirds(name):
        return {int(word[1:]) // 100 for stretch in text[name] for word in re.findall(r"\b[bp]\d{4}\b", stretch)}

    assert thirds("search") == {0}
    assert thirds("measure_unscaled") == thirds("choose") == {1}
    assert thirds("test") == {0, 2}, "the text that was searched on, and one that nothing has seen"
    assert {word[0] for stretch in text["test"] for word in stretch.split()} == {"b", "p"}


def test_another_seed_searches_and_judges_on_other_contexts():
    n_contexts = dict.fromkeys(("search", "validation", "test"), 4)
    first, again, other = (divide([KV], TEXTS, n_contexts, 4, seed) for seed in (0, 0, 1))
    for part in ("search", "validation", "test"):
        assert first[part].tasks == again[part].tasks
        assert first[part].text == again[part].text != other[part].text
        contexts = [{probe.context for probe in parts[part].tasks[0].probes} for parts in (first, other)]
        assert not contexts[0] & contexts[1]


@settings(max_examples=200, deadline=None)
@given(st.integers(12, 100), st.tuples(*[st.integers(2, 40)] * 3))
def test_a_file_is_divided_into_parts_that_it_holds(there, wanted):
    probes = tuple(Probe(f"{n}", (Question("", "", "a", 0),), 1) for n in range(there))
    shares = dividing._share_out(Suite("mine", probes), wanted)
    assert len(shares) == 3
    assert min(shares) >= 2
    assert sum(shares) == min(there, sum(wanted))


def test_what_is_told_of_a_smaller_file_is_what_was_done(find, mine, capsys):
    result = find(mine(20), contexts=(16, 8, 32))
    tested = len(result.judged.tasks[0].probes)
    assert tested < 32
    assert (result.about["search"] + result.about["validation"], result.about["test"]) == (20 - tested, tested)
    assert f"and {tested} to test on" in capsys.readouterr().out


# Minutes


class Planned(Exception):
    pass


@pytest.fixture
def plan(find, monkeypatch, capsys):
    """What is announced, at a speed and for so many minutes: steps, contexts to choose and to test on, estimate."""

    def announced(minutes, seconds_a_token=1e-2, **options):
        def stop(_):
            raise Planned

        monkeypatch.setattr(recipe, "measure_seconds_per_token", lambda *_: seconds_a_token)
        monkeypatch.setattr(Run, "measure_unscaled", stop)
        capsys.readouterr()
        with pytest.raises(Planned):
            find(minutes=minutes, **({"steps": 24, "contexts": (16, 8, 32)} | options))
        [line] = capsys.readouterr().out.splitlines()
        pattern = (
            r"tiny-llama: (\d+) steps over \d+ contexts of kv-short-3, then (\d+) to choose and (\d+) to test on: "
            r"about (\d+\.\d) minutes here"
        )
        *plan, estimate = re.fullmatch(pattern, line).groups()
        return [*map(int, plan)], float(estimate)

    return announced


def test_few_minutes_make_a_smaller_search_that_fits(plan, tmp_path):
    whole, estimate = plan(None)
    assert whole == [24, 8, 32]
    assert estimate > 1
    assert plan(1.01 * estimate, ledger=Ledger(tmp_path / "all.sqlite")) == (whole, estimate)
    before, cut = estimate, whole
    for share in (0.8, 0.6):
        smaller, after = plan(share * estimate, ledger=Ledger(tmp_path / f"{share}.sqlite"))
        assert all(a <= b for a, b in zip(smaller, cut, strict=True))
        assert smaller != cut
        assert 0.8 * share * estimate < after <= share * estimate + 0.1, "it fits, and time is not given away"
        assert after < before
        before, cut = after, smaller


def test_a_machine_that_is_twice_as_fast_does_as_much_in_half_the_minutes(plan, tmp_path):
    _, estimate = plan(None)
    slow = plan(0.7 * estimate, ledger=Ledger(tmp_path / "slow.sqlite"))
    fast = plan(0.35 * estimate, seconds_a_token=5e-3, ledger=Ledger(tmp_path / "fast.sqlite"))
    assert fast[0] == slow[0]
    assert fast[1] == pytest.approx(slow[1] / 2, abs=0.1)


def test_a_search_that_is_taken_up_again_keeps_its_plan_at_whatever_speed(plan):
    _, estimate = plan(None)
    began, _ = plan(0.7 * estimate)
    assert began != plan(None)[0]
    for seconds_a_token in (3e-2, 1e-3):
        assert plan(0.7 * estimate, seconds_a_token)[0] == began


def test_more_minutes_make_a_larger_search(plan):
    whole, estimate = plan(None)
    few, _ = plan(0.6 * estimate)
    more, _ = plan(1.1 * estimate)
    assert more == whole != few


def test_minutes_that_are_too_few_are_refused_with_how_many_it_takes(plan, find, monkeypatch):
    _, estimate = plan(None)
    options = {"steps": 24, "contexts": (16, 8, 32)}
    with pytest.raises(ValueError, match=r"minutes are too few: the smallest search \(8 steps\) takes") as error:
        find(minutes=0.05 * estimate, **options)
    times = float(re.search(r"about (\d+\.\d) times as long here", str(error.value))[1])
    with pytest.raises(ValueError, match="minutes are too few"):
        find(minutes=(times - 0.2) * 0.05 * estimate, **options)
    assert plan(times * 0.05 * estimate)[0][:2] == [8, 4]


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "all"}, "space is 'all'; choose one of auto, layers, factors, pi_factors, temperatures, both, "),
        ({"minutes": 0}, "minutes is 0; give more than 0, or None for no limit"),
        ({"minutes": -2}, "minutes is -2; give more than 0"),
        ({"minutes": math.nan}, "minutes is nan"),
        ({"max_perplexity_rise": -0.1}, r"max_perplexity_rise is -0.1; give a share from 0 on"),
        ({"max_perplexity_rise": math.nan}, "max_perplexity_rise is nan"),
        ({"steps": 1}, "steps is 1; it must be at least 2"),
        ({"contexts": (0, 1, 1)}, r"contexts is \(0, 1, 1\); give \(search, validation, test\), each at least 2"),
        ({"contexts": (4, 4)}, r"contexts is \(4, 4\)"),
        ({"stretches": 1}, "stretches is 1; it must be at least 2"),
        ({"questions": 0}, "questions is 0; it must be at least 1"),
        ({"texts": {"book": TEXTS["book"], "note": "a b c d e f g h"}}, "text 'note', divided into thirds .* 3 words"),
        ({"texts": {"book": ""}}, "text 'book', divided into thirds to search, choose and test on: the text has 0 w"),
        ({"texts": {}}, "texts"),
        ({"task": []}, "task"),
        ({"task": lambda n_contexts, seed: KV(n_contexts=n_contexts, seed=0)}, "kv-short-3 gives the same context for"),
        ({"task": lambda n_contexts, seed: KV(n_contexts=n_contexts, seed=seed // 9000)}, "gives the same context for"),
        ({"task": KV(n_contexts=11, seed=0)}, "kv-short-3 has 11 contexts; to search, choose and .* it needs 12"),
        ({"task": partial(tasks.kv_retrieval, 110, keys="short")}, r"context 0 of kv-short-110 has 2,\d+ tok.*reads"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_a_message_that_names_it(find, options, message):
    with pytest.raises(ValueError, match=message):
        find(**options)


def test_a_file_with_too_few_contexts_says_how_many_it_takes(find, mine):
    with pytest.raises(ValueError, match=r"mine has 5 contexts; to search, choose and test .* it needs 12"):
        find(mine(5))
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        find("nothing.jsonl")


def test_an_answer_that_merges_with_its_prompt_is_refused(tiny, find):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = Split(Regex(r"lo|[\s\S]"), "isolated")
    probes = [Probe(f"context {n} says: ", (Question("hel", "", "o", 0),), 1) for n in range(12)]
    with pytest.raises(
        ValueError, match=r"the answer 'o' at position 0 in context \d+ of merging.* merges with its pr"
    ):
        find(Suite("merging", tuple(probes)), lm=replace(tiny, tokenizer=tokenizer))


def of_family(tiny, model_type, **settings):
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    settings = sizes | {"num_attention_heads": 4, "pad_token_id": 0, "max_position_embeddings": 2048} | settings
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32).eval()
    return LM(model, tiny.tokenizer, model_type)


def test_a_space_that_a_family_can_not_have_is_refused_by_name(tiny, find):
    partial_rotary, other = of_family(tiny, "stablelm", num_key_value_heads=4), of_family(tiny, "gpt_neox")
    with pytest.raises(ValueError, match=r"temperatures\[0\] is 2, but in layer 0 of StableLmForCausalLM"):
        find(lm=partial_rotary, space="layers")
    with pytest.raises(ValueError, match="GPTNeoXLayer has no o_proj, so its heads can't have gains"):
        find(lm=other, space="head_gains")
    with pytest.raises(ValueError, match="GPT2LMHeadModel can't be scaled"):
        find(lm=of_family(tiny, "gpt2"))
    assert find(lm=partial_rotary, space="factors").about["space"] == "factors"


@pytest.mark.parametrize(("family", "space"), [("qwen3", "heads"), ("smollm3", "layers"), ("gemma3", "auto")])
def test_other_families_are_searched_as_well(find, family, space):
    lm = load_lm(f"tiny-{family}", dtype="float32", device="cpu")
    found = find(lm=lm, space=space)
    assert str(found).startswith("No ")
    assert space != "auto" or found.about["space"] == "head_gains"  # its heads share a query norm: no temperatures


@pytest.mark.parametrize(
    ("family", "dtype", "space"),
    [
        ("qwen2", "float32", "heads"),
        ("qwen2", "bfloat16", "heads"),
        ("qwen3", "bfloat16", "head_gains"),  # its heads share a query norm
        ("olmo2", "bfloat16", "heads"),  # a norm, but with a weight for each head
        ("llama", "bfloat16", "heads"),
    ],
)
def test_a_folder_of_a_users_model_is_searched_in_its_precision(find, tmp_path, family, dtype, space):
    made = load_lm(f"tiny-{family}", dtype=dtype, device="cpu")
    made.model.save_pretrained(tmp_path / "mine")
    made.tokenizer.save_pretrained(tmp_path / "mine")
    lm = load_lm(tmp_path / "mine", dtype=dtype, device="cpu")
    found = find(lm=lm)
    assert found.about["space"] == space
    assert f"helped {tmp_path / 'mine'} on" in str(found)
    assert np.isfinite(found.row("text", "perplexity, not seen")["found"])


def test_without_a_task_the_general_ones_are_searched(tiny, tmp_path, monkeypatch):
    words = partial(tasks.copying, n_questions=3)
    monkeypatch.setattr(recipe, "general_tasks", lambda: {"keys": KV, "copying": tasks.vary_size(words, (20, 30))})
    found = find_scaling(tiny, ledger=Ledger(tmp_path / "ledger.sqlite"), **SMALL)
    assert [suite.name for suite in found.judged.tasks] == ["kv-short-3", "copying-20/30"]
    assert {"kv-short-3", "copying-20/30"} <= {*found.table["task"]}
