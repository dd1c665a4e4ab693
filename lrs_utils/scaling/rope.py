"""RoPE mathematics: frequencies under every scheme, and how fast attention may decay with distance.

Knows formulas only; `tables` puts frequencies on a model, `analysis.heads` measures what a model makes of them.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

SCHEMES = ("pi", "ntk", "yarn")
DYNAMIC = "dynamic_ntk"
COMBINATIONS = ("multiply", "divide")
_YARN_ROTATIONS = (32, 1)  # beta_fast, beta_slow of YaRN and transformers


def frequencies(head_dim: int, theta: float) -> Tensor:
    """theta_i = theta^(-2i/d), shape (head_dim / 2,), in radians a token (RoFormer, 2104.09864, Section 3.2.2)."""
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def scaled_frequencies(unscaled: Tensor, factor: float | Tensor, scheme: str, window: int) -> tuple[Tensor, float]:
    """Frequencies for positions stretched by a factor, and what cos and sin are multiplied by.

    Parameters
    ----------
    unscaled : Tensor, shape (d / 2,)
        The model's own, d the rotated dimensions of a head.
    factor : float
        s > 0; 1 changes nothing under any scheme. A tensor ("pi" and "ntk" only) lets a gradient through.
    scheme : str
        "pi": every frequency divided by s (2306.15595, Eq. 4; transformers' rope type "linear").
        "ntk": the base raised to theta s^(d/(d-2)): the lowest frequency divided by s, the highest kept.
        "yarn": frequencies that turn less than once in the window divided by s, those that turn more than 32 times
        kept, a ramp between; for s > 1 cos and sin grow by 0.1 ln s + 1 (2309.00071, Sections 3.2 and 3.4;
        transformers' rope type "yarn").
    window : int
        Positions the model was trained for (only "yarn" asks).

    Raises
    ------
    ValueError
        An unknown scheme; "yarn" for frequencies that are no powers of one base.
    """
    half = len(unscaled)
    if scheme == "pi":
        return unscaled / factor, 1.0
    i = torch.arange(half, dtype=unscaled.dtype, device=unscaled.device)
    if scheme == "ntk":
        return unscaled * factor ** (-i / (half - 1)), 1.0
    if scheme == "yarn":
        log_theta = -math.log(unscaled[1]) * half
        if not torch.allclose(unscaled.log(), -log_theta * i / half, atol=1e-4):
            raise ValueError("scheme 'yarn' needs frequencies that are powers of one base; use 'pi' or 'ntk'")
        fast, slow = (half * math.log(window / (n * 2 * math.pi)) / log_theta for n in _YARN_ROTATIONS)
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), 2 * half - 1)
        stretched = ((i - low) / max(high - low, 0.001)).clamp(0, 1)
        gain = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        return unscaled / factor * stretched + unscaled * (1 - stretched), gain
    raise ValueError(f"scheme {scheme!r} is unknown; choose one of {', '.join(SCHEMES)}")


def layer_frequencies(
    unscaled: Tensor, factor: float | Tensor, scheme: str, window: int, *, extension: float, combine: str, length: int
) -> tuple[Tensor, float]:
    """Frequencies of one layer of a model that is to read beyond its window, and what cos and sin are multiplied by.

    What every layer has in common is the extension e, L'/L; the layer's factor comes on top in one of two ways. Which
    of them the paper (2503.04355) used is not known.

    Parameters
    ----------
    unscaled, factor, window
        As in `scaled_frequencies`.
    scheme : str
        One of its schemes, or "dynamic_ntk": "ntk" by max(1, e n / window - (e - 1)) for n tokens, which leaves what
        is within the window alone (transformers' rope type "dynamic").
    combine : str
        "multiply": the scheme is given e times the factor where it would be given e. "divide": it is given e, then
        every frequency is divided by the factor. With "pi" both are the same.
    length : int
        Tokens n (only "dynamic_ntk" asks).

    Raises
    ------
    ValueError
        An unknown way to combine, and what `scaled_frequencies` raises.
    """
    if combine not in COMBINATIONS:
        raise ValueError(f"combine {combine!r} is unknown; choose one of {', '.join(COMBINATIONS)}")
    stretch: Any = extension * factor if combine == "multiply" else extension
    if scheme == DYNAMIC:
        scheme, stretch = "ntk", stretch * (length / window - 1) + 1
        stretch = stretch.clamp(min=1) if isinstance(stretch, Tensor) else max(1.0, stretch)
    frequencies, gain = scaled_frequencies(unscaled, stretch, scheme, window)
    return (frequencies, gain) if combine == "multiply" else (frequencies / factor, gain)


def divide_by_band(frequencies: Tensor, bands: Sequence[float] | Tensor) -> Tensor:
    """Frequencies divided by a number for each band: as many neighbouring frequencies in each, high ones first.

    Bands that are all s divide as scheme "pi" does. Every scheme is a point of this space: log frequency of pair k of a
    layer is that of the model less the log of what divides it.

    Parameters
    ----------
    frequencies : Tensor, shape (d / 2,)
    bands : sequence of float or Tensor, shape (K,)
        K at most d / 2.
    """
    numbers = bands if isinstance(bands, Tensor) else torch.tensor(bands, dtype=torch.float32)
    half, n = len(frequencies), len(numbers)
    if n > half:
        raise ValueError(f"there are {n} bands, but only {half} frequencies to divide")
    of = torch.arange(half, device=frequencies.device) * n // half
    return frequencies / numbers.to(frequencies.device)[of]


def decay_bound(distances: ArrayLike, frequencies: Tensor) -> NDArray[np.float64]:
    """RoFormer's bound on q.k against distance (2104.09864, Section 3.4.3), up to the size of q and k.

    B(r) = 2/d sum_i |S_i(r)|, S_i(r) = sum over j < i of exp(i r theta_j). An upper bound only: it falls with distance,
    though not steadily, but a model need not follow it (2410.06205, Propositions 3.1 and 3.2).

    Parameters
    ----------
    distances : array, shape (distances,)
        Tokens between query and key.
    frequencies : Tensor, shape (d / 2,)

    Returns
    -------
    float array, shape (distances,)
    """
    angles = np.multiply.outer(np.asarray(distances, float), frequencies.double().numpy())
    return np.asarray(np.abs(np.exp(1j * angles).cumsum(axis=-1)).mean(axis=-1))
