"""Training a language model inside its window, whatever positions its tokens are given (CREAM, 2406.07138, Section 3).

A plain loop that ends in the same place no matter how often it is killed: step s draws its documents and positions from
only the seed and s, and weights, optimiser and losses are written to disk every few steps.
"""

import copy
import hashlib
import inspect
import io
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lrs_utils.models.download import write_whole
from lrs_utils.models.load import LM
from lrs_utils.progress import Progress
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.training.positions import Sampler

# Draws a given number of documents. A token i that is read but need not be predicted is given as ~i.
Documents = Callable[[int, np.random.Generator], Sequence[NDArray[np.int64]]]


def tokens_on_disk(lm: LM, texts: Sequence[str], folder: str | Path) -> NDArray[np.uint32]:
    """Texts as one row of tokens, written once and mapped into memory, with the end-of-text token between texts."""
    digest = hashlib.sha256(lm.tokenizer.backend_tokenizer.to_str().encode())
    for text in texts:
        digest.update(f"{len(text)} {text}".encode())
    path = Path(folder) / f"tokens-{digest.hexdigest()[:16]}.npy"
    if not path.exists():
        end = [] if lm.tokenizer.eos_token_id is None else [lm.tokenizer.eos_token_id]
        ids = np.concatenate([np.array(lm.tokenizer(text)["input_ids"] + end, np.uint32) for text in texts])
        file = io.BytesIO()
        np.save(file, ids)
        write_whole(path, file.getbuffer())
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def stretches(tokens: NDArray[np.uint32], length: int) -> Documents:
    """Documents that are stretches of a long row of tokens, from random places."""
    if length > len(tokens):
        raise ValueError(f"the text has {len(tokens):,} tokens; documents of {length:,} don't fit into it")

    def draw(n: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        starts = rng.integers(len(tokens) - length + 1, size=n)
        return [tokens[start : start + length].astype(np.int64) for start in starts]

    return draw


@dataclass(frozen=True)
class Training:
    """How to train: everything that the result depends on besides model, documents and positions.

    Parameters
    ----------
    steps, batch, accumulate : int
        Optimiser steps; examples in a forward pass, and passes in a step.
    rate : float
        AdamW's learning rate: it rises from 0 over `warmup` steps, then falls to 0 in a straight line.
    lora : int, optional
        Rank of LoRA's matrices on the projections of attention (peft); by default all weights are trained.
    checkpointing : bool
        Compute activations twice instead of keeping them.

    Raises
    ------
    ValueError
        A number that is not positive where it must be.
    """

    steps: int
    batch: int = 8
    accumulate: int = 1
    rate: float = 2e-5
    warmup: int = 10
    weight_decay: float = 0.0
    lora: int | None = None
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")


def train(
    lm: LM,
    documents: Documents,
    sampler: Sampler,
    training: Training,
    folder: str | Path,
    *,
    about: Mapping[str, Any],
    scaling: LayerScaling | None = None,
    save_every: int = 50,
) -> tuple[LM, NDArray[np.float64]]:
    """Train a model and return it, with the loss of every step in nats a token.

    Weights of a model in bfloat16 are trained in float32, since small steps would be rounded away, with products in
    bfloat16 (`torch.autocast`); the returned model is bfloat16 again. LoRA leaves them unchanged and trains its own.

    Parameters
    ----------
    lm : LM
        Not changed.
    documents : function (n, generator) -> token arrays
        At least as long as the sampler's window.
    sampler : Sampler
        Which tokens of a document are read, and the positions they are given (`cream`).
    folder : path
        Holds trainings, each in a folder named after its settings, with its checkpoint and the losses so far. A killed
        training resumes from the last checkpoint; a finished one is read.
    about : mapping of JSON values
        Describes documents and sampler, so that trainings that differ in them are told apart.
    scaling : LayerScaling, optional
        On the model while it trains: it stretches frequencies for the target length.
    save_every : int
        Steps between checkpoints.

    Raises
    ------
    ValueError
        A model that takes no `position_ids`.
    """
    if "position_ids" not in inspect.signature(lm.model.forward).parameters:
        raise ValueError(f"{type(lm.model).__name__} takes no position_ids, so positions can't be manipulated")
    scaled_as = None if scaling is None else scaling.key
    described = {"training": vars(training), "model": lm.fingerprint, "scaling": scaled_as, "about": dict(about)}
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
    folder = Path(folder) / f"training-{digest}"
    write_whole(folder / "training.json", json.dumps(described, indent=1))
    own = [lm.model.device] if lm.model.device.type == "cuda" else []  # whose random numbers are left as they were
    with torch.random.fork_rng(devices=own):
        torch.manual_seed(training.seed)  # LoRA's first weights
        bare = copy.deepcopy(lm.model)
        model = _make_trainable(bare, training)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(weights, lr=training.rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _scale_rate(step, training))
    losses = _resume(folder / "checkpoint.pt", weights, adam, schedule)
    bar = Progress(training.steps, "training")
    scaled = nullcontext() if scaling is None else scaling.applied_to(bare)
    with bar.shown(), torch.random.fork_rng(devices=own), scaled:
        bar.advance(len(losses))
        for step in range(len(losses), training.steps):
            torch.manual_seed(training.seed * 1_000_003 + step)  # dropout, where a model has it
            losses.append(_add_gradient(model, lm.model.dtype, documents, sampler, training, step))
            torch.nn.utils.clip_grad_norm_(weights, 1.0, error_if_nonfinite=True)
            adam.step()
            adam.zero_grad()
            schedule.step()
            if (step + 1) % save_every == 0 or step + 1 == training.steps:
                _save(folder / "checkpoint.pt", weights, adam, schedule, losses)
            bar.advance(1, f"loss {np.mean(losses[-20:]):.3f}")
    trained = model.merge_and_unload() if training.lora else model
    if training.checkpointing:
        trained.gradient_checkpointing_disable()
    cast(trained, lm.model.dtype).requires_grad_(False).train(False)
    return replace(lm, model=trained), np.array(losses)


def cast(model: PreTrainedModel, dtype: torch.dtype) -> Any:
    """Convert weights to a precision. `to` would also round the rotary frequencies, which loading keeps in float32."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def _make_trainable(model: PreTrainedModel, training: Training) -> Any:
    if training.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    if training.lora is None:
        return cast(model, torch.float32).requires_grad_(True).train()
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=training.lora, lora_alpha=2 * training.lora, target_modules=names, task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # peft asks for is_gradient_checkpointing, a name that transformers will drop
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config).train()


def _scale_rate(step: int, training: Training) -> float:
    """What the learning rate is multiplied by."""
    if step < training.warmup:
        return (step + 1) / training.warmup
    return (training.steps - step) / max(1, training.steps - training.warmup)


def _add_gradient(
    model: Any, dtype: torch.dtype, documents: Documents, sampler: Sampler, training: Training, step: int
) -> float:
    """Add the gradient of one step to the weights' own, and return the step's loss."""
    # two generators, so that every sampler is given the same documents
    of_documents, of_positions = np.random.default_rng([training.seed, step]).spawn(2)
    total, full = 0.0, dtype == torch.float32
    for _ in range(training.accumulate):
        drawn = documents(training.batch, of_documents)
        positions, tokens = sampler([len(document) for document in drawn], of_positions)
        given = np.array([document[t] for document, t in zip(drawn, tokens, strict=True)])
        # a label of -100 counts nothing towards transformers' loss
        read, predicted = np.where(given < 0, ~given, given), np.where(given < 0, -100, given)
        ids, at, labels = (torch.from_numpy(x).to(model.device) for x in (read, positions, predicted))
        # with the mask, or transformers takes every gap between positions for the beginning of another text
        mask = torch.ones_like(ids)
        # entered again for every pass: while entered, it keeps the weights as first cast
        with torch.autocast(model.device.type, torch.bfloat16 if full else dtype, enabled=not full):
            output = model(input_ids=ids, attention_mask=mask, position_ids=at, labels=labels, use_cache=False)
        loss = output.loss / training.accumulate
        loss.backward()
        total += loss.item()
    if not math.isfinite(total):
        raise FloatingPointError(
            f"the loss of step {step} is {total}; lower the rate, train in float32, or give tokens to predict"
        )
    return total


def _save(path: Path, weights: list[Any], adam: Any, schedule: Any, losses: list[float]) -> None:
    state = {
        "weights": [w.detach() for w in weights],
        "adam": adam.state_dict(),
        "schedule": schedule.state_dict(),
        "losses": losses,
    }
    file = io.BytesIO()
    torch.save(state, file)
    write_whole(path, file.getbuffer())
    curve = "".join(f"{step},{loss:.6g}\n" for step, loss in enumerate(losses, 1))
    write_whole(path.with_name("losses.csv"), f"step,loss\n{curve}")


def _resume(path: Path, weights: list[Any], adam: Any, schedule: Any) -> list[float]:
    if not path.exists():
        return []
    state = torch.load(path, weights_only=True, map_location=weights[0].device)
    with torch.no_grad():
        for weight, saved in zip(weights, state["weights"], strict=True):
            weight.copy_(saved)
    adam.load_state_dict(state["adam"])
    schedule.load_state_dict(state["schedule"])
    return [*state["losses"]]
