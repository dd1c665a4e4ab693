"""A GGUF file with a scaling in its weights, for llama.cpp: a copy of the file that the model was loaded from."""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from lrs_utils.arguments import instance
from lrs_utils.export.forms import refuse_unexportable
from lrs_utils.models.embedded import EMBEDDED, embedded_gguf
from lrs_utils.models.load import LM
from lrs_utils.scaling.base import Scaling
from lrs_utils.scaling.fold import fold
from lrs_utils.scaling.products import n_heads

Layout = Callable[[NDArray[np.float32], int], NDArray[np.float32]]


def export_gguf(lm: LM, scaling: Scaling, path: str | Path) -> None:
    """Write the GGUF file that a model was loaded from once more, with the weights that a scaling changes.

    Those are stored in 16 bits, all others stay as they are. llama.cpp has one base of RoPE for all layers, so this is
    for temperatures and gains alone. Unlike a folder, the file doesn't say that its model is scaled.

    Parameters
    ----------
    lm : LM
        Loaded from a .gguf file, or embedded.
    path : path
        A new file. It appears whole or not at all.

    Raises
    ------
    ValueError
        A model that doesn't come from a GGUF file, a file that exists, numbers that don't fold into weights.
    """
    instance("lm", lm, LM, "what `load_lm` returns")
    path = Path(path).expanduser()
    if path.exists():
        raise ValueError(f"{path} exists; give a new file")
    refuse_unexportable(lm.model, scaling)
    with ExitStack() as stack:
        if lm.name in EMBEDDED:
            source = embedded_gguf(lm.name, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        elif lm.name.endswith(".gguf"):
            source = Path(lm.name)
        else:
            raise ValueError(f"{lm.name} wasn't loaded from a .gguf file; export a folder, and convert that")
        before, after = lm.model.state_dict(), fold(scaling, lm.model).state_dict()
        changed = {name: after[name] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        reader: Any = GGUFReader(source)
        arrays = _lay_out(reader, lm, before, changed)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-")))
        _write(reader, arrays, scratch / path.name)
        (scratch / path.name).rename(path)


def _lay_out(
    reader: Any, lm: LM, before: Mapping[str, Tensor], changed: Mapping[str, Tensor]
) -> dict[str, NDArray[Any]]:
    """Changed weights as the file lays them out, by the file's names.

    A layout is right if it makes the file's own tensor of the model's weight as it was.
    """
    architecture = reader.fields["general.architecture"].contents()
    arch = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise ValueError(f"the file's architecture {architecture!r} isn't known to the gguf package")
    names = gguf.get_tensor_name_map(arch, lm.num_layers)
    tensors, heads = {tensor.name: tensor for tensor in reader.tensors}, n_heads(lm.model)
    found = {}
    for name, weight in changed.items():
        tensor = tensors.get(names.get_name(name, try_suffixes=(".weight", ".bias")))
        if tensor is None:
            raise ValueError(f"the file has no tensor known to be {name}")
        own = dequantize(tensor.data, tensor.tensor_type)
        was, now = (w.float().cpu().numpy() for w in (before[name], weight))
        near = 1e-2 * float(np.abs(own).mean())  # the model may be in 16 bits
        fitting = [layout for layout in _LAYOUTS if np.allclose(layout(was, heads), own, rtol=1e-2, atol=near)]
        if not fitting:
            raise ValueError(f"{name} lies in the file in a way that isn't known here")
        laid = fitting[0](now, heads)
        found[tensor.name] = laid.astype(np.float16 if laid.ndim == 2 else np.float32)
    return found


def _pair_up(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows that rotate together beside each other, as llama.cpp has Llama's queries."""
    rows = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


_LAYOUTS: tuple[Layout, ...] = (
    lambda weight, _: weight,
    lambda weight, heads: _pair_up(weight, heads) if len(weight) % (2 * heads) == 0 else weight,
    lambda weight, _: weight + 1,  # norms that multiply by 1 + w
)


def _write(reader: Any, arrays: Mapping[str, NDArray[Any]], path: Path) -> None:
    """The reader's file with some tensors replaced."""
    writer: Any = GGUFWriter(path, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            kind = field.types[0]
            of = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=of)
    for tensor in reader.tensors:
        if tensor.name in arrays:
            writer.add_tensor(tensor.name, arrays[tensor.name])
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
