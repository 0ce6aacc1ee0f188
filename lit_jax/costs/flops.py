"""FLOPs by formula: those of the model's definition, whoever computes it.

A multiply-add is one MAC or two FLOPs. The forward pass is counted by the architecture
(`forward_flops`). What a compiled program does is read elsewhere: hlo.py.
"""


def train_step_flops(student: float, teacher: float = 0.0) -> float:
    """FLOPs of one image in a training step.

    Args:
      student, teacher: those of a forward pass; 0 for a step without a teacher.
    """
    # The backward pass of a product y = x w has two, dx = dy w^T and dw = x^T dy:
    # three in all. The teacher is frozen and has the forward one alone.
    return 3 * student + teacher
