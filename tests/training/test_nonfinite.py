"""Gradients of a loss that is not finite."""

import math

import torch

from eve_ds.training.nonfinite import poison_if_nonfinite


def test_a_non_finite_loss_gets_non_finite_gradients():
    x = torch.tensor([1e30, 1.0], requires_grad=True)
    loss = x.square().sum()
    assert loss.item() == math.inf
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert plain.isfinite().all(), "the plain gradient must not show the overflow"
    (gradient,) = torch.autograd.grad(poison_if_nonfinite(loss), x)
    assert gradient.isnan().all()
    y = torch.tensor([0.1, -3.7], requires_grad=True)
    value = y.square().sum()
    poisoned = poison_if_nonfinite(value)
    assert torch.equal(poisoned, value)
    assert torch.equal(*(torch.autograd.grad(one, y, retain_graph=True)[0] for one in (poisoned, value)))
