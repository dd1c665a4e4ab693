"""Per-head numbers: a temperature and a gain for each query head, on an unmodified Hugging Face model.

The gain of a head multiplies its output before `o_proj` (SEAL, 2501.15225); the temperature of a head multiplies its
attention logits. Both are products with activations that a weight could hold as well, so they fold into a plain model.
Ours, not the paper's (2503.04355), which scales positions: `scaling`.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrs_utils.models.load import used_alone
from lrs_utils.scaling.layers import UNSCALED, LayerScaling, Scaling, Setting, model_name, reachable_decoder
from lrs_utils.scaling.trial import layers_with_temperatures, tried

_scaled_decoders: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # by which thread; others wait
Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class HeadScaling(Scaling):
    """One temperature, one gain, or both, for each query head of each decoder layer.

    Parameters
    ----------
    temperatures : array of float, shape (layers, heads), optional
        t > 0: the attention logits of a head are multiplied by t. All equal within a layer, they are that layer's
        temperature of a `LayerScaling`.
    gains : array of float, shape (layers, heads), optional
        g > 0: the output of a head is multiplied by g before the output projection.
    mlp_gains : sequence of float, shape (layers,), optional
        The output of a layer's MLP is multiplied by it. Not a per-head number: with gains that are equal within a layer
        it makes two numbers per layer that have nothing to do with positions: a control.
    layers : LayerScaling, optional
        Factors and temperatures of layers, at the same time.

    Raises
    ------
    ValueError
        A value that is not a positive finite number, shapes that differ, or nothing at all.
    """

    temperatures: Rows | None = None
    gains: Rows | None = None
    mlp_gains: tuple[float, ...] | None = None
    layers: LayerScaling | None = None
    num_layers: int = field(default=0, init=False)

    def __init__(
        self,
        temperatures: ArrayLike | None = None,
        gains: ArrayLike | None = None,
        *,
        mlp_gains: ArrayLike | None = None,
        layers: LayerScaling | None = None,
    ) -> None:
        given = {
            "temperatures": _checked("temperatures", temperatures, 2),
            "gains": _checked("gains", gains, 2),
            "mlp_gains": _checked("mlp_gains", mlp_gains, 1),
        }
        lengths = {name: len(values) for name, values in given.items() if values is not None}
        if layers is not None:
            lengths["layers"] = len(layers.factors)
        if not lengths:
            raise ValueError("a HeadScaling needs temperatures, gains, mlp_gains or layers; all are None")
        widths = {len(given[name][0]) for name in ("temperatures", "gains") if given[name] is not None}
        if len(set(lengths.values())) > 1 or len(widths) > 1:
            shapes = ", ".join(f"{name} {np.shape(given.get(name) or [0] * n)}" for name, n in lengths.items())
            raise ValueError(f"the shapes don't agree: {shapes}; give (layers, heads), and (layers,) for mlp_gains")
        for name, values in given.items():
            changes = values is not None and bool(np.any(np.asarray(values) != 1.0))
            # values of 1 are no scaling, and the same scaling must have the same key
            object.__setattr__(self, name, values if changes else None)
        if layers is not None and layers.is_identity:
            layers = None
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "num_layers", next(iter(lengths.values())))

    @property
    def key(self) -> str:
        """Canonical text of what this scaling computes; with all numbers 1 that of no scaling."""
        layers = self.layers or LayerScaling.identity(self.num_layers)
        parts = [layers.key]
        for name in ("temperatures", "gains", "mlp_gains"):
            if (values := getattr(self, name)) is not None:
                parts.append(f"{name} " + ",".join(map(repr, np.asarray(values).ravel().tolist())))
        return ";".join(parts)

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Setting of each layer."""
        layers = (UNSCALED,) * self.num_layers if self.layers is None else self.layers.settings
        return tuple(
            setting._replace(
                head_temperatures=_row(self.temperatures, at),
                head_gains=_row(self.gains, at),
                mlp_gain=1.0 if self.mlp_gains is None else self.mlp_gains[at],
            )
            for at, setting in enumerate(layers)
        )

    @property
    def reach(self) -> float:
        """Tokens that may be read, in windows; only factors change it."""
        return 1.0 if self.layers is None else self.layers.reach

    @contextmanager
    def applied_to(self, model: PreTrainedModel, *, length: int | None = None) -> Iterator[None]:
        """Let `model` behave as scaled inside the `with` block: forward, `generate` and caches included.

        Hooks multiply what passes between modules; no weight changes, and they are removed again on exit, even after
        an error. A `LayerScaling` may be applied around it or given as `layers`.

        Raises
        ------
        ValueError
            The number of layers or heads differs from the model's, its heads are already scaled, or its family's
            projections can't be reached (named in the message).
        """
        decoder = reachable_decoder(model)
        with ExitStack() as stack:
            stack.enter_context(used_alone(model))
            self.refuse_misfit(model)
            if self.layers is not None:
                stack.enter_context(self.layers.applied_to(model, length=length))
            _scaled_decoders[decoder] = threading.get_ident()
            stack.callback(_scaled_decoders.pop, decoder)
            for layer, setting in zip(decoder.layers, self.settings, strict=True):
                stack.enter_context(multiplied(layer, *products([setting], 1, model)))
            yield

    def refuse_misfit(self, model: PreTrainedModel) -> None:
        """Raise the ValueError of `applied_to` where this scaling can't be put on the model as it is."""
        decoder = reachable_decoder(model)
        n_layers, n_heads = len(decoder.layers), _n_heads(model)
        if self.layers is not None:
            self.layers.refuse_misfit(model)
        if self.num_layers != n_layers:
            raise ValueError(f"there are numbers for {self.num_layers} layers but {model_name(model)} has {n_layers}")
        for name in ("temperatures", "gains"):
            values = getattr(self, name)
            if values is not None and len(values[0]) != n_heads:
                raise ValueError(
                    f"{name} has {len(values[0])} values a layer but {model_name(model)} has {n_heads} query heads"
                )
        for layer in decoder.layers:
            if self.temperatures is not None:
                _queries_of(layer)
            if self.gains is not None:
                _output_of(layer)
            if self.mlp_gains is not None:
                _mlp_of(layer)
        if _scaled_decoders.get(decoder) == threading.get_ident():
            raise ValueError(f"the heads of {model_name(model)} are already scaled; leave the other block first")
        if self.temperatures is not None:
            _refuse_idle_temperatures(model, self.temperatures)

    def fold_into(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of a model whose own weights hold the numbers: a plain model that computes the same, at no cost.

        Gains multiply columns of `o_proj`, temperatures rows of `q_proj` (or the weight of a query norm after it),
        gains of the MLP rows of `down_proj`. `model` is not changed.

        Raises
        ------
        ValueError
            Where that can't be exact: factors of layers, a query norm that heads with different temperatures share, a
            projection that is no plain linear layer (quantised, or with an adapter).
        """
        self.refuse_misfit(model)
        LayerScaling.identity(self.num_layers).refuse_misfit(model)  # a copy would keep the hooks of one applied
        if self.layers is not None:
            raise ValueError(
                f"factors of layers change cos and sin, which no weight of {model_name(model)} holds; fold the numbers "
                "of heads alone, or use `applied_to`"
            )
        plain = copy.deepcopy(model)
        for layer, setting in zip(reachable_decoder(plain).layers, self.settings, strict=True):
            if setting.head_temperatures:
                _fold_temperatures(layer, torch.tensor(setting.head_temperatures))
            if setting.head_gains:
                output, gains = _linear(_output_of(layer)), torch.tensor(setting.head_gains)
                _multiply(output.weight, gains.repeat_interleave(output.in_features // len(gains)))
            if setting.mlp_gain != 1.0:
                down = _linear(getattr(_mlp_of(layer), "down_proj", None))
                for parameter in (down.weight, down.bias):
                    if parameter is not None:
                        _multiply(parameter, torch.tensor(setting.mlp_gain))
        return plain

    def at_dose(self, dose: float) -> "HeadScaling":
        """All numbers to the power of `dose`: 0 is no scaling, 1 this one."""

        def powered(values: Any) -> NDArray[np.float64] | None:
            return None if values is None else np.round(np.asarray(values) ** dose, 5)

        layers = LayerScaling.identity(self.num_layers) if self.layers is None else self.layers.at_dose(dose)
        numbers = powered(self.temperatures), powered(self.gains)
        return HeadScaling(*numbers, mlp_gains=powered(self.mlp_gains), layers=layers)


def products(
    settings: Sequence[Setting], n_tokens: int, model: PreTrainedModel
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What a layer's queries, head outputs and MLP output are multiplied by, for `multiplied`; None where that is 1.

    Parameters
    ----------
    settings : sequence of Setting
        One for each copy of a row of `n_tokens` tokens, laid end to end.

    Returns
    -------
    temperatures, gains : float32 tensors, shape (copies * n_tokens, heads), or None
    mlp : float32 tensor, shape (copies * n_tokens, 1), or None
    """
    heads = (1.0,) * _n_heads(model)

    def laid_out(rows: Sequence[tuple[float, ...]]) -> Tensor | None:
        if all(set(row) == {1.0} for row in rows):
            return None
        return torch.tensor(rows, dtype=torch.float32, device=model.device).repeat_interleave(n_tokens, dim=0)

    return (
        laid_out([s.head_temperatures or heads for s in settings]),
        laid_out([s.head_gains or heads for s in settings]),
        laid_out([(s.mlp_gain,) for s in settings]),
    )


@contextmanager
def multiplied(layer: nn.Module, queries: Tensor | None, outputs: Tensor | None, mlp: Tensor | None) -> Iterator[None]:
    """Let a decoder layer multiply its queries, the outputs of its heads, and the output of its MLP.

    Parameters
    ----------
    queries, outputs : tensor, shape (tokens or 1, heads), or None
    mlp : tensor, shape (tokens or 1, 1), or None
    """
    with ExitStack() as stack:
        if queries is not None:
            module, numbers = _queries_of(layer), queries
            hook = module.register_forward_hook(lambda _, given, output: _times_heads(given, output, numbers))
            stack.callback(hook.remove)
        if outputs is not None:
            gains = outputs
            handle = _output_of(layer).register_forward_pre_hook(
                lambda _, given: (_times(_by_head(given[0], gains.shape[1]), gains[..., None]).flatten(-2),)
            )
            stack.callback(handle.remove)
        if mlp is not None:
            factor = mlp
            stack.callback(_mlp_of(layer).register_forward_hook(lambda _, __, output: _times(output, factor)).remove)
        yield


def _times(values: Tensor, by: Tensor) -> Tensor:
    # in float32, rounded once: in bfloat16 a gain of 1.003 would be 1
    return (values.float() * by.to(values.device)).to(values.dtype)


def _times_heads(given: Any, output: Tensor, by: Tensor) -> Tensor:
    """The output of a query projection or norm, whichever axis its heads are on."""
    heads = by.shape[1]
    if output.dim() == 3:  # (batch, tokens, heads * dim)
        return _times(_by_head(output, heads), by[..., None]).flatten(-2)
    like, dim = given[0], output.shape[-1]
    # (batch, tokens, heads, dim) or (batch, heads, tokens, dim): where both would fit, the layout in memory tells
    fit = [axis for axis in (1, 2) if output.dim() == 4 and output.shape[axis] == heads]
    if len(fit) == 2:
        fit = [2] if heads == 1 else [axis for axis in fit if like.stride(axis) == dim]
    if len(fit) != 1:
        raise RuntimeError(f"queries of shape {tuple(output.shape)} don't show which axis the {heads} heads are on")
    return _times(output, by[..., None] if fit == [2] else by.mT[..., None])


def _by_head(values: Tensor, heads: int) -> Tensor:
    return values.view(*values.shape[:-1], heads, -1)


def _n_heads(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().num_attention_heads)


def _queries_of(layer: nn.Module) -> nn.Module:
    """The module whose output is a layer's queries, before or after rotation."""
    attention: Any = getattr(layer, "self_attn", None)
    projection = getattr(attention, "q_proj", None)
    if not isinstance(projection, nn.Module):
        raise ValueError(f"{type(layer).__name__} has no q_proj of its own, so its heads can't have temperatures")
    norm = getattr(attention, "q_norm", None)
    return norm if isinstance(norm, nn.Module) else projection


def _output_of(layer: nn.Module) -> nn.Module:
    output = getattr(getattr(layer, "self_attn", None), "o_proj", None)
    if not isinstance(output, nn.Module):
        raise ValueError(f"{type(layer).__name__} has no o_proj, so its heads can't have gains")
    return output


def _mlp_of(layer: nn.Module) -> nn.Module:
    mlp = getattr(layer, "mlp", None)
    if not isinstance(mlp, nn.Module):
        raise ValueError(f"{type(layer).__name__} has no mlp that could have a gain")
    return mlp


def _refuse_idle_temperatures(model: PreTrainedModel, temperatures: Rows) -> None:
    layers, heads = reachable_decoder(model).layers, _n_heads(model)

    def hot(layer: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        with multiplied(layer, torch.full((1, heads), 4.0), None, None):
            return layer.forward(*args, **given)

    obeyed = tried(
        model, "head temperatures", lambda: layers_with_temperatures(model, layers, hot), (True,) * len(layers)
    )
    for layer, row in enumerate(temperatures):
        if set(row) != {1.0} and not obeyed[layer]:
            raise ValueError(
                f"heads of layer {layer} of {type(model).__name__} can't have temperatures: tried on a few tokens, "
                "multiplied queries don't multiply the attention logits (a norm after rotation, say); leave them 1"
            )


def _linear(module: Any) -> nn.Linear:
    if type(module) is not nn.Linear:
        raise ValueError(f"{type(module).__name__} is no plain linear layer, so nothing folds into it exactly")
    return module


def _fold_temperatures(layer: nn.Module, temperatures: Tensor) -> None:
    projection, norm = _linear(layer.self_attn.q_proj), _queries_of(layer)  # type: ignore[union-attr]
    rows = temperatures.repeat_interleave(projection.out_features // len(temperatures))
    if norm is projection:
        _multiply(projection.weight, rows[:, None])
        if projection.bias is not None:
            _multiply(projection.bias, rows)
        return
    weight = getattr(norm, "weight", None)
    if isinstance(weight, nn.Parameter):
        if weight.numel() == len(rows) and _folds(norm, rows):
            return
        if len(set(temperatures.tolist())) == 1 and _folds(norm, rows[: weight.numel()]):
            return
    raise ValueError(
        f"{type(norm).__name__} normalises the queries of all heads by one weight, so different temperatures don't "
        "fold into it; fold gains, or use `applied_to`"
    )


def _folds(norm: nn.Module, by: Tensor) -> bool:
    """Put multipliers of a norm's output into its weight, if that gives the same; some norms multiply by 1 + w."""
    weight: Any = norm.weight
    before, by = weight.detach().clone(), by.to(weight.device)
    sample = torch.randn(3, len(by), generator=torch.Generator().manual_seed(0)).to(weight)
    wanted = norm(sample).float() * by
    for changed in (before.float() * by, (1 + before.float()) * by - 1):
        weight.data = changed.to(before)
        if torch.allclose(norm(sample).float(), wanted, rtol=1e-5 if before.dtype == torch.float32 else 2e-2):
            return True
    weight.data = before
    return False


def _multiply(parameter: Tensor, by: Tensor) -> None:
    parameter.data = (parameter.float() * by.to(parameter.device)).to(parameter)


def _row(rows: Rows | None, at: int) -> tuple[float, ...]:
    """A layer's numbers; none where all are 1."""
    return () if rows is None or set(rows[at]) == {1.0} else rows[at]


def _checked(name: str, values: ArrayLike | None, axes: int) -> Any:
    """Positive finite numbers as nested tuples."""
    if values is None:
        return None
    shape = "(layers, heads)" if axes == 2 else "(layers,)"
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        for at, value in np.ndenumerate(np.asarray(values, dtype=object)):
            if at and not isinstance(value, int | float | list):
                place = "".join(f"[{i}]" for i in at)
                raise ValueError(f"{name}{place} is {value!r}; it must be a positive finite number") from error
        raise ValueError(f"{name} must be numbers of shape {shape}: {error}") from error
    if array.ndim != axes or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; it must be {shape}")
    for at in zip(*np.nonzero(~(np.isfinite(array) & (array > 0))), strict=True):
        place = "".join(f"[{i}]" for i in at)
        raise ValueError(f"{name}{place} is {array[at]}; it must be a positive finite number")
    return tuple(map(tuple, array.tolist())) if axes == 2 else tuple(array.tolist())
