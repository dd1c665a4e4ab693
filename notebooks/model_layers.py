"""What the layers of a model see, how they attend, and what scaling one of them costs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.stats import spearmanr

from lrs_utils import LM, LayerScaling, Ledger, score, tasks
from lrs_utils.analysis.attention import attention, induction_scores
from lrs_utils.analysis.statistics import bootstrap_mean
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.products import n_heads


def describe_model(lm: LM) -> dict[str, str]:
    """What matters for positions, in words."""
    config, windows = lm.model.config.get_text_config(), list_windows(lm)
    sliding = sorted({window for window in windows if window})
    ropes = config.rope_parameters if "rope_theta" not in config.rope_parameters else {"all": config.rope_parameters}
    bases = sorted({rope["rope_theta"] for rope in ropes.values()})
    weights = sum(parameter.numel() for parameter in lm.model.parameters())
    attention = lm.model.get_submodule("model.layers.0.self_attn")
    return {
        "weights": f"{weights / 1e6:,.0f} million",
        "layers": str(lm.num_layers),
        "layers that see the whole context": str(windows.count(0)),
        "tokens that the others see": ", ".join(f"{window:,}" for window in sliding) or "all see the whole",
        "query heads, key-value heads": f"{config.num_attention_heads}, {config.num_key_value_heads}",
        "factors and temperatures of layers": str(2 * lm.num_layers),
        "gains of heads": str(lm.num_layers * n_heads(lm.model)),
        "norm of queries and keys": "yes" if hasattr(attention, "q_norm") else "no",
        "base of RoPE": ", ".join(f"{base:,.0f}" for base in bases),
        "window (tokens)": f"{lm.window:,}",
    }


def describe_layers(
    lm: LM, ledger: Ledger, n_pairs: int, factor: float, *, n_contexts: int, n_texts: int, seed: int
) -> pd.DataFrame:
    """What each layer sees, how widely it looks, whether it copies, and what scaling it alone costs.

    Returns
    -------
    DataFrame
        A row for each layer: "sees" (tokens of a sliding window, 0 for all), "entropy" (of the last query, divided by
        that of even attention), "previous token" and "prefix matching" (its best head's scores, as
        `induction_scores`), and the change of the answers' nll under each scheme with its interval over contexts.
    """
    suite = tasks.kv_retrieval(n_pairs, n_contexts, seed, keys="short")
    entropy = []
    for number, probe in enumerate(suite.probes[:n_texts]):
        q = probe.questions[(2 * number + 1) * len(probe.questions) // (2 * n_texts)]
        ids = lm.tokenizer(probe.context + q.prompt + q.answer_prefix)["input_ids"]
        seen = np.array([min(len(ids), window or len(ids)) for window in list_windows(lm)])
        entropy.append(attention(lm, ids, queries=1).entropy[..., 0].mean(axis=1) / np.log(seen))
    heads = induction_scores(lm, seed=seed, n_texts=n_texts).groupby("layer").max()
    table = pd.DataFrame({"sees": list_windows(lm), "entropy": np.mean(entropy, axis=0)}).join(heads)
    for scheme in ("pi", "ntk"):
        alone = [LayerScaling.one_layer(layer, factor, lm.num_layers, scheme) for layer in range(lm.num_layers)]
        nll = score(lm, suite, [LayerScaling.identity(lm.num_layers), *alone], ledger=ledger).nll.mean(axis=2)
        changes = [bootstrap_mean(after - nll[0]) for after in nll[1:]]
        for name in ("mean", "low", "high"):
            table[f"{scheme}, {name}"] = [float(getattr(change, name)) for change in changes]
    return table.rename_axis("layer").reset_index()


def summarise_layers(rows: pd.DataFrame) -> dict[str, Any]:
    """What `describe_layers` says of a model: its most harmful layer, what is in it, how entropy goes over layers."""
    harm, previous = rows["pi, mean"].to_numpy(float), rows["previous token"].to_numpy(float)
    worst, trend = int(harm.argmax()), spearmanr(rows["layer"], rows["entropy"])
    return {
        "most harmful layer": worst,
        "its harm (nats)": float(harm[worst]),
        "sum of the others": float(harm.sum() - harm[worst]),
        "its previous-token head": float(previous[worst]),
        "rank of that head": int((previous > previous[worst]).sum()) + 1,
        "what it sees": f"{rows['sees'].iloc[worst]} tokens" if rows["sees"].iloc[worst] else "the whole context",
        "entropy over the layers": float(trend.statistic),
        "its p": float(trend.pvalue),
    }


def list_windows(lm: LM) -> list[int]:
    """Tokens that each layer sees; 0 for all."""
    config = lm.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * lm.num_layers
    return [config.sliding_window if kind == "sliding_attention" else 0 for kind in kinds]


def split_by_kind(lm: LM, scaling: Scaling) -> dict[str, LayerScaling]:
    """A scaling of layers with the factors of one kind of layers only, the others at 1."""
    assert isinstance(scaling, LayerScaling)
    parts, slides = {}, [bool(window) for window in list_windows(lm)]
    for kind, wanted in (("sliding layers", True), ("layers that see the whole context", False)):
        factors = [f if here == wanted else 1.0 for f, here in zip(scaling.factors, slides, strict=True)]
        parts[f"the {slides.count(wanted)} {kind} alone"] = LayerScaling(factors, scheme=scaling.scheme)
    return parts


def draw_layers(values: pd.Series, windows: Sequence[int], *, ylabel: str, ax: Axes) -> None:
    """A bar for each layer, those that see the whole context dark; the highest carries its number."""
    ax.bar(values.index, values, color=["0.75" if window else "0.25" for window in windows])
    ax.axhline(0, color="0.6", linewidth=0.8)
    top = int(values.to_numpy().argmax())
    ax.annotate(
        f"layer {top}", (top, float(values.max())), (0, 2), textcoords="offset points", ha="center", fontsize="small"
    )
    ax.set(ylabel=ylabel, xlim=(-0.7, len(values) - 0.3))
    ax.margins(y=0.2)
