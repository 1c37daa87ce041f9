"""Scoring: windows, and figures that were worked out by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from litgpt_moe.scoring import Corpus, iter_batches, score, summarize

pytestmark = pytest.mark.usefixtures("eager")


def test_a_head_of_zeros_scores_the_logarithm_of_the_vocabulary(tiny_config):
    from litgpt import GPT

    model = GPT(tiny_config)
    torch.nn.init.zeros_(model.lm_head.weight)
    corpus = Corpus(lambda a, b: np.arange(a, b), 200, 1000, 512, Path(), {})
    result = score(model, corpus, window=64)
    assert result["loss"] == pytest.approx(math.log(512), abs=1e-6)
    assert result["perplexity"] == pytest.approx(512, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(9 * 199 / 1000, abs=1e-6)  # log2(512) = 9


@pytest.mark.parametrize("n_tokens", [2, 9, 10, 11, 40, 41])
def test_windows_predict_every_token_but_the_first_once_and_in_order(n_tokens):
    corpus = Corpus(lambda a, b: np.arange(n_tokens)[a:b], n_tokens, 1, 512, Path(), {})
    parts = list(iter_batches(corpus, window=5, batch_size=2))
    assert np.concatenate([ids[:, 1:].ravel() for ids in parts]).tolist() == list(range(1, n_tokens))
    assert np.concatenate([ids[:, :-1].ravel() for ids in parts]).tolist() == list(range(n_tokens - 1))


def test_standard_error_of_equal_windows_is_the_usual_one():
    # means 1, 2, 3: standard deviation 1, over sqrt(3)
    result = summarize(np.array([10.0, 20.0, 30.0]), np.array([10, 10, 10]), n_bytes=50)
    assert result["loss"] == 2.0 and result["loss_stderr"] == pytest.approx(1 / math.sqrt(3))


def test_a_short_window_weighs_by_its_length():
    assert summarize(np.array([10.0, 6.0]), np.array([10, 2]), n_bytes=1)["loss"] == pytest.approx(16 / 12)


def test_one_window_has_no_standard_error():
    assert summarize(np.array([10.0]), np.array([5]), n_bytes=1)["loss_stderr"] is None
