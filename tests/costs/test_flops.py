"""The formula against sums that a reader can redo in the head."""

from lit_jax.costs.flops import train_step_flops


def test_a_step_is_three_forward_passes_of_the_student_and_one_of_the_teacher():
    assert train_step_flops(10.0) == 30.0
    assert train_step_flops(10.0, 7.0) == 37.0
