import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrs_utils.scaling import rope

DISTANCES = [0, 16, 64, 256, 512, 1024, 2048, 4096]


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (1, [32.5, 15.8, 10.1, 6.5, 5.3, 4.0, 3.6, 4.9]),
        (1.5, [32.5, 17.5, 12.2, 9.1, 6.5, 4.7, 3.8, 3.5]),
        (2, [32.5, 19.8, 13.4, 9.3, 6.5, 5.3, 4.0, 3.6]),
    ],
)
def test_bound_has_the_reference_values_of_llama_2(factor, expected):
    scaled, _ = rope.scaled_frequencies(rope.frequencies(128, 1e4), factor, "pi", 4096)
    np.testing.assert_allclose(rope.decay_bound(DISTANCES, scaled), expected, atol=0.051)


def test_bound_is_not_monotone():
    bound = rope.decay_bound(np.arange(4097), rope.frequencies(128, 1e4))
    assert bound[4096] > bound[2048] + 1
    scaled, _ = rope.scaled_frequencies(rope.frequencies(128, 1e4), 1.2, "pi", 4096)
    assert rope.decay_bound([2048], scaled)[0] == pytest.approx(8.1, abs=0.05)


def test_bound_is_a_bound_on_the_sum_of_cosines():
    frequencies = rope.frequencies(64, 1e5)
    distances = np.arange(0, 5000, 7)
    cosines = np.cos(np.multiply.outer(distances, frequencies.numpy())).sum(axis=1)
    # of q = k = 1 in every dimension pair: h is constant but for its end, where it falls from 1 to 0
    assert (np.abs(cosines) <= 32 * rope.decay_bound(distances, frequencies) + 1e-9).all()


@given(st.sampled_from(rope.SCHEMES), st.floats(0.5, 8), st.sampled_from([16, 64, 128]))
def test_every_scheme_divides_the_lowest_frequency_by_the_factor(scheme, factor, head_dim):
    unscaled = rope.frequencies(head_dim, 1e4)
    scaled, _ = rope.scaled_frequencies(unscaled, factor, scheme, 1024)
    assert scaled[-1] == pytest.approx(unscaled[-1] / factor)
    assert scaled[0] == pytest.approx(unscaled[0] / (factor if scheme == "pi" else 1))
    same, gain = rope.scaled_frequencies(unscaled, 1.0, scheme, 1024)
    assert gain == 1
    torch.testing.assert_close(same, unscaled)


def test_yarn_refuses_frequencies_of_no_base():
    bent = rope.frequencies(64, 1e5)
    bent[20:] /= 8
    with pytest.raises(ValueError, match="powers of one base"):
        rope.scaled_frequencies(bent, 2.0, "yarn", 4096)


def test_an_unknown_scheme_is_named():
    with pytest.raises(ValueError, match="'npk' is unknown; choose one of pi, ntk, yarn"):
        rope.scaled_frequencies(rope.frequencies(64, 1e5), 2.0, "npk", 4096)
