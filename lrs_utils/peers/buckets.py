"""Attention Buckets (2312.04455): a text is read with several bases of RoPE, and the surest decides most."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrs_utils.models.decode import model_name
from lrs_utils.models.load import LM
from lrs_utils.models.turns import used_alone
from lrs_utils.progress import Progress
from lrs_utils.scaling.applied import positions_replaced
from lrs_utils.scaling.base import UNSCALED, Setting, reachable_decoder
from lrs_utils.scaling.layers import LayerScaling
from lrs_utils.scaling.tables import PositionTables
from lrs_utils.scoring.forward import PackedForward, refuse_unscorable
from lrs_utils.scoring.ledger import Ledger
from lrs_utils.scoring.packing import Layout, pack
from lrs_utils.scoring.window import refuse_beyond_window
from lrs_utils.tasks import Suite


class AttentionBuckets:
    """Several bases at once, each with a cache of its own: n times the work of one.

    The logits of the next token are the mean of those under each base, weighted by softmax of their highest logits.

    Parameters
    ----------
    bases : sequence of float
        In multiples of the model's own; 1, 1.75, 1.8, 1.9, 2 and 2.5 in the paper (10,000 to 25,000) for tools.
    """

    def __init__(self, bases: Sequence[float] = (1.0, 1.75, 1.8, 1.9, 2.0, 2.5)) -> None:
        if not bases or not all(base > 0 for base in bases):
            raise ValueError(f"bases is {bases}; give positive multiples of the model's base")
        self.bases = tuple(map(float, bases))

    @property
    def key(self) -> str:
        """Canonical text of what this computes."""
        return f"buckets {','.join(map(repr, self.bases))}"

    def _settings(self, model: PreTrainedModel) -> list[Setting]:
        """One for each base: "ntk" with factor s multiplies the base by s ** (d / (d - 2))."""
        rotary = reachable_decoder(model).rotary_emb
        d = 2 * next(len(buffer) for name, buffer in rotary.named_buffers() if name.endswith("inv_freq"))
        factors = [base ** ((d - 2) / d) for base in self.bases]
        return [UNSCALED if factor == 1 else Setting(factor, scheme="ntk") for factor in factors]

    @contextmanager
    def applied_to(self, model: PreTrainedModel) -> Iterator[None]:
        """Let `model` read every text with all bases inside the `with` block: forward, `generate` and caches included.

        One text at a time.
        """
        settings, decoder = self._settings(model), reachable_decoder(model)
        with ExitStack() as stack:
            stack.enter_context(used_alone(model))
            self.refuse_misfit(model)
            stack.enter_context(
                positions_replaced(model, [UNSCALED] * len(decoder.layers))
            )  # no other scaling meanwhile
            tables = stack.enter_context(PositionTables(model))
            for layer in decoder.layers:
                hook = partial(_give_tables, tables=tables, settings=settings)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            repeat = partial(_repeat, n=len(settings), name=model_name(model))
            stack.callback(decoder.register_forward_pre_hook(repeat, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(_decide).remove)
            yield

    def refuse_misfit(self, model: PreTrainedModel) -> None:
        """Raise the ValueError that names a family which doesn't read by the cos and sin that its layers get."""
        LayerScaling.uniform(2.0, len(reachable_decoder(model).layers), "ntk").refuse_misfit(model)

    def score(
        self, lm: LM, suite: Suite, *, ledger: Ledger | None = None
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Verdicts of greedy decoding and nll, each (contexts, questions).

        Raises
        ------
        ValueError
            Contexts with different numbers of questions or beyond the window, a family that can't be scored.
        FloatingPointError
            A likelihood that isn't finite.
        """
        self.refuse_misfit(lm.model)
        refuse_unscorable(lm)
        if not suite.asked.all():
            raise ValueError(f"contexts of {suite.name} have different numbers of questions; give them as many")
        settings, n, bar = self._settings(lm.model), len(self.bases), Progress(len(suite.probes), "scoring")
        found = {} if ledger is None else ledger.find(lm.fingerprint, self.key)
        rows = []
        with torch.inference_mode(), PackedForward(lm, fixed_rows=True) as forward, bar.shown():
            for number, probe in enumerate(suite.probes):
                if not all(key in found for key in probe.keys):
                    packed, where = pack(lm, probe, f"context {number} of {suite.name}"), f"context {number}"
                    refuse_beyond_window(lm, packed.longest, LayerScaling.identity(lm.num_layers), where)
                    layout = Layout([packed], lm.model.device)
                    hidden = forward.embed(layout).repeat(1, n, 1)
                    for layer in range(lm.num_layers):
                        hidden = forward.run(layer, hidden, settings)
                    states = hidden.view(n, layout.length, -1)[:, layout.predicted_at]
                    logits = _combine(torch.stack([forward.logits(some).float() for some in states]))
                    loss = F.cross_entropy(logits, layout.targets, reduction="none").double().cpu().numpy()
                    hit = (logits.argmax(-1) == layout.targets).cpu().numpy()
                    n_tokens = np.bincount(packed.owner)
                    exact = np.bincount(packed.owner, hit) == n_tokens
                    nll = (np.bincount(packed.owner, loss) / n_tokens).astype(np.float32).astype(float)
                    known = list(zip(exact.tolist(), nll.tolist(), strict=True))
                    if not np.isfinite(nll).all():
                        raise FloatingPointError(
                            f"{lm.name} gave a non-finite likelihood in {where}; try dtype float32"
                        )
                    if ledger is not None:
                        known = list(ledger.record(lm.fingerprint, self.key, probe.keys, exact, nll))
                    found |= dict(zip(probe.keys, known, strict=True))
                rows.append([found[key] for key in probe.keys])
                bar.advance(1)
        table = np.array(rows, float)
        return table[..., 0].astype(bool), table[..., 1]


def _combine(logits: Tensor) -> Tensor:
    """One row of logits from those under each base, (bases, ..., vocabulary)."""
    return (logits.amax(-1, keepdim=True).softmax(0) * logits).sum(0)


def _decide(_: nn.Module, __: Any, output: Any) -> Any:
    output["logits"] = _combine(output["logits"].float())[None]
    return output


def _repeat(_: nn.Module, args: Any, given: dict[str, Any], *, n: int, name: str) -> tuple[Any, dict[str, Any]]:
    """A text once for each base, where a batch of one came in."""
    rows = {k: v for k, v in given.items() if k in ("input_ids", "attention_mask", "position_ids", "inputs_embeds")}
    rows = {k: v for k, v in rows.items() if isinstance(v, Tensor)}
    if args or any(len(v) != 1 for v in rows.values()):
        raise ValueError(f"{name} reads with several bases one text at a time; give a batch of one, by name")
    return args, given | {k: v.repeat(n, *[1] * (v.dim() - 1)) for k, v in rows.items()}


def _give_tables(
    _: nn.Module, args: Any, given: dict[str, Any], *, tables: PositionTables, settings: Sequence[Setting]
) -> tuple[Any, dict[str, Any]]:
    each = [tables(given.get("position_embeddings"), setting) for setting in settings]
    rows = [
        [part if len(part) == 1 else part[n : n + 1] for n, part in enumerate(of)] for of in zip(*each, strict=True)
    ]
    return args, given | {"position_embeddings": tuple(torch.cat(of) for of in rows)}
