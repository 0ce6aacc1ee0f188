"""The terms of LiT's hybrid distillation; those of denoising belong to the process (diffusion.py).

Each term is per sample and unweighted: {name: (B,)}. The train step weighs and sums them.
"""

import jax

from lit_jax.diffusion import Process, mean_square

VARIANCE_TARGETS = ("raw", "log_variance")


def distillation_terms(
    process: Process,
    student_output: jax.Array,
    teacher_output: jax.Array,
    t: jax.Array,
    *,
    in_channels: int,
    variance_target: str = "raw",
) -> dict[str, jax.Array]:
    """Mean squared distance of the student to its teacher, for each part of an output.

    Each counts at each timestep as the process says: that of the noise as in its loss (Min-SNR).

    Args:
      student_output, teacher_output: (B, h, w, C or 2C) on the same x_t, t and condition. The
        teacher's is detached here.
      in_channels: C, the channels of x_t.
      variance_target: "raw" compares the variance head's values as they are (the paper's code),
        "log_variance" the interpolated log-variances that they stand for.
    Returns: {"kd_noise": (B,)} and, where there is a variance head, {"kd_variance": (B,)};
      {"kd_velocity": (B,)} of a RectifiedFlow.
    Raises: ValueError for outputs of two shapes.
    """
    if student_output.shape != teacher_output.shape:
        raise ValueError(
            f"the student's output {student_output.shape} and the teacher's "
            f"{teacher_output.shape} differ"
        )
    # Part by part, as the two have weights of their own: lambda_1 and lambda_2 of the paper.
    student = process.parts(student_output, in_channels)
    teacher = process.parts(jax.lax.stop_gradient(teacher_output), in_channels)
    if variance_target == "log_variance":
        # Both heads' values stand for one between the same two bounds at this t.
        student, teacher = (process.interpret(parts, t) for parts in (student, teacher))
    return {
        f"kd_{part}": process.weigh(part, mean_square(student[part] - teacher[part]), t)
        for part in student
    }
