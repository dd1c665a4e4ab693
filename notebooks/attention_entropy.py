"""How notebook 02 measures and draws attention: its entropy by layer and head, and where in a text it goes.

Knows no files and no parameters: texts, suites and scalings are passed in.
"""

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from lrs_utils import LayerScaling, tasks
from lrs_utils.analysis.attention import attention
from lrs_utils.analysis.methods import colour_of, label_ends
from lrs_utils.analysis.plots import named_lines
from lrs_utils.analysis.statistics import Interval, bootstrap_mean, rank_correlation
from lrs_utils.models.load import LM

TENTHS = [f"{10 * d} %" for d in range(1, 11)]  # of the context, each by where it ends
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "last"]
PARTS = ["first token", *TENTHS, "question"]
KIND_COLOURS: dict[str, tuple[float, ...] | str] = {"key-value": "0.1", "documents": "#ca9161", "book": "#0c9bd9"}

Text = tuple[list[int], int]  # tokens, and how many of them are the context's


def ask_one_each(lm: LM, suite: tasks.Suite) -> list[Text]:
    """Put one question to each context, at depths from the beginning to the end in turn."""
    found = []
    for number, probe in enumerate(suite.probes):
        q = probe.questions[int((number + 0.5) * len(suite.depths) / len(suite.probes))]
        whole = lm.tokenizer(probe.context + q.prompt + q.answer_prefix)["input_ids"]
        found.append((whole, len(lm.tokenizer(probe.context)["input_ids"])))
    return found


def relative(entropy: NDArray[np.float32]) -> NDArray[np.float64]:
    """Divide by ln(tokens seen), for queries from the second on; the last axis is theirs."""
    return np.asarray(entropy[..., 1:] / np.log(np.arange(2, entropy.shape[-1] + 1)))


def even_shares(edges: Sequence[int]) -> NDArray[np.float64]:
    """Find what each part gets when every query attends evenly to all that it sees; mean over queries."""
    seen = np.arange(1, edges[-1] + 1)
    shares = np.diff(np.minimum.outer(seen, np.asarray(edges)), axis=1) / seen[:, None]
    return np.asarray(shares.mean(axis=0))


def measure_texts(lm: LM, kind: str, texts: Sequence[Text]) -> pd.DataFrame:
    """Measure, by text and layer, relative entropy (mean over heads, and of each) and attention on each part.

    Returns
    -------
    DataFrame
        Relative entropy of the "last" query, of queries of the "question" and of "all"; attention of the last query on
        each of `PARTS`, and that of all queries over its even share; the last query's relative entropy by head.
    """
    rows = []
    for number, (ids, n_context) in enumerate(texts):
        edges = [0, *np.linspace(1, n_context, 11).round().astype(int).tolist()]
        found = attention(lm, ids, edges=edges)
        entropy, even = relative(found.entropy), even_shares([*edges, len(ids)])
        last, question = entropy[..., -1], entropy[..., n_context:]
        columns = {"last": last.mean(1), "question": question.mean((1, 2)), "all": entropy.mean((1, 2))}
        columns |= {f"last {part}": m for part, m in zip(PARTS, found.mass[:, :, -1].mean(1).T, strict=True)}
        columns |= {f"all {part}": m for part, m in zip(PARTS, (found.mass.mean((1, 2)) / even).T, strict=True)}
        columns |= {f"head {head}": e for head, e in enumerate(last.T)}
        rows.append(pd.DataFrame({"kind": kind, "text": number} | columns).rename_axis("layer"))
    return pd.concat(rows).reset_index().round(5)


def correlate_over_layers(entropy: Mapping[tuple[str, str], NDArray[np.float64]]) -> pd.DataFrame:
    """Correlate entropy with the layer's number within each text; mean entropy of each half of the layers.

    Parameters
    ----------
    entropy : mapping of (kind of text, queries) to array, shape (texts, layers)

    Returns
    -------
    DataFrame
        By kind and queries; correlations are means with intervals over texts.
    """
    rows = {}
    for key, values in entropy.items():
        half = values.shape[1] // 2
        each = [float(rank_correlation(np.arange(values.shape[1]), text, resamples=1).mean) for text in values]
        rows[key] = [*map(float, bootstrap_mean(each)), values[:, :half].mean(), values[:, half:].mean()]
    return pd.DataFrame(rows, index=["rank correlation with depth", "low", "high", "first half", "second half"]).T


def find_spans(lm: LM, probe: tasks.Probe, question: tasks.Question) -> dict[str, tuple[int, int]]:
    """Find where the asked value ("gold") and each tenth of a context stand: first token, and first one after."""
    ends = np.array(lm.tokenizer(probe.context, return_offsets_mapping=True)["offset_mapping"])[:, 1]
    start = probe.context.index(question.answer)
    first, after = np.searchsorted(ends, [start, start + len(question.answer)], side="right").tolist()
    tenths = np.linspace(1, len(ends), 11).round().astype(int).tolist()
    return {"gold": (first, after)} | dict(zip(TENTHS, pairwise(tenths), strict=True))


def measure_asked(lm: LM, suite: tasks.Suite, name: str, scaling: LayerScaling) -> pd.DataFrame:
    """Measure the last query under a scaling, with each position asked for in turn.

    Returns
    -------
    DataFrame
        By text and layer, mean over heads: relative entropy, attention on the asked value ("gold") and on each tenth.
    """
    rows = []
    for number, probe in enumerate(suite.probes):
        q = probe.questions[number % len(probe.questions)]
        ids = lm.tokenizer(probe.context + q.prompt + q.answer_prefix)["input_ids"]
        places = find_spans(lm, probe, q)
        edges = sorted({0}.union(*places.values()))
        with scaling.applied_to(lm.model):
            found = attention(lm, ids, edges=edges, queries=1)
        mass = pd.DataFrame(found.mass[:, :, 0].mean(1), columns=edges)
        columns = {"entropy": found.entropy[..., 0].mean(1) / np.log(len(ids))}
        columns |= {part: mass.loc[:, a : b - 1].sum(axis=1) for part, (a, b) in places.items()}
        rows.append(pd.DataFrame({"scaling": name, "text": number, "position": q.position} | columns))
    return pd.concat(rows).rename_axis("layer").reset_index().round(5)


def find_spreads(heads: pd.DataFrame) -> tuple[float, float]:
    """Find the standard deviation of heads within layers (mean over layers) and that of the layers' means.

    Parameters
    ----------
    heads : DataFrame
        A row for each layer, a column for each head.
    """
    return float(heads.std(axis=1).mean()), float(heads.mean(axis=1).std())


def find_effects(scaled: pd.DataFrame, baseline: str = "no scaling") -> dict[tuple[str, str], dict[str, Interval]]:
    """Find what scalings do: attention on the asked value, and changes of attention on each tenth and of entropy.

    Parameters
    ----------
    scaled : DataFrame
        Rows of `measure_asked` for several scalings, the baseline included.

    Returns
    -------
    mapping of (ylabel, xlabel) to mapping of scaling to Interval
        In per cent by fifth of depth, in points by tenth, and by layer; changes without the baseline.
    """
    by_scaling = dict(iter(scaled.groupby("scaling", sort=False)))
    of_text = {name: of.groupby(["text", "position"]).mean(numeric_only=True) for name, of in by_scaling.items()}
    of_layer = {name: of.pivot(index="text", columns="layer", values="entropy") for name, of in by_scaling.items()}
    fifth = pd.cut(of_text[baseline].index.get_level_values("position"), 5, labels=False)
    on_gold, on_tenths, widths = {}, {}, {}
    for name, of in of_text.items():
        each = [bootstrap_mean(100 * of["gold"].to_numpy()[fifth == f]) for f in range(5)]
        on_gold[str(name)] = Interval(*np.transpose(each))
        if name != baseline:
            on_tenths[str(name)] = bootstrap_mean(100 * (of[TENTHS] - of_text[baseline][TENTHS]).to_numpy())
            widths[str(name)] = bootstrap_mean((of_layer[name] - of_layer[baseline]).to_numpy())
    return {
        ("attention on the\nasked value (%)", "depth of the pair (0 beginning, 1 end)"): on_gold,
        ("change on each\ntenth (points)", "depth of the part (0 beginning, 1 end)"): on_tenths,
        ("change of\nrelative entropy", "layer"): widths,
    }


def measure_long(lm: LM, ids: list[int]) -> pd.DataFrame:
    """Measure relative entropy by layer of one long text, seconds, and the process's largest memory so far."""
    import resource  # not on Windows

    start = time.perf_counter()
    entropy = relative(attention(lm, ids).entropy).mean(axis=1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    columns = {"all": entropy.mean(axis=1), "last 256": entropy[:, -256:].mean(axis=1)}
    return (
        pd.DataFrame(columns | {"seconds": time.perf_counter() - start, "GiB": peak}).rename_axis("layer").reset_index()
    )


def draw_rows(rows: Mapping[str, NDArray[np.float64]], marked: tuple[int, int]) -> Figure:
    """Draw the attention of one query in several heads, a panel each: per cent on every token, some of them shaded."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(7, 1.7 * len(rows)), sharex=True, squeeze=False)
    for ax, (title, row) in zip(axes[:, 0], rows.items(), strict=True):
        ax.axvspan(*marked, color="#d55e00", alpha=0.3, linewidth=0)
        ax.vlines(np.arange(len(row)), 0, 100 * row, color="#0c9bd9", linewidth=1)
        ax.set_title(title, loc="left", fontsize="medium")
        ax.set(ylabel="attention (%)", ylim=(0, None))
    axes[-1, 0].set_xlabel("token")
    return figure


def draw_entropy(panels: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """Draw relative entropy by layer: a panel for each set of queries, a line for each kind of text."""
    figure, axes = plt.subplots(1, len(panels), figsize=(7, 3.2), sharey=True, squeeze=False)
    for ax, (title, lines) in zip(axes[0], panels.items(), strict=True):
        layers = np.arange(len(next(iter(lines.values())).mean))
        named_lines(lines, layers, KIND_COLOURS, xlabel="layer", ylabel="", ax=ax)
        ax.set_title(title, fontsize="medium")
    axes[0, 0].set_ylabel("relative entropy")
    return figure


def draw_scaled(panels: Mapping[tuple[str, str], Mapping[str, Interval]]) -> Figure:
    """Draw what scalings do: a panel for each (ylabel, xlabel); factors above 1 are dashed.

    Parameters
    ----------
    panels : mapping of (ylabel, xlabel) to mapping of method to Interval
        Depths from 0 to 1 if the xlabel begins with "depth", else layers.
    """
    figure, axes = plt.subplots(len(panels), 1, figsize=(7, 2.2 * len(panels)), squeeze=False)
    for ax, ((ylabel, xlabel), lines) in zip(axes[:, 0], panels.items(), strict=True):
        ends = {}
        for name, line in lines.items():
            n = len(line.mean)
            x = np.linspace(0, 1, n) if xlabel.startswith("depth") else np.arange(n)
            dash = "--" if name.startswith("one factor") and float(name.split("(")[1][:-1]) > 1 else "-"
            ax.plot(x, line.mean, dash, color=colour_of(name), linewidth=1.8)
            ax.fill_between(x, line.low, line.high, color=colour_of(name), alpha=0.12, linewidth=0)
            ends[name] = float(line.mean[-1])
        ax.set(xlabel=xlabel, ylabel=ylabel)
        label_ends(ax, float(x[-1]), ends, {name: colour_of(name) for name in ends}, gap=0.1)
    figure.align_ylabels()
    return figure


def draw_layers(panels: Mapping[str, ArrayLike], marked: int) -> Figure:
    """Draw several numbers of each layer below each other, the last on a scale that shows small and large ones."""
    figure, axes = plt.subplots(len(panels), 1, figsize=(7, 1.6 * len(panels)), sharex=True, squeeze=False)
    for ax, (name, values) in zip(axes[:, 0], panels.items(), strict=True):
        values = np.asarray(values, float)
        colours = np.where(np.arange(len(values)) == marked, "#d55e00", "0.6")
        ax.bar(np.arange(len(values)), values, color=colours.tolist())
        ax.set_title(name, loc="left", fontsize="medium")
    axes[-1, 0].set_yscale("symlog", linthresh=0.02)
    axes[-1, 0].yaxis.set_major_formatter("{x:g}")
    axes[-1, 0].axhline(0, color="0.5", linewidth=0.8)
    axes[-1, 0].set_xlabel("layer")
    return figure


def draw_correlations(table: pd.DataFrame, marked: str) -> Figure:
    """Draw a forest plot of rank correlations, in the order of the rows, with one marked.

    Parameters
    ----------
    table : DataFrame
        Index: names. Columns "rank correlation", "low", "high".
    """
    figure, ax = plt.subplots(figsize=(7, 0.28 * len(table) + 0.9))
    ax.axvline(0, color="0.7", linewidth=0.8)
    at = np.arange(len(table))[::-1]
    for row, (name, of) in zip(at, table.iterrows(), strict=True):
        colour = "#d55e00" if name == marked else "0.5"
        ax.plot([of["low"], of["high"]], [row, row], color=colour, linewidth=2)
        ax.plot(of["rank correlation"], row, "o", color=colour, markersize=5)
    ax.set_yticks(at, [str(name) for name in table.index])
    for name, label in zip(table.index, ax.get_yticklabels(), strict=True):
        label.set_color("#d55e00" if name == marked else "0.2")
    ax.set_xlabel("rank correlation with sensitivity")
    return figure
