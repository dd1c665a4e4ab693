"""Fine-tuning on positions that a sampler draws, and what the tuned models read (for notebook 09).

A method is a sampler, the scheme that stretches frequencies, and a target. `SmallTuning` trains the small model by one
and `Reading` tests it at every length; `LargeTuning` and `LargeReading` do the same past a real model's window;
`search_factors` searches layer factors on top. Trainings are found again by their settings, so settings stay in order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lrs_utils import ExtendedScaling, GeneticSearch, score, search, tasks
from lrs_utils.models.load import LM
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.perplexity import window_nll
from lrs_utils.scoring.window import context_tokens
from lrs_utils.searchers.objectives import mixture
from lrs_utils.tasks import Suite
from lrs_utils.training import small
from lrs_utils.training.finetune import Documents, Training, cast, train
from lrs_utils.training.positions import Sampler, cream, plain, pose, rand_pos

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "CREAM": cream, "PoSE": pose, "plain": plain, "RandPos": rand_pos,
    "CREAM as released": partial(cream, mode="reference"),
}  # fmt: skip
SCHEMES = {"no scaling": "pi", "PI": "pi", "YaRN": "yarn"}  # "no scaling" stretches by 1
MAIN = ("CREAM", "PoSE", "plain")  # the samplers of the main comparison
TASKS = ("pairs", "lines", "pass key")
USUAL = float("nan")  # sigma where the sampler's own is used


class Method(NamedTuple):
    """One training of the small model, or the stretch alone ("untuned")."""

    sampler: str
    scheme: str
    factor: int  # the target, in windows
    sigma: float = USUAL
    nth: int = 0  # training of its kind

    @property
    def name(self) -> str:
        """Of its piece in `run.table`."""
        spread = "" if np.isnan(self.sigma) else f", sigma {self.sigma:g}"
        return f"{self.sampler}{spread}, {self.scheme} x {self.factor}, training {self.nth}"


def list_methods(targets: Sequence[int], n_seeds: int, sigmas: Sequence[float]) -> list[Method]:
    """What is measured: first the model as it is and stretched, then every training.

    All samplers are trained with YaRN toward each target, the main ones with PI toward the nearer, and CREAM with other
    sigmas. The main comparison has `n_seeds` trainings of each kind, everything else half as many.
    """
    near, far, many, few = targets[0], max(targets), range(n_seeds), range(max(1, n_seeds // 2))
    methods = [Method("untuned", "no scaling", 1), Method("untuned", "PI", near)]
    methods += [Method("untuned", "YaRN", factor) for factor in targets]
    for factor, sampler in product(targets, SAMPLERS):
        seeds = many if factor == far and sampler in MAIN else few
        methods += [Method(sampler, "YaRN", factor, nth=nth) for nth in seeds]
    methods += [Method(sampler, "PI", near, nth=nth) for sampler, nth in product(MAIN, few)]
    return methods + [Method("CREAM", "YaRN", far, sigma, nth) for sigma, nth in product(sigmas, few)]


def lengths_up_to(window: int, factor: int) -> list[int]:
    """One window, two, four, up to the target."""
    return [window * 2**i for i in range(int(np.log2(factor)) + 1)]


def stretch(n_layers: int, scheme: str, extension: float, factors: Sequence[float] | None = None) -> ExtendedScaling:
    """Frequencies stretched for a target, with layer factors on top if they are given."""
    return ExtendedScaling(factors or (1.0,) * n_layers, SCHEMES[scheme], extension=float(extension))


@dataclass(frozen=True)
class SmallTuning:
    """How the small model is trained: all its weights, on documents of one window.

    Parameters
    ----------
    lm, start : LM
        The model that is tested, in float32, and the same in bfloat16, from which training starts.
    documents : Documents
        The same for every sampler, step by step.
    seed : int
        Of the first training of each kind.
    folder : Path
        Of trainings (`train`).
    """

    lm: LM
    start: LM
    documents: Documents
    training: Training
    folder: Path
    seed: int

    def stretch(self, method: Method, factors: Sequence[float] | None = None) -> ExtendedScaling:
        """What the model reads with: the stretch that it was tuned with, and perhaps factors on top."""
        return stretch(self.lm.num_layers, method.scheme, method.factor, factors)

    def tune(self, method: Method) -> tuple[LM, NDArray[np.float64]]:
        """The model after a training, in float32, and the loss of every step."""
        sampler, _, factor, sigma, nth = method
        options = {} if np.isnan(sigma) else {"sigma": sigma}
        about = {
            "documents": "small.mixed", "window": self.lm.window, "sampler": sampler, "factor": factor, "sigma": sigma,
        }  # fmt: skip
        tuned, losses = train(
            self.start, self.documents, SAMPLERS[sampler](self.lm.window, factor, **options),
            replace(self.training, seed=self.seed + nth), self.folder, about=about, scaling=self.stretch(method),
        )  # fmt: skip
        return replace(tuned, model=cast(tuned.model, torch.float32)), losses

    def tuned(self, method: Method) -> LM:
        """The model that a method reads with; an untuned one is the model itself."""
        return self.lm if method.sampler == "untuned" else self.tune(method)[0]

    def losses_of(self, method: Method, every: int = 10) -> pd.DataFrame:
        """Mean loss of every ten steps."""
        losses = self.tune(method)[1]
        steps = np.arange(len(losses)) // every * every + every
        by_step = pd.DataFrame({"step": steps, "loss": losses}).groupby("step", as_index=False).mean()
        return by_step.assign(**method._asdict())


@dataclass(frozen=True)
class Reading:
    """What the small model is asked for at every length.

    Parameters
    ----------
    contexts, windows : int
        Contexts of each task and length, stretches of each text.
    first_end : int
        Tokens of a text up to the end of its first stretch, the same for every length and target.
    texts : function
        Gives the texts, which the model was not trained on.
    """

    contexts: int
    windows: int
    first_end: int
    seed: int
    ledger: Ledger
    texts: Callable[[], Sequence[str]] = small.measuring_texts

    def suites(self, task: str, length: int) -> list[Suite]:
        """Pairs, lines (twenty of them are asked for) or pass keys (at five depths) that fill a length."""
        return small.suites(task, length, self.contexts, 3_000 + self.seed, n_asked=20)

    def read(self, model: LM, scaling: ExtendedScaling, lengths: Sequence[int]) -> pd.DataFrame:
        """Answers to each task and nll of texts, at every length, by context and by fifth of the depth."""
        parts = [self._read_task(model, scaling, task, length) for task, length in product(TASKS, lengths)]
        return pd.concat([*parts, self._read_texts(model, scaling, lengths)])

    def measure(self, tuning: SmallTuning, method: Method, lengths: Sequence[int]) -> pd.DataFrame:
        """What a method's model reads."""
        rows = self.read(tuning.tuned(method), tuning.stretch(method), lengths)
        return rows.assign(**method._asdict())

    def measure_factors(
        self, tuning: SmallTuning, method: Method, how: str, factors: Sequence[float], lengths: Sequence[int]
    ) -> pd.DataFrame:
        """What a method's model reads with layer factors on top of its stretch."""
        rows = self.read(tuning.tuned(method), tuning.stretch(method, tuple(factors)), lengths)
        return rows.assign(sampler=method.sampler, how=how, nth=method.nth)

    def _read_task(self, model: LM, scaling: ExtendedScaling, task: str, length: int) -> pd.DataFrame:
        suites = self.suites(task, length)
        asked = [score(model, suite, [scaling], ledger=self.ledger, extrapolate=True) for suite in suites]
        exact, nll = (np.concatenate([getattr(o, of)[0] for o in asked], axis=1) for of in ("exact", "nll"))
        right = 100 * np.stack([fifth.mean(axis=1) for fifth in np.array_split(exact, 5, axis=1)], axis=1)
        of_contexts = {"right": right.mean(axis=1), "middle": right[:, 1:4].mean(axis=1), "nll": nll.mean(axis=1)}
        by_context = pd.DataFrame(of_contexts).rename_axis("context").reset_index()
        by_fifth = pd.DataFrame({"fifth": range(1, 6), "right": right.mean(axis=0)})
        return pd.concat([by_context, by_fifth]).assign(task=task, length=length)

    def _read_texts(self, model: LM, scaling: ExtendedScaling, lengths: Sequence[int]) -> pd.DataFrame:
        nll = [
            window_nll(
                model, text, lengths, stride=model.window // 2, n_windows=self.windows, first_end=self.first_end,
                scaling=scaling, extrapolate=True,
            ).mean(axis=1)
            for text in self.texts()
        ]  # fmt: skip
        return _by_text(nll, lengths)


def search_factors(
    model: LM, sampler: str, how: str, extension: float, suite: Suite, budget: int, *, seed: int, ledger: Ledger
) -> pd.DataFrame:
    """Layer factors on top of YaRN's stretch that give a suite the least nll, a row for each layer.

    Parameters
    ----------
    sampler : str
        What the model was tuned with; only written into the rows.
    how : "one factor" or "GA"
        The best of one number for all layers, or the paper's genetic algorithm.
    """
    if how not in ("one factor", "GA"):
        raise ValueError(f"how is {how!r}; choose one factor or GA")
    if how == "GA":
        tried, nll = _genetic(model, extension, suite, budget, ledger, seed=seed)
    else:
        tried, nll = _one_factor(model, extension, suite, budget, ledger)
    alone = score(model, suite, [stretch(model.num_layers, "YaRN", extension)], ledger=ledger, extrapolate=True)
    best = int(np.argmin(nll))
    rows = pd.DataFrame({"layer": range(model.num_layers), "factor": tried[best].factors})
    return rows.assign(sampler=sampler, how=how, candidates=len(nll), nll=alone.nll.mean(), best=nll[best])


def _one_factor(
    model: LM, extension: float, suite: Suite, budget: int, ledger: Ledger
) -> tuple[Sequence[ExtendedScaling], list[float]]:
    numbers = np.arange(0.5, 2.0, 0.1 if budget >= 16 else 0.5).round(2).tolist()
    n = model.num_layers
    tried = [stretch(n, "YaRN", extension, (number,) * n) for number in numbers]
    found = score(model, suite, tried, extrapolate=True, ledger=ledger).nll.mean(axis=(1, 2))
    return tried, [float(nll) for nll in found]


def _genetic(
    model: LM, extension: float, suite: Suite, budget: int, ledger: Ledger, *, seed: int
) -> tuple[Sequence[Any], list[float]]:
    size = 4 if budget < 16 else 8
    searcher = GeneticSearch(
        model.num_layers, scheme="yarn", make=partial(ExtendedScaling, extension=extension), bounds=[0.5, 2.0],
        step=0.1, start=1.0, population=size, parents=size // 2, mutations=size // 4, crossovers=size // 4, seed=seed,
    )  # fmt: skip
    result = search(model, suite, searcher, budget=budget, objective=mixture(1), extrapolate=True, ledger=ledger)
    return result.candidates, [-fitness for [fitness] in result.fitness]


@dataclass(frozen=True)
class LargeTuning:
    """How a real model is trained past its window: examples of `window` tokens with positions up to `target`.

    Parameters
    ----------
    texts : mapping
        Where the documents come from; part of a training's name.
    """

    lm: LM
    documents: Documents
    training: Training
    folder: Path
    texts: dict[str, Any]
    window: int
    target: int

    def stretch(self, scheme: str) -> ExtendedScaling:
        """Frequencies stretched from the model's own window to the target; "no scaling": by 1."""
        return stretch(self.lm.num_layers, scheme, 1.0 if scheme == "no scaling" else self.target / self.lm.window)

    def tune(self, sampler: str, scheme: str) -> tuple[LM, NDArray[np.float64]]:
        """The model after training, and the loss of every step."""
        about = {"texts": self.texts, "window": self.window, "sampler": sampler, "target": self.target}
        return train(
            self.lm, self.documents, SAMPLERS[sampler](self.window, self.target // self.window), self.training,
            self.folder, about=about, scaling=self.stretch(scheme), save_every=max(5, self.training.steps // 8),
        )  # fmt: skip

    def losses_of(self, sampler: str, scheme: str) -> pd.DataFrame:
        """The loss of every step."""
        losses = self.tune(sampler, scheme)[1]
        return pd.DataFrame({"method": f"{sampler}, {scheme}", "step": range(1, len(losses) + 1), "loss": losses})


@dataclass(frozen=True)
class LargeReading:
    """What a real model is asked for: texts at its window and at the target, pass keys at the target, short pairs."""

    texts: int
    windows: int
    stride: int
    depths: Sequence[float]
    pairs: Suite
    seed: int
    ledger: Ledger

    def measure(self, tuning: LargeTuning, sampler: str, scheme: str) -> pd.DataFrame:
        """Nll by text, retrieval by depth."""
        model = tuning.lm if sampler == "untuned" else tuning.tune(sampler, scheme)[0]
        scaling = tuning.stretch(scheme)
        keys = tasks.passkey((tuning.target - 80) // 25, 1, seed=3_000 + self.seed, depths=self.depths)
        parts = [self._read_texts(model, scaling, [tuning.lm.window, tuning.target])]
        for task, suite in [("pairs", self.pairs), *(("pass key", suite) for suite in keys)]:
            outcomes = score(model, suite, [scaling], ledger=self.ledger, extrapolate=True)
            length = max(context_tokens(model, probe) for probe in suite.probes)
            right, nll = 100 * outcomes.exact[0].mean(axis=0), outcomes.nll[0].mean(axis=0)
            by_depth = pd.DataFrame({"depth": outcomes.depths, "right": right, "nll": nll})
            parts.append(by_depth.assign(task=task, length=length))
        return pd.concat(parts).assign(method=f"{sampler}, {scheme}")

    def _read_texts(self, model: LM, scaling: ExtendedScaling, lengths: list[int]) -> pd.DataFrame:
        long_enough = [text for text in small.measuring_texts() if len(text) > 4 * max(lengths)]
        nll = [
            window_nll(
                model, text, lengths, scaling=scaling, extrapolate=True, stride=self.stride, n_windows=self.windows
            ).mean(axis=1)
            for text in long_enough[: self.texts]
        ]
        return _by_text(nll, lengths)


def _by_text(nll: list[NDArray[np.float64]], lengths: Sequence[int]) -> pd.DataFrame:
    by_text = pd.DataFrame(nll, columns=list(lengths)).rename_axis("context").reset_index()
    return by_text.melt("context", var_name="length", value_name="nll").assign(task="text")
