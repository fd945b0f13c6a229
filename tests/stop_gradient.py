"""Finite differences of functions with stop-gradients: what is detached must stay where it was."""

from unittest import mock

import torch


def hold_detached(f):
    """`f`, whose `.detach()`ed values are those of its first call, whatever it is called with afterwards."""
    held, detach = [], torch.Tensor.detach

    def recorded(x):
        held.append(detach(x).clone())  # gradcheck moves its inputs in place
        return held[-1]

    def g(*inputs):
        replayed = iter(held)
        stopped = (lambda x: next(replayed)) if held else recorded
        with mock.patch.object(torch.Tensor, "detach", stopped):
            return f(*inputs)

    return g
