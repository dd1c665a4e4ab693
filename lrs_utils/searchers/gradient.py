"""The gradient of a context's nll with respect to numbers of layers and heads.

A factor enters a model through one layer's cos and sin, a head's numbers multiply its activations, so the nll of an
answer can be differentiated in all of them at once, for two to three times what scoring the context costs. Ours; the
paper (2503.04355) searches without gradients.
"""

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lrs_utils.models.load import LM
from lrs_utils.scaling.applied import refuse_unrotatable
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scaling.products import by_head, n_heads
from lrs_utils.scaling.rotation import Rotation
from lrs_utils.scoring.forward import PackedForward, refuse_unscorable
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.packing import Layout, Packed, pack
from lrs_utils.scoring.window import context_tokens, refuse_beyond_window
from lrs_utils.searchers.learned import LAYER_NUMBERS, OF_HEADS, is_of_layer, layers_of, numbers_of
from lrs_utils.tasks import Probe

_KEPT_BYTES = 2 * 2**30  # of activations kept for the backward pass on a CPU; above it they are computed twice
_KEPT_SHARE = 0.25  # the same on a GPU, of its memory
PRICE = 4  # of a gradient, in answers scored, wherever methods are compared at the same budget (CHOICES.md)


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
        Known gradients are read from it, and new ones written to it.

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
    _refuse_without_gradient(lm, scaling, numbers)
    compute = partial(_differentiate, lm, [probe], [1.0], scaling, numbers, extrapolate)
    layers = layers_of(scaling, lm)
    return _find_or_file(lm, scaling, gradient_key(probe, layers.scheme, layers.combine, numbers), compute, ledger)


def sum_nll_gradient(
    lm: LM,
    probes: Sequence[Probe],
    weights: Sequence[float],
    scaling: Scaling,
    numbers: Sequence[str] = LAYER_NUMBERS,
    *,
    extrapolate: bool = False,
    ledger: Ledger | None = None,
) -> tuple[float, NDArray[np.float64]]:
    """The weighted sum of what `nll_gradient` gives for several contexts, from one pass over all of them.

    It is filed under `sum_key`, apart from the contexts' own.
    """
    _refuse_without_gradient(lm, scaling, numbers)
    if scaling.stretches_by_length and len(probes) > 1:
        raise ValueError(f"{scaling} stretches by a context's length; take the gradient of one context at a time")
    compute = partial(_differentiate, lm, probes, weights, scaling, numbers, extrapolate)
    layers = layers_of(scaling, lm)
    keys = [gradient_key(probe, layers.scheme, layers.combine, numbers) for probe in probes]
    return _find_or_file(lm, scaling, sum_key(keys, weights), compute, ledger)


def fits_at_once(lm: LM, probes: Sequence[Probe], scaling: Scaling) -> bool:
    """Whether several contexts are better differentiated in one pass: on a GPU, where its memory holds all at once.

    On a CPU one at a time, so that each has the same bits whatever goes with it.
    """
    device = lm.model.device
    if device.type == "cpu" or scaling.stretches_by_length:
        return False
    n_tokens = sum(len(pack(lm, probe, "a context").ids) for probe in probes)
    return _count_activation_bytes(lm, n_tokens) <= _count_room(device)


def _refuse_without_gradient(lm: LM, scaling: Scaling, numbers: Sequence[str]) -> None:
    if layers_of(scaling, lm).scheme == "yarn":
        raise ValueError("scheme 'yarn' has no gradient here; use 'pi', 'ntk' or 'dynamic_ntk'")
    scaling.refuse_misfit(lm.model)
    if "head_factors" in numbers:
        refuse_unrotatable(lm.model)


def _find_or_file(
    lm: LM, scaling: Scaling, key: str, compute: Callable[[], tuple[float, NDArray[np.float64]]], ledger: Ledger | None
) -> tuple[float, NDArray[np.float64]]:
    if ledger is None:
        return compute()
    found = ledger.find_gradient(lm.fingerprint, scaling.key, key)
    return ledger.record_gradient(lm.fingerprint, scaling.key, key, *compute()) if found is None else found


def gradient_key(probe: Probe, scheme: str, combine: str = "multiply", numbers: Sequence[str] = LAYER_NUMBERS) -> str:
    """The name of a context's gradient in a ledger: what is differentiated, by what, and how factors enter, which a
    scaling's key leaves out where all factors are 1."""
    scheme += " /" * (combine == "divide")
    if tuple(numbers) != LAYER_NUMBERS:
        scheme += " " + " ".join(numbers)
    return hashlib.sha256("|".join((scheme, *probe.keys)).encode()).hexdigest()[:16]


def sum_key(keys: Sequence[str], weights: Sequence[float]) -> str:
    """The name of a weighted sum of gradients in a ledger, from the names of the gradients."""
    terms = [f"{weight!r} {key}" for key, weight in zip(keys, map(float, weights), strict=True)]
    return hashlib.sha256("|".join(terms).encode()).hexdigest()[:16]


def _differentiate(
    lm: LM,
    probes: Sequence[Probe],
    weights: Sequence[float],
    scaling: Scaling,
    numbers: Sequence[str],
    extrapolate: bool,
) -> tuple[float, NDArray[np.float64]]:
    packs = [pack(lm, probe, "a context") for probe in probes]
    if not extrapolate:
        for packed in packs:
            refuse_beyond_window(lm, packed.longest, scaling, "a context")
    length = context_tokens(lm, probes[0]) if scaling.stretches_by_length else None
    refuse_unscorable(lm)
    device = lm.model.device
    values = numbers_of(scaling, lm, numbers)
    now = {name: torch.tensor(rows, dtype=torch.float32, device=device) for name, rows in values.items()}
    changes = {name: torch.zeros_like(now[name], requires_grad=True) for name in numbers}  # of the logs
    with torch.enable_grad():
        now |= {name: change.exp() * now[name] for name, change in changes.items()}
    run = partial(_run_layers, lm, scaling=scaling, now=now, numbers=numbers)
    tensors = list(changes.values())
    nll, by_number = _differentiate_packed(lm, packs, weights, length, run, tensors, f" under {scaling}")
    gradient = torch.cat(by_number)
    return nll, np.array([[float(f"{value:.5g}") for value in row] for row in gradient.tolist()])


def nll_gradient_by(lm: LM, probe: Probe, tensors: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """The nll of a context's questions, and its derivative by tensors that hooks on the model's layers use.

    For numbers of your own: put hooks on modules of the model (`register_forward_hook`) that compute with `tensors`.

    Parameters
    ----------
    probe : Probe
    tensors : sequence of Tensor
        Leaves that require a gradient.
    """
    refuse_unscorable(lm)
    packed, none = pack(lm, probe, "a context"), LayerScaling.identity(lm.num_layers)
    refuse_beyond_window(lm, packed.longest, none, "a context")
    run = partial(_run_layers, lm, scaling=none, now={}, numbers=())
    return _differentiate_packed(lm, [packed], [1.0], None, run, tensors)


def _differentiate_packed(
    lm: LM,
    packs: Sequence[Packed],
    weights: Sequence[float],
    length: int | None,
    run: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    under: str = "",
) -> tuple[float, list[Tensor]]:
    """The weighted sum of the nll of packed contexts whose layers are run by `run`, and its derivative by tensors."""
    layout = Layout(packs, lm.model.device)
    with torch.enable_grad(), PackedForward(lm) as forward:
        forward.stretch_for(length)
        states = run(forward, layout)
        nll, by_states = _sum_nll(forward, layout, packs, weights, states.detach())
        gradients = [*torch.autograd.grad(states, list(tensors), by_states)]
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        raise FloatingPointError(f"{lm.name} gave a non-finite gradient{under}; try dtype float32")
    return nll, gradients


def _run_layers(
    lm: LM,
    forward: PackedForward,
    layout: Layout,
    scaling: Scaling,
    now: Mapping[str, Tensor],
    numbers: Sequence[str],
) -> Tensor:
    """The last layer's output where the numbers are `now`, in a form that `numbers` can be differentiated through."""
    layers = layers_of(scaling, lm)
    keeps_all = _count_activation_bytes(lm, layout.length) <= _count_room(lm.model.device)
    run: Callable[..., Tensor] = operator.call if keeps_all else _compute_twice
    of_layers, heads = any(map(is_of_layer, numbers)), n_heads(lm.model)
    bands = next((rows for name, rows in now.items() if name.startswith("bands_")), None)
    rotates = "head_factors" in numbers or bool((now.get("head_factors", torch.ones(1)) != 1).any())
    with torch.no_grad():
        hidden = forward.embed(layout)
    for at, setting in enumerate(scaling.settings):
        table: tuple[Tensor, Tensor] | None
        rotations: list[Rotation | None] = [None]
        if of_layers or rotates:
            factor, temperature = (now[name][0, at] for name in LAYER_NUMBERS)
            of_bands = None if bands is None else bands[:, at]
            if rotates:
                factors = factor * now["head_factors"][:, at]
                table, rotations[0] = forward.differentiable_rotation(at, layers, factors, temperature, of_bands)
            else:
                table = forward.differentiable_table(at, layers, factor, temperature, of_bands)
        else:
            table = forward.table(at, setting)
        # what is 1 and not asked about is left out, as it is where the layer is scored
        there = {n: rows[:, at] for n, rows in now.items() if n in numbers or bool((rows[:, at] != 1).any())}
        multipliers = [
            _multiply([by_head(there[n], heads, pairs=n == "pair_temperatures") for n in names if n in there])
            for names in OF_HEADS.values()
        ]
        multipliers.append(there["mlp_gains"][None] if "mlp_gains" in there else None)
        hidden = run(forward.run_with, at, hidden, table, rotations, *multipliers)
    return hidden


def _multiply(numbers: Sequence[Tensor]) -> Tensor | None:
    """The product of numbers of heads and of their channels, for all tokens."""
    return reduce(operator.mul, numbers)[None] if numbers else None


def _sum_nll(
    forward: PackedForward, layout: Layout, packs: Sequence[Packed], weights: Sequence[float], states: Tensor
) -> tuple[float, Tensor]:
    """The weighted sum of contexts' nll, each a mean over questions, and its gradient by the last layer's output.

    A few hundred tokens at a time, forward and at once backward: logits over a vocabulary are large.
    """
    answers = []  # of each context: tokens of the answer that each of its tokens is in, and how many answers there are
    for packed in packs:
        owner = torch.as_tensor(packed.owner, device=states.device)
        n_tokens = owner.bincount()
        answers.append((n_tokens[owner], len(n_tokens)))
    shares = [weight / (n_tokens * n) for weight, (n_tokens, n) in zip(weights, answers, strict=True)]
    at_tokens, gradient, losses = layout.predicted_at.to(states.device), torch.zeros_like(states), []
    pieces = (torch.split(x, 256) for x in (at_tokens, layout.targets.to(states.device), torch.cat(shares)))
    for at, targets, of in zip(*pieces, strict=True):
        some = states[0, at].requires_grad_()
        loss = F.cross_entropy(forward.logits(some).float(), targets, reduction="none")
        losses.append(loss.detach())
        gradient[0, at] = torch.autograd.grad(loss, some, of.to(loss.dtype))[0]
    by_context = torch.split(torch.cat(losses), [len(n_tokens) for n_tokens, _ in answers])
    nll = [(loss / n_tokens).sum().item() / n for loss, (n_tokens, n) in zip(by_context, answers, strict=True)]
    return sum(weight * value for weight, value in zip(weights, nll, strict=True)), gradient


def _compute_twice(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False)  # type: ignore[no-any-return]


def _count_room(device: torch.device) -> float:
    """Bytes of activations that may be kept: of a GPU a share of all its memory, the same whatever else runs there."""
    if device.type != "cuda":
        return _KEPT_BYTES
    return _KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory


def _count_activation_bytes(lm: LM, n_tokens: int) -> int:
    """About what a forward pass keeps for its gradient: measured on SmolLM2, 50 KB a token and layer in float32."""
    config = lm.model.config.get_text_config()
    numbers = 10 * config.hidden_size + 4 * config.intermediate_size
    return int(n_tokens * lm.num_layers * numbers * lm.model.dtype.itemsize)
