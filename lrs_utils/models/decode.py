"""Running a model with settings of our own: greedy continuations, and attention by a function of ours."""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import EllipsisType
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from lrs_utils.models.load import LM
from lrs_utils.models.turns import used_alone

_REMINDER = logging.getLogger("transformers.generation.stopping_criteria")  # of a window that callers check themselves
NO_SINK = -(2.0**14)  # the logit of an attention sink that takes nothing; exact in every precision


def decode(lm: LM, ids: Tensor, mask: Tensor, n_tokens: int, *, to_the_end: bool = False, **given: Any) -> Tensor:
    """Greedy continuations by the model's `generate`, with settings of our own.

    `generate` takes what is not set from the model's generation config: a penalty that ships with a model, say. Only
    that config's end-of-text tokens are kept.

    Parameters
    ----------
    ids, mask : int tensors, shape (rows, tokens)
    to_the_end : bool
        Always `n_tokens` of them: the end of a text is never chosen.
    given
        Further arguments of `generate`.

    Returns
    -------
    int tensor, shape (rows, at most n_tokens): the new tokens
    """
    _refuse_training(lm.model)
    end, named = lm.tokenizer.eos_token_id, getattr(lm.model.generation_config, "eos_token_id", None)
    ends = [*{end, *(named if isinstance(named, list) else [named])} - {None}]
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=n_tokens, min_new_tokens=n_tokens if to_the_end else None, use_cache=True,
        eos_token_id=end if to_the_end else ends or None,
        pad_token_id=end if lm.tokenizer.pad_token_id is None else lm.tokenizer.pad_token_id,
    )  # fmt: skip
    model = copy.copy(lm.model)  # with the same weights and modules; the caller's keeps its own config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    # `generate` hands the head every row's last token as a slice: a product that copies the vocabulary for each row
    head: Any = model.get_output_embeddings() or nn.Identity()  # type: ignore[no-untyped-call]  # a family may name none
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]) if args else None)
    level = _REMINDER.level
    _REMINDER.setLevel(logging.ERROR)
    try:
        tokens = model.generate(ids, attention_mask=mask, generation_config=settings, **given)  # type: ignore[operator]
    finally:
        hook.remove()
        _REMINDER.setLevel(level)
    return tokens[:, ids.shape[1] :]  # type: ignore[no-any-return]


@contextmanager
def attending_by(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let a model's layers attend by a function registered with transformers' `AttentionInterface`."""
    _refuse_training(model)
    with used_alone(model):
        before = model.config._attn_implementation
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ValueError(f"{type(model).__name__} does not run on transformers' attention interface")
        try:
            yield
        finally:
            model.set_attn_implementation(before)


def known_window(module: nn.Module, handed: int | EllipsisType | None, kwargs: Mapping[str, Any]) -> int | None:
    """The sliding window of an attention layer as a registered function is called, or None for none.

    Raises
    ------
    ValueError
        The layer does something with its logits that causal attention wouldn't.
    """
    family = type(module).__name__
    for unknown in ("softcap", "s_aux"):
        value = kwargs.get(unknown)
        if value is not None and not (unknown == "s_aux" and bool((value <= NO_SINK).all())):
            raise ValueError(f"{family} uses {unknown}, which lrs_utils' attention does not know")
    if not isinstance(handed, EllipsisType):
        return handed
    if getattr(getattr(module, "config", None), "sliding_window", None):  # in its mask; 0 is Qwen2-MoE's none
        raise ValueError(f"{family} hides its sliding window from lrs_utils' attention")
    return None


def model_name(model: PreTrainedModel) -> str:
    """What to call the model in a message: its hub id or folder name, else its class."""
    path = getattr(model.config, "_name_or_path", "")
    return Path(path).name or type(model).__name__


def _refuse_training(model: PreTrainedModel) -> None:
    """Raise the ValueError of a model in training mode, whose dropout would decide what is measured."""
    if model.training:
        raise ValueError(
            f"{model_name(model)} is in training mode, where dropout changes its answers; call model.eval() first"
        )
