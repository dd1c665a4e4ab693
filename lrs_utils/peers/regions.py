"""Methods that read far distances otherwise than near ones: Self-Extend, ReRoPE, STRING."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedModel

from lrs_utils.arguments import whole
from lrs_utils.models.decode import model_name
from lrs_utils.models.scaled import refuse_exported
from lrs_utils.models.turns import used_alone
from lrs_utils.scaling.applied import positions_replaced, refuse_scaled, refuse_unrotatable
from lrs_utils.scaling.base import UNSCALED, Scaling, Setting, reachable_decoder
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scaling.products import heads_multiplied, n_heads, refuse_unreachable_heads
from lrs_utils.scaling.rotation import PLAIN, Positions, Region


@dataclass(frozen=True, init=False)
class RegionScaling(Scaling):
    """Regions of distances for each decoder layer, on an unmodified Hugging Face model.

    Between two tokens that are r apart, the last region that begins at or before r says how both positions are read.
    Attention rotates by itself (`scaling.rotation`), in a plain forward pass, in `generate` with its cache, and in
    `score`.

    Parameters
    ----------
    regions : sequence of sequence of Region, length layers
        By growing `since`, the first at 0; none for a layer that stays as it is.
    on : Scaling, optional
        What else is scaled: factors and temperatures of layers, numbers of heads.

    Raises
    ------
    ValueError
        Regions out of order, or a number of layers that differs from that of `on`.
    """

    regions: tuple[tuple[Region, ...], ...]
    on: Scaling | None

    def __init__(self, regions: Sequence[Sequence[Region]], on: Scaling | None = None) -> None:
        rows = tuple(tuple(row) for row in regions)
        for layer, row in enumerate(rows):
            begins = [region.since for region in row]
            if row and (begins[0] != 0 or begins != sorted(set(begins))):
                raise ValueError(f"regions of layer {layer} begin at {begins}; begin at 0, and grow")
        if isinstance(on, RegionScaling):
            raise ValueError("regions can't be put on regions; give all of them at once")
        if on is not None and len(on.settings) != len(rows):
            raise ValueError(f"there are regions for {len(rows)} layers, but the scaling below has {len(on.settings)}")
        # one region that changes nothing is none
        object.__setattr__(self, "regions", tuple(() if row == (PLAIN,) else row for row in rows))
        object.__setattr__(self, "on", on)

    @property
    def _below(self) -> tuple[Setting, ...]:
        return (UNSCALED,) * len(self.regions) if self.on is None else self.on.settings

    @property
    def key(self) -> str:
        """Canonical text of what this scaling computes; where no layer has regions, that of what is below."""
        below = LayerScaling.identity(len(self.regions)) if self.on is None else self.on
        rows = [f"{len([*same])} x {_text(row)}" for row, same in groupby(self.regions)]
        return f"regions {', '.join(rows)}; on {below.key}" if any(self.regions) else below.key

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Setting of each layer."""
        return tuple(
            setting._replace(regions=regions) for setting, regions in zip(self._below, self.regions, strict=True)
        )

    @property
    def reach(self) -> float:
        """Tokens that may be read, in windows: as with no regions, however far they would reach."""
        return 1.0 if self.on is None else self.on.reach

    @contextmanager
    def applied_to(self, model: PreTrainedModel, *, length: int | None = None) -> Iterator[None]:
        """Let `model` behave as scaled inside the `with` block: forward, `generate` and caches included.

        Raises
        ------
        ValueError
            Another number of layers or heads than the model's, positions that are already scaled, a family whose
            rotation isn't known here (named in the message), a padded batch.
        """
        reachable_decoder(model)
        with ExitStack() as stack:
            stack.enter_context(used_alone(model))
            self.refuse_misfit(model)
            stack.enter_context(positions_replaced(model, self.settings, length))
            stack.enter_context(heads_multiplied(model, self.settings))
            yield

    def refuse_misfit(self, model: PreTrainedModel) -> None:
        """Raise the ValueError of `applied_to` where this scaling can't be put on the model as it is."""
        refuse_exported(model)
        refuse_scaled(model)
        n_layers, heads = len(reachable_decoder(model).layers), n_heads(model)
        if len(self.regions) != n_layers:
            raise ValueError(f"there are regions for {len(self.regions)} layers but {model_name(model)} has {n_layers}")
        for layer, row in enumerate(self.regions):
            for positions in (positions for region in row for positions in (region.queries, region.keys)):
                if len(positions.divisors) not in (1, heads):
                    raise ValueError(
                        f"regions of layer {layer} have {len(positions.divisors)} divisors, but {model_name(model)} "
                        f"has {heads} heads"
                    )
        if self.on is not None:
            self.on.refuse_misfit(model)
        refuse_unreachable_heads(model, self.settings)
        refuse_unrotatable(model)

    def fold_into(self, model: PreTrainedModel) -> PreTrainedModel:
        """Never: distances are read in attention, which no weight holds."""
        raise ValueError(
            f"{type(self).__name__} changes how distances are read, which no weight holds; use `applied_to`"
        )

    def at_dose(self, dose: float) -> Scaling:
        """Never: a region is there or not."""
        raise ValueError(f"{type(self).__name__} has no dose; choose its numbers")


def _text(regions: Sequence[Region]) -> str:
    def read(positions: Positions) -> str:
        return f"{'/'.join(map(repr, positions.divisors))}{'|' * positions.whole}{positions.offset:+}"

    return " ".join(f"{region.since}({read(region.queries)})({read(region.keys)})" for region in regions) or "none"


class SelfExtend(RegionScaling):
    """Self-Extend (2401.01325): far positions in groups.

    Near distances, below `window`, are read as they are. Beyond, with G = `group` and w = `window`, the distance
    between i and j is floor(i / G) - floor(j / G) + w - floor(w / G).

    Parameters
    ----------
    window : int
        Near tokens; 1024 in the authors' repository.
    group : int
        Tokens of a group; 8 in the authors' repository.
    """

    def __init__(self, num_layers: int, window: int = 1024, group: int = 8, *, on: Scaling | None = None) -> None:
        w, g = whole("window", window, least=1), whole("group", group, least=1)
        keys = Positions((float(g),), whole=True)
        super().__init__([[PLAIN, Region(w, keys._replace(offset=float(w - w // g)), keys)]] * num_layers, on)


class ReRoPE(RegionScaling):
    """ReRoPE (Su): no distance is read as more than `window`."""

    def __init__(self, num_layers: int, window: int, *, on: Scaling | None = None) -> None:
        w = whole("window", window, least=1)
        nowhere = Positions((float("inf"),))
        super().__init__([[PLAIN, Region(w, nowhere._replace(offset=float(w)), nowhere)]] * num_layers, on)


class String(RegionScaling):
    """STRING (2410.18745): distances from `shift` on are read as smaller by shift - local.

    Parameters
    ----------
    shift : int
        S; the paper takes a third of the model's window.
    local : int
        W, which a distance of S is read as; 128 in the paper.
    """

    def __init__(self, num_layers: int, shift: int, local: int = 128, *, on: Scaling | None = None) -> None:
        s, w = whole("shift", shift, least=1), whole("local", local, least=0)
        super().__init__([[PLAIN, Region(s, Positions(offset=float(w - s)))]] * num_layers, on)
