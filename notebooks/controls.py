"""Controls: other numbers than those of positions and heads, learned with the same contexts, steps, limits and doses.

Each acts through hooks on unmodified modules, begins as no change, and can be taken in doses. `ControlRun` is a call of
`find_scaling` whose search learns a control's numbers, and whose scores are taken under its hooks.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrs_utils import LM, HeadScaling, LayerScaling
from lrs_utils.finding.plan import STOPS
from lrs_utils.finding.stages import Run
from lrs_utils.scaling.base import Scaling, Setting, reachable_decoder
from lrs_utils.scoring.outcomes import Outcomes
from lrs_utils.searchers.descent import draw_steps
from lrs_utils.searchers.gradient import nll_gradient_by
from lrs_utils.tasks import Suite

Hooks = Callable[[nn.Module, Mapping[str, Tensor]], Sequence[Any]]  # put on a layer with its numbers; handles


@dataclass(frozen=True, eq=False)
class Control(Scaling):
    """Learned numbers of layers, and how they act.

    Attributes
    ----------
    name : str
    learned : tuple of mapping of str to Tensor
        For each layer, float32; 0 is no change, and a dose multiplies those of `dosed`.
    hooks : function
        Puts a layer's numbers on it.
    dosed : tuple of str
        By default all.
    """

    name: str
    learned: tuple[Mapping[str, Tensor], ...]
    hooks: Hooks
    dosed: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many numbers are learned."""
        return sum(numbers.numel() for layer in self.learned for numbers in layer.values())

    @property
    def key(self) -> str:
        """The name with a digest of all numbers."""
        digest = hashlib.sha256(self.name.encode())
        for layer in self.learned:
            for numbers in layer.values():
                digest.update(numbers.detach().cpu().numpy().tobytes())
        return f"{self.name} {digest.hexdigest()[:16]}"

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Those of no scaling: a control is scored under its hooks."""
        return LayerScaling.identity(len(self.learned)).settings

    @property
    def reach(self) -> float:
        """No position changes."""
        return 1.0

    @property
    def is_identity(self) -> bool:
        """Whether all that a dose multiplies is 0."""
        return not any(
            bool(numbers.any())
            for layer in self.learned
            for name, numbers in layer.items()
            if name in (self.dosed or layer)
        )

    @contextmanager
    def applied_to(self, model: PreTrainedModel, *, length: int | None = None) -> Iterator[None]:
        """Let `model` behave as changed inside the `with` block."""
        with ExitStack() as stack:
            for layer, numbers in zip(reachable_decoder(model).layers, self.learned, strict=True):
                for handle in self.hooks(layer, numbers):
                    stack.callback(handle.remove)
            yield

    def refuse_misfit(self, model: PreTrainedModel) -> None:
        """Nothing: a control is made for its model."""

    def fold_into(self, model: PreTrainedModel) -> PreTrainedModel:
        """Never: a control is measured, not used."""
        raise ValueError(f"{self.name} is a control, which is not folded")

    def at_dose(self, dose: float) -> "Control":
        """The numbers of `dosed` times `dose`."""
        learned = tuple(
            {n: dose * v if n in (self.dosed or layer) else v for n, v in layer.items()} for layer in self.learned
        )
        return replace(self, learned=learned)


def list_controls(lm: LM, seed: int) -> dict[str, Control]:
    """The controls of a model by name, each at its start: no change.

    "random directions" move queries and keys in directions of rank 1 that are drawn once, two for each layer (as many
    numbers as factors and temperatures) or one for each head; "LoRA r = 1" learns its directions too; "input norms"
    multiplies what the norm before attention puts out, channel by channel; "first two tokens" adds to what the first
    layer makes of them, as a soft prompt does.
    """
    n, config, device = lm.num_layers, lm.model.config.get_text_config(), lm.model.device
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    generator = torch.Generator().manual_seed(seed)

    def low_rank() -> dict[str, Tensor]:
        modules = _projections(reachable_decoder(lm.model).layers[0]).items()
        into = {f"{name} in": torch.randn(hidden, generator=generator).to(device) / hidden**0.5 for name, _ in modules}
        return into | {f"{name} out": torch.zeros(module.out_features, device=device) for name, module in modules}

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    found = [
        Control(
            f"{each * n} random directions", tuple({"z": zeros(each)} for _ in range(n)), _add_random(lm, each, seed)
        )
        for each in (2, heads)
    ]
    found += [
        Control("LoRA r = 1", tuple(low_rank() for _ in range(n)), _add_low_rank, ("q out", "k out")),
        Control("input norms", tuple({"log": zeros(hidden)} for _ in range(n)), _multiply_norm),
        Control("first two tokens", ({"added": zeros(2, hidden)}, *({},) * (n - 1)), _add_to_first),
    ]
    return {control.name: control for control in found}


def _projections(layer: Any) -> dict[str, Any]:
    return {"q": layer.self_attn.q_proj, "k": layer.self_attn.k_proj}


def _add_random(lm: LM, each: int, seed: int) -> Hooks:
    """Each number moves queries or keys in one direction of rank 1, drawn once, as large as the weight itself."""
    generator = torch.Generator().manual_seed(seed + 1)
    directions: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    for layer in reachable_decoder(lm.model).layers:
        for place, module in enumerate(_projections(layer).values()):
            n = (each + 1 - place) // 2  # the first half queries', the rest keys'
            into, out = (
                torch.randn(n, size, generator=generator) for size in (module.in_features, module.out_features)
            )
            norm = module.weight.detach().float().norm().cpu() / (into.norm(dim=1) * out.norm(dim=1))
            directions[module] = into.to(lm.model.device), (norm[:, None] * out).to(lm.model.device)

    def put(layer: nn.Module, numbers: Mapping[str, Tensor]) -> list[Any]:
        handles, z = [], numbers["z"]
        for module, of in zip(_projections(layer).values(), (z[: (each + 1) // 2], z[(each + 1) // 2 :]), strict=True):
            into, out = directions[module]
            handles.append(module.register_forward_hook(_adding(into, out, of)))
        return handles

    return put


def _add_low_rank(layer: nn.Module, numbers: Mapping[str, Tensor]) -> list[Any]:
    return [
        module.register_forward_hook(_adding(numbers[f"{name} in"][None], numbers[f"{name} out"][None]))
        for name, module in _projections(layer).items()
    ]


def _adding(into: Tensor, out: Tensor, by: Tensor | float = 1.0) -> Callable[..., Tensor]:
    """A hook that adds what a product of matrices makes of the input: into and out of as many numbers as `by`."""

    def add(_: nn.Module, given: Any, output: Tensor) -> Tensor:
        added: Tensor = (given[0].float() @ into.mT * by) @ out
        return (output.float() + added).to(output.dtype)

    return add


def _multiply_norm(layer: nn.Module, numbers: Mapping[str, Tensor]) -> list[Any]:
    norm: Any = layer.input_layernorm
    by = numbers["log"]
    return [norm.register_forward_hook(lambda _, __, output: (output.float() * by.exp()).to(output.dtype))]


def _add_to_first(layer: nn.Module, numbers: Mapping[str, Tensor]) -> list[Any]:
    if not numbers:
        return []
    added = numbers["added"]

    def add(_: nn.Module, __: Any, given: dict[str, Any], output: Tensor) -> Tensor:
        first = torch.nn.functional.one_hot(given["position_ids"].clamp(max=2), 3)[..., :2]  # (batch, tokens, 2)
        return (output.float() + first.to(added) @ added).to(output.dtype)

    # of what the first layer puts out: what it takes in is noted, and its hooks on that run, before it is run itself
    return [layer.register_forward_hook(add, with_kwargs=True)]


class ControlRun(Run):
    """A call of `find_scaling` that learns a control's numbers: `search`, then `choose` and `test` as they are."""

    def learn(self, start: Control, rate: float) -> list[Control]:
        """The control at each stopping point, the last one first, by Adam as `GradientSearch` has it."""
        about, suites = self._about, [*self._parts["search"].tasks, self._parts["search"].text]
        weights = [1 / max(float(np.nanmean(o.nll)), 1e-6) for o in self._unscaled_outcomes] + [about["text_weight"]]
        learned = tuple({n: v.clone().requires_grad_() for n, v in layer.items()} for layer in start.learned)
        control, tensors = replace(start, learned=learned), [v for layer in learned for v in layer.values()]
        adam = torch.optim.Adam(tensors, lr=rate, betas=(0.9, 0.99))
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, about["steps"])
        drawn, every = draw_steps(suites, about["questions"], about["seed"]), math.ceil(about["steps"] / STOPS)
        stops: list[Control] = []
        for step in range(1, about["steps"] + 1):
            adam.zero_grad()
            with control.applied_to(self._lm.model):
                for weight, probe in zip(weights, next(drawn), strict=True):
                    _, gradients = nll_gradient_by(self._lm, probe, tensors)
                    for tensor, gradient in zip(tensors, gradients, strict=True):
                        tensor.grad = weight * gradient + (0 if tensor.grad is None else tensor.grad)
            adam.step()
            cosine.step()
            if step % every == 0 or step == about["steps"]:
                kept = tuple({n: v.detach().clone() for n, v in layer.items()} for layer in learned)
                stops.append(replace(start, learned=kept))
        return stops[::-1]

    def _score(self, suite: Suite, scaling: Scaling) -> Outcomes:
        """As that of any scaling, under the hooks of a control."""
        with scaling.applied_to(self._lm.model) if isinstance(scaling, Control) else nullcontext():
            return super()._score(suite, scaling)


def shuffle_heads(scaling: HeadScaling, seed: int) -> HeadScaling:
    """The same numbers, given to the heads of each layer in another order: is it which head, or how much?"""
    rng = np.random.default_rng(seed)

    def shuffled(rows: Any) -> Any:
        return None if rows is None else rng.permuted(np.array(rows), axis=1)

    numbers = shuffled(scaling.temperatures), shuffled(scaling.gains)
    return HeadScaling(*numbers, mlp_gains=scaling.mlp_gains, layers=scaling.layers)
