"""The formulas against small sums that a reader can redo in the head."""

import pytest

from lit_jax.costs.flops import attention_macs, train_step_flops


def test_softmax_multiplies_every_token_with_every_other_twice():
    # Three tokens of width 4: 9 pairs, of which each costs 4 for its score and 4 for its value.
    assert attention_macs("softmax", tokens=3, width=4, num_heads=2) == 72


def test_linear_attention_passes_each_token_through_its_heads_state_twice():
    # Three tokens of two heads of 2 x 2: 8 into the states and 8 out of them, for each token.
    sizes = dict(tokens=3, width=4, num_heads=2)
    assert attention_macs("linear", **sizes) == 48
    # And nine taps for each of the 12 values.
    assert attention_macs("linear", **sizes, conv_size=3) == 48 + 108


def test_an_attention_without_a_formula_is_refused():
    with pytest.raises(ValueError, match="attention = 'ring' has no formula"):
        attention_macs("ring", tokens=3, width=4, num_heads=2)


def test_a_step_is_three_forward_passes_of_the_student_and_one_of_the_teacher():
    assert train_step_flops(10.0) == 30.0
    assert train_step_flops(10.0, 7.0) == 37.0
