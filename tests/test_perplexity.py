import numpy as np
import pytest
import torch

from lrs_utils import LayerScaling, load_lm, tasks
from lrs_utils.scoring.perplexity import window_nll

TEXT = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(500))


def test_each_stretch_is_predicted_from_its_window_alone(tiny):
    ids = torch.tensor(tiny.tokenizer(TEXT)["input_ids"])
    nll = window_nll(tiny, TEXT, [40, 100], stride=16)
    assert nll.shape == (2, (500 - 100) // 16 + 1)
    for row, length in enumerate((40, 100)):
        for column in (0, 7, 25):
            end = 100 + 16 * column
            window = ids[end - length : end]
            with torch.no_grad():
                likelihood = tiny.model(window[None]).logits[0].log_softmax(-1)
            expected = [-likelihood[t - 1, window[t]].item() for t in range(length - 16, length)]
            assert nll[row, column] == pytest.approx(np.mean(expected), abs=1e-4)


def test_bfloat16_on_a_cpu_is_read_in_blocks_alike():
    lm, text = load_lm("tiny-llama", dtype="bfloat16", device="cpu"), TEXT * 4
    [[found]] = window_nll(lm, text, [1500], stride=64, n_windows=1)
    window = torch.tensor(lm.tokenizer(text)["input_ids"])[None, :1500]
    with torch.no_grad():
        logits = lm.model(window[:, :-1]).logits[0, -64:].float()
    assert found == pytest.approx(torch.nn.functional.cross_entropy(logits, window[0, -64:]).item(), abs=0.03)


def test_fewer_windows_are_spread_over_the_text(tiny):
    every = window_nll(tiny, TEXT, [40], stride=16)
    some = window_nll(tiny, TEXT, [40], stride=16, n_windows=3)
    np.testing.assert_allclose(some, every[:, [0, 14, 28]], atol=1e-5)


def test_calls_for_different_lengths_can_measure_the_same_stretches(tiny):
    together = window_nll(tiny, TEXT, [40, 100], stride=16, n_windows=3)
    options = {"stride": 16, "n_windows": 3, "first_end": 100}
    apart = [window_nll(tiny, TEXT, [length], **options) for length in (40, 100)]
    np.testing.assert_array_equal(np.concatenate(apart), together)


def test_a_scaling_changes_it_and_comes_off_again(tiny):
    before = window_nll(tiny, TEXT, [64], n_windows=2, stride=16)
    scaled = window_nll(tiny, TEXT, [64], n_windows=2, stride=16, scaling=LayerScaling((1.0, 1.5)))
    assert np.abs(scaled - before).max() > 1e-3
    np.testing.assert_array_equal(window_nll(tiny, TEXT, [64], n_windows=2, stride=16), before)


def test_a_real_model_reads_more_with_more_before_it(smollm2):
    [book] = tasks.long_texts()
    nll = window_nll(smollm2, book, [300, 1024], n_windows=4)
    assert 2 < np.exp(nll.mean()) < 100
    assert nll[1].mean() < nll[0].mean()


def test_bad_lengths_are_refused(tiny):
    with pytest.raises(ValueError, match=r"length 16 is not between stride \+ 1 \(17\) and the text's 500"):
        window_nll(tiny, TEXT, [16], stride=16)
    with pytest.raises(ValueError, match="length 501 is not between"):
        window_nll(tiny, TEXT, [501], stride=16)
    with pytest.raises(ValueError, match="n_windows is 30; the text has 1 to 29"):
        window_nll(tiny, TEXT, [40], stride=16, n_windows=30)
    with pytest.raises(ValueError, match=r"first_end 39 is not between 40 \(a length\) and the text's 500"):
        window_nll(tiny, TEXT, [40], stride=16, first_end=39)
    long = TEXT * 5
    with pytest.raises(ValueError, match=r"length 2,100 is beyond what tiny-llama reads, 2,048 .* extrapolate=True"):
        window_nll(tiny, long, [2100], stride=16)
    assert window_nll(tiny, long, [2100], stride=16, n_windows=1, extrapolate=True).shape == (1, 1)
