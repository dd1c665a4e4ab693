"""What a notebook will cost, said before it starts: its measured time at the `cpu` profile, carried to other settings.

Time is taken to grow with the tokens that go through the larger model's layers, with its weights, and to fall with the
machine's rate of matrix products. The counts are of each notebook's main parts, so all this is rough.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import yaml

from lrs_utils.models import choose_device, choose_dtype, outline
from lrs_utils.repository import profiles

_READ, _ASKED = 73, 77  # tokens of a UUID pair in a context, and of a question about one with its answer
_BACKWARD = 4  # a gradient, in forward passes of the same tokens
_KNOWN_RATE, _KNOWN_WEIGHTS = 861e9, 134_515_008  # where the `cpu` profile was timed: data/results/benchmark.csv
_GIB = 2**30


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of some matrix products."""
    best = 0.0
    for m, k, n in [(1024,) * 3, (2048,) * 3, (4096,) * 3, (4096, 1024, 4096)]:
        a, b = (torch.randn(rows, k, device=device, dtype=dtype) for rows in (m, n))
        product = partial(torch.nn.functional.linear, a, b)
        best = max(best, *(2 * m * k * n / seconds_of(device, product) for _ in range(4)))  # the first warms up
    return best


def seconds_of(device: torch.device, run: Callable[[], object]) -> float:
    """What a call takes, work that it leaves to a GPU included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _asked(pairs: int, questions: int | None = None) -> int:
    return _READ * pairs + _ASKED * (pairs if questions is None else questions)


def _rope_decay(s: Mapping[str, Any], _: int) -> Any:
    return 2 * s["decay_texts"] * s["decay_tokens"] * (1 + len(s["decay_layers"]) * len(s["decay_factors"]))


def _attention_entropy(s: Mapping[str, Any], _: int) -> Any:
    scaled = s["n_pairs"] * s["attention_rounds"] * (2 + len(s["attention_factors"]))
    return (3 * s["attention_texts"] + scaled) * _READ * s["n_pairs"]


def _lost_in_the_middle(s: Mapping[str, Any], _: int) -> Any:
    kv = sum(s["n_contexts"] * _asked(n) for n in s["kv_lengths"])
    documents = sum(s["n_contexts"] * 250 * n for n in s["documents"])
    return kv + documents + 3 * s["n_free_contexts"] * s["n_pairs"] * s["answer_tokens"] * 50  # decoding is slow


def _uniform_vs_layer_specific(s: Mapping[str, Any], layers: int) -> Any:
    scalings = 8 + len(s["uniform_factors"]) + len(s["uniform_ntk_factors"])
    single = s["map_contexts"] * layers * (len(s["map_factors"]) + 1) / 2  # layers below are shared
    return s["uniform_contexts"] * scalings * _asked(s["n_pairs"]) + single * _asked(s["ablation_pairs"])


def _ga_search(s: Mapping[str, Any], _: int) -> Any:
    searches = s["budget"] * s["n_contexts"] * (_asked(s["n_pairs"], 3) + _asked(s["n_pairs"]))
    return searches + 4 * s["n_test_contexts"] * _asked(s["n_pairs"])


def _held_out_and_transfer(s: Mapping[str, Any], _: int) -> Any:
    of_u = s["search_seeds"] * s["budget"] * s["n_contexts"] * _asked(s["n_pairs"], 3)
    of_nll = (9 + 3 * s["search_seeds"]) * s["budget"] * s["search_contexts"] * _asked(s["search_pairs"])
    gradients = (16 + 2 * len(s["text_weights"])) * s["gradient_steps"] * _BACKWARD * _asked(s["search_pairs"])
    judged = 26 * s["n_test_contexts"] + (26 + 10 * s["doses"]) * s["validation_contexts"]
    transfer = 8 * s["transfer_contexts"] * sum(_asked(n, 5) for n in s["transfer_pairs"])
    return of_u + of_nll + gradients + judged * _asked(s["n_pairs"]) + transfer


def _extrapolation(s: Mapping[str, Any], _: int) -> Any:
    texts = sum(n * length for n, length in zip(s["long_texts"], s["long_lengths"], strict=True))
    return 12 * texts + 3 * s["long_budget"] * s["long_contexts"] * s["long_searched_at"]


def _cream(s: Mapping[str, Any], _: int) -> Any:
    t = s["long_tuning"]
    trained = t["steps"] * t["batch"] * t.get("accumulate", 1) * s["long_window"]
    read = 6 * s["long_tuned_texts"] * s["long_target"] * (1 + len(s["long_tuned_depths"]))
    return 3 * trained * (_BACKWARD if t.get("checkpointing") else 3) + read


# Parameter of the larger model, tokens through all of its layers, and minutes of the `cpu` profile measured anew
# (their first cells say how they were measured).
_COUNTED: dict[str, tuple[str, Callable[[Mapping[str, Any], int], Any], float]] = {
    "01_rope_decay": ("model", _rope_decay, 11),
    "02_attention_entropy": ("model", _attention_entropy, 11),
    "03_lost_in_the_middle": ("model", _lost_in_the_middle, 65),
    "04_uniform_vs_layer_specific": ("model", _uniform_vs_layer_specific, 17),
    "06_ga_search": ("model", _ga_search, 71),
    "07_held_out_and_transfer": ("model", _held_out_and_transfer, 480),
    "08_extrapolation": ("long_model", _extrapolation, 35),
    "09_cream": ("tuned_model", _cream, 120),
}


def announced(notebook: str, settings: Mapping[str, Any]) -> str:
    """The line a notebook begins with where everything is to be measured: hours on this machine, and memory.

    Raises
    ------
    MemoryError
        A GPU too small for the weights, or for training them; says what to change.
    """
    if notebook not in _COUNTED:
        return f"{notebook}: minutes"
    role, count, minutes = _COUNTED[notebook]
    known = yaml.safe_load(profiles()["cpu"].read_text(encoding="utf-8"))
    device = choose_device()
    dtype = choose_dtype(settings["dtype"], device)
    model = outline(settings[role])
    n_weights = sum(weight.numel() for weight in model.parameters())
    work = count(settings, model.config.get_text_config().num_hidden_layers) * n_weights
    minutes *= work / (count(known, 30) * _KNOWN_WEIGHTS) * _KNOWN_RATE / matrix_rate(device, dtype)
    # weights, gradients and AdamW's two moments in float32 where all weights are trained
    trained = notebook == "09_cream" and settings["long_tuning"].get("lora") is None
    needed = n_weights * (16 if trained else dtype.itemsize)
    where, has = "this CPU", ""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        where, has = torch.cuda.get_device_name(device), f" of {memory / _GIB:.0f}"
        if needed > memory:
            lora = " or, in the profile, long_tuning a rank of lora" if trained else ""
            raise MemoryError(
                f"{notebook}: {settings[role]} takes {needed / _GIB:.0f} GiB{' to train' if trained else ''}, "
                f"{where} has {memory / _GIB:.0f}; give another {role} (-p {role}=...){lora}"
            )
    dtype_name = str(dtype).removeprefix("torch.")
    return (
        f"{notebook}: roughly {_duration(minutes)} on {where}; {settings[role]} in {dtype_name}, "
        f"{needed / _GIB:.1f} GiB{has} for its {'training' if trained else 'weights'}"
    )


def _duration(minutes: float) -> str:
    return f"{minutes / 60:.0f} hours" if minutes >= 120 else f"{max(1, minutes):.0f} minutes"
