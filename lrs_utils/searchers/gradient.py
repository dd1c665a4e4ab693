"""The gradient of a suite's nll with respect to numbers of layers and heads, and the search that follows it.

A factor enters a model through one layer's cos and sin, a head's numbers multiply its activations, so the nll of an
answer can be differentiated in all of them at once, for about the cost of four forward passes (one to compute
activations again instead of keeping them). Ours; the paper (2503.04355) searches without gradients.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrs_utils.arguments import number, whole
from lrs_utils.models.load import LM, attending_by
from lrs_utils.progress import Progress
from lrs_utils.scaling.heads import HeadScaling, multiplied
from lrs_utils.scaling.layers import LayerScaling, PositionTables, Scaling, reachable_decoder, temperature_layers
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.outcomes import context_tokens, entered, judged, refuse_beyond_window, refuse_unscorable
from lrs_utils.scoring.packing import Layout, laid_out, pack
from lrs_utils.searchers.methods import Fitness
from lrs_utils.tasks import Probe, Suite

_KEPT_BYTES = 2 * 2**30  # of activations kept for the way back; above it they are computed twice
PRICE = 4  # of a gradient, in answers scored: measured, see CHOICES.md
LAYER_NUMBERS, HEAD_NUMBERS = ("factors", "temperatures"), ("head_temperatures", "head_gains", "mlp_gains")

# What may be learned together. A number of heads behind "=" is the same for all heads of a layer.
SPACES = {
    "factors": ("factors",),
    "temperatures": ("temperatures",),
    "both": LAYER_NUMBERS,
    "head_temperatures": ("head_temperatures",),
    "head_gains": ("head_gains",),
    "heads": ("head_temperatures", "head_gains"),
    "outputs": ("=head_gains", "mlp_gains"),  # as many numbers as "both", none of positions: a control
}


def numbers_of(scaling: Scaling, lm: LM) -> dict[str, NDArray[np.float64]]:
    """A scaling's numbers by name, each of shape (rows, layers): one row for a number of a layer, one for each head."""
    layers, heads = _parts(scaling, lm)
    n_heads, ones = int(lm.model.config.get_text_config().num_attention_heads), np.ones(lm.num_layers)
    given = {
        "factors": layers.factors,
        "temperatures": layers.temperatures,
        "head_temperatures": None if heads is None or heads.temperatures is None else np.transpose(heads.temperatures),
        "head_gains": None if heads is None or heads.gains is None else np.transpose(heads.gains),
        "mlp_gains": None if heads is None else heads.mlp_gains,
    }
    rows = {name: n_heads if name in ("head_temperatures", "head_gains") else 1 for name in given}
    return {
        name: np.tile(ones, (rows[name], 1)) if values is None else np.array(values, float).reshape(rows[name], -1)
        for name, values in given.items()
    }


def refuse_space(lm: LM, vary: str) -> None:
    """Raise the ValueError that names a family which can't have the numbers of a space."""
    twos = {
        name: np.full_like(values, 2.0).T
        for name, values in numbers_of(LayerScaling.identity(lm.num_layers), lm).items()
    }
    names = {name.removeprefix("=") for name in SPACES[vary]}
    if "temperatures" in names:
        obeyed = temperature_layers(lm.model)  # where they are idle there is no gradient, and they stay 1
        some = [2.0 if here or not any(obeyed) else 1.0 for here in obeyed]
        LayerScaling((1.0,) * lm.num_layers, temperatures=some).refuse_misfit(lm.model)
    heads = [twos[name] if name in names else None for name in ("head_temperatures", "head_gains")]
    if {*HEAD_NUMBERS} & names:
        HeadScaling(*heads, mlp_gains=twos["mlp_gains"][:, 0] if "mlp_gains" in names else None).refuse_misfit(lm.model)


def _parts(scaling: Scaling, lm: LM) -> tuple[LayerScaling, HeadScaling | None]:
    heads = scaling if isinstance(scaling, HeadScaling) else None
    layers = scaling if heads is None else heads.layers
    return (layers if isinstance(layers, LayerScaling) else LayerScaling.identity(lm.num_layers)), heads


def nll_gradient(
    lm: LM,
    probe: Probe,
    scaling: Scaling,
    numbers: Sequence[str] = LAYER_NUMBERS,
    *,
    extrapolate: bool = False,
    ledger: Ledger | None = None,
) -> tuple[float, NDArray[np.float64]]:
    """The nll of a context's questions, and its derivative by the logs of numbers.

    Activations are kept while they are small; else only the layers' inputs are, and the rest is computed twice.

    Parameters
    ----------
    probe : Probe
        A context; the nll is the mean over its questions, as `score` measures it.
    numbers : sequence of str
        Which of `numbers_of` to differentiate by: factors and temperatures of layers by default.
    extrapolate : bool
        Allow a context longer than the window.
    ledger : Ledger, optional
        Where a gradient known is found, and a new one is written.

    Returns
    -------
    nll : float
        In nats.
    gradient : float array, shape (rows, layers)
        By the logs of each of `numbers` in turn: one row for a number of a layer, one a head for numbers of heads.

    Raises
    ------
    ValueError
        Scheme "yarn", a model whose tables can't be differentiated, a context beyond the window.
    """
    layers, _ = _parts(scaling, lm)
    if layers.scheme == "yarn":
        raise ValueError("scheme 'yarn' has no gradient here; use 'pi', 'ntk' or 'dynamic_ntk'")
    scaling.refuse_misfit(lm.model)
    filed = gradient_key(probe, layers.scheme, layers.combine, numbers)
    if ledger is not None:
        known = ledger.find_gradient(lm.fingerprint, scaling.key, filed)
        if known is not None:
            return known
    packed = pack(lm, probe, "a context")
    if not extrapolate:
        refuse_beyond_window(lm, packed.longest, scaling, "a context")
    length = context_tokens(lm, probe) if scaling.stretches_by_length else None
    refuse_unscorable(lm)
    device = lm.model.device
    layout, decoder_layers = Layout([packed], device), reachable_decoder(lm.model).layers
    through = _computed_twice if _activation_bytes(lm, layout.length) > _KEPT_BYTES else _kept
    now = {n: torch.tensor(v, dtype=torch.float32, device=device) for n, v in numbers_of(scaling, lm).items()}
    changes = {name: torch.zeros_like(now[name], requires_grad=True) for name in numbers}  # of the logs
    now |= {name: change.exp() * now[name] for name, change in changes.items()}
    of_layers = bool({*LAYER_NUMBERS} & {*numbers})
    with torch.enable_grad(), attending_by(lm, "lrs_packed"), PositionTables(lm.model, length=length) as tables:
        with torch.no_grad(), laid_out(layout):
            hidden, notes = entered(lm, layout)
        for at, (layer, given, setting) in enumerate(zip(decoder_layers, notes, scaling.settings, strict=True)):
            if of_layers:
                pair = (now[name][0, at] for name in LAYER_NUMBERS)
                table = tables.differentiable(given["position_embeddings"], layers, *pair)
            else:
                table = tables(given["position_embeddings"], setting)
            by = [v[None] if n in numbers or (v != 1).any() else None for n in HEAD_NUMBERS for v in [now[n][:, at]]]
            hidden = through(_layer_over, layout, layer, hidden, given, *table, *by)
        at_tokens = layout.judged.to(hidden.device)
        losses = [
            _computed_twice(_losses, lm, *part)
            for part in zip(
                *(torch.split(x, 256) for x in (hidden[0, at_tokens], layout.targets.to(hidden.device))), strict=True
            )
        ]
        owner = torch.as_tensor(packed.owner, device=at_tokens.device)
        n_tokens = owner.bincount()
        nll = (torch.cat(losses) / n_tokens[owner]).sum() / len(n_tokens)
        gradient = torch.cat(torch.autograd.grad(nll, list(changes.values())))
    if not gradient.isfinite().all():
        raise FloatingPointError(f"{lm.name} gave a non-finite gradient under {scaling}; try dtype float32")
    result = nll.item(), np.array([[float(f"{value:.5g}") for value in row] for row in gradient.tolist()])
    if ledger is not None:
        result = ledger.record_gradient(lm.fingerprint, scaling.key, filed, *result)
    return result


def gradient_key(probe: Probe, scheme: str, combine: str = "multiply", numbers: Sequence[str] = LAYER_NUMBERS) -> str:
    """What a context's gradient is filed under: by what it is taken of, and by the way that factors enter, which a key
    without factors leaves out."""
    scheme += " /" * (combine == "divide")
    if tuple(numbers) != LAYER_NUMBERS:
        scheme += " " + " ".join(numbers)
    return hashlib.sha256("|".join((scheme, *probe.keys)).encode()).hexdigest()[:16]


class GradientSearch:
    """Adam on the logs of numbers of layers or heads, one context of each suite a step (ours, not the paper's).

    `search` gives it candidates to judge: the scaling after every few steps, so the stopping point is chosen by
    whatever objective and suite the search is told, which may be other ones than are followed downhill here.

    Parameters
    ----------
    lm : LM
    suites : Suite or sequence of Suite
        What the nll is taken of. Contexts are drawn without replacement until all were seen.
    weights : sequence of float, optional
        Of the suites' nll in their sum; 1 each by default.
    vary : str
        What is learned, a name of `SPACES`: "factors", "temperatures" or "both" (of layers), "head_temperatures",
        "head_gains" or "heads" (both), "outputs".
    start : Scaling, optional
        No scaling by default. Its scheme (not "yarn") and extension are kept.
    steps : int
        The rate falls to 0 over them, as half a cosine.
    rate, temperature_rate : float
        Adam's, of the logs; that of temperatures of layers by itself.
    bounds : (low, high), optional
        Of factors; by default only that the longest context fits into the window, with a tenth to spare (not with
        `extrapolate`).
    every : int
        Steps between candidates.
    questions : int, optional
        At most this many questions of a context in a step, drawn again each time and spread over depth: a cheaper step.
    extrapolate : bool
        Allow contexts longer than the window.
    ledger : Ledger, optional
        Gradients found there are not computed again, so a killed search resumes.
    seed : int
        Of the order of contexts.
    progress : Progress, optional
        Advanced by `PRICE` for every context; without it each `ask` shows its own.
    """

    def __init__(
        self,
        lm: LM,
        suites: Suite | Sequence[Suite],
        *,
        weights: Sequence[float] | None = None,
        vary: str = "both",
        start: Scaling | None = None,
        steps: int = 60,
        rate: float = 0.02,
        temperature_rate: float = 0.02,
        bounds: tuple[float, float] | None = None,
        every: int = 10,
        questions: int | None = None,
        extrapolate: bool = False,
        ledger: Ledger | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        if vary not in SPACES:
            raise ValueError(f"vary is {vary!r}; choose one of {', '.join(SPACES)}")
        for name, value in (("steps", steps), ("every", every), ("questions", questions)):
            if value is not None:
                whole(name, value, least=1)
        number("rate", rate, above=0)
        number("temperature_rate", temperature_rate, above=0)
        if bounds is not None and not 0 < bounds[0] < bounds[1]:
            raise ValueError(f"bounds is {bounds}; factors need 0 < low < high")
        self._suites = [suites] if isinstance(suites, Suite) else list(suites)
        self._weights = [1.0] * len(self._suites) if weights is None else list(weights)
        if len(self._weights) != len(self._suites):
            raise ValueError(f"weights has {len(self._weights)} values for {len(self._suites)} suites")
        start = LayerScaling.identity(lm.num_layers) if start is None else start
        layers, _ = _parts(start, lm)
        if bounds is None:
            low = 0.0
            if not extrapolate:
                longest = max(pack(lm, probe, "a context").longest for suite in self._suites for probe in suite.probes)
                reach = replace(layers, factors=(1.0,) * lm.num_layers).reach
                low = 1.1 * longest / (lm.window * (reach if math.isfinite(reach) else 1.0))
            bounds = min(max(low, 1e-3), *layers.factors), math.inf
        self._bounds, self._extrapolate, self._progress = bounds, extrapolate, progress
        self._lm, self._ledger, self._start, self._steps, self._every = lm, ledger, start, steps, every
        self._values = numbers_of(start, lm)
        self._numbers = tuple(name.removeprefix("=") for name in SPACES[vary])
        if {*LAYER_NUMBERS} & {*self._numbers}:
            self._numbers = LAYER_NUMBERS  # one gradient for all searches of layers
        self._logs: dict[str, Tensor] = {}
        self._base: dict[str, Any] = {}  # what their exponentials multiply
        for name in SPACES[vary]:
            values = torch.tensor(self._values[name.removeprefix("=")], dtype=torch.float32)
            if name[0] == "=":
                self._base[name[1:]], values = self._values[name[1:]], torch.ones(1, lm.num_layers)
            self._logs[name.removeprefix("=")] = values.log().requires_grad_()
        refuse_space(lm, vary)
        rates = {"temperatures": temperature_rate}
        groups = [{"params": [row], "lr": rates.get(name, rate)} for name, row in self._logs.items()]
        self._adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self._cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self._adam, steps)
        rng = np.random.default_rng(seed)
        self._order = [_orders(rng.spawn(1)[0], len(suite.probes)) for suite in self._suites]
        self._questions, self._drawn = questions, rng.spawn(1)[0]
        self._begun = False
        self.nll: list[list[float]] = []  # of each step, suite by suite
        self.gradients: list[NDArray[np.float64]] = []  # of each step, (rows, layers), and where it was taken
        self.visited: list[Scaling] = []
        self.filed: list[str] = []  # keys of the gradients, as `gradient_key` makes them

    @property
    def answers(self) -> int:
        """What the steps so far cost, in answers scored."""
        asked = sum(min(suite.n_questions, self._questions or suite.n_questions) for suite in self._suites)
        return PRICE * len(self.nll) * asked

    @property
    def scaling(self) -> Scaling:
        """Where the search is."""
        return self._with(
            {
                name: self._base.get(name, 1.0) * np.array([[round(v, 5) for v in row] for row in logs.exp().tolist()])
                for name, logs in self._logs.items()
            }
        )

    def _with(self, changed: Mapping[str, NDArray[np.float64]]) -> Scaling:
        """The start with some numbers changed."""
        values, (layers, heads) = self._values | {**changed}, _parts(self._start, self._lm)
        layers = replace(layers, factors=values["factors"][0], temperatures=values["temperatures"][0])
        if heads is None and not {*HEAD_NUMBERS} & {*changed}:
            return layers
        of_heads = [values[name].T for name in ("head_temperatures", "head_gains")]
        return HeadScaling(*of_heads, mlp_gains=values["mlp_gains"][0], layers=layers)

    def ask(self) -> list[Scaling]:
        """The start, then where the next few steps lead."""
        if not self._begun:
            self._begun = True
            return [self._start]
        left = min(self._every, self._steps - len(self.nll))
        bar = self._progress or Progress(left * len(self._suites) * PRICE, "gradient")
        with bar.entered():
            for _ in range(left):
                self._step(bar)
        return [self.scaling] if left else []

    def tell(self, candidates: Sequence[Scaling], fitness: Sequence[Fitness]) -> None:
        """The way downhill does not depend on it."""

    def _asking_some(self, probe: Probe) -> Probe:
        if self._questions is None or len(probe.questions) <= self._questions:
            return probe
        by_depth = sorted(range(len(probe.questions)), key=lambda q: probe.questions[q].position)
        some = [int(self._drawn.choice(part)) for part in np.array_split(by_depth, self._questions)]
        return replace(probe, questions=tuple(probe.questions[q] for q in sorted(some)))

    def _step(self, bar: Progress) -> None:
        scaling, parts, losses = self.scaling, [], []
        for suite, weight, order in zip(self._suites, self._weights, self._order, strict=True):
            probe = self._asking_some(suite.probes[next(order)])
            nll, gradient = nll_gradient(
                self._lm, probe, scaling, self._numbers, extrapolate=self._extrapolate, ledger=self._ledger
            )
            layers, _ = _parts(scaling, self._lm)
            self.filed.append(gradient_key(probe, layers.scheme, layers.combine, self._numbers))
            losses.append(nll)
            parts.append(weight * gradient)
            bar.advance(PRICE)
        total = np.sum(parts, axis=0)
        by_number = np.split(total, np.cumsum([len(self._values[name]) for name in self._numbers])[:-1])
        for name, gradient in zip(self._numbers, by_number, strict=True):
            if (logs := self._logs.get(name)) is not None:
                tied = len(logs) < len(gradient)
                logs.grad = torch.tensor(gradient.sum(0, keepdims=True) if tied else gradient, dtype=logs.dtype)
        self._adam.step()
        self._cosine.step()
        if "factors" in self._logs:
            self._logs["factors"].data.clamp_(*map(math.log, self._bounds))
        self.visited.append(scaling)
        self.nll.append(losses)
        self.gradients.append(total)
        shown = ", ".join(f"{value:.3f}" for value in losses)
        bar.advance(0, f"step {len(self.nll)} of {self._steps}, nll {shown}")


def _orders(rng: np.random.Generator, n: int) -> Iterator[int]:
    while True:
        yield from rng.permutation(n).tolist()


def _kept(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


def _computed_twice(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False)  # type: ignore[no-any-return]


def _activation_bytes(lm: LM, n_tokens: int) -> int:
    """About what a forward pass keeps for its gradient: measured on SmolLM2, 50 KB a token and layer in float32."""
    config = lm.model.config.get_text_config()
    numbers = 10 * config.hidden_size + 4 * config.intermediate_size
    return int(n_tokens * lm.num_layers * numbers * lm.model.dtype.itemsize)


def _layer_over(
    layout: Layout,
    layer: nn.Module,
    hidden: Tensor,
    given: dict[str, Any],
    cos: Tensor,
    sin: Tensor,
    *numbers: Tensor | None,
) -> Tensor:
    # here, since the second computation may run in another thread
    with laid_out(layout), multiplied(layer, *numbers):
        return layer(hidden, **given | {"position_embeddings": (cos, sin)})  # type: ignore[no-any-return]


def _losses(lm: LM, states: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(judged(lm, states), targets, reduction="none")
