"""Other people's methods beside ours: as published, tuned on validation, and with ours below; what each costs."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from two_models import Trial, compare_outcomes, cut_unseen_text

from lrs_utils import LM, LayerScaling, load_factors, load_lm, score, tasks
from lrs_utils.analysis.statistics import paired_change
from lrs_utils.peers import AttentionBuckets, LaMPE, MsPoE, RegionScaling, ReRoPE, SelfExtend, String
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.files import read_key
from lrs_utils.scaling.products import n_heads
from lrs_utils.scoring.answers import generate_answers
from lrs_utils.scoring.packing import pack
from lrs_utils.tasks import Probe, Suite
from lrs_utils.tasks.judging import best_subspan_em, judged

Applied = Scaling | AttentionBuckets
Values = Mapping[str, Any]
_VALIDATION = 80_000  # seed of the contexts that values are chosen on


@dataclass(frozen=True)
class Method:
    """A method of somebody else.

    Attributes
    ----------
    make : function of (lm, probe, on, values)
        What is applied while a context is read; the same for all contexts unless `by_context`.
    published : mapping
        Values of its paper or script.
    grid : mapping of a value's name to a sequence
        What is tried on validation contexts.
    by_context : bool
        What is applied depends on the context.
    """

    make: Callable[[LM, Probe, Scaling | None, Values], Applied]
    published: Values
    grid: Mapping[str, Sequence[Any]]
    by_context: bool = False

    def list_values(self) -> list[dict[str, Any]]:
        """Every combination of the grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


def _uniform(scheme: str, lm: LM, _: Probe, on: Scaling | None, values: Values) -> Scaling:
    if on is not None:
        raise ValueError("one number for all layers is not put on another scaling")
    temperatures = None if "temperature" not in values else [values["temperature"]] * lm.num_layers
    return LayerScaling.uniform(values.get("factor", 1.0), lm.num_layers, scheme, temperatures=temperatures)


def _order_by_prompt(lm: LM, probe: Probe, on: Scaling | None, values: Values) -> Scaling:
    question = probe.questions[0]
    found = MsPoE.for_prompt(lm, probe.context + question.prompt + question.answer_prefix, **values)
    return RegionScaling(found.regions, on)


def _fit_to_length(lm: LM, probe: Probe, on: Scaling | None, values: Values) -> Scaling:
    n = pack(lm, probe, "a context").longest
    near, far = (max(least, round(values[end] * n)) for end, least in (("near", 1), ("far", 0)))
    return LaMPE(lm.num_layers, n, values["mapped"] * n, near, far, on=on)


METHODS = {
    "one factor (yarn)": Method(partial(_uniform, "yarn"), {"factor": 2.0}, {"factor": [0.8, 1.1, 1.2, 1.5, 2.0]}),
    "one factor (ntk)": Method(partial(_uniform, "ntk"), {"factor": 2.0}, {"factor": [0.8, 0.9, 1.1, 1.2, 1.5, 2.0]}),
    "one temperature": Method(
        partial(_uniform, "pi"), {"temperature": 1.2}, {"temperature": [0.8, 0.9, 1.1, 1.2, 1.3, 1.5]}
    ),
    "Ms-PoE, fixed order": Method(
        lambda lm, _, on, v: MsPoE(lm.num_layers, n_heads(lm.model), on=on, **v),
        {"low": 1.2, "high": 1.8},
        {"low": [0.8, 0.9, 1.0, 1.1], "high": [1.1, 1.2, 1.4]},
    ),
    "Ms-PoE, order by prompt": Method(
        _order_by_prompt, {"low": 1.2, "high": 1.8}, {"low": [0.9, 1.0, 1.1], "high": [1.1, 1.2, 1.4]}, by_context=True
    ),
    "Self-Extend": Method(
        lambda lm, _, on, v: SelfExtend(lm.num_layers, on=on, **v),
        {"window": 1024, "group": 8},
        {"window": [64, 128, 256, 512], "group": [2, 4, 8]},
    ),
    "ReRoPE": Method(
        lambda lm, _, on, v: ReRoPE(lm.num_layers, on=on, **v),
        {"window": 512},
        {"window": [32, 64, 128, 256, 384, 512, 768, 1024]},
    ),
    "STRING": Method(
        lambda lm, _, on, v: String(lm.num_layers, on=on, **v),
        {"shift": 2730, "local": 128},
        {"shift": [128, 256, 384, 512, 768], "local": [32, 128]},
    ),
    "LaMPE": Method(
        _fit_to_length,
        {"mapped": 0.75, "near": 0.1, "far": 0.1},
        {"mapped": [0.5, 0.75, 0.9], "near": [0.05, 0.2], "far": [0.0, 0.1]},
        by_context=True,
    ),
    "Attention Buckets": Method(
        lambda _, __, ___, v: AttentionBuckets(v["bases"]),
        {"bases": [1.0, 1.75, 1.8, 1.9, 2.0, 2.5]},
        {"bases": [[1.0, 1.5], [1.0, 2.0], [0.7, 1.0, 1.5], [1.0, 1.25, 1.5, 2.0]]},
    ),
}


@dataclass(frozen=True)
class Contest:
    """A model and a task on which methods are tuned and judged.

    Attributes
    ----------
    budget : int
        Answers that may be scored to tune a method: as many as the gradient search took.
    n_test_contexts, test_stretches : int
        Held-out contexts, and stretches of each text.
    """

    trial: Trial
    budget: int
    n_test_contexts: int
    test_stretches: int

    @property
    def lm(self) -> LM:
        """The model."""
        return self.trial.lm

    def tune(self, name: str) -> pd.DataFrame:
        """Accuracy and nll of each combination of a method's grid on validation contexts, the best first.

        Every combination is scored on the same contexts: as many as the budget allows, 16 at most.
        """
        combinations, questions = METHODS[name].list_values(), self.trial.n_pairs
        n = max(1, min(16, self.budget // (len(combinations) * questions)))
        suite = self.trial.make_suite(n, _VALIDATION)
        rows = []
        for values in combinations:
            exact, nll = self.read(name, values, suite)
            rows.append({"values": json.dumps(values), "contexts": n, "accuracy": exact.mean(), "nll": nll.mean()})
        table = pd.DataFrame(rows).sort_values(["accuracy", "nll"], ascending=[False, True], kind="stable")
        return table.reset_index(drop=True).assign(method=name, answers=len(combinations) * n * questions)

    def judge(self, name: str, values: Values, on: str | None = None) -> pd.DataFrame:
        """A row of points and perplexity: a method with its values, on held-out contexts and texts.

        Parameters
        ----------
        name : str
            Of `METHODS`, or another name for the scaling `on` alone.
        on : str, optional
            Key of a scaling that lies below.
        """
        suite, text = self.trial.make_judged(self.n_test_contexts), cut_unseen_text(self.test_stretches)
        none = [LayerScaling.identity(self.lm.num_layers)]
        before, text_before = (score(self.lm, s, none, ledger=self.trial.ledger) for s in (suite, text))
        exact, _ = self.read(name, values, suite, on)
        _, nll = self.read(name, values, text, on)
        found = compare_outcomes(before.exact[0], exact, before.depths, text_before.nll[0, :, 0], nll[:, 0])
        return pd.DataFrame([{"method": name, "values": json.dumps(dict(values)), "below": on or "", **found}])

    def judge_documents(
        self, name: str, values: Values, suite: Suite, n_tokens: int, on: str | None = None
    ) -> pd.DataFrame:
        """A row of points on documents, judged as Lost in the Middle does: free text that holds an accepted answer.

        One question at a time: prompts of different lengths would be padded, which regions of distances don't know.
        """
        asked = tasks.in_chat(suite, self.lm.tokenizer) if self.lm.tokenizer.chat_template else suite
        asked = replace(asked, probes=tuple(replace(p, questions=(q,)) for p in asked.probes for q in p.questions))
        none = LayerScaling.identity(self.lm.num_layers)
        before, after = (
            np.concatenate([self._judge_text(*part, n_tokens) for part in parts]).reshape(len(suite.probes), -1)
            for parts in ([(none, asked)], self._list_parts(name, values, asked, on))
        )
        change = paired_change(100 * before.mean(axis=1), 100 * after.mean(axis=1))
        row = {"method": name, "values": json.dumps(dict(values)), "test": suite.name, "accuracy": after.mean()}
        return pd.DataFrame([row | {"no scaling": before.mean(), "points": change.pop("change")} | change])

    def _judge_text(self, applied: Applied, suite: Suite, n_tokens: int) -> NDArray[np.float64]:
        if isinstance(applied, AttentionBuckets):
            raise ValueError("Attention Buckets read one text at a time, and free answers are written together")
        texts = generate_answers(self.lm, suite, applied, max_new_tokens=n_tokens, ledger=self.trial.ledger)
        return judged(suite, texts, best_subspan_em).astype(float)

    def read(
        self, name: str, values: Values, suite: Suite, on: str | None = None
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Verdicts and nll under a method, each (contexts, questions)."""
        found = [self._read_part(*part) for part in self._list_parts(name, values, suite, on)]
        return np.concatenate([exact for exact, _ in found]), np.concatenate([nll for _, nll in found])

    def _list_parts(self, name: str, values: Values, suite: Suite, on: str | None) -> list[tuple[Applied, Suite]]:
        """What is applied to which contexts."""
        below = None if on is None else read_key(on)
        if name not in METHODS:
            if below is None:
                raise ValueError(f"{name!r} is no method; there are {', '.join(METHODS)}")
            return [(below, suite)]
        method = METHODS[name]
        parts = [replace(suite, probes=(probe,)) for probe in suite.probes] if method.by_context else [suite]
        return [(method.make(self.lm, part.probes[0], below, values), part) for part in parts]

    def _read_part(self, applied: Applied, suite: Suite) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        if isinstance(applied, AttentionBuckets):
            return applied.score(self.lm, suite, ledger=self.trial.ledger)
        outcomes = score(self.lm, suite, [applied], ledger=self.trial.ledger)
        return outcomes.exact[0], outcomes.nll[0]


def read_ours(name: str) -> str:
    """The key of a scaling, given as a factor file's name or as the key itself."""
    return (read_key(name) if "|" in name else load_factors(name)).key


def measure_cost(model: str, name: str, values: Values, dtype: str, n_pairs: int) -> pd.DataFrame:
    """What a method costs to read a context of UUID pairs once, in a process of its own.

    What a method has to find out about the context first (`by_context`) counts.

    Returns
    -------
    DataFrame
        A row: "seconds" (the fastest of three), "MB" (how far the process grew above the loaded model).
    """
    asked = json.dumps([model, name, json.dumps(dict(values)), dtype, n_pairs])
    command = [sys.executable, "-c", f"import rivals; rivals.print_cost(*{asked})"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    seconds, megabytes = map(float, found.stdout.split()[-2:])
    return pd.DataFrame([{"method": name, "values": json.dumps(dict(values)), "seconds": seconds, "MB": megabytes}])


def print_cost(model: str, name: str, values: str, dtype: str, n_pairs: int) -> None:
    """The other side of `measure_cost`: the two numbers on a line. "no scaling" is a name too."""
    lm, method = load_lm(model, dtype=dtype), METHODS.get(name)
    [probe] = tasks.kv_retrieval(n_pairs, 1).probes
    question = probe.questions[0]
    prompt = probe.context + question.prompt + question.answer_prefix
    ids = lm.tokenizer(prompt, return_tensors="pt")["input_ids"].to(lm.model.device)

    def make() -> Applied:
        return method.make(lm, probe, None, json.loads(values)) if method else LayerScaling.identity(lm.num_layers)

    with torch.no_grad():
        applied = make()
        lm.model(ids[:, :32], use_cache=False)
        before, seconds = _peak(), []
        for _ in range(3):
            started = perf_counter()
            with (make() if method and method.by_context else applied).applied_to(lm.model):
                lm.model(ids, use_cache=False, logits_to_keep=1)
            seconds.append(perf_counter() - started)
    print(min(seconds), _peak() - before)


def _peak() -> float:
    """The most memory that this process has held, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def draw_map(method: Method, lm: LM, probe: Probe, values: Values, n_tokens: int, ax: Axes) -> None:
    """What distances are read as, from the last of `n_tokens` tokens: one line, or one for each head."""
    applied = method.make(lm, probe, None, values)
    if not isinstance(applied, Scaling):
        raise ValueError("bases have no map of distances")
    setting, far = applied.settings[-1], torch.arange(n_tokens)
    for region, nearer in zip(setting.regions, [*setting.regions[1:], None], strict=True):
        end = n_tokens if nearer is None else min(nearer.since, n_tokens)
        read = region.queries.read(torch.tensor([n_tokens - 1])) - region.keys.read(n_tokens - 1 - far)
        for row in read[:, region.since : end]:
            ax.plot(far[region.since : end], row, color="#0173b2", linewidth=0.8)
    ax.plot([0, n_tokens], [0, n_tokens], color="0.8", linewidth=0.8, zorder=0)
    ax.set(xlabel="distance", ylabel="read as")


def draw_comparison(table: pd.DataFrame, ax: Axes) -> None:
    """Points against time at inference: a row of `table` each, "times" as long as with no scaling.

    Parameters
    ----------
    table : DataFrame
        "method", "points", "low", "high", "times", and "ours", which is drawn full.
    """
    for ours, colour in ((False, "#949494"), (True, "#0173b2")):
        some = table[table["ours"] == ours]
        errors = (some["points"] - some["low"], some["high"] - some["points"])
        face = colour if ours else "white"
        ax.errorbar(some["times"], some["points"], errors, fmt="o", color=colour, markerfacecolor=face, elinewidth=1)
        for row in some.itertuples():
            ax.annotate(str(row.method), (row.times, row.points), (5, 3), textcoords="offset points", fontsize=7)
    ax.axhline(0, color="0.8", zorder=0)
    ax.set(xlabel="time to read, in times of no scaling", ylabel="points gained")
