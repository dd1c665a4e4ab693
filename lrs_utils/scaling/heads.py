"""Per-head numbers: a temperature and a gain for each query head, on an unmodified Hugging Face model.

The gain of a head multiplies its output before `o_proj` (SEAL, 2501.15225); the temperature of a head multiplies its
attention logits. Both are products with activations that a weight could hold as well, so they fold into a plain model.
Ours, not the paper's (2503.04355), which scales positions: `layers`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedModel

from lrs_utils.models.decode import model_name
from lrs_utils.models.scaled import refuse_exported
from lrs_utils.models.turns import used_alone
from lrs_utils.scaling.applied import positions_replaced, refuse_scaled, refuse_unrotatable
from lrs_utils.scaling.base import UNSCALED, Scaling, Setting, reachable_decoder
from lrs_utils.scaling.fold import fold
from lrs_utils.scaling.layers import LayerScaling, refuse_unknown
from lrs_utils.scaling.products import head_dim, heads_multiplied, n_heads, refuse_unreachable_heads
from lrs_utils.scaling.rope import SCHEMES

Rows = tuple[tuple[float, ...], ...]
# Numbers of heads, and what a head has instead if there are more.
_OF_HEADS = {"temperatures": "pairs of dimensions", "gains": "channels", "factors": ""}


@dataclass(frozen=True)
class HeadScaling(Scaling):
    """One temperature, one gain, or both, for each query head of each decoder layer.

    Parameters
    ----------
    temperatures : array of float, shape (layers, heads) or (layers, heads * d / 2), optional
        t > 0: the attention logits of a head are multiplied by t. All equal within a layer, they are that layer's
        temperature of a `LayerScaling`. Or one for each pair of a head's d dimensions that rotate together: what that
        pair adds to the logits is multiplied by it.
    gains : array of float, shape (layers, heads) or (layers, heads * d), optional
        g > 0: the output of a head is multiplied by g before the output projection (SEAL-H), or each of its d channels
        by a number of its own (SEAL-C).
    mlp_gains : sequence of float, shape (layers,), optional
        The output of a layer's MLP is multiplied by it. Not a per-head number: with gains that are equal within a layer
        it makes two numbers per layer that have nothing to do with positions: a control.
    factors : array of float, shape (layers, heads), optional
        f > 0: positions are read by each head under its own factor, which multiplies the layer's, and enters
        frequencies by `scheme`. No weight holds them, and attention has to rotate by itself (`rotation`).
    scheme : str
        Of the factors of heads, where `layers` doesn't say it.
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
    factors: Rows | None = None
    scheme: str = UNSCALED.scheme
    layers: LayerScaling | None = None
    num_layers: int = field(default=0, init=False)

    def __init__(
        self,
        temperatures: ArrayLike | None = None,
        gains: ArrayLike | None = None,
        *,
        mlp_gains: ArrayLike | None = None,
        factors: ArrayLike | None = None,
        scheme: str = "ntk",
        layers: LayerScaling | None = None,
    ) -> None:
        given = {
            "temperatures": _checked("temperatures", temperatures, 2),
            "gains": _checked("gains", gains, 2),
            "mlp_gains": _checked("mlp_gains", mlp_gains, 1),
            "factors": _checked("factors", factors, 2),
        }
        lengths = {name: len(values) for name, values in given.items() if values is not None}
        if layers is not None:
            lengths["layers"] = len(layers.factors)
        if not lengths:
            raise ValueError("a HeadScaling needs temperatures, gains, mlp_gains, factors or layers; all are None")
        widths = sorted(len(given[name][0]) for name in _OF_HEADS if given[name] is not None)
        if len(set(lengths.values())) > 1 or (widths and widths[-1] % widths[0]):
            shapes = ", ".join(f"{name} {np.shape(given.get(name) or [0] * n)}" for name, n in lengths.items())
            raise ValueError(f"the shapes don't agree: {shapes}; give (layers, heads), and (layers,) for mlp_gains")
        for name, values in given.items():
            changes = values is not None and bool(np.any(np.asarray(values) != 1.0))
            # values of 1 are no scaling, and the same scaling must have the same key
            object.__setattr__(self, name, values if changes else None)
        refuse_unknown("scheme", scheme, SCHEMES)
        if layers is not None:
            scheme = layers.scheme
        object.__setattr__(self, "scheme", scheme if factors is not None else UNSCALED.scheme)
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
        if self.factors is not None:
            parts.append(f"{self.scheme}_factors " + ",".join(map(repr, np.asarray(self.factors).ravel().tolist())))
        return ";".join(parts)

    @classmethod
    def from_key(cls, key: str) -> "HeadScaling":
        """A scaling that computes what the key is of."""
        first, *parts = key.split(";")
        layers, numbers = LayerScaling.from_key(first), dict[str, Any]()
        for name, values in (part.split(" ") for part in parts):
            row = np.array(values.split(","), float)
            if name.endswith("_factors"):
                numbers["scheme"], name = name.split("_")
            numbers[name] = row if name == "mlp_gains" else row.reshape(len(layers.factors), -1)
        return cls(**numbers, layers=None if layers.is_identity else layers)

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Setting of each layer."""
        layers = (UNSCALED,) * self.num_layers if self.layers is None else self.layers.settings
        return tuple(
            setting._replace(
                head_temperatures=_row(self.temperatures, at),
                head_gains=_row(self.gains, at),
                mlp_gain=1.0 if self.mlp_gains is None else self.mlp_gains[at],
                head_factors=_row(self.factors, at),
                scheme=self.scheme if _row(self.factors, at) else setting.scheme,
            )
            for at, setting in enumerate(layers)
        )

    @property
    def reach(self) -> float:
        """Tokens that may be read, in windows, at least; only factors change it."""
        least = 1.0 if self.factors is None else min(map(min, self.factors))
        return least * (1.0 if self.layers is None else self.layers.reach)

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
        reachable_decoder(model)  # or an error, before anything that isn't a model gets a lock
        with ExitStack() as stack:
            stack.enter_context(used_alone(model))
            self.refuse_misfit(model)
            if self.factors is not None:
                stack.enter_context(positions_replaced(model, self.settings, length))
            elif self.layers is not None:
                stack.enter_context(self.layers.applied_to(model, length=length))
            stack.enter_context(heads_multiplied(model, self.settings))
            yield

    def refuse_misfit(self, model: PreTrainedModel) -> None:
        """Raise the ValueError of `applied_to` where this scaling can't be put on the model as it is."""
        if not self.is_identity:
            refuse_exported(model)
        n_layers, heads = len(reachable_decoder(model).layers), n_heads(model)
        if self.layers is not None:
            self.layers.refuse_misfit(model)
        if self.num_layers != n_layers:
            raise ValueError(f"there are numbers for {self.num_layers} layers but {model_name(model)} has {n_layers}")
        if self.factors is not None:
            refuse_scaled(model)
            refuse_unrotatable(model)
        for name, channels in _OF_HEADS.items():
            values = getattr(self, name)
            if values is not None and len(values[0]) != heads:
                dim = head_dim(model) // (1 + (name == "temperatures")) if channels else 0
                if len(values[0]) != heads * dim:
                    of = f" of {dim} {channels}" if channels else ""
                    raise ValueError(
                        f"{name} has {len(values[0])} values a layer but {model_name(model)} has {heads} query "
                        f"heads{of}"
                    )
        refuse_unreachable_heads(model, self.settings)

    def fold_into(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of a model whose own weights hold the numbers: a plain model that computes the same (`fold.fold`)."""
        return fold(self, model)

    def at_dose(self, dose: float) -> "HeadScaling":
        """All numbers to the power of `dose`: 0 is no scaling, 1 this one."""

        def powered(values: Any) -> NDArray[np.float64] | None:
            return None if values is None else np.round(np.asarray(values) ** dose, 5)

        layers = LayerScaling.identity(self.num_layers) if self.layers is None else self.layers.at_dose(dose)
        numbers = powered(self.temperatures), powered(self.gains)
        more: dict[str, Any] = {
            "mlp_gains": powered(self.mlp_gains),
            "factors": powered(self.factors),
            "scheme": self.scheme,
        }
        return HeadScaling(*numbers, **more, layers=None if layers.is_identity else layers)


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
