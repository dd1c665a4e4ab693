"""Free answers: what a model writes after a question, greedily, by our own settings."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from lrs_utils.models.decode import decode
from lrs_utils.models.load import LM
from lrs_utils.progress import Progress
from lrs_utils.scaling.base import Scaling
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.packing import shared_prefix
from lrs_utils.scoring.window import context_tokens, refuse_beyond_window
from lrs_utils.tasks import Suite

_CACHED_BYTES = 1440 * 2**20  # of keys and values of all answers decoded together; on a GPU half of what is free


@torch.inference_mode()
def generate_answers(
    lm: LM,
    suite: Suite,
    scaling: Scaling,
    *,
    max_new_tokens: int = 100,
    ledger: Ledger | None = None,
    extrapolate: bool = False,
) -> list[list[str]]:
    """Let the model answer freely: greedy text for each question, without answer prefix (the authors' protocol).

    Decoding is by our own settings, whatever the model's generation config says. The context is read once; its
    questions are decoded together from copies of its cache.

    Parameters
    ----------
    ledger : Ledger, optional
        Texts found there are not generated again; those generated are written as soon as they are known.

    Returns
    -------
    list of list of str, shape (contexts, questions)
    """
    answers = []
    with Progress(len(suite.probes), "answering").shown() as bar:
        fingerprint = lm.fingerprint
        found = {} if ledger is None else ledger.find_texts(fingerprint, scaling.key, max_new_tokens)
        for p, probe in enumerate(suite.probes):
            if any(key not in found for key in probe.keys):
                # all questions, known or not: what is decoded together rounds together
                prompts = [lm.tokenizer(probe.context + q.prompt)["input_ids"] for q in probe.questions]
                if not extrapolate:
                    longest = max(map(len, prompts)) + max_new_tokens
                    refuse_beyond_window(lm, longest, scaling, f"context {p} of {suite.name}")
                length = context_tokens(lm, probe) if scaling.stretches_by_length else None
                with scaling.applied_to(lm.model, length=length):
                    texts = _decode_together(lm, prompts, max_new_tokens)
                if ledger is not None:
                    texts = ledger.record_texts(fingerprint, scaling.key, max_new_tokens, probe.keys, texts)
                found |= zip(probe.keys, texts, strict=True)
            answers.append([found[key] for key in probe.keys])
            bar.advance(1)
    return answers


def _decode_together(lm: LM, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy text after each of some prompts that begin the same way; what they share is read once."""
    pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.tokenizer.eos_token_id
    n_context, longest = shared_prefix(prompts), max(map(len, prompts))
    device = lm.model.device
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _CACHED_BYTES
    read = DynamicCache(config=lm.model.config)
    shared = torch.tensor([prompts[0][:n_context]], device=device)
    lm.model(shared, past_key_values=read, logits_to_keep=1)
    kept = [tensor for layer in read.layers for tensor in vars(layer).values() if isinstance(tensor, Tensor)]
    bytes_a_token = sum(tensor.nbytes for tensor in kept) / n_context
    at_once = max(1, int(room / (bytes_a_token * (longest + max_new_tokens))))
    texts: list[str] = []
    for first in range(0, len(prompts), at_once):
        some = prompts[first : first + at_once]
        # questions of different lengths are padded between context and question, where a mask hides it
        rows = [ids[:n_context] + [pad] * (longest - len(ids)) + ids[n_context:] for ids in some]
        masks = [[1] * n_context + [0] * (longest - len(ids)) + [1] * (len(ids) - n_context) for ids in some]
        cache = copy.deepcopy(read) if first + at_once < len(prompts) else read
        cache.batch_repeat_interleave(len(rows))
        ids, mask = (torch.tensor(x, device=device) for x in (rows, masks))
        tokens = decode(lm, ids, mask, max_new_tokens, past_key_values=cache)
        texts += lm.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts
