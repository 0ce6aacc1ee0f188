"""FLOPs by formula, from plain numbers.

They are those of the model's definition, whoever computes it: of matrix products and
depth-wise convolutions. A multiply-add is one MAC or two FLOPs. What a compiled
program does is read elsewhere: hlo.py.
"""


def attention_macs(
    attention: str,
    *,
    tokens: int,
    width: int,
    num_heads: int,
    conv_size: int = 0,
) -> int:
    """Multiply-adds of one layer's attention for one image, without its projections.

    For T tokens of width D in heads of H columns (LiT, arXiv 2501.12976, section 3.2):

        softmax   2 T T D            scores and read-out
        linear    2 T D H + K K T D  state and read-out, then the convolution

    Args:
      attention: "softmax" or "linear".
      tokens: T.
      width: D.
      num_heads: D / H.
      conv_size: K, of linear attention; 0: no convolution.
    Raises: ValueError for another attention.
    """
    if attention == "softmax":
        return 2 * tokens * tokens * width
    if attention != "linear":
        raise ValueError(f"attention = {attention!r} has no formula; known are softmax and linear")

    head_width = width // num_heads
    # The normaliser, T D more, is left out, as in the paper's table of MACs.
    products = 2 * tokens * width * head_width
    convolution = conv_size * conv_size * tokens * width
    return products + convolution


def train_step_flops(student: float, teacher: float = 0.0) -> float:
    """FLOPs of one image in a training step.

    Args:
      student, teacher: those of a forward pass; 0 for a step without a teacher.
    """
    # The backward pass of a product y = x w has two, dx = dy w^T and dw = x^T dy:
    # three in all. The teacher is frozen and has the forward one alone.
    return 3 * student + teacher
