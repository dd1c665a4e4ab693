"""No text is read under two scalings, one for its beginning and another for its end."""

import pytest
import torch

from lrs_utils import HeadScaling, LayerScaling

IDS = (torch.arange(60) * 37 + 5)[None] % 257
GAINS = [[1.3, 0.7, 1.0, 1.0], [1.0, 1.2, 0.8, 1.0]]
SCALINGS = {
    "layers": LayerScaling((1.3, 0.8)),
    "other layers": LayerScaling((1.3, 0.9)),
    "heads": HeadScaling(gains=GAINS),
    "other heads": HeadScaling(temperatures=GAINS),
    "both": HeadScaling(gains=GAINS, layers=LayerScaling((1.3, 0.8))),
    "none": LayerScaling.identity(2),
}
REFUSED = "past_key_values were filled under another scaling, or none"


def begin(model):
    return model(IDS[:, :30], use_cache=True).past_key_values


def go_on(model, cache, n=30):
    return model(IDS[:, 30 : 30 + n], past_key_values=cache).logits


@pytest.mark.parametrize("name", SCALINGS)
def test_a_text_goes_on_under_the_scaling_it_began_under(tiny, name):
    with SCALINGS[name].applied_to(tiny.model):
        wanted = tiny.model(IDS).logits[:, 30:]
        cache = begin(tiny.model)
    with SCALINGS[name].applied_to(tiny.model):
        first, second = go_on(tiny.model, cache, 10), tiny.model(IDS[:, 40:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, second], dim=1), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("first", "then"),
    [("layers", "other layers"), ("heads", "other heads"), ("layers", "both"), ("heads", "both")],
)
def test_under_another_it_is_refused(tiny, first, then):
    with SCALINGS[first].applied_to(tiny.model):
        cache = begin(tiny.model)
    with SCALINGS[then].applied_to(tiny.model), pytest.raises(ValueError, match=REFUSED):
        go_on(tiny.model, cache)


@pytest.mark.parametrize("name", ["layers", "heads"])
def test_what_was_read_with_no_scaling_is_refused_by_one(tiny, name):
    cache = begin(tiny.model)
    with SCALINGS["none"].applied_to(tiny.model):
        go_on(tiny.model, begin(tiny.model))
    with SCALINGS[name].applied_to(tiny.model), pytest.raises(ValueError, match=REFUSED):
        go_on(tiny.model, cache)


@pytest.mark.parametrize("name", ["layers", "heads"])
def test_what_went_on_outside_the_block_is_refused_inside(tiny, name):
    with SCALINGS[name].applied_to(tiny.model):
        cache = begin(tiny.model)
    go_on(tiny.model, cache, 5)  # no hook is left that could see it
    with SCALINGS[name].applied_to(tiny.model), pytest.raises(ValueError, match=REFUSED):
        tiny.model(IDS[:, 35:], past_key_values=cache)
