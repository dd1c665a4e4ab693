import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrs_utils import BezierCurve

heights = st.tuples(*[st.floats(0.5, 2.0)] * 4)
even_layers = st.tuples(st.integers(0, 5), st.integers(1, 12)).map(lambda p: tuple(p[0] + p[1] * k for k in range(4)))
free_layers = st.lists(st.integers(0, 60), min_size=4, max_size=4, unique=True).map(sorted).map(tuple)
any_layers = st.one_of(even_layers, free_layers)


def every_layer(curve):
    return np.arange(curve.layers[0], curve.layers[3] + 1)


@given(any_layers, heights)
def test_the_curve_stays_inside_the_convex_hull(layers, values):
    curve = BezierCurve(layers, values)
    sampled = curve(every_layer(curve))
    assert (sampled >= min(values) - 1e-12).all()
    assert (sampled <= max(values) + 1e-12).all()


@given(any_layers, heights)
def test_end_points_are_interpolated(layers, values):
    ends = BezierCurve(layers, values)([layers[0], layers[3]])
    np.testing.assert_allclose(ends, [values[0], values[3]], atol=1e-12)


@given(any_layers, st.floats(0.5, 2.0))
def test_flat_stays_flat(layers, value):
    curve = BezierCurve(layers, (value,) * 4)
    np.testing.assert_allclose(curve(every_layer(curve)), value, rtol=1e-12)


@given(any_layers, heights.map(sorted))
def test_the_curve_is_monotone_when_its_values_are(layers, values):
    curve = BezierCurve(layers, values)
    assert (np.diff(curve(every_layer(curve))) >= -1e-12).all()


@given(free_layers, heights, st.floats(0, 1))
def test_free_layers_follow_the_bernstein_form(layers, values, t):
    bernstein = np.array([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3])
    sampled = BezierCurve(layers, values)([bernstein @ layers])
    # x(t) can be flat to third order at an end, where t is known to the cube root of the rounding of x only
    np.testing.assert_allclose(sampled, bernstein @ values, atol=1e-4)


@given(even_layers, heights)
def test_evenly_spaced_layers_make_the_parameter_the_normalised_depth(layers, values):
    curve = BezierCurve(layers, values)
    t = (every_layer(curve) - layers[0]) / (layers[3] - layers[0])
    expected = sum(math.comb(3, k) * (1 - t) ** (3 - k) * t**k * values[k] for k in range(4))
    np.testing.assert_allclose(curve(every_layer(curve)), expected, rtol=1e-12)


@given(any_layers, heights, st.sampled_from([0.05, 0.1, 0.25]))
def test_factors_lie_on_the_grid_and_in_the_bounds(layers, values, step):
    factors = BezierCurve(layers, values).factors(61, first_layer=2, step=step, bounds=(0.75, 1.5))
    assert len(factors) == 61
    assert factors[:2] == (1.0, 1.0)
    np.testing.assert_allclose(np.array(factors) / step, np.round(np.array(factors) / step), atol=1e-6)
    assert min(factors[2:]) >= 0.75
    assert max(factors[2:]) <= 1.5


def test_the_paper_start_is_uniform_from_the_first_scaled_layer():
    curve = BezierCurve(layers=(2, 11, 21, 31), values=(1.5, 1.5, 1.5, 1.5))
    assert curve.factors(num_layers=32, first_layer=2, step=0.1, bounds=(1.0, 2.0)) == (1.0, 1.0) + (1.5,) * 30


def test_layers_beyond_the_control_points_take_the_height_of_the_nearer_end():
    assert BezierCurve((2, 3, 4, 5), (1.2, 1.2, 1.6, 1.6)).factors(8) == (1.2, 1.2, 1.2, 1.3, 1.5, 1.6, 1.6, 1.6)


def test_no_rounding_without_a_step():
    factors = BezierCurve((0, 1, 2, 3), (1.0, 1.123, 1.0, 1.0)).factors(4, step=None)
    assert factors[1] != round(factors[1], 3)


@pytest.mark.parametrize("layers", [(0, 2, 1, 3), (0, 1, 1, 3), (3, 2, 1, 0)])
def test_control_layers_that_do_not_increase_are_refused(layers):
    with pytest.raises(ValueError, match=r"control layers .* are not increasing"):
        BezierCurve(layers, (1, 1, 1, 1))


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="layers has 3 numbers"):
        BezierCurve((0, 1, 2), (1, 1, 1, 1))
    with pytest.raises(ValueError, match="must be finite"):
        BezierCurve((0, 1, 2, 3), (1, math.nan, 1, 1))
    curve = BezierCurve((0, 1, 2, 3), (1, 1, 1, 1))
    with pytest.raises(ValueError, match="first_layer is 4"):
        curve.factors(4, first_layer=4)
    with pytest.raises(ValueError, match="step is 0"):
        curve.factors(4, step=0)
    with pytest.raises(ValueError, match=r"bounds is \(2, 1\)"):
        curve.factors(4, bounds=(2, 1))
