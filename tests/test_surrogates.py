"""Ratio and trust regions, against closed forms."""

import math

import pytest
import torch as th

from sb3_flow.common.surrogates import TRUST_REGIONS, flow_ratio, surrogate_objective

EPS = 0.1


def objective_and_gradient(ratio, advantage, trust_region):
    ratio = th.tensor([[ratio]], requires_grad=True)
    objective = surrogate_objective(ratio, th.tensor([[advantage]]), EPS, trust_region)
    assert objective.shape == (1, 1)
    (gradient,) = th.autograd.grad(objective.sum(), ratio)
    return objective.item(), gradient.item()


def ppo(r, a):
    clipped = min(max(r, 1 - EPS), 1 + EPS)
    return (r * a, a) if r * a <= clipped * a else (clipped * a, 0.0)


def spo(r, a):
    return r * a - abs(a) / (2 * EPS) * (r - 1) ** 2, a - abs(a) / EPS * (r - 1)


@pytest.mark.parametrize("ratio", [0.7, 0.95, 1.0, 1.05, 1.3])
@pytest.mark.parametrize("advantage", [-2.0, 1.5])
@pytest.mark.parametrize("trust_region", TRUST_REGIONS)
def test_closed_forms(ratio, advantage, trust_region):
    expected = spo if trust_region == "aspo" and advantage < 0 else ppo
    result = objective_and_gradient(ratio, advantage, trust_region)
    assert result == pytest.approx(expected(ratio, advantage), abs=1e-5)


@pytest.mark.parametrize("trust_region", TRUST_REGIONS)
@pytest.mark.parametrize("advantage", [-2.0, 1.5])
def test_gradient_at_one_is_the_policy_gradient(trust_region, advantage):
    assert objective_and_gradient(1.0, advantage, trust_region)[1] == pytest.approx(advantage)


def test_no_gradient_from_a_clipped_sample():
    """With A > 0 and a ratio beyond the clip, the CFM losses of that sample get no gradient, the others do."""
    old_loss = th.ones(2, 1, 4)
    loss = th.tensor([[[0.5] * 4], [[0.99] * 4]], requires_grad=True)  # ratios e^0.5 (clipped) and e^0.01
    ratio = flow_ratio(old_loss, loss)
    surrogate_objective(ratio, th.ones(2, 1), EPS, "ppo").mean().backward()
    assert th.equal(loss.grad[0], th.zeros(1, 4))
    assert (loss.grad[1] < 0).all()


def test_aspo_pulls_back_what_ppo_leaves():
    """A < 0 and a ratio below the clip: PPO has no gradient left, the penalty of ASPO brings the ratio back up."""
    assert objective_and_gradient(0.7, -2.0, "ppo")[1] == 0
    assert objective_and_gradient(0.7, -2.0, "aspo")[1] > 0


def test_ratio_by_hand():
    old_loss, loss = th.tensor([[[1.0, 3.0]]]), th.tensor([[[0.8, 3.4]]])
    assert flow_ratio(old_loss, loss).item() == pytest.approx(math.exp(-0.1), rel=1e-5)
    assert flow_ratio(old_loss, loss).shape == (1, 1)
    per_sample = flow_ratio(old_loss, loss, "per_sample")
    assert per_sample.tolist()[0] == pytest.approx([math.exp(0.2), math.exp(-0.4)], rel=1e-5)
    assert th.equal(flow_ratio(loss, loss, "per_sample"), th.ones(1, 2))


def test_ratio_with_baseline_actions_by_hand():
    """The changes of the baseline actions, on average -0.1 and 0.3, are subtracted from those of the action taken."""
    old_loss = th.tensor([[[1.0, 3.0], [2.0, 2.0], [1.0, 1.0]]])
    loss = th.tensor([[[0.8, 3.4], [2.1, 1.8], [1.1, 0.6]]])
    assert flow_ratio(old_loss, loss).item() == pytest.approx(math.exp((0.2 + 0.1 - 0.4 - 0.3) / 2), rel=1e-5)
    per_sample = flow_ratio(old_loss, loss, "per_sample")
    assert per_sample.tolist()[0] == pytest.approx([math.exp(0.3), math.exp(-0.7)], rel=1e-5)
    # What all actions have in common is not a change of the policy
    assert flow_ratio(old_loss, old_loss + 0.5).item() == pytest.approx(1.0)


def test_ratio_clips():
    old_loss, loss = th.tensor([[[30.0]]]), th.tensor([[[1.0]]], requires_grad=True)
    assert flow_ratio(old_loss, loss, cfm_loss_clip=2.0).item() == pytest.approx(math.e, rel=1e-5)
    ratio = flow_ratio(old_loss, loss, log_ratio_clip=3.0)
    assert ratio.item() == pytest.approx(math.exp(3), rel=1e-5)
    assert flow_ratio(1e9 * old_loss, loss, log_ratio_clip=3.0).item() == pytest.approx(math.exp(3), rel=1e-5)
    # The gradient is that of the exponential at the clipped value
    ratio.sum().backward()
    assert loss.grad.item() == pytest.approx(-math.exp(3), rel=1e-5)
    assert flow_ratio(loss, old_loss, log_ratio_clip=3.0).item() == pytest.approx(math.exp(-3), rel=1e-5)
