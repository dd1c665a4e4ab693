"""Folders of models that are scaled already: their mark, and the code that goes with those that need some.

Where numbers of positions fit no stock architecture, the folder carries a short file, `modeling_lrs.py`, which
transformers runs with `trust_remote_code=True`. Here is what it says, so that `load_lm` trusts that and nothing else.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

MARK = "lrs_scaling"  # a config with it is of a scaled model; its value names the factor file in the folder
CODE = "modeling_lrs.py"
MODEL_TYPE = "lrs_{}"  # of the family it is made from: no engine takes the model for the plain one
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
    angles = positions[..., None].float() * torch.tensor(frequencies, device=positions.device)
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


def write_code(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Write the file for a model's family into a folder; returns what its config must say besides the numbers."""
    config = model.config
    model_type = MODEL_TYPE.format(config.model_type)
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    names = type(config).__name__, type(decoder).__name__, type(model).__name__
    (folder / CODE).write_text(_fill(*names, model_type), encoding="utf-8")
    stem = CODE.removesuffix(".py")
    return {
        "model_type": model_type,
        "architectures": ["ScaledForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{stem}.ScaledConfig",
            "AutoModel": f"{stem}.ScaledModel",
            "AutoModelForCausalLM": f"{stem}.ScaledForCausalLM",
        },
    }


def _fill(config: str, decoder: str, model: str, model_type: str) -> str:
    return _TEXT.format(config=config, decoder=decoder, model=model, model_type=model_type)


def has_known_code(folder: Path) -> bool:
    """Whether a folder's code is word for word what `write_code` writes, so that it may be run."""
    if not (folder / CODE).is_file() or [path.name for path in folder.glob("*.py")] != [CODE]:
        return False
    text, config = (folder / CODE).read_text(encoding="utf-8"), read_config(folder)
    names = _CLASSES.findall(text)
    files = {str(name).partition(".")[0] for name in config.get("auto_map", {}).values()}
    if len(names) != 1 or files != {CODE.removesuffix(".py")}:
        return False
    of_config, of_decoder, of_model = names[0]
    return text == _fill(of_config, of_decoder, of_model, str(config.get("model_type")))


def read_config(folder: Path) -> Mapping[str, Any]:
    """A folder's config.json."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def refuse_exported(model: PreTrainedModel) -> None:
    """Raise the ValueError of a model that was exported with a scaling, which another would be put on top of."""
    if (file := getattr(model.config, MARK, None)) is not None:
        raise ValueError(
            f"{Path(model.config._name_or_path).name or type(model).__name__} holds a scaling already ({file} beside "
            f"its weights); load the model it was made from, or `del lm.model.config.{MARK}` to scale it once more"
        )
