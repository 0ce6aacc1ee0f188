"""The denoising loss of DiT and the hybrid distillation loss of LiT, each per sample and term by term."""

import jax
import jax.numpy as jnp

from lit_jax import diffusion as gd


def _mean_square(x: jax.Array) -> jax.Array:
    return jnp.square(x).mean(axis=(1, 2, 3))


def denoising_loss(
    diffusion: gd.Diffusion,
    model_output: jax.Array,
    x_start: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    noise: jax.Array,
) -> dict[str, jax.Array]:
    """L_simple and, when the model predicts a variance, L_vlb (unscaled, as in DiT).

    The bound trains the variance alone: the predicted noise enters it detached (Improved DDPM, section 3.1).

    Args: model_output (B, h, w, C or 2C), x_start, x_t, noise (B, h, w, C), t (B,); float32.
    Returns: {"mse": (B,)} and {"vb": (B,) bits per dimension} with a variance head. Their sum is the loss.
    """
    C = x_start.shape[-1]
    eps = model_output[..., :C]
    terms = {"mse": _mean_square(eps - noise)}
    if model_output.shape[-1] == 2 * C:
        detached = jnp.concatenate([jax.lax.stop_gradient(eps), model_output[..., C:]], axis=-1)
        terms["vb"] = gd.vb_terms(diffusion, detached, x_start, x_t, t)
    return terms


def distillation_loss(
    diffusion: gd.Diffusion,
    student_output: jax.Array,
    teacher_output: jax.Array,
    t: jax.Array,
    *,
    in_channels: int,
    variance_target: str = "raw",
) -> dict[str, jax.Array]:
    """The terms of LiT's hybrid distillation, unweighted: mean squared distance to the teacher's noise and variance.

    Args:
      student_output, teacher_output: (B, h, w, C or 2C) on the same x_t, t and condition; the teacher's is detached here.
      in_channels: C, the channels of x_t, which are also those of the predicted noise.
      variance_target: "raw" compares the variance heads' raw values v (the paper's code), "log_variance" the
        interpolated log-variances.
    Returns: {"kd_noise": (B,)} and, when there is a variance head, {"kd_variance": (B,)}.
    """
    if student_output.shape != teacher_output.shape:
        raise ValueError(
            f"the student's output {student_output.shape} and the teacher's {teacher_output.shape} differ"
        )
    if variance_target not in ("raw", "log_variance"):
        raise ValueError(
            f"distill.variance_target must be raw or log_variance, got {variance_target!r}"
        )
    C = in_channels
    teacher_output = jax.lax.stop_gradient(teacher_output)
    terms = {"kd_noise": _mean_square(student_output[..., :C] - teacher_output[..., :C])}
    if student_output.shape[-1] == 2 * C:
        student_variance, teacher_variance = student_output[..., C:], teacher_output[..., C:]
        if variance_target == "log_variance":
            student_variance = gd.learned_range_log_variance(diffusion, student_variance, t)
            teacher_variance = gd.learned_range_log_variance(diffusion, teacher_variance, t)
        terms["kd_variance"] = _mean_square(student_variance - teacher_variance)
    return terms
