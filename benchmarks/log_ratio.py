"""
How well FPO's log-ratio estimates that of the likelihoods: `python benchmarks/log_ratio.py`

A Gaussian policy, whose flow is exact, gets another mean or another standard deviation. Printed, and left in
benchmarks/results/log_ratio.csv, is the correlation over actions of the change in loss, with the weights of the evidence
lower bound and two baseline actions, with the change in log-likelihood.
"""

import csv
import itertools

import torch as th
from runs import ROOT

from sb3_flow.common.flow import SAMPLINGS, CFMLoss, draw_pairs, flow_target, interpolate, squared_error
from sb3_flow.common.surrogates import relative_loss

RESULTS = ROOT / "benchmarks" / "results" / "log_ratio.csv"
N_ACTIONS, N_MC_SAMPLES, N_FLOW_STEPS, CHANGE = 200_000, 4, 10, 0.01


def gaussian_velocity(x_t: th.Tensor, t: th.Tensor, mean: float, std: float) -> th.Tensor:
    """Velocity of the flow from N(0, 1) to N(mean, std^2)."""
    slope = (t - (1 - t) * std**2) / (t**2 + ((1 - t) * std) ** 2)
    return slope.unsqueeze(-1) * (x_t - (1 - t.unsqueeze(-1)) * mean) - mean


def correlation(sampling: str, distribution: str, std: float, change: tuple[float, float]) -> float:
    """
    :param sampling: How the pairs depend on each other
    :param distribution: Where their timesteps come from
    :param std: Standard deviation of the policy
    :param change: Of its mean, in units of the standard deviation, and of the logarithm of the standard deviation
    :return: Correlation of the log-ratios
    """
    z, baseline = th.randn(2, N_ACTIONS)
    second = -baseline if sampling == "stratified" else th.randn(N_ACTIONS)
    actions = std * th.stack([z, baseline, second], dim=1).view(N_ACTIONS, 3, 1, 1)
    loss = CFMLoss("elbo", "sum", distribution, sampling)
    pairs = draw_pairs((N_ACTIONS, N_MC_SAMPLES, 1), loss, n_flow_steps=N_FLOW_STEPS)
    noise, t, weights = (x.unsqueeze(1) for x in pairs)
    x_t, target = interpolate(actions, noise, t), flow_target("velocity", actions, noise)
    new_mean, new_std = change[0] * std, (1 + change[1]) * std
    old, new = (
        weights * squared_error(gaussian_velocity(x_t, t, *parameters), target)
        for parameters in ((0.0, std), (new_mean, new_std))
    )
    log_ratio = relative_loss(old - new).mean(dim=1)
    expected = change[0] * z + change[1] * (z**2 - 1)
    return th.corrcoef(th.stack([log_ratio, expected]))[0, 1].item()


def main() -> None:
    th.manual_seed(0)
    stds = (1.0, 0.3, 0.1)
    changes = {"mean": (CHANGE, 0.0), "spread": (0.0, CHANGE)}
    header = ["pairs", "timesteps", *(f"{name}, σ = {std:g}" for name in changes for std in stds)]
    rows = []
    for sampling, distribution in itertools.product(SAMPLINGS, ("grid", "importance")):
        values = [correlation(sampling, distribution, std, change) for change in changes.values() for std in stds]
        rows.append([sampling, distribution, *(f"{value:.2f}" for value in values)])
    with open(RESULTS, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
