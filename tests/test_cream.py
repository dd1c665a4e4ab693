import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrs_utils.training.positions import cream, distances_seen, middle_factors, plain, pose, rand_pos

SAMPLERS = {
    "cream": cream,
    "cream as released": lambda window, factor: cream(window, factor, mode="reference"),
    "pose": pose,
    "rand_pos": rand_pos,
    "plain": plain,
}


def drawn(sampler, n=400, length=10_000, seed=0):
    return sampler([length] * n, np.random.default_rng(seed))


@pytest.mark.parametrize("name", SAMPLERS)
@settings(max_examples=25, deadline=None)
@given(window=st.integers(40, 300), factor=st.integers(1, 4), extra=st.integers(0, 2000), seed=st.integers(0, 99))
def test_positions_rise_within_the_target_and_tokens_within_the_document(name, window, factor, extra, seed):
    positions, tokens = drawn(SAMPLERS[name](window, factor), 20, window + extra, seed)
    assert positions.shape == tokens.shape == (20, window)
    assert positions.min() >= 0
    assert positions.max() < window * factor
    assert (np.diff(positions) > 0).all()
    assert (np.diff(tokens) > 0).all() or name == "cream as released"
    assert tokens.min() >= 0
    assert tokens.max() < window + extra


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_factor_of_1_is_the_window_itself(name):
    assert (drawn(SAMPLERS[name](60, 1))[0] == np.arange(60)).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_deterministic_from_its_generator(name):
    a, b, c = (drawn(SAMPLERS[name](60, 4), seed=seed)[0] for seed in (3, 3, 4))
    assert (a == b).all()
    assert (a == c).all() == (name == "plain")


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_head_and_tail_stand_at_the_ends_of_the_target_and_the_middle_is_one_block(mode):
    window, factor = 240, 8
    positions, _ = drawn(cream(window, factor, mode=mode))
    gaps = np.diff(positions) > 1
    assert gaps.sum(axis=1).max() <= 2
    kinds = set()
    for row in positions:
        k = 32 if row[79] != 79 or row[-80] != window * factor - 80 else 80  # continuity: 4 x factor; else a third
        kinds.add(k)
        assert (row[:k] == np.arange(k)).all()
        assert (row[-k:] == np.arange(window * factor - k, window * factor)).all()
        assert (np.diff(row[k:-k]) == 1).all()
    assert kinds == ({32, 80} if mode == "paper" else {next(iter(kinds))})  # one coin a batch as released


def test_the_coin_falls_for_each_example_in_the_paper_and_for_each_batch_as_released():
    def continuity(mode, seed):
        positions, _ = cream(240, 8, mode=mode)([5_000] * 40, np.random.default_rng(seed))
        return (positions[:, 79] != 79) | (positions[:, -80] != 240 * 8 - 80)

    assert 0.3 < np.mean([continuity("paper", seed) for seed in range(20)]) < 0.7
    by_batch = np.array([continuity("reference", seed) for seed in range(40)])
    assert (by_batch == by_batch[:, :1]).mean() > 0.95  # a middle next to an end may look like the other kind
    assert 0.2 < by_batch[:, 0].mean() < 0.8


def test_the_released_distribution_piles_up_at_its_ends_and_the_paper_s_does_not():
    rng = np.random.default_rng(0)
    released, truncated = (middle_factors(4, 3.0, mode)(rng, 100_000) for mode in ("reference", "paper"))
    assert np.mean(released == 2) == pytest.approx(0.253, abs=0.01)  # facts of the released code
    assert np.mean(released == 8) == pytest.approx(0.159, abs=0.01)
    assert (truncated.min() >= 2) & (truncated.max() <= 8)
    assert len(np.unique(truncated)) > 99_000
    assert np.mean(truncated) == pytest.approx(5, abs=0.02)
    assert middle_factors(8, 3.0, "reference")(rng, 100_000).min() == 2


def test_the_middle_s_own_tokens_are_read_where_the_document_is_long_enough():
    window, factor = 120, 4
    sampler = cream(window, factor)
    positions, tokens = drawn(sampler, length=window * factor)
    own = tokens[:, 40:80] == positions[:, 40:80]
    assert own.all(axis=1).mean() > 0.9
    _, short = drawn(sampler, length=window)
    assert (short == np.arange(window)).all()


def test_the_released_code_may_read_the_tail_s_tokens_twice():
    window, factor = 120, 4
    _, tokens = drawn(cream(window, factor, mode="reference"), length=window * factor - 60)
    twice = [len(np.unique(row)) < window for row in tokens]
    assert 0 < np.mean(twice) < 0.5, "where the middle ends within the tail's tokens"
    _, tokens = drawn(cream(window, factor), length=window * factor - 60)
    assert all(len(np.unique(row)) == window for row in tokens)


def test_rivals_read_the_beginning_of_a_long_document():
    for name in ("pose", "rand_pos", "plain"):
        assert (drawn(SAMPLERS[name](60, 4), length=1_000)[1] == np.arange(60)).all()


def test_pose_and_rand_pos():
    positions, _ = drawn(pose(100, 5))
    gaps = np.diff(positions) - 1
    assert ((gaps > 0).sum(axis=1) <= 1).all()
    assert (positions[:, 0] == 0).all()
    assert gaps.max() > 350
    positions, _ = drawn(rand_pos(100, 5))
    assert np.bincount(positions.ravel(), minlength=500).min() > 0


@pytest.mark.parametrize("name", ["cream", "pose", "rand_pos"])
def test_every_distance_comes_up_in_the_limit(name):
    seen = distances_seen(drawn(SAMPLERS[name](90, 3), 4000)[0], 270)
    assert (seen[:-1] > 0).mean() > 0.99


def test_distances_are_counted_as_by_hand():
    positions = np.array([[0, 1, 5], [0, 2, 3]])
    assert distances_seen(positions, 6).tolist() == [6, 2, 1, 1, 1, 1]


def test_the_union_of_distances_is_as_large_as_theorem_b1_says_at_most():
    window, factor = 60, 40  # the window is small beside the target
    k = window // 3
    positions, _ = drawn(cream(window, factor, k=k), 3000)
    sizes = [(distances_seen(row[None], window * factor) > 0).sum() for row in positions]
    assert max(sizes) <= max(k - 1, window - 2 * k - 1) + 2 * window
    assert max(sizes) >= max(k - 1, window - 2 * k - 1) + 2 * window - 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cream(100, 2.5), "factor is 2.5; the target is a whole multiple"),
        (lambda: pose(100, 0), "factor is 0"),
        (lambda: cream(100, 2, k=50), "head and tail of 50 tokens leave no middle in a window of 100"),
        (lambda: cream(100, 20), "head and tail of 80 tokens leave no middle"),
        (lambda: cream(100, 2, mode="mine"), "mode is 'mine'"),
        (lambda: cream(100, 2, sigma=0), "sigma is 0"),
        (lambda: plain(0), "window is 0"),
        (lambda: drawn(pose(100, 2), length=99), "document 0 has 99 tokens; it must fill the window, 100"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
