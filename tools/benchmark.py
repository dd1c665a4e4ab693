"""What an answer and a search cost, against decoding each answer separately and the machine's limit: `make bench`.

One run; repetitions of all lines are interleaved, so that a noisy machine slows them equally, and ratios are taken
within a repetition. The limit is the number of operations that the line's work needs, divided by the machine's own
rate of matrix products in the model's precision, measured in the same repetition.
"""

import argparse
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from result_tables import RESULTS, write_table
from torch import Tensor

from lrs_utils import tasks
from lrs_utils.analysis import plots
from lrs_utils.models.download import write_whole
from lrs_utils.models.load import LM, load_lm
from lrs_utils.notebook import ROOT, parameters_of, versions
from lrs_utils.progress import Progress
from lrs_utils.scaling.base import Setting, reachable_decoder
from lrs_utils.scaling.heads import HeadScaling
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.outcomes import score
from lrs_utils.scoring.packing import pack
from lrs_utils.searchers.engine import SearchResult, search
from lrs_utils.searchers.genetic import GeneticSearch
from lrs_utils.searchers.gradient import nll_gradient
from lrs_utils.searchers.objectives import Objective, utilisation_over_depths_then_nll, utilisation_then_nll
from lrs_utils.tasks import Probe, Suite

GENERATE, ALONE, THREE, ALL = "generate", "score, one question", "score, three positions", "score, all positions"
GENERATION, GENERATION_ALONE = "generation of the search", "generation, each candidate alone"
# Contexts that gradients are priced on (pairs, keys), and what they are taken by: numbers of layers, and of heads.
PRICED = ((40, "short"), (12, "uuid"), (20, "uuid"))
DIFFERENTIATED = {"layers": ("factors", "temperatures"), "heads": ("head_temperatures", "head_gains")}


@dataclass(frozen=True)
class Work:
    """Something to time: what it is, how many answers it gives, and the least operations it needs."""

    line: str
    pairs: int
    answers: int
    operations: float
    run: Callable[[Progress], object]
    steps: int  # of progress
    saved: float = 0.0  # share of layers that candidates have in common


def operations(lm: LM, tokens: int, seen: int, judged: int) -> float:
    """Multiplications and additions of a forward pass.

    Parameters
    ----------
    tokens : int
        Tokens through every layer.
    seen : int
        Sum over these tokens of the tokens that each attends to, itself included.
    judged : int
        Tokens whose logits are wanted.
    """
    config, layers = lm.model.config.get_text_config(), reachable_decoder(lm.model).layers
    weights = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.num_attention_heads * head_dim * len(layers)  # queries with keys, weights with values
    return float(2 * (weights * tokens + attention * seen + config.vocab_size * config.hidden_size * judged))


def generate_work(lm: LM, probe: Probe, scaling: LayerScaling, questions: Sequence[int]) -> Work:
    """(a) As public code does it: `model.generate` for each question on its full prompt, one at a time."""
    prompts: list[tuple[Tensor, int]] = []
    total = 0.0
    for q in questions:
        packed = pack(lm, replace(probe, questions=(probe.questions[q],)), "the benchmark")
        n, answer = len(packed.ids) + 1 - len(packed.predicted_at), len(packed.predicted_at)
        prompts.append((packed.ids[None, :n].to(lm.model.device), answer))
        total += operations(lm, n + answer - 1, (n + answer - 1) * (n + answer) // 2, answer)

    def run(bar: Progress) -> None:
        with scaling.applied_to(lm.model):
            for ids, answer in prompts:
                lm.model.generate(  # type: ignore[operator]
                    ids, max_new_tokens=answer, min_new_tokens=answer, do_sample=False, pad_token_id=0
                )
                bar.advance(1)

    return Work(GENERATE, probe.n_items, len(questions), total, run, len(questions))


def score_work(lm: LM, line: str, suite: Suite, scalings: Sequence[LayerScaling], *, together: bool = True) -> Work:
    """Contexts scored under some scalings; operations are those of the layers that differ between candidates."""
    packs = [pack(lm, probe, "the benchmark") for probe in suite.probes]
    share = len(_distinct_layers(scalings)) / sum(len(s.factors) for s in scalings) if together else 1.0
    one = sum(operations(lm, len(p.ids), int((p.positions + 1).sum()), 0) for p in packs)
    judged = sum(operations(lm, 0, 0, len(p.predicted_at)) for p in packs)

    def run(bar: Progress) -> None:
        for group in [scalings] if together else [[s] for s in scalings]:
            score(lm, suite, group, extrapolate=True, progress=bar)

    answers = len(scalings) * int(suite.asked.sum())
    work = len(scalings) * (one * share + judged)
    return Work(line, suite.probes[0].n_items, answers, work, run, len(scalings) * len(suite.probes), 1 - share)


def price_works(lm: LM, pairs: int, keys: str, seed: int) -> Iterator[Work]:
    """One context scored, and its gradient by numbers of layers and of heads: about what a step of a search costs."""
    suite = tasks.kv_retrieval(pairs, 1, seed, keys=keys)
    layers = LayerScaling.uniform(1.02, lm.num_layers, "ntk", temperatures=(1.02,) * lm.num_layers)
    heads = np.full((lm.num_layers, lm.model.config.get_text_config().num_attention_heads), 1.02)
    of = {"layers": layers, "heads": HeadScaling(heads, heads)}
    works: dict[str, Callable[[], object]] = {"score": partial(score, lm, suite, [of["heads"]])}
    for what, numbers in DIFFERENTIATED.items():
        works[what] = partial(nll_gradient, lm, suite.probes[0], of[what], numbers)
    for what, work in works.items():

        def run(bar: Progress, work: Callable[[], object] = work) -> None:
            with torch.inference_mode(False):
                work()
            bar.advance(1)

        yield Work(f"price of {keys}: {what}", pairs, pairs, 0.0, run, 1)


def price_table(raw: pd.DataFrame) -> pd.DataFrame:
    """What a gradient costs, in contexts scored: median, least and most of the ratios within a repetition."""
    rows = []
    for pairs, keys in PRICED:
        times = raw[raw["pairs"] == pairs].pivot(index="repetition", columns="line", values="seconds")
        scored = times[f"price of {keys}: score"]
        for what in DIFFERENTIATED:
            ratio = times[f"price of {keys}: {what}"] / scored
            rows.append(
                {"pairs": pairs, "keys": keys, "numbers of": what, "score, seconds": scored.median()}
                | {"price": ratio.median(), "least": ratio.min(), "most": ratio.max(), "repetitions": len(ratio)}
            )
    return pd.DataFrame(rows)


def measure_prices(lm: LM, repetitions: int) -> None:
    """Measure, print and write `data/results/gradient_prices.csv`."""
    _warm_up(lm, LayerScaling.identity(lm.num_layers))
    plan = [
        [work for pairs, keys in PRICED for work in price_works(lm, pairs, keys, 21_000 + repetition)]
        for repetition in range(repetitions)
    ]
    raw = measured(lm, plan)
    prices, origin = price_table(raw), f"{describe_machine(lm)} | {lm!r} | peak memory {raw['peak'].max():.2f} GiB"
    print(prices.round(2).to_string(index=False), origin, sep="\n")
    write_table("gradient_prices", prices, f"benchmark.py | {origin}", "%.3f")


def _distinct_layers(scalings: Sequence[LayerScaling]) -> set[tuple[Setting, ...]]:
    """Branches of the trie of candidates: what must be computed, a layer each."""
    return {s.settings[: layer + 1] for s in scalings for layer in range(len(s.factors))}


def measured(lm: LM, repetitions: Sequence[Sequence[Work]]) -> pd.DataFrame:
    """Run all work, repetition by repetition; one row each time, with the matrix rate of its repetition."""
    rows = []
    bar = Progress(sum(work.steps for works in repetitions for work in works), "benchmark")
    with torch.inference_mode(), bar.shown():
        for repetition, works in enumerate(repetitions):
            rate = matrix_rate(lm.model.device, lm.model.dtype)
            for work in works:
                seconds = seconds_of(lm.model.device, partial(work.run, bar))
                rows.append(
                    {
                        "repetition": repetition,
                        "line": work.line,
                        "pairs": work.pairs,
                        "answers": work.answers,
                        "seconds": seconds,
                        "limit": work.operations / rate,
                        "rate": rate,
                        "saved": work.saved,
                        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                    }
                )
    return pd.DataFrame(rows)


def profile(lm: LM, work: Work) -> str:
    """Where the time of some work goes: torch's own operations by their share, those below 2 % left out."""
    on = "device" if lm.model.device.type == "cuda" else "cpu"
    with torch.inference_mode(), torch.profiler.profile() as seen:
        work.run(Progress(work.steps, f"profile of {work.line}"))
    spent = {event.key: getattr(event, f"self_{on}_time_total") for event in seen.key_averages()}
    total = sum(spent.values())
    shares = sorted(((time / total, name) for name, time in spent.items() if time > 0.02 * total), reverse=True)
    return f"profile of {work.line}, {work.pairs} pairs: " + ", ".join(f"{name} {share:.0%}" for share, name in shares)


def summary(raw: pd.DataFrame) -> pd.DataFrame:
    """A row for each line and number of pairs: medians over repetitions, ratios taken within a repetition."""
    raw = raw.assign(each=raw["seconds"] / raw["answers"], share=raw["limit"] / raw["seconds"])
    generate = raw[raw["line"] == GENERATE].set_index(["repetition", "pairs"])["each"]
    raw["ratio"] = generate.reindex(pd.MultiIndex.from_frame(raw[["repetition", "pairs"]])).to_numpy() / raw["each"]
    groups = raw.groupby(["line", "pairs"], sort=False)
    table = groups.agg(
        times_faster=("ratio", "median"), fastest=("ratio", "max"), slowest=("ratio", "min"),
        seconds=("seconds", "median"), answers=("answers", "first"), seconds_an_answer=("each", "median"),
        least=("each", "min"), most=("each", "max"), share_of_limit=("share", "median"), repetitions=("each", "size"),
    )  # fmt: skip
    return table.reset_index()


@dataclass(frozen=True)
class Recorded:
    """A real search, replayed from its outcomes."""

    name: str
    answers: int  # a context
    contexts: int
    result: SearchResult[LayerScaling]

    @property
    def scored(self) -> int:
        """Contexts of candidates that were scored."""
        return self.contexts * len(self.result.candidates)

    @property
    def saved(self) -> float:
        """Share of their layers that candidates of a generation have in common."""
        members: dict[int, list[LayerScaling]] = {}
        for candidate, generation in zip(self.result.candidates, self.result.generation, strict=True):
            members.setdefault(generation, []).append(candidate)
        run = sum(len(_distinct_layers(candidates)) for candidates in members.values())
        return 1 - run / sum(len(candidate.factors) for candidate in self.result.candidates)

    def __str__(self) -> str:
        return f"{self.name}: {len(self.result.candidates)} candidates; layers saved by the trie {self.saved:.1%}"


def recorded_search(
    lm: LM, settings: Mapping[str, Any], ledger: Ledger, name: str, objective: Objective, positions: list[int] | None
) -> Recorded:
    """Notebook 06's search, from the outcomes that ship with it."""
    suite = tasks.kv_retrieval(
        settings["n_pairs"], settings["n_contexts"], settings["seed"], keys=settings["keys"], positions=positions
    )

    def replayed(budget: int) -> SearchResult[LayerScaling]:
        half = settings["population"] // 2
        genetic = GeneticSearch(
            lm.num_layers, first_layer=settings["first_layer"], bounds=settings["bounds"], step=settings["step"],
            start=settings["start"], population=2 * half, parents=half, mutations=half // 2,
            crossovers=half - half // 2, seed=settings["seed"],
        )  # fmt: skip
        return search(lm, suite, genetic, budget=budget, ledger=ledger, objective=objective)

    if replayed(1).recomputed:
        raise RuntimeError(f"the shipped outcomes know nothing of the {name} on {lm!r}; run notebook 06 first")
    return Recorded(name, len(suite.depths), len(suite.probes), replayed(settings["budget"]))


def with_searches(raw: pd.DataFrame, recorded: Sequence[Recorded]) -> pd.DataFrame:
    """Add whole searches: what they scored times what a context took in each repetition.

    The trie's gain is that of the generation measured, in proportion to the layers saved.
    """
    rows = []
    for repetition, times in raw.groupby("repetition"):
        if GENERATION not in set(times["line"]):
            continue
        at = times[times["pairs"] == times.loc[times["line"] == GENERATION, "pairs"].iloc[0]].set_index("line")
        together, alone = at.loc[GENERATION], at.loc[GENERATION_ALONE]
        for one in recorded:
            context = at.loc[ALL if one.answers == at.loc[ALL, "answers"] else THREE]
            for line, base, scale, share in (
                (GENERATE, at.loc[GENERATE], one.scored * one.answers / at.loc[GENERATE, "answers"], 0),
                ("score", context, one.scored, 0),
                ("trie", context, one.scored, one.saved),
            ):
                gained = {
                    what: base[what] * scale * (1 - (1 - together[what] / alone[what]) * share / together["saved"])
                    for what in ("seconds", "limit")
                }
                name = {"line": f"{one.name}: {line}", "answers": one.scored * one.answers}
                rows.append({"repetition": repetition, "pairs": base["pairs"], **name, **gained})
    return pd.concat([raw, pd.DataFrame(rows)], ignore_index=True)


def main() -> None:
    """Measure, print and write what scoring costs, or a gradient: apart, since memory is of the whole process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10, 20, 40, 75, 140], help="4 or more each")
    parser.add_argument("--prices", action="store_true", help="what a gradient costs, in a process of its own")
    arguments = parser.parse_args()
    search = parameters_of("06_ga_search", "cpu")
    settings = search | search["settings"]
    lm, pairs = load_lm(settings["model"], dtype=settings["dtype"]), settings["n_pairs"]
    if arguments.prices:
        measure_prices(lm, arguments.repetitions)
    else:
        measure_scoring(lm, pairs, settings, arguments)


def measure_scoring(lm: LM, pairs: int, settings: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    """Measure, print and write `data/results/benchmark.csv` and `figures/benchmark.svg`."""
    three = [0, (pairs - 1) // 2, pairs - 1]
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        ledger.load(RESULTS / "06_ga_search.outcomes.csv.gz")
        recorded = [
            recorded_search(lm, settings, ledger, "search of U", utilisation_then_nll, three),
            recorded_search(lm, settings, ledger, "search of all depths", utilisation_over_depths_then_nll, None),
        ]
    first = recorded[0].result
    scaling = first.best
    generation = [c for c, number in zip(first.candidates, first.generation, strict=True) if number == 1]

    def works(repetition: int) -> Iterator[Work]:
        for n in sorted({*arguments.pairs, pairs}):
            if n > 50 and repetition >= 3:
                continue  # minutes each, and steady
            suite = tasks.kv_retrieval(n, 1, seed=20_000 + repetition)
            asked = [q * n // 4 + repetition % (n // 4) for q in range(4 if n == pairs else 1)]
            yield generate_work(lm, suite.probes[0], scaling, asked)
            yield score_work(lm, ALL, suite, [scaling])
            if n == pairs:
                for line, positions in ((ALONE, [asked[0]]), (THREE, three)):
                    few = tasks.kv_retrieval(n, 1, seed=20_000 + repetition, positions=positions)
                    yield score_work(lm, line, few, [scaling])
                yield score_work(lm, GENERATION, suite, generation)
                yield score_work(lm, GENERATION_ALONE, suite, generation, together=False)

    _warm_up(lm, scaling)
    plan = [list(works(repetition)) for repetition in range(arguments.repetitions)]
    raw = measured(lm, plan)
    table = summary(with_searches(raw, recorded))
    peaks = raw[raw["repetition"] == 0].groupby("pairs")["peak"].max()  # of the process so far, fewest pairs first
    provenance = f"make bench | {versions()} | {describe_machine(lm)} | {lm!r}"
    facts = [f"matrix products: {raw['rate'].median() / 1e9:.0f} GFLOP/s"]
    facts += [f"peak memory up to {n} pairs: {gib:.2f} GiB" for n, gib in peaks.items()]
    facts += [profile(lm, work) for work in plan[0] if work.pairs == pairs and work.line in (GENERATE, ALL)]
    report = "\n".join([provenance, *facts, *map(str, recorded)])
    print(table.round(3).to_string(index=False), report, sep="\n")
    plots.use_style()
    comments = "".join(f"# {line}\n" for line in report.split("\n"))
    write_whole(RESULTS / "benchmark.csv", comments + table.to_csv(index=False, float_format="%.4g"))
    plots.benchmark(table, pairs).savefig(ROOT / "figures" / "benchmark.svg", metadata={"Date": None})


def _warm_up(lm: LM, scaling: LayerScaling) -> None:
    probe = tasks.kv_retrieval(4, 1).probes[0]
    generate_work(lm, probe, scaling, [0]).run(Progress(1, "warm-up"))
    score_work(lm, ALL, tasks.kv_retrieval(4, 1), [scaling]).run(Progress(1, "warm-up"))


def describe_machine(lm: LM) -> str:
    """The GPU, or threads, cores and name of the processor."""
    if lm.model.device.type == "cuda":
        return torch.cuda.get_device_name(lm.model.device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{torch.get_num_threads()} threads on {os.cpu_count()} cores of {name}"


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of some matrix products."""
    best = 0.0
    for m, k, n in [(1024,) * 3, (2048,) * 3, (4096,) * 3, (4096, 1024, 4096)]:
        a, b = (torch.randn(rows, k, device=device, dtype=dtype) for rows in (m, n))
        product = partial(torch.nn.functional.linear, a, b)
        best = max(best, *(2 * m * k * n / seconds_of(device, product) for _ in range(4)))  # the first warms up
    return best


def seconds_of(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds of a call, including the work that it leaves to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
