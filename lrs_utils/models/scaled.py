"""Folders of models that are scaled already: their mark, and the code that goes with those that need some.

Where numbers of positions fit no stock architecture, the folder carries a short file, `modeling_lrs.py`, which
transformers runs with `trust_remote_code=True`. Here is what it says, so that `load_lm` trusts that and nothing else.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedModel

MARK = "lrs_scaling"  # a config with it is of a scaled model; its value names the factor file in the folder
CODE = "modeling_lrs.py"
_PREFIX = "lrs_"  # before the family's model type, so that no engine takes the model for the plain one
_CLASSES = re.compile(r"^from transformers import (\w+), (\w+), (\w+)$", re.MULTILINE)
_TEXT = '''"""A {decoder} whose layers read positions by frequencies of their own. It needs nothing but transformers.

config.layer_frequencies has a row for each layer: by how many radians a token turns each pair of a head.
config.layer_amplitudes has a number for each layer: what cos and sin are multiplied by.
Written by lrs_utils, the reference implementation of layer-specific RoPE scaling (arXiv 2503.04355).
"""

from functools import partial

import torch
from transformers import {config}, {decoder}, {model}


class ScaledConfig({config}):
    model_type = "{model_type}"


def read_positions(layer, args, given, frequencies, amplitude):
    positions, (cos, _) = given["position_ids"], given["position_embeddings"]
    angles = positions[..., None].float() * torch.tensor(frequencies, dtype=torch.float32, device=positions.device)
    angles = torch.cat([angles, angles], dim=-1)
    tables = (angles.cos() * amplitude).to(cos.dtype), (angles.sin() * amplitude).to(cos.dtype)
    return args, given | {{"position_embeddings": tables}}


def scale(decoder, config):
    for layer, *numbers in zip(decoder.layers, config.layer_frequencies, config.layer_amplitudes, strict=True):
        hook = partial(read_positions, frequencies=numbers[0], amplitude=numbers[1])
        layer.register_forward_pre_hook(hook, with_kwargs=True)


class ScaledModel({decoder}):
    config_class = ScaledConfig

    def __init__(self, config):
        super().__init__(config)
        scale(self, config)


class ScaledForCausalLM({model}):
    config_class = ScaledConfig

    def __init__(self, config):
        super().__init__(config)
        scale(self.get_decoder(), config)
'''


_AUTO_MAP = {
    "AutoConfig": "modeling_lrs.ScaledConfig",
    "AutoModel": "modeling_lrs.ScaledModel",
    "AutoModelForCausalLM": "modeling_lrs.ScaledForCausalLM",
}


def write_code(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Write the file for a model's family into a folder; returns what its config must say besides the numbers."""
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    model_type = _PREFIX + str(model.config.model_type)
    names = {"config": type(model.config), "decoder": type(decoder), "model": type(model)}
    text = _TEXT.format(model_type=model_type, **{name: of.__name__ for name, of in names.items()})
    (folder / CODE).write_text(text, encoding="utf-8")
    return {"model_type": model_type, "architectures": ["ScaledForCausalLM"], "auto_map": _AUTO_MAP}


def has_known_code(folder: Path) -> bool:
    """Whether a folder's code is word for word what `write_code` writes, and all that is run, so that it may be run."""
    if not (folder / CODE).is_file() or [path.name for path in folder.rglob("*.py")] != [CODE]:
        return False
    text, config = (folder / CODE).read_text(encoding="utf-8"), read_config(folder)
    model_type = str(config.get("model_type"))
    base = model_type.removeprefix(_PREFIX)
    family = CONFIG_MAPPING[base].__name__ if base in CONFIG_MAPPING else None
    found = _CLASSES.findall(text)
    if not model_type.startswith(_PREFIX) or family is None or len(found) != 1 or found[0][0] != family:
        return False
    names = dict(zip(("config", "decoder", "model"), found[0], strict=True))
    elsewhere = [path for path in folder.rglob("*.json") if "auto_map" in path.read_text(encoding="utf-8")]
    return (
        text == _TEXT.format(model_type=model_type, **names)
        and config.get("auto_map") == _AUTO_MAP
        and elsewhere == [folder / "config.json"]
    )


def read_config(folder: Path) -> Mapping[str, Any]:
    """A folder's config.json."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def refuse_exported(model: PreTrainedModel) -> None:
    """Raise the ValueError of a model that was exported with a scaling, which another would be put on top of."""
    if (file := getattr(model.config, MARK, None)) is not None:
        raise ValueError(
            f"{Path(model.config._name_or_path).name or type(model).__name__} holds a scaling already ({file} beside "
            "its weights); load the model it was made from"
        )
