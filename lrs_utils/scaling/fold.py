"""Folding temperatures and gains into weights: a plain model that computes the same, at no cost."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrs_utils.models.decode import model_name
from lrs_utils.scaling.applied import refuse_scaled
from lrs_utils.scaling.base import UNSCALED, Scaling, Setting, reachable_decoder
from lrs_utils.scaling.products import (
    by_head,
    mlp_of,
    n_heads,
    output_of,
    queries_of,
    refuse_unreachable_heads,
)


def fold(scaling: Scaling, model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose own weights hold all numbers of a scaling.

    Raises
    ------
    ValueError
        Where that can't be exact: factors and bands, which change cos and sin, and what `fold_products` refuses.
    """
    scaling.refuse_misfit(model)
    refuse_scaled(model)  # a copy would keep the hooks
    for at, setting in enumerate(scaling.settings):
        if changes_tables(setting):
            raise ValueError(
                f"the factor of layer {at} changes cos and sin, which no weight of {model_name(model)} holds; use "
                "`applied_to`, or a scaling of temperatures and gains alone"
            )
    return fold_products(model, scaling.settings)


def changes_tables(setting: Setting) -> bool:
    """Whether positions are read in another way: more than a temperature, which is a product with queries as well."""
    return setting.positions._replace(temperature=1.0) != UNSCALED


def fold_products(model: PreTrainedModel, settings: Sequence[Setting]) -> PreTrainedModel:
    """A copy of a model whose own weights hold the temperatures and gains of each layer's setting; its factors are left
    out.

    Gains multiply columns of `o_proj`, temperatures rows of `q_proj` (or the weight of a query norm after it), gains of
    the MLP rows of `down_proj`. `model` is not changed.

    Raises
    ------
    ValueError
        A query norm that heads with different temperatures share, a projection that isn't a plain linear layer
        (quantised, or with an adapter).
    """
    heads = n_heads(model)
    settings = [_as_of_heads(setting, heads) for setting in settings]
    refuse_unreachable_heads(model, settings)
    plain = copy.deepcopy(model)
    for layer, setting in zip(reachable_decoder(plain).layers, settings, strict=True):
        if setting.head_temperatures:
            _fold_temperatures(layer, by_head(torch.tensor(setting.head_temperatures), heads, pairs=True))
        if setting.head_gains:
            output, gains = _linear(output_of(layer)), torch.tensor(setting.head_gains)
            _multiply(output.weight, gains.repeat_interleave(output.in_features // len(gains)))
        if setting.mlp_gain != 1.0:
            down = _linear(getattr(mlp_of(layer), "down_proj", None))
            for parameter in (down.weight, down.bias):
                if parameter is not None:
                    _multiply(parameter, torch.tensor(setting.mlp_gain))
    return plain


def can_fold_temperatures(model: PreTrainedModel) -> bool:
    """Whether temperatures that differ between heads fold into weights: heads share no query norm."""
    layers: list[Any] = [*reachable_decoder(model).layers]
    norms: list[tuple[Any, Any]] = [(layer.self_attn.q_proj, queries_of(layer)) for layer in layers]
    return all(norm is query or norm.weight.numel() == query.out_features for query, norm in norms)


def _as_of_heads(setting: Setting, heads: int) -> Setting:
    """The same with the layer's temperature in those of its heads."""
    if setting.temperature == 1.0:
        return setting
    temperatures = tuple(setting.temperature * t for t in setting.head_temperatures or (1.0,) * heads)
    return setting._replace(temperature=1.0, head_temperatures=temperatures)


def _linear(module: Any) -> nn.Linear:
    if type(module) is not nn.Linear:
        raise ValueError(f"{type(module).__name__} is no plain linear layer, so nothing folds into it exactly")
    return module


def _fold_temperatures(layer: nn.Module, temperatures: Tensor) -> None:
    projection, norm = _linear(layer.self_attn.q_proj), queries_of(layer)  # type: ignore[union-attr]
    of_head = temperatures.expand(-1, projection.out_features // len(temperatures))
    rows = of_head.flatten()
    if norm is projection:
        _multiply(projection.weight, rows[:, None])
        if projection.bias is not None:
            _multiply(projection.bias, rows)
        return
    weight = getattr(norm, "weight", None)
    if isinstance(weight, nn.Parameter):
        if weight.numel() == len(rows) and _folds(norm, rows):
            return
        if bool((of_head == of_head[0]).all()) and _folds(norm, rows[: weight.numel()]):
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
    near = 1e-5 if before.dtype == torch.float32 else 2e-2
    for changed in (before.float() * by, (1 + before.float()) * by - 1):
        weight.data = changed.to(before)
        # small ones may be off by more of themselves: of 1 + w near 0 few bits are left
        if torch.allclose(norm(sample).float(), wanted, rtol=near, atol=near * float(wanted.abs().mean())):
            return True
    weight.data = before
    return False


def _multiply(parameter: Tensor, by: Tensor) -> None:
    parameter.data = (parameter.float() * by.to(parameter.device)).to(parameter)
