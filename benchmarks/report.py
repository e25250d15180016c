"""
Tables and figures of what dmc.py has left in benchmarks/results/dmc: `python benchmarks/report.py`

It writes docs/guide/results.rst, and the figures beside the results. Aggregates are rliable's, with 95 % stratified bootstrap
intervals: https://arxiv.org/abs/2108.13264
"""

import argparse
import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from dmc import (
    ALGOS,
    DMC,
    HIDDEN,
    LONGER,
    MUJOCO,
    RESULTS,
    SEEDS,
    TASKS,
    is_current,
    is_of_former_code,
    is_planned,
    result_file,
)
from rliable import library, metrics
from runs import N_EVAL_EPISODES, ROOT

PAGE = ROOT / "docs" / "guide" / "results.rst"
TUNED_BY_HAND = ROOT / "benchmarks" / "results" / "tuning" / "by_hand.csv"
NAMES = {"fpo": "FPO", "dppo": "DPPO", "ppo": "PPO", "ppo-zoo": "PPO, rl-zoo3"}
#: Colour-blind safe
COLORS = {"fpo": "#0072B2", "dppo": "#009E73", "ppo": "#D55E00", "ppo-zoo": "#CC79A7"}
REPS = 10_000

#: Results by task and algorithm
Runs = dict[str, dict[str, list[dict[str, Any]]]]
Estimate = tuple[float, float, float]


def load(tasks: Iterable[str]) -> Runs:
    """Planned runs that are there, of what has the effect of today's hyperparameters."""
    runs: Runs = {}
    for task in tasks:
        of_task = {}
        for algo in ALGOS:
            seeds = [seed for seed in SEEDS if is_planned(algo, task, seed) and is_current(algo, task, seed)]
            if seeds:
                of_task[algo] = [json.loads(result_file(algo, task, seed).read_text()) for seed in seeds]
        if of_task:
            runs[task] = of_task
    return runs


def missing(tasks: Iterable[str]) -> str:
    """How many of the planned runs are not there."""
    planned = [(algo, task, seed) for task in tasks for algo in ALGOS for seed in SEEDS if is_planned(algo, task, seed)]
    gaps = [run for run in planned if not is_current(*run)]
    if not gaps:
        return f"All {len(planned)} runs are there."
    numbers = [(NAMES[algo], sum(of_run == algo for of_run, _, _ in gaps)) for algo in ALGOS]
    by_algo = ", ".join(f"{number} of {name}" for name, number in numbers if number)
    return f"**{len(gaps)} of the {len(planned)} planned runs are missing** ({by_algo})."


def returns(results: list[dict[str, Any]], mode: str = "deterministic") -> np.ndarray:
    return np.array([result[mode]["mean_return"] for result in results])


def spread(values: np.ndarray, digits: int = 0) -> str:
    """Mean ± standard deviation, which one seed has none of."""
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def scores(runs: Runs, algo: str, mode: str, relative: bool) -> np.ndarray:
    """
    Returns of an algorithm, of as many seeds as it has on each of the tasks, (n_seeds, n_tasks).

    :param runs: Results, of tasks where it has some
    :param algo: Name of the algorithm
    :param mode: "deterministic" or "stochastic"
    :param relative: Whether they are in units of PPO's mean on the task
    """
    n_seeds = min(len(task[algo]) for task in runs.values())
    units = [returns(task["ppo"], mode).mean() if relative else 1.0 for task in runs.values()]
    return np.stack([returns(task[algo], mode)[:n_seeds] for task in runs.values()], axis=1) / units


def estimate(data: Any, function: Any) -> list[Estimate]:
    """Values of a function of scores, with the lower and upper ends of their intervals."""
    # The same page from the same files: rliable draws from NumPy's global generator, not from its `random_state`
    np.random.seed(0)
    points, intervals = library.get_interval_estimates({"": data}, function, reps=REPS)
    return [(float(point), float(low), float(high)) for point, low, high in zip(points[""], *intervals[""], strict=True)]


def aggregates(of_algo: np.ndarray) -> list[Estimate]:
    """:return: IQM and mean over tasks and seeds"""
    return estimate(of_algo, lambda x: np.array([metrics.aggregate_iqm(x), metrics.aggregate_mean(x)]))


def comparison(of_algo: np.ndarray, of_peer: np.ndarray) -> list[Estimate]:
    """:return: ratios of the IQM and of the mean, and the probability that a run is better than one of the peer"""

    def compare(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        ratios = [metric(x) / metric(y) for metric in (metrics.aggregate_iqm, metrics.aggregate_mean)]
        return np.array([*ratios, metrics.probability_of_improvement(x, y)])

    return estimate((of_algo, of_peer), compare)


def plot_curves(runs: Runs, path: Path) -> None:
    """Training returns of each task, mean over seeds and the range of the seeds."""
    n_columns = min(len(runs), 5)
    n_rows = -(-len(runs) // n_columns)
    size = (max(2.3 * n_columns, 3.2), 2.1 * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat[len(runs) :]:
        ax.set_axis_off()
    for ax, (task, by_algo) in zip(axes.flat, runs.items(), strict=False):
        for algo, results in by_algo.items():
            steps = np.array([step for step, _ in results[0]["training_curve"]])
            curves = np.array([np.interp(steps, *np.array(result["training_curve"]).T) for result in results])
            color = COLORS[algo]
            ax.plot(steps / 1e6, curves.mean(axis=0), color=color, linewidth=1.2, label=NAMES[algo])
            ax.fill_between(steps / 1e6, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.2, linewidth=0)
        ax.set_title(task, fontsize=8)
        ax.tick_params(labelsize=7)
    figure.supxlabel("million steps", fontsize=8)
    figure.supylabel("return in training", fontsize=8)
    handles = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    axes[0, 0].legend(handles.values(), handles.keys(), fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [".. list-table::", "    :header-rows: 1", ""]
    for row in [header, *rows]:
        lines += [f"    {'*' if k == 0 else ' '} - {cell}".rstrip() for k, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def returns_table(runs: Runs, mode: str, relative: bool) -> str:
    """One row a task, and the mean over the tasks that all algorithms have."""
    algos = [algo for algo in ALGOS if any(algo in task for task in runs.values())]
    has_ratio = {"fpo", "ppo"} <= set(algos)
    rows = []
    for name, task in runs.items():
        cells = [f"{spread(returns(task[algo], mode))} ({len(task[algo])})" if algo in task else "" for algo in algos]
        if has_ratio and {"fpo", "ppo"} <= task.keys():
            cells.append(f"{returns(task['fpo'], mode).mean() / returns(task['ppo'], mode).mean():.2f}")
        elif has_ratio:
            cells.append("")
        rows.append([name, *cells])
    if not relative and len(runs) > 1:
        means = []
        for algo in algos:
            values = [returns(task[algo], mode).mean() for task in runs.values() if algo in task]
            means.append(f"**{np.mean(values):.0f}**" if len(values) == len(runs) else "")
        rows.append(["**mean**", *means, *([""] if has_ratio else [])])
    return table(["", *(NAMES[algo] for algo in algos), *(["FPO / PPO"] if has_ratio else [])], rows)


def aggregates_table(runs: Runs, relative: bool) -> str:
    """Over tasks and seeds: each algorithm by itself, and against PPO, on the tasks where both have more than one seed."""
    rows = []
    digits = 2 if relative else 0

    def cell(value: Estimate, digits: int) -> str:
        point, low, high = value
        return f"{point:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    for algo in ALGOS:
        both = {name: task for name, task in runs.items() if all(len(task.get(one, [])) > 1 for one in (algo, "ppo"))}
        if not both:
            continue
        for mode in ("deterministic", "stochastic"):
            mine, peer = (scores(both, one, mode, relative) for one in (algo, "ppo"))
            iqm, mean = aggregates(mine)
            cells = [str(len(both)), cell(iqm, digits), cell(mean, digits)]
            if algo != "ppo":
                iqm_ratio, mean_ratio, probability = comparison(mine, peer)
                wins = int((mine.mean(axis=0) > peer.mean(axis=0)).sum())
                cells += [cell(iqm_ratio, 2), cell(mean_ratio, 2), cell(probability, 2), f"{wins} of {len(both)}"]
            else:
                cells += 4 * [""]
            rows.append([f"{NAMES[algo]}{', sampled' if mode == 'stochastic' else ''}", *cells])
    header = ["", "tasks", "IQM", "mean", "IQM / PPO's", "mean / PPO's", "P(better than PPO)", "ahead on"]
    return table(header, rows) if rows else "There are too few runs of PPO for a comparison.\n"


def cost_table(runs: Runs) -> str:
    """Steps per second in training, and what the networks compute."""
    rows = []
    for algo in ALGOS:
        results = [result for task in runs.values() for result in task.get(algo, [])]
        if results:
            speeds = np.array([result["steps"] / result["train_seconds"] for result in results])
            gflop = [result["gflop_per_step"] for result in results if "gflop_per_step" in result]
            n_envs = sorted({result["hyperparameters"].get("n_envs", 1) for result in results})
            rows.append(
                [
                    NAMES[algo],
                    " or ".join(map(str, n_envs)),
                    f"{speeds.mean():.0f}",
                    f"{1000 * np.mean(gflop):.1f}" if gflop else "",
                ]
            )
    return table(["", "environments", "steps per second", "MFLOP per step"], rows)


def section(title: str, text: str, tasks: Iterable[str], relative: bool, figure: Path) -> list[str]:
    """
    Tables, aggregates and figure.

    :param title: Heading
    :param text: What is said of it
    :param tasks: Names of the tasks
    :param relative: Whether the returns of the tasks have scales of their own: then those in units of PPO's are averaged
    :param figure: Path of the figure
    :return: lines of the page
    """
    tasks = list(tasks)
    runs = load(tasks)
    lines = [title, "-" * len(title), "", text, "", missing(tasks), ""]
    if not runs:
        return lines
    plot_curves(runs, figure)
    unit = ", in units of PPO's mean on the task" if relative else ""
    return [
        *lines,
        "Deterministic return (flows: from zero noise, PPO: of the mean action), mean ± standard deviation over seeds, and in",
        "brackets their number:",
        "",
        returns_table(runs, "deterministic", relative),
        "With actions that are sampled:",
        "",
        returns_table(runs, "stochastic", relative),
        f"Over tasks and seeds{unit}, with 95 % stratified bootstrap intervals. P is the probability that a run is",
        "better than one of PPO on the same task:",
        "",
        aggregates_table(runs, relative),
        "Cost, with one thread, while other runs shared the machine:",
        "",
        cost_table(runs),
        f".. image:: ../../{figure.relative_to(ROOT)}",
        "",
        "Lines: mean over seeds; bands: from the worst to the best seed.",
        "",
    ]


def tuned_by_hand(tasks: dict[str, Any]) -> str:
    """How many runs on these tasks each algorithm was tuned with by hand."""
    ids = {task.env_id for task in tasks.values()}
    with open(TUNED_BY_HAND) as file:
        rows = [row for row in csv.DictReader(file) if row["env"] in ids]
    envs = {algo: [row["env"] for row in rows if row["algo"] == algo] for algo in ALGOS}
    return ", ".join(f"{len(runs)} of {NAMES[algo]} on {len(set(runs))} tasks" for algo, runs in envs.items() if runs)


def provenance() -> str:
    """Versions, hardware, and what is not of the code of today."""
    results = [result for task in load(TASKS).values() for runs in task.values() for result in runs]
    versions, hardware = results[0]["versions"], sorted({result["hardware"] for result in results})
    n_former, n_dirty = sum(map(is_of_former_code, results)), sum(run["commit"].endswith("-dirty") for run in results)
    text = (
        f"Raw results of the {len(results)} runs, with curves, commands and commits ({n_dirty} with changes that were not\n"
        "committed, ``-dirty``): ``benchmarks/results/dmc``. "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + f"; {'; '.join(hardware)}.\n"
    )
    if n_former:
        text += (
            f"\n{n_former} runs of FPO are of the code up to commit baea80a, with half the ``ent_coef`` and 1.14 times the\n"
            "``action_scale`` of today's ``hyperparams/fpo.yml``: for a Gaussian policy, that was the same. Observations and\n"
            "rewards were normalized by ``VecNormalize``, where the policy does it today.\n"
        )
    return text


INTRODUCTION = """\
.. Made by benchmarks/report.py: change it there

Results
=======

Flow policies against Gaussian ones, with the same environments, rollouts, minibatches and networks. FPO and DPPO have the
hyperparameters of ``hyperparams/fpo.yml`` and ``dppo.yml``, PPO those of ``benchmarks/ppo.yml``, and on MuJoCo also those of
rl-zoo3. Class defaults are compared in :doc:`out_of_the_box`; :doc:`modes` has tasks with several equally good actions, and
:doc:`../modules/fql` results of offline learning.
"""
TUNING = """\
The hyperparameters of the DeepMind Control suite were found with seeds from 1000 on (``benchmarks/results/tuning``): on four
of the ten tasks with 250,000 steps (``benchmarks/tune.py`` of commit abea70b), where PPO's were the best of 12 trials and
FPO's the best of 8, and then by hand, with single runs of up to 1,000,000 steps: {dmc}, finished ones. What they have in
common has the same values, but for ``vf_coef`` (FPO 0.25, PPO 0.5), for ``ent_coef`` (FPO 0.02, and 0.06 on cartpole-
balance; PPO 0.01), and for the standard deviation that exploration starts with (FPO 0.76, PPO 0.86). On MuJoCo the width of
exploration and the entropy coefficient are others, chosen with seed 1000: {mujoco}. DPPO has the values of FPO where they
share something, and was not searched.
"""
DMC_TEXT = """\
The ten tasks of the FPO paper, 1,000,000 steps. The paper has 1.137 times the mean of tuned PPO and 8 of 10 tasks ahead, with
FPO's actions sampled, 60 million steps of another simulator, 2048 environments and 5 seeds."""
LONGER_TEXT = """\
Three of these tasks hardly learn anything in a million steps, whatever the algorithm, so that their part of the mean is partly
chance. Here they have five million."""
MUJOCO_TEXT = """\
1,000,000 steps."""
HIDDEN_TEXT = """\
Walker2d-v5 without the angles and velocities of the left leg. What the leg has to do depends on where it is, which the rest
of the observation tells only in part: several actions may be right, for the different places where it may be, and none in
between. The task was chosen before anything was run on it."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    tuning = TUNING.format(dmc=tuned_by_hand(DMC), mujoco=tuned_by_hand(MUJOCO))
    sections = [
        *section("DeepMind Control", DMC_TEXT, DMC, False, RESULTS / "dmc.png"),
        *section("Five million steps", LONGER_TEXT, LONGER, False, RESULTS / "longer.png"),
        *section("MuJoCo", MUJOCO_TEXT, MUJOCO, True, RESULTS / "mujoco.png"),
        *section("A part of the observation hidden", HIDDEN_TEXT, HIDDEN, True, RESULTS / "hidden.png"),
    ]
    replicate = [
        "How to replicate",
        "----------------",
        "",
        f"Means of {N_EVAL_EPISODES} episodes at the end of each run. Interrupted, it goes on where it stopped:",
        "",
        ".. code-block:: bash",
        "",
        "    python benchmarks/dmc.py --jobs 2",
        "    python benchmarks/report.py",
        "",
        provenance(),
    ]
    PAGE.write_text("\n".join([INTRODUCTION, tuning, *sections, *replicate]))
    print(f"{PAGE}: {missing(TASKS)}")


if __name__ == "__main__":
    main()
