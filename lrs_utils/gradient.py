"""The gradient of a suite's nll with respect to every layer's factor and temperature, and the search that follows it.

A factor enters a model through one layer's cos and sin, so the nll of an answer can be differentiated in all of them at
once, for about the price of four forward passes (one to compute activations again instead of keeping them). Ours; the
paper (2503.04355) searches without gradients.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrs_utils.ledger import Ledger
from lrs_utils.models import LM, attending_by
from lrs_utils.packed import Layout, laid_out, pack
from lrs_utils.progress import Progress
from lrs_utils.rope import DYNAMIC
from lrs_utils.scaling import LayerScaling, PositionTables, reachable_decoder
from lrs_utils.scoring import context_tokens, entered, judged, refuse_beyond_window
from lrs_utils.searchers import Fitness, varied
from lrs_utils.tasks import Probe, Suite

PRICE = 4  # of a gradient, in answers scored: measured, see CHOICES.md


def nll_gradient(
    lm: LM, probe: Probe, scaling: LayerScaling, *, extrapolate: bool = False, ledger: Ledger | None = None
) -> tuple[float, NDArray[np.float64]]:
    """The nll of a context's questions, and its derivative by the log of each layer's factor and temperature.

    Activations are computed twice, none are kept but the layers' inputs (checkpointing).

    Parameters
    ----------
    probe : Probe
        A context; the nll is the mean over its questions, as `score` measures it.
    extrapolate : bool
        Allow a context longer than the window.
    ledger : Ledger, optional
        Where a gradient known is found, and a new one is written.

    Returns
    -------
    nll : float
        In nats.
    gradient : float array, shape (2, layers)
        By log s_l, then by log t_l.

    Raises
    ------
    ValueError
        Scheme "yarn", a model whose tables can't be differentiated, a context beyond the window.
    """
    if scaling.scheme == "yarn":
        raise ValueError("scheme 'yarn' has no gradient here; use 'pi', 'ntk' or 'dynamic_ntk'")
    scaling.refuse_misfit(lm.model)
    if ledger is not None:
        known = ledger.find_gradient(lm.fingerprint, scaling.key, gradient_key(probe, scaling.scheme, scaling.combine))
        if known is not None:
            return known
    packed = pack(lm, probe, "a context")
    if not extrapolate:
        refuse_beyond_window(lm, packed.longest, scaling, "a context")
    length = context_tokens(lm, probe) if scaling.scheme == DYNAMIC else None
    device = lm.model.device
    layout, layers = Layout([packed], device), reachable_decoder(lm.model).layers
    change = torch.zeros(2, len(layers), device=device, requires_grad=True)  # of log factors and log temperatures
    values = change.exp() * torch.tensor([scaling.factors, scaling.temperatures or (1.0,) * len(layers)], device=device)
    with torch.enable_grad(), attending_by(lm, "lrs_packed"), PositionTables(lm.model, length=length) as tables:
        with torch.no_grad(), laid_out(layout):
            hidden, notes = entered(lm, layout)
        for layer, given, factor, temperature in zip(layers, notes, *values, strict=True):
            own = tables.differentiable(given["position_embeddings"], scaling, factor, temperature)
            hidden = checkpoint(_layer_over, layout, layer, hidden, given, *own, use_reentrant=False)
        at = layout.judged.to(hidden.device)
        losses = [
            checkpoint(_losses, lm, *part, use_reentrant=False)
            for part in zip(*(torch.split(x, 256) for x in (hidden[0, at], layout.targets.to(at.device))), strict=True)
        ]
        owner = torch.as_tensor(packed.owner, device=at.device)
        n_tokens = owner.bincount()
        nll = (torch.cat(losses) / n_tokens[owner]).sum() / len(n_tokens)
        [gradient] = torch.autograd.grad(nll, [change])
    if not gradient.isfinite().all():
        raise FloatingPointError(f"{lm.name} gave a non-finite gradient under {scaling}; try dtype float32")
    result = nll.item(), np.array([[float(f"{value:.5g}") for value in row] for row in gradient.tolist()])
    if ledger is not None:
        result = ledger.record_gradient(
            lm.fingerprint, scaling.key, gradient_key(probe, scaling.scheme, scaling.combine), *result
        )
    return result


def gradient_key(probe: Probe, scheme: str, combine: str = "multiply") -> str:
    """What a context's gradient is filed under: by the way that factors enter too, which a key without factors leaves
    out."""
    scheme += " /" * (combine == "divide")
    return hashlib.sha256("|".join((scheme, *probe.keys)).encode()).hexdigest()[:16]


class GradientSearch:
    """Adam on the logs of factors and temperatures, one context of each suite a step (ours, not the paper's).

    `search` gives it candidates to judge: the scaling after every few steps, so the stopping point is chosen by
    whatever objective and suite the search is told, which may be other ones than are followed downhill here.

    Parameters
    ----------
    lm : LM
    suites : Suite or sequence of Suite
        What the nll is taken of. Contexts are drawn without putting back until all were seen.
    weights : sequence of float, optional
        Of the suites' nll in their sum; 1 each by default.
    vary : str
        "factors", "temperatures" or "both".
    start : LayerScaling, optional
        No scaling by default. Its scheme (not "yarn") and extension are kept.
    steps : int
        The rate falls to 0 over them, as half a cosine.
    rate, temperature_rate : float
        Adam's, of the logs of factors and of temperatures.
    bounds : (low, high), optional
        Of factors; by default only that the longest context fits into the window, with a tenth to spare (not with
        `extrapolate`).
    every : int
        Steps between candidates.
    extrapolate : bool
        Allow contexts longer than the window.
    ledger : Ledger, optional
        Gradients found there are not computed again: a search that was killed goes on where it was.
    seed : int
        Of the order of contexts.
    """

    def __init__(
        self,
        lm: LM,
        suites: Suite | Sequence[Suite],
        *,
        weights: Sequence[float] | None = None,
        vary: str = "both",
        start: LayerScaling | None = None,
        steps: int = 60,
        rate: float = 0.02,
        temperature_rate: float = 0.02,
        bounds: tuple[float, float] | None = None,
        every: int = 10,
        extrapolate: bool = False,
        ledger: Ledger | None = None,
        seed: int = 0,
    ) -> None:
        varied(vary)
        for name, value in (("steps", steps), ("every", every)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if bounds is not None and not 0 < bounds[0] < bounds[1]:
            raise ValueError(f"bounds is {bounds}; factors need 0 < low < high")
        self._suites = [suites] if isinstance(suites, Suite) else list(suites)
        self._weights = [1.0] * len(self._suites) if weights is None else list(weights)
        if len(self._weights) != len(self._suites):
            raise ValueError(f"weights has {len(self._weights)} values for {len(self._suites)} suites")
        start = LayerScaling.identity(lm.num_layers) if start is None else start
        if vary != "factors":  # families that can't have temperatures are refused by name
            LayerScaling(start.factors, temperatures=(2.0,) * lm.num_layers).refuse_misfit(lm.model)
        if bounds is None:
            low = 0.0
            if not extrapolate:
                longest = max(pack(lm, probe, "a context").longest for suite in self._suites for probe in suite.probes)
                reach = replace(start, factors=(1.0,) * lm.num_layers).reach
                low = 1.1 * longest / (lm.window * (reach if math.isfinite(reach) else 1.0))
            bounds = min(max(low, 1e-3), *start.factors), math.inf
        self._bounds, self._extrapolate = bounds, extrapolate
        self._lm, self._ledger, self._start, self._steps, self._every = lm, ledger, start, steps, every
        values = torch.tensor([start.factors, start.temperatures or (1.0,) * lm.num_layers]).log()
        self._logs = [row.requires_grad_() for row in values]
        rates = [rate * (vary != "temperatures"), temperature_rate * (vary != "factors")]
        groups = [{"params": [row], "lr": r} for row, r in zip(self._logs, rates, strict=True)]
        self._adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self._cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self._adam, steps)
        rng = np.random.default_rng(seed)
        self._order = [_orders(rng.spawn(1)[0], len(suite.probes)) for suite in self._suites]
        self._begun = False
        self.nll: list[list[float]] = []  # of each step, suite by suite
        self.gradients: list[NDArray[np.float64]] = []  # of each step, (2, layers), and where it was taken
        self.visited: list[LayerScaling] = []

    @property
    def answers(self) -> int:
        """What the steps so far cost, in answers scored."""
        return PRICE * len(self.nll) * sum(len(suite.depths) for suite in self._suites)

    @property
    def scaling(self) -> LayerScaling:
        """Where the search is."""
        values = [[round(value, 5) for value in row.exp().tolist()] for row in self._logs]
        return replace(self._start, factors=tuple(values[0]), temperatures=tuple(values[1]))

    def ask(self) -> list[LayerScaling]:
        """The start, then where the next few steps lead."""
        if not self._begun:
            self._begun = True
            return [self._start]
        left = min(self._every, self._steps - len(self.nll))
        with Progress(left, "gradient").entered() as bar:
            for _ in range(left):
                self._step()
                nll = ", ".join(f"{value:.3f}" for value in self.nll[-1])
                bar.advance(1, f"step {len(self.nll)} of {self._steps}, nll {nll}")
        return [self.scaling] if left else []

    def tell(self, candidates: Sequence[LayerScaling], fitness: Sequence[Fitness]) -> None:
        """The way downhill does not depend on it."""

    def _step(self) -> None:
        scaling, total, losses = self.scaling, np.zeros((2, self._lm.num_layers)), []
        for suite, weight, order in zip(self._suites, self._weights, self._order, strict=True):
            probe = suite.probes[next(order)]
            nll, gradient = nll_gradient(self._lm, probe, scaling, extrapolate=self._extrapolate, ledger=self._ledger)
            losses.append(nll)
            total += weight * gradient
        for row, gradient in zip(self._logs, total, strict=True):
            row.grad = torch.tensor(gradient, dtype=row.dtype)
        self._adam.step()
        self._cosine.step()
        self._logs[0].data.clamp_(*map(math.log, self._bounds))
        self.visited.append(scaling)
        self.nll.append(losses)
        self.gradients.append(total)


def _orders(rng: np.random.Generator, n: int) -> Iterator[int]:
    while True:
        yield from rng.permutation(n).tolist()


def _layer_over(
    layout: Layout, layer: nn.Module, hidden: Tensor, given: dict[str, Any], cos: Tensor, sin: Tensor
) -> Tensor:
    with laid_out(layout):  # here, since the second computation may run in another thread
        return layer(hidden, **given | {"position_embeddings": (cos, sin)})  # type: ignore[no-any-return]


def _losses(lm: LM, states: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(judged(lm, states), targets, reduction="none")
