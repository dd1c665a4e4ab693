from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from lrs_utils import cost

PROFILES = Path(__file__).parent.parent / "notebooks" / "profiles"
NOTEBOOKS = [path.stem for path in sorted(PROFILES.parent.glob("[0-9]*.ipynb"))]


def profile(name):
    return yaml.safe_load((PROFILES / f"{name}.yaml").read_text())


@pytest.fixture
def on_h100(monkeypatch):
    """A stand-in for the GPU, and models of 6.7 billion weights without their weights."""
    with torch.device("meta"):
        vicuna = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama"))
    monkeypatch.setattr(cost, "outline", lambda name: vicuna)
    monkeypatch.setattr(cost, "choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(cost, "matrix_rate", lambda device, dtype: 700e12)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    total = type("Properties", (), {"total_memory": 79 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)


def test_the_cpu_profile_takes_what_was_measured_on_a_machine_as_fast(monkeypatch, smollm2):
    monkeypatch.setattr(cost, "matrix_rate", lambda device, dtype: 861e9)
    settings = profile("cpu")
    assert cost.announced("04_uniform_vs_layer_specific", settings) == (
        "04_uniform_vs_layer_specific: roughly 17 minutes on this CPU; "
        "smollm2-135m in bfloat16, 0.3 GiB for its weights"
    )
    monkeypatch.setattr(cost, "matrix_rate", lambda device, dtype: 2 * 861e9)
    assert "roughly 4 hours" in cost.announced("07_held_out_and_transfer", settings)
    more = settings | {"n_contexts": 10 * settings["n_contexts"], "n_test_contexts": 1000}
    assert "roughly 6 hours" in cost.announced("06_ga_search", more)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_notebook_says_what_the_gpu_profile_costs(notebook, on_h100):
    settings = profile("gpu")
    if notebook == "09_cream":
        with pytest.raises(
            MemoryError, match=r"Llama-2-7b-hf takes 100 GiB to train, NVIDIA H100 has 79; .* rank of lora"
        ):
            cost.announced(notebook, settings)
        settings["long_tuning"]["lora"] = 8
    said = cost.announced(notebook, settings)
    assert said.startswith(f"{notebook}: ")
    if notebook not in ("00_find_a_scaling", "05_bezier_playground"):  # the first measures its own price
        assert " on NVIDIA H100; " in said
        assert said.endswith(" in bfloat16, 12.6 GiB of 79 for its weights")


def test_a_gpu_without_bfloat16_is_given_float16(on_h100, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert "in float16, 12.6 GiB" in cost.announced("03_lost_in_the_middle", profile("gpu"))
