"""Functions of one logit that are summed over the classes, and their derivatives."""

import triton
import triton.language as tl

TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32


@triton.jit
def log_of_one_plus(x):
    """`log(1 + x)` for x > -1, to the last digits where x is small."""
    rounded = 1 + x
    # The rounding of 1 + x cancels in the quotient.
    safe = tl.where(rounded == 1, 2.0, rounded)
    return tl.where(rounded == 1, x, tl.log(safe) * (x / (safe - 1)))


@triton.jit
def softplus(x):
    """`log(1 + exp(x))`"""
    return tl.maximum(x, 0.0) + log_of_one_plus(tl.exp(-tl.abs(x)))


@triton.jit
def shifted(x, margin):
    """`u = max(sigmoid(x) - margin, 0)`, never quite 0 so that it can be divided by."""
    u = tl.sigmoid(x)
    if margin is not None:
        u -= margin
    return tl.maximum(u, TINY)


@triton.jit
def log_of_rest(x, u, margin):
    """`log(1 - u)` of what `shifted` gave for x."""
    if margin is None:
        return -softplus(x)
    else:
        return log_of_one_plus(-u)


@triton.jit
def power_of(x, power):
    """`x^power` for x >= 0, and for 0 that of the smallest number that is not."""
    return tl.exp(power * tl.log(tl.maximum(x, TINY)))


@triton.jit
def summand_value(x, first, second, third, NAME: tl.constexpr):
    """s(x), by the name of the function.

    Its parameters: `asymmetric` has gamma and margin (None for 0), `adjusted_cosine` scale, power and offset.
    """
    if NAME == "softplus":
        return softplus(x)
    elif NAME == "stablemax":
        return tl.where(x < 0, 1 / (1 - x), x + 1)
    elif NAME == "asymmetric":
        u = shifted(x, second)
        return -power_of(u, first) * log_of_rest(x, u, second)
    else:
        tl.static_assert(NAME == "adjusted_cosine")
        return softplus(first * (2 * power_of(x / (2 * first) + 0.5, second) - 1) + third)


@triton.jit
def summand_slope(x, first, second, third, NAME: tl.constexpr):
    """s'(x)"""
    if NAME == "softplus":
        return tl.sigmoid(x)
    elif NAME == "stablemax":
        return tl.where(x >= 0, 1.0, 1 / ((1 - x) * (1 - x)))
    elif NAME == "asymmetric":
        u = shifted(x, second)
        log_rest = log_of_rest(x, u, second)
        power, positive, negative = power_of(u, first), tl.sigmoid(x), tl.sigmoid(-x)
        # u^gamma (1 / (1 - u) - gamma log(1 - u) / u) du/dx
        if second is None:
            return power * (positive - first * negative * log_rest)
        else:
            slope = power * (1 / (1 - u) - first * log_rest / u) * positive * negative
            return tl.where(positive <= second, 0.0, slope)
    else:
        tl.static_assert(NAME == "adjusted_cosine")
        base = x / (2 * first) + 0.5
        slope = tl.sigmoid(first * (2 * power_of(base, second) - 1) + third)
        return slope * second * power_of(base, second - 1)
