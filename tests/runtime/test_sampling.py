import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_edge.runtime.bundle.errors import BackendError, ShapeError
from trio_edge.runtime.model.answers.sampling import Sampler, TopTokens

LOGITS_V = np.log(np.array([0.05, 0.5, 0.3, 0.15], np.float32))


def _frequencies(sample, *, num: int = 400) -> np.ndarray:
    return np.bincount([sample(LOGITS_V) for _ in range(num)], minlength=4) / num


def test_the_default_takes_the_most_likely_token():
    assert Sampler()(LOGITS_V) == 1


def test_greedy_ties_keep_the_lowest_id():
    assert Sampler()(np.array([0.0, 2.0, 2.0], np.float32)) == 1


def test_temperature_one_samples_the_probabilities():
    np.testing.assert_allclose(_frequencies(Sampler(1.0, seed=0), num=3000), np.exp(LOGITS_V), atol=0.03)


def test_a_low_temperature_approaches_greedy():
    assert _frequencies(Sampler(0.05, seed=0))[1] == 1.0


def test_top_k_leaves_only_the_k_most_likely():
    np.testing.assert_array_equal(_frequencies(Sampler(1.0, top_k=2, seed=0)) > 0, [False, True, True, False])


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, [1]), (0.6, [1, 2]), (0.9, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_leaves_the_smallest_set_that_reaches_it(top_p, kept):
    assert np.flatnonzero(_frequencies(Sampler(1.0, top_p=top_p, seed=0))).tolist() == kept


def test_the_same_seed_repeats_the_choices():
    first, second = Sampler(1.0, seed=7), Sampler(1.0, seed=7)
    assert [first(LOGITS_V) for _ in range(20)] == [second(LOGITS_V) for _ in range(20)]


def test_masked_tokens_are_never_chosen():
    sample = Sampler(1.0, seed=0)
    assert {sample(np.array([-np.inf, 0.0, -np.inf], np.float32)) for _ in range(20)} == {1}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
    st.floats(1e-3, 100),
    st.floats(1e-6, 1),
    st.integers(0, 30),
)
def test_any_setting_returns_a_token_of_the_vocabulary(logits, temperature, top_p, top_k):
    token = Sampler(temperature, top_p, top_k, seed=0)(np.array(logits, np.float32))
    assert 0 <= token < len(logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "logits", [[0, np.nan], [0, np.inf], [-np.inf, -np.inf]], ids=["nan", "inf", "all -inf"]
)
def test_broken_logits_are_an_error(logits, temperature):
    with pytest.raises(BackendError, match="expected finite numbers"):
        Sampler(temperature)(np.array(logits, np.float32))


def test_logits_of_another_rank_are_an_error():
    with pytest.raises(ShapeError, match=r"logits: expected \[V\], got \[1, 4\]"):
        Sampler()(LOGITS_V[None])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected a number >= 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature: "),
        ({"temperature": float("inf")}, "temperature: "),
        ({"top_p": 0.0}, "top_p: expected 0 < top_p <= 1, got 0.0"),
        ({"top_p": 1.5}, "top_p: "),
        ({"top_k": -1}, "top_k: expected a whole number >= 0, got -1"),
        ({"top_k": 2.5}, "top_k: "),
        ({"seed": -1}, "seed: expected a whole number"),
    ],
)
def test_arguments_out_of_range_are_an_error(arguments, message):
    with pytest.raises(ShapeError, match=message):
        Sampler(**arguments)


def top_of(logits_V: np.ndarray, count: int) -> TopTokens:
    """The largest logits in descending order, of equals the higher id first: a device may order them so."""
    ids = np.lexsort((-np.arange(len(logits_V)), -logits_V))[:count].astype(np.int32)
    return TopTokens(ids=ids, logits=logits_V[ids])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-5, 5, width=16), min_size=9, max_size=30),
    st.sampled_from([0.0, 0.7, 2.0]),
    st.sampled_from([1.0, 0.5]),
    st.integers(0, 8),
    st.integers(0, 1000),
)
def test_the_most_likely_tokens_give_what_all_logits_give_or_do_not_decide(
    values, temperature, top_p, top_k, seed
):
    logits = np.array(values, np.float32)
    chosen = Sampler(temperature, top_p, top_k, seed).from_top(top_of(logits, 8))
    assert chosen in (None, Sampler(temperature, top_p, top_k, seed)(logits))


@pytest.mark.parametrize(
    ("temperature", "top_k", "decides"), [(0.0, 0, True), (1.0, 2, True), (1.0, 3, False), (1.0, 0, False)]
)
def test_greedy_and_a_small_top_k_need_only_the_most_likely_tokens(temperature, top_k, decides):
    chosen = Sampler(temperature, top_k=top_k, seed=0).from_top(top_of(LOGITS_V, 3))
    assert (chosen is not None) == decides


def test_a_tie_that_goes_on_behind_the_most_likely_tokens_is_not_decided():
    assert Sampler().from_top(top_of(np.array([1.0, 1.0, 1.0, 0.0], np.float32), 3)) is None


def test_most_likely_tokens_that_are_not_finite_are_refused():
    with pytest.raises(BackendError, match="expected finite numbers, got a maximum of nan"):
        Sampler().from_top(TopTokens(ids=np.arange(2, dtype=np.int32), logits=np.full(2, np.nan, np.float32)))
