"""Position indices for fine-tuning inside the window so that a model reads far beyond it: CREAM and its rivals.

A sampler gives each training example of `window` tokens positions out of a target of `window * factor`, and says which
tokens of a longer document get them. CREAM (2406.07138) keeps a head at the beginning and a tail at the end of the
target, and puts a middle between them, near the target's middle more often than elsewhere. PoSE (2309.10400) shifts the
second of two chunks; RandPos draws positions one by one; plain ones are those of pre-training.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats


class Indices(NamedTuple):
    """What a batch of training examples reads, both int arrays of shape (examples, window)."""

    positions: NDArray[np.int64]  # strictly increasing, from 0 to below the target
    tokens: NDArray[np.int64]  # their indices in each example's document


# Draws the indices of a batch from the number of tokens of each example's document; a document shorter than the window
# is a ValueError.
Sampler = Callable[[Sequence[int], np.random.Generator], Indices]


def cream(window: int, factor: int, *, mode: str = "paper", sigma: float = 3.0, k: int | None = None) -> Sampler:
    """CREAM (2406.07138): continuity or relativity, by a coin, and a middle drawn by a truncated Gaussian.

    Continuity: head and tail of `k` tokens, so that nearly all positions follow one another. Relativity: head, middle
    and tail of a third of the window each, so that many distances are seen. The middle ends at P_e, drawn evenly from
    what r leaves, and r in [2, 2 factor] comes from a Gaussian around 1 + factor, the middle of the target.

    Parameters
    ----------
    window, factor : int
        Tokens of an example; the target is window x factor positions.
    mode : str
        "paper": the Gaussian is truncated and renormalised, and each example has its own coin. "reference": as in the
        authors' code: whole r from a clamped distribution function, so that both ends get what lies beyond
        them, one coin for all examples of a call, and middles that may reach into the tail's tokens.
    sigma : float
        Of the Gaussian (their ablation: 2, 2.5, 3, 3.5, 4).
    k : int, optional
        Head and tail of continuity; 4 x factor in their code.
    """
    _refuse_bad_sizes(window, factor)
    if mode not in ("paper", "reference"):
        raise ValueError(f"mode is {mode!r}; choose paper or reference")
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma}; it must be positive")
    k = 4 * factor if k is None else k
    if k < 1 or 2 * k + 1 > window:
        raise ValueError(f"head and tail of {k} tokens leave no middle in a window of {window}; give a smaller k")
    draw = middle_factors(factor, sigma, mode)

    def sample(lengths: Sequence[int], rng: np.random.Generator) -> Indices:
        coins = rng.integers(2, size=len(lengths) if mode == "paper" else 1)
        coins = np.broadcast_to(coins, len(lengths))
        rows = [
            _cream_example(window, factor, window // 3 if coin == 0 else k, r, length, mode, rng)
            for coin, r, length in zip(coins, draw(rng, len(lengths)), lengths, strict=True)
        ]
        return Indices(*(np.array(part) for part in zip(*rows, strict=True)))

    return _refusing_short_documents(window, sample)


def middle_factors(factor: int, sigma: float, mode: str) -> Callable[[np.random.Generator, int], NDArray[np.float64]]:
    """Draws r, twice the multiple of the window near which the middle ends: from 2 to 2 x factor."""
    low, high, mean = 2, 2 * factor, 1 + factor
    if factor == 1:
        return lambda rng, n: np.full(n, 2.0)
    if mode == "paper":
        gaussian = stats.truncnorm((low - mean) / sigma, (high - mean) / sigma, loc=mean, scale=sigma)
        return lambda rng, n: np.asarray(gaussian.rvs(size=n, random_state=rng))
    x = np.linspace(low, high, 1000)
    below = special.ndtr((x - mean) / sigma)
    return lambda rng, n: np.floor(np.interp(rng.random(n), below, x))


def _cream_example(
    window: int, factor: int, ends: int, r: float, length: int, mode: str, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions and tokens of one example, whose head and tail have `ends` tokens each."""
    middle, target = window - 2 * ends, window * factor
    # P_e: r = 2 leaves the middle at its place in the window; at r = 2 factor it may end just before the tail
    last = rng.integers(int(ends + (middle - 1) * r / 2), int(window * r / 2) - ends - 1, endpoint=True)
    block = np.arange(last - middle + 1, last + 1)
    positions = np.concatenate([np.arange(ends), block, np.arange(target - ends, target)])
    # the tokens at the middle's own positions where the document is that long, else those before its tail
    own = last < (length if mode == "reference" else length - ends)
    content = block if own else np.arange(length - ends - middle, length - ends)
    return positions, np.concatenate([np.arange(ends), content, np.arange(length - ends, length)])


def pose(window: int, factor: int) -> Sampler:
    """PoSE (2309.10400): two chunks, the second shifted by a random part of what the target has to spare."""
    _refuse_bad_sizes(window, factor)

    def sample(lengths: Sequence[int], rng: np.random.Generator) -> Indices:
        first = rng.integers(1, (window + 1) // 2, size=len(lengths), endpoint=True)
        shift = rng.integers(0, window * (factor - 1), size=len(lengths), endpoint=True)
        tokens = np.tile(np.arange(window), (len(lengths), 1))
        positions = tokens + np.where(tokens >= first[:, None], shift[:, None], 0)
        return Indices(positions, tokens)

    return _refusing_short_documents(window, sample)


def rand_pos(window: int, factor: int) -> Sampler:
    """RandPos (Ruoss et al. 2023): positions drawn from the target without replacement, in order."""
    _refuse_bad_sizes(window, factor)

    def sample(lengths: Sequence[int], rng: np.random.Generator) -> Indices:
        rows = [np.sort(rng.choice(window * factor, window, replace=False)) for _ in lengths]
        return Indices(np.array(rows), np.tile(np.arange(window), (len(lengths), 1)))

    return _refusing_short_documents(window, sample)


def plain(window: int, factor: int = 1) -> Sampler:
    """The positions of pre-training, whatever the target."""
    _refuse_bad_sizes(window, factor)

    def sample(lengths: Sequence[int], rng: np.random.Generator) -> Indices:
        each = np.tile(np.arange(window), (len(lengths), 1))
        return Indices(each, each.copy())

    return _refusing_short_documents(window, sample)


def distances_seen(positions: NDArray[np.int64], target: int) -> NDArray[np.int64]:
    """How many pairs of tokens are each distance apart, over all examples, shape (target,).

    Of one example its non-zero entries are the relative positions D_r of CREAM's Theorem B.1, which says that with the
    middle P_s to P_e there are at most max(head - 1, P_e - P_s, tail - 1) + 2 window of them.

    Parameters
    ----------
    positions : int array, shape (examples, window)
    """
    marks = np.zeros((len(positions), 2 * target))  # twice as long, or distances would wrap around
    np.put_along_axis(marks, positions, 1.0, axis=1)
    spectrum = np.fft.rfft(marks)
    pairs = np.fft.irfft(np.abs(spectrum) ** 2, n=2 * target)[:, :target]
    return np.asarray(np.round(pairs).astype(int).sum(axis=0))


def _refuse_bad_sizes(window: int, factor: int) -> None:
    if not isinstance(factor, int | np.integer) or factor < 1:
        raise ValueError(
            f"factor is {factor!r}; the target is a whole multiple of the window, 1 or more: round it up, and stretch "
            "frequencies by the true ratio"
        )
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")


def _refusing_short_documents(window: int, sample: Sampler) -> Sampler:
    """`sample`, but for documents that don't fill the window."""

    def refuse_or_sample(lengths: Sequence[int], rng: np.random.Generator) -> Indices:
        for example, length in enumerate(lengths):
            if length < window:
                raise ValueError(f"document {example} has {length} tokens; it must fill the window, {window}")
        return sample(lengths, rng)

    return refuse_or_sample
