"""The forms that a scaled model takes as a plain checkpoint, best first: its own architecture, another stock one, or
its own with a few lines of code."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lrs_utils.models.decode import NO_SINK
from lrs_utils.models.scaled import read_config, refuse_exported, write_code
from lrs_utils.progress import no_progress_bars
from lrs_utils.scaling.base import UNSCALED, Scaling, Setting, reachable_decoder
from lrs_utils.scaling.fold import changes_tables, fold, fold_products
from lrs_utils.scaling.rope import DYNAMIC
from lrs_utils.scaling.tables import PositionTables

_LIKE_GRANITE = ("llama", "mistral", "qwen2", "granite", "smollm3")
# What a GraniteSWA model has in common with others; more is checked by its weights and its logits.
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings",
)  # fmt: skip


def _write_stock(model: PreTrainedModel, scaling: Scaling, folder: Path) -> None:
    """All numbers in the weights, which any engine loads."""
    _save(fold(scaling, model), folder)


def _write_granite(model: PreTrainedModel, scaling: Scaling, folder: Path) -> None:
    """GraniteSWA with one base of RoPE a layer, which transformers, vLLM and SGLang have."""
    config, decoder = model.config, reachable_decoder(model)
    if config.model_type not in _LIKE_GRANITE:
        raise ValueError(f"a {config.model_type} isn't known to compute what GraniteSWA does")
    if {*(getattr(config, "layer_types", None) or ())} - {"full_attention"} or _has_window(model):
        raise ValueError("its layers have sliding windows of their own")
    bases = [
        _find_base(frequencies, amplitude, at)
        for at, (frequencies, amplitude) in enumerate(_layer_frequencies(model, scaling.settings))
    ]
    for at, kept in enumerate(getattr(config, "no_rope_layers", None) or ()):
        bases[at] = bases[at] if kept else 0.0  # no rotation
    plain = fold_products(model, scaling.settings)
    weights, head_dim = plain.state_dict(), decoder.layers[0].self_attn.head_dim
    given = {name: getattr(config, name) for name in _SIZES}
    multipliers = ("embedding_multiplier", "logits_scaling", "residual_multiplier")
    biased = [name for name in weights if name.endswith("self_attn.q_proj.bias")]
    granite = AutoConfig.for_model(
        "granite_swa", **given, **{name: getattr(config, name, 1.0) for name in multipliers},
        attention_multiplier=decoder.layers[0].self_attn.scaling, attention_bias=bool(biased),
        mlp_bias=bool(getattr(config, "mlp_bias", False)), layer_types=["full_attention"] * len(bases),
        layer_rope_theta=bases, head_dim=head_dim, sliding_window=config.max_position_embeddings,
    )  # fmt: skip
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(granite)  # type: ignore[no-untyped-call]
    weights |= {
        name: torch.zeros_like(place, device="cpu", dtype=model.dtype) + (NO_SINK if name.endswith("sinks") else 0)
        for name, place in target.state_dict().items()
        if name.endswith("sinks") or (name.endswith("o_proj.bias") and name not in weights)
    }
    if strange := sorted(weights.keys() ^ target.state_dict().keys()):
        raise ValueError(f"GraniteSWA has no place for {strange[0]}, or lacks it")
    target.load_state_dict(weights, assign=True)
    target.generation_config = model.generation_config
    _save(target, folder)


def _write_remote(model: PreTrainedModel, scaling: Scaling, folder: Path) -> None:
    """The family's own classes with a few lines of code that give each layer its cos and sin."""
    tables = _layer_frequencies(model, scaling.settings)
    _save(fold_products(model, scaling.settings), folder)
    note = write_code(model, folder)
    note |= {"layer_frequencies": [row.tolist() for row, _ in tables], "layer_amplitudes": [a for _, a in tables]}
    add_to_config(folder, **note)


FORMS: dict[str, Callable[[PreTrainedModel, Scaling, Path], None]] = {
    "stock": _write_stock,
    "granite": _write_granite,
    "remote": _write_remote,
}


def refuse_unexportable(model: PreTrainedModel, scaling: Scaling) -> None:
    """Raise the ValueError of a scaling that has no form: it says what stands in the way."""
    if scaling.is_identity:
        raise ValueError("the scaling changes nothing; save the model itself with `save_pretrained`")
    refuse_exported(model)
    scaling.refuse_misfit(model)
    for at, setting in enumerate(scaling.settings):
        what = "the heads" if setting.head_factors else "the distances" if setting.regions else ""
        if what:
            raise ValueError(
                f"layer {at} reads positions in another way for each of {what}, which needs an attention function of "
                "its own, and no engine but this one has it; use `applied_to`"
            )
        if setting.scheme == DYNAMIC:
            raise ValueError(
                f"layer {at} stretches by what is read ({DYNAMIC!r}); use an `ExtendedScaling` of scheme 'ntk' for the "
                "length that you need"
            )


def add_to_config(folder: Path, **values: Any) -> None:
    """Write values into a folder's config.json."""
    text = json.dumps({**read_config(folder), **values}, indent=2)
    (folder / "config.json").write_text(f"{text}\n", encoding="utf-8")


def _save(plain: PreTrainedModel, folder: Path) -> None:
    """Save a model of our own; some models come with sampling settings that transformers reads but refuses to write."""
    settings = plain.generation_config
    if settings is not None:
        plain.generation_config = settings = copy.deepcopy(settings)
        try:
            settings.validate(strict=True)
        except ValueError:
            settings.do_sample = True
    with no_progress_bars():
        plain.save_pretrained(folder)
    theta = (getattr(plain.config, "rope_parameters", None) or {}).get("rope_theta")
    if theta is not None:
        add_to_config(folder, rope_theta=theta)  # where loaders from before transformers 5 look for it


def _layer_frequencies(model: PreTrainedModel, settings: Sequence[Setting]) -> list[tuple[Tensor, float]]:
    """Frequencies of each layer, float32 (d / 2,), and what its cos and sin are multiplied by, temperature apart."""
    tables, types = PositionTables(model), getattr(model.config.get_text_config(), "layer_types", None)
    found = []
    for at, setting in enumerate(settings):
        wanted = setting.positions._replace(temperature=1.0) if changes_tables(setting) else UNSCALED
        rotary: Any = tables.prepare(wanted)
        kind = f"{types[at]}_" if types and hasattr(rotary, f"{types[at]}_inv_freq") else ""
        amplitude = getattr(rotary, f"{kind}attention_scaling", 1.0)
        found.append((getattr(rotary, f"{kind}inv_freq").float().cpu(), float(amplitude)))
    return found


def _find_base(frequencies: Tensor, amplitude: float, layer: int) -> float:
    """The base of RoPE whose powers the frequencies are."""
    if amplitude != 1.0:
        raise ValueError(f"cos and sin of layer {layer} are multiplied by {amplitude:g}")
    values = frequencies.double()
    base = float(values[1] ** -len(values))
    powers = base ** -(torch.arange(len(values), dtype=torch.float64) / len(values))
    if not torch.allclose(values, powers, rtol=1e-5, atol=0):
        raise ValueError(f"the frequencies of layer {layer} are no powers of one base, as those of scheme 'ntk' are")
    return base


def _has_window(model: PreTrainedModel) -> bool:
    """Whether any layer attends to the last tokens only."""
    config = model.config
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
