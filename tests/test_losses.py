"""The denoising and the distillation loss against float64 oracles.

Also: where their gradients may not go.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import assert_close

from lit_jax import diffusion, losses

PROCESS = diffusion.GaussianDiffusion()
BETAS, ALPHAS_CUMPROD = oracles.linear_schedule(1000)
C = 4
T = np.array([0, 1, 37, 500, 999])


def normal(seed, channels=C):
    return np.random.default_rng(seed).standard_normal((len(T), 4, 6, channels)).astype(np.float32)


@pytest.fixture(scope="module")
def batch():
    """x_start, x_t, noise (B, 4, 6, C), student's and teacher's output (B, 4, 6, 2C)."""
    x_start, noise = np.clip(normal(0), -1, 1), normal(1)
    x_t = np.asarray(PROCESS.perturb(x_start, T, noise))
    # Near the noise, as a trained model's output is. At t = 0 the probability of a level that is
    # many deviations away is nothing but rounding in float32.
    student = np.concatenate([noise + 0.3 * normal(2), normal(3)], axis=-1)
    return x_start, x_t, noise, student, normal(4, 2 * C)


def test_denoising_loss_matches_the_oracle_sample_by_sample(batch):
    x_start, x_t, noise, output, _ = batch
    terms = PROCESS.loss(output, x_start, x_t, T, noise)
    assert set(terms) == {"mse", "vb"} and terms["mse"].shape == terms["vb"].shape == (len(T),)
    assert_close(
        terms["mse"],
        ((output[..., :C].astype(np.float64) - noise) ** 2).mean(axis=(1, 2, 3)),
        reduction=96,
    )
    for i, t in enumerate(T):
        expected = oracles.variational_bound(
            output[i], x_start[i], x_t[i], int(t), BETAS, ALPHAS_CUMPROD
        )
        # As in test_diffusion.py: log-variances of -9 in float32 give a ratio of exponentials that
        # is exact to 1e-5.
        assert float(terms["vb"][i]) == pytest.approx(expected, rel=2e-5)


def test_without_a_variance_head_only_the_noise_counts(batch):
    x_start, x_t, noise, output, teacher = batch
    assert set(PROCESS.loss(output[..., :C], x_start, x_t, T, noise)) == {"mse"}
    assert set(
        losses.distillation_terms(PROCESS, output[..., :C], teacher[..., :C], T, in_channels=C)
    ) == {"kd_noise"}


def test_the_true_noise_has_no_error(batch):
    x_start, x_t, noise, output, _ = batch
    output = np.concatenate([noise, output[..., C:]], axis=-1)
    np.testing.assert_array_equal(PROCESS.loss(output, x_start, x_t, T, noise)["mse"], 0.0)


def test_the_bound_trains_the_variance_alone(batch):
    x_start, x_t, noise, output, _ = batch

    def total(output, term):
        return PROCESS.loss(output, x_start, x_t, T, noise)[term].sum()

    vb, mse = (
        jax.grad(total)(jnp.asarray(output), "vb"),
        jax.grad(total)(jnp.asarray(output), "mse"),
    )
    np.testing.assert_array_equal(vb[..., :C], 0.0)
    assert (jnp.abs(vb[..., C:]).max(axis=(1, 2, 3)) > 0).all()
    np.testing.assert_array_equal(mse[..., C:], 0.0)
    assert_close(mse[..., :C], 2 * (output[..., :C].astype(np.float64) - noise) / (4 * 6 * C))


def test_distillation_matches_the_oracle(batch):
    *_, student, teacher = batch
    terms = losses.distillation_terms(PROCESS, student, teacher, T, in_channels=C)
    square = (student.astype(np.float64) - teacher) ** 2
    assert set(terms) == {"kd_noise", "kd_variance"}
    assert_close(terms["kd_noise"], square[..., :C].mean(axis=(1, 2, 3)), reduction=96)
    assert_close(terms["kd_variance"], square[..., C:].mean(axis=(1, 2, 3)), reduction=96)


def test_min_snr_weighs_the_distilled_noise_as_the_error_of_the_noise(batch):
    x_start, x_t, noise, student, teacher = batch
    gamma = 0.05
    process = diffusion.GaussianDiffusion(min_snr_gamma=gamma)
    plain = losses.distillation_terms(PROCESS, student, teacher, T, in_channels=C)
    terms = losses.distillation_terms(process, student, teacher, T, in_channels=C)
    snr = ALPHAS_CUMPROD[T] / (1 - ALPHAS_CUMPROD[T])
    weights = np.minimum(snr, gamma) / snr
    assert weights[-1] == 1 and weights[0] < 1e-5
    # Tables and products are float32.
    np.testing.assert_allclose(terms["kd_noise"], plain["kd_noise"] * weights, rtol=1e-6)
    np.testing.assert_array_equal(terms["kd_variance"], plain["kd_variance"])


def test_log_variance_target_matches_the_oracle(batch):
    *_, student, teacher = batch
    terms = losses.distillation_terms(
        PROCESS, student, teacher, T, in_channels=C, variance_target="log_variance"
    )
    raw = losses.distillation_terms(PROCESS, student, teacher, T, in_channels=C)
    np.testing.assert_array_equal(terms["kd_noise"], raw["kd_noise"])
    for i, t in enumerate(T):
        ours, theirs = (
            oracles.learned_log_variance(x[i, ..., C:], t, BETAS, ALPHAS_CUMPROD)
            for x in (student, teacher)
        )
        expected = np.mean((ours - theirs) ** 2)
        # The range becomes narrow as t grows: 6e-6 at the last step. Both of its ends lie between
        # -4 and -14. So in float32 the square of a difference in it is smaller than the rounding
        # of the log-variances.
        rounding = (16 * 2.0**-23) ** 2 * 4
        assert float(terms["kd_variance"][i]) == pytest.approx(
            expected, rel=1e-3, abs=max(rounding, 1e-9)
        ), f"t = {t}"


def test_nothing_flows_into_the_teacher(batch):
    *_, student, teacher = batch

    def total(student, teacher):
        terms = losses.distillation_terms(PROCESS, student, teacher, T, in_channels=C)
        return terms["kd_noise"].sum() + terms["kd_variance"].sum()

    to_student, to_teacher = jax.grad(total, argnums=(0, 1))(
        jnp.asarray(student), jnp.asarray(teacher)
    )
    np.testing.assert_array_equal(to_teacher, 0.0)
    assert_close(to_student, 2 * (student.astype(np.float64) - teacher) / (4 * 6 * C))


def test_a_student_that_copies_its_teacher_has_no_distance(batch):
    *_, teacher = batch
    for target in ("raw", "log_variance"):
        for value in losses.distillation_terms(
            PROCESS, teacher, teacher, T, in_channels=C, variance_target=target
        ).values():
            np.testing.assert_array_equal(value, 0.0)


def test_what_does_not_fit_is_named(batch):
    *_, student, teacher = batch
    with pytest.raises(ValueError, match=r"\(5, 4, 6, 8\).*\(5, 4, 6, 4\)"):
        losses.distillation_terms(PROCESS, student, teacher[..., :C], T, in_channels=C)
