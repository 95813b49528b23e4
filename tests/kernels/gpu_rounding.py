# SPDX-License-Identifier: MIT
"""How far float32 on a GPU is from float32 on a CPU: what the tests of Triton kernels allow there in addition.

The figures are those of the PTX ISA and of the formats, not of a measurement; Triton's interpreter has no such errors.
"""

import torch

ON_GPU = torch.cuda.is_available()
EXP2 = 2.0**-22  # the largest relative error of ex2.approx.f32
SPLIT = 3 * 2.0**-22  # of a product of float32 factors, each the sum of two with 11 bits, without the smallest part


def tensor_core_sum(terms: int) -> float:
    """The error of a sum of products by tl.dot with tf32x3, relative to the sum of their absolute values.

    A tensor core adds 8 products at a time, three times for the parts of the factors, and truncates every sum.
    """
    return SPLIT + 3 * -(-terms // 8) * 2.0**-23 if ON_GPU else 0.0


def random_walk(tokens: int, steps: int, sharpness: float) -> float:
    """The error of masks from 0 to 1 in random_walk's Triton kernel.

    Cosines are products of split factors. An error of all weights by a factor changes a mean by at most twice as much.
    """
    weights = sharpness * SPLIT + EXP2 if ON_GPU else 0.0
    return steps * (2 * weights + tensor_core_sum(tokens))


def attention_weight(terms: int, products: float, log_sum: float) -> float:
    """The relative error of a weight that is exp2 of a score minus a log-sum-exp that another kernel has rounded.

    Args:
        terms: Length of the dot product of a score. Two kernels add it in different orders: an expected error of
            sqrt(terms) units each (Higham and Mary, 2019).
        products: The largest sum of the absolute values of these terms.
        log_sum: The largest absolute value of a log-sum-exp; it is multiplied and rounded four times on the way.
    """
    return EXP2 + 2.0**-24 * (4 * log_sum + 2 * terms**0.5 * products) if ON_GPU else 0.0
