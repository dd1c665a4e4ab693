"""How a model copies, and what is left of it when one layer is scaled: measurements and drawings of notebook 04.

A previous-token head tells each token what came before it; an induction head in a later layer looks for the token that
this one came before (Olsson et al. 2022). Here are their scores under a scaling, and their attention on the tokens of
one answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lrs_utils import LayerScaling, tasks
from lrs_utils.analysis.attention import attention, induction_scores
from lrs_utils.models.load import LM
from lrs_utils.scoring.answers import generate_answers
from lrs_utils.scoring.ledger import Ledger

Floats = NDArray[np.float64]
RED, GREY = "#d55e00", "0.6"


def score_copying(
    lm: LM, heads: pd.DataFrame, layer: int | None, factor: float, *, seed: int, n_tokens: int, n_texts: int
) -> pd.DataFrame:
    """When a layer is scaled: score of its best previous-token head, and mean of the five best induction heads.

    Parameters
    ----------
    heads : DataFrame
        `induction_scores` with no scaling: which heads are the best.
    layer : int or None
        None: no scaling, a row for each layer.
    """
    layers = np.arange(lm.num_layers)
    scaling = LayerScaling.identity(lm.num_layers)
    if layer is not None:
        scaling = LayerScaling.one_layer(layer, factor, lm.num_layers)
    with scaling.applied_to(lm.model):
        scores = induction_scores(lm, seed=seed, n_tokens=n_tokens, n_texts=n_texts)
    previous = scores["previous token"].loc[heads["previous token"].groupby("layer").idxmax()].to_numpy()
    matching = scores["prefix matching"].loc[heads["prefix matching"].nlargest(5).index].mean()
    scaled, of = (-1, layers) if layer is None else (layer, np.array([layer]))
    columns = {"scaled": scaled, "layer": of, "previous token": previous[of], "prefix matching": matching}
    return pd.DataFrame(columns)


def compare_copying(copies: pd.DataFrame) -> pd.DataFrame:
    """By layer: its own best previous-token head and the induction heads, each with no scaling and with it scaled.

    Parameters
    ----------
    copies : DataFrame
        Rows of `score_copying` for no scaling and for each layer in turn.
    """
    by_layer = copies.set_index("layer")
    plain, when = by_layer[by_layer["scaled"] < 0], by_layer[by_layer["scaled"] >= 0]
    both = {"previous": "previous token", "matching": "prefix matching"}
    columns = {f"{name}{end}": of[kind] for name, kind in both.items() for end, of in (("", plain), (" scaled", when))}
    return pd.DataFrame(columns)


@dataclass(frozen=True)
class Copy:
    """Where the tokens of an answer stand in a text: in the context (`source`), and again in the answer (`copy`).

    Attributes
    ----------
    ids : list of int
        The text: context, question, answer.
    source, copy : int
        Index of the first of `length` equal tokens.
    """

    ids: list[int]
    source: int
    copy: int
    length: int


def find_copy(lm: LM, context: str, question: tasks.Question, most: int = 10) -> Copy:
    """The answer of a question written after it, and the tokens in the context that it repeats: `most` of them."""
    asked = lm.tokenizer(context + question.prompt + question.answer_prefix)["input_ids"]
    whole = lm.tokenizer(context + question.prompt + question.answer_prefix + question.answer)["input_ids"]
    n_context = len(lm.tokenizer(context)["input_ids"])
    first = min(len(asked), len(whole) - 1)
    same = SequenceMatcher(None, whole[:n_context], whole[first:], autojunk=False).find_longest_match()
    return Copy(list(whole), same.a, first + same.b, max(1, min(most, same.size)))


def watch(lm: LM, ids: Sequence[int], head: tuple[int, int], scaling: LayerScaling) -> Floats:
    """Attention of one head, shape (tokens, tokens): each row is where one token looks."""
    with scaling.applied_to(lm.model):
        mass = attention(lm, ids, edges=range(len(ids))).mass
    return np.asarray(mass[head], float)


def ask_freely(
    lm: LM,
    probe: tasks.Probe,
    question: tasks.Question,
    scalings: Mapping[str, LayerScaling],
    *,
    ledger: Ledger,
    max_new_tokens: int,
) -> tuple[tasks.Suite, dict[str, str]]:
    """What the model writes after the beginning of an answer, up to its end, by the name of each scaling.

    Returns
    -------
    Suite
        Of the one question, under whose keys the ledger keeps the texts.
    dict of str to str
    """
    asked = replace(question, prompt=question.prompt + question.answer_prefix, answer_prefix="")
    suite = tasks.Suite("one question", (replace(probe, questions=(asked,)),))
    texts = {}
    for name, scaling in scalings.items():
        [[text]] = generate_answers(lm, suite, scaling, max_new_tokens=max_new_tokens, ledger=ledger)
        texts[name] = text.partition("\n")[0].partition('"')[0]
    return suite, texts


def draw_circuit(steps: Sequence[tuple[str, str]]) -> Figure:
    """Boxes joined by arrows from left to right, each a heading and a line of what it does."""
    figure, ax = plt.subplots(figsize=(7, 1.5))
    ax.set(xlim=(0, len(steps)), ylim=(0, 1))
    ax.axis("off")
    for nth, (heading, does) in enumerate(steps):
        box = {"boxstyle": "round,pad=0.6", "facecolor": "0.95", "edgecolor": "0.5"}
        ax.text(nth + 0.5, 0.5, f"{heading}\n\n{does}", ha="center", va="center", fontsize=8.5, bbox=box)
        if nth:
            ax.annotate(
                "", (nth + 0.12, 0.5), (nth - 0.12, 0.5), arrowprops={"arrowstyle": "-|>", "color": RED, "lw": 2}
            )
    return figure


def draw_attention(
    panels: Mapping[str, Floats], rows: Sequence[str], columns: Sequence[str], *, xlabel: str, ylabel: str
) -> Figure:
    """Attention of one head on the same tokens, a panel for each scaling; the tokens are written on the axes."""
    figure, axes = plt.subplots(1, len(panels), figsize=(7, 3.3), sharey=True)
    for nth, ((title, part), ax) in enumerate(zip(panels.items(), np.atleast_1d(axes), strict=True)):
        last = nth == len(panels) - 1
        sns.heatmap(
            part, vmin=0, vmax=1, cmap="rocket_r", square=True, linewidths=0.3, ax=ax, xticklabels=list(columns),
            yticklabels=list(rows), cbar=last, cbar_kws={"label": "attention", "shrink": 0.7} if last else None,
        )  # fmt: skip
        ax.set_title(title, fontsize="medium")
        ax.tick_params(axis="both", length=0, labelsize=8, rotation=0)
    np.atleast_1d(axes)[0].set_ylabel(ylabel)
    figure.supxlabel(xlabel, fontsize="medium")
    return figure


def draw_layers(values: pd.Series, marked: int, *, ylabel: str, title: str, ax: Axes) -> None:
    """A bar for each layer; one is red and carries its number."""
    ax.bar(values.index, values, color=[RED if layer == marked else GREY for layer in values.index])
    ax.axhline(0, color="0.6", linewidth=0.8)
    height = float(values.loc[marked])
    ax.annotate(
        f"layer {marked}: {height:+.3g}", (marked, max(height, 0)), (8, 0), textcoords="offset points", color=RED,
        va="top" if height > 0.5 * values.max() else "bottom",
    )  # fmt: skip
    ax.set(ylabel=ylabel, xlim=(-0.7, len(values) - 0.3))
    ax.set_title(title, loc="left", fontsize="medium")


def draw_losses(table: pd.DataFrame, *, titles: Sequence[str]) -> Figure:
    """What scaling each of some layers (rows) takes: a panel for each pair of columns, from open to filled dot.

    Parameters
    ----------
    table : DataFrame
        Index: the name of a layer. Columns: before and after of the first panel, then of the second, and so on; the
        first row, drawn red, stands at the top.
    """
    figure, axes = plt.subplots(1, len(titles), figsize=(7, 0.3 * len(table) + 1.2), sharey=True)
    rows = np.arange(len(table))[::-1]
    for nth, (title, ax) in enumerate(zip(titles, np.atleast_1d(axes), strict=True)):
        before, after = (table.iloc[:, 2 * nth + k].to_numpy(float) for k in (0, 1))
        for row, a, b in zip(rows, before, after, strict=True):
            colour = RED if row == rows[0] else GREY
            ax.plot([a, b], [row, row], color=colour, linewidth=1.8)
            ax.plot(a, row, "o", color="white", markeredgecolor=colour, markersize=6)
            ax.plot(b, row, "o", color=colour, markersize=6)
        ax.set_title(title, loc="left", fontsize="medium")
        ax.set(xlim=(0, 1), ylim=(-0.6, len(table) - 0.4))
    figure.supxlabel("score (open: no scaling; filled: scaled)", fontsize="medium")
    np.atleast_1d(axes)[0].set_yticks(rows, list(table.index))
    return figure
