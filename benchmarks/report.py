"""
Tables and figures of what dmc.py has left in benchmarks/results/dmc: `python benchmarks/report.py`

It writes docs/guide/results.rst, and the figures beside the results. Aggregates are rliable's, with 95 % stratified bootstrap
intervals: https://arxiv.org/abs/2108.13264
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from dmc import ALGOS, DMC, MUJOCO, RESULTS, STEPS, is_current, is_of_former_code
from learning import RESULTS as LEARNING_RESULTS
from rliable import library, metrics
from runs import N_EVAL_EPISODES, ROOT

PAGE = ROOT / "docs" / "guide" / "results.rst"
TUNED_BY_HAND = ROOT / "benchmarks" / "results" / "tuning" / "by_hand.csv"
#: Colour-blind safe
COLORS = {"fpo": "#0072B2", "ppo": "#D55E00"}
#: What the paper has: mean of the ten tasks over that of tuned PPO, and the number of tasks ahead
PAPER_RATIO, PAPER_WINS = 1.137, 8

Runs = dict[str, dict[str, list[dict[str, Any]]]]


def load(tasks: list[str]) -> Runs:
    """Results by task and algorithm with what has the effect of today's hyperparameters, of tasks and seeds that both have."""
    runs: Runs = {}
    for env_id in tasks:
        by_seed = {
            algo: {
                result["seed"]: result
                for file in sorted(RESULTS.glob(f"{env_id.split('/')[-1]}-{algo}-seed*.json"))
                for result in [json.loads(file.read_text())]
                if is_current(result) or is_of_former_code(result)
            }
            for algo in ALGOS
        }
        seeds = sorted(set.intersection(*(set(results) for results in by_seed.values())))
        if seeds:
            runs[env_id] = {algo: [by_seed[algo][seed] for seed in seeds] for algo in ALGOS}
    return runs


def tuned_by_hand(tasks: list[str]) -> str:
    """How many runs on these tasks each algorithm was tuned with by hand."""
    with open(TUNED_BY_HAND) as file:
        rows = [row for row in csv.DictReader(file) if row["env"] in tasks]
    envs = {algo: [row["env"] for row in rows if row["algo"] == algo] for algo in ALGOS}
    return ", ".join(f"{len(runs)} of {algo.upper()} on {len(set(runs))} tasks" for algo, runs in envs.items() if runs)


def same_geometry(tasks: list[str]) -> str:
    """What learning.py has left of PPO with FPO's geometry, on the tasks where rl-zoo3's PPO has one of its own."""
    parts = []
    for env_id in tasks:
        files = sorted(LEARNING_RESULTS.glob(f"{env_id}-{STEPS}-ppo-narrow-seed*.json"))
        if files:
            results = [json.loads(file.read_text()) for file in files]
            seeds = ", ".join(str(result["seed"]) for result in results)
            values = f"{spread(returns(results))}, sampled {spread(returns(results, 'stochastic'))}"
            parts.append(f"{env_id} {values} (seeds {seeds})")
    return (
        "PPO with the environments, rollouts, networks and width of exploration of FPO is another opponent than that of\n"
        f"rl-zoo3. With {STEPS:,} steps it has: {'; '.join(parts)}\n"
        f"(``python benchmarks/learning.py --env ENV --steps {STEPS} --settings ppo-narrow``). HalfCheetah-v5 with 300,000\n"
        "steps: :doc:`../modules/fpo`.\n"
    )


def returns(results: list[dict[str, Any]], kind: str = "deterministic") -> np.ndarray:
    return np.array([result[kind]["mean_return"] for result in results])


def spread(values: np.ndarray) -> str:
    """Mean ± standard deviation, which one seed has none of."""
    return f"{values.mean():.0f} ± {values.std():.0f}" if len(values) > 1 else f"{values.mean():.0f}"


def aggregates(runs: Runs, relative: bool) -> dict[str, dict[str, tuple[float, float, float]]]:
    """
    IQM and mean over tasks and seeds, with their intervals. Each task needs the same number of seeds.

    :param runs: Results by task and algorithm
    :param relative: Whether returns are in units of PPO's mean on the task
    :return: value, and lower and upper end of its interval
    """
    n_seeds = min(len(results) for task in runs.values() for results in task.values())
    units = [returns(task["ppo"]).mean() if relative else 1.0 for task in runs.values()]
    scores = {
        algo: np.stack([returns(task[algo])[:n_seeds] for task in runs.values()], axis=1) / units for algo in ALGOS
    }  # fmt: skip
    # The same page from the same files: rliable draws from NumPy's global generator, not from its `random_state`
    np.random.seed(0)
    points, intervals = library.get_interval_estimates(
        scores, lambda x: np.array([metrics.aggregate_iqm(x), metrics.aggregate_mean(x)]), reps=10_000
    )
    return {
        algo: {name: (points[algo][k], intervals[algo][0, k], intervals[algo][1, k]) for k, name in enumerate(("IQM", "mean"))}
        for algo in ALGOS
    }


def plot_curves(runs: Runs, path: Path) -> None:
    """Training returns of each task, mean over seeds and the range of the seeds."""
    n_columns = min(len(runs), 5)
    n_rows = -(-len(runs) // n_columns)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=(2.3 * n_columns, 2.1 * n_rows), layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(runs) :]:
        ax.set_axis_off()
    for ax, (env_id, task) in zip(axes.flat, runs.items(), strict=False):
        for algo in ALGOS:
            steps = np.array([step for step, _ in task[algo][0]["training_curve"]])
            curves = np.array(
                [np.interp(steps, *np.array(result["training_curve"]).T) for result in task[algo]]
            )  # fmt: skip
            ax.plot(steps / 1e6, curves.mean(axis=0), color=COLORS[algo], linewidth=1.2, label=algo.upper())
            ax.fill_between(steps / 1e6, curves.min(axis=0), curves.max(axis=0), color=COLORS[algo], alpha=0.2, linewidth=0)
        ax.set_title(env_id.split("/")[-1].rsplit("-", 1)[0], fontsize=8)
        ax.tick_params(labelsize=7)
    figure.supxlabel("million steps", fontsize=8)
    figure.supylabel("return in training", fontsize=8)
    axes[0, 0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [".. list-table::", "    :header-rows: 1", ""]
    for row in [header, *rows]:
        lines += [f"    {'*' if k == 0 else ' '} - {cell}".rstrip() for k, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def section(title: str, runs: Runs, relative: bool, figure: Path) -> str:
    """
    Table, aggregates and figure.

    :param title: Heading
    :param runs: Results by task and algorithm
    :param relative: Whether the returns of the tasks have scales of their own: then it is their ratios that are averaged
    :param figure: Path of the figure
    :return: section of the page
    """
    header = ["", "seeds", "FPO", "PPO", "FPO / PPO", "FPO, stochastic", "PPO, stochastic", "FPO, steps/s", "PPO, steps/s"]
    rows, means = [], []
    for env_id, task in runs.items():
        deterministic, stochastic = (
            {algo: returns(task[algo], kind) for algo in ALGOS} for kind in ("deterministic", "stochastic")
        )
        means.append([values[algo].mean() for values in (deterministic, stochastic) for algo in ALGOS])
        speeds = [np.mean([result["steps"] / result["train_seconds"] for result in task[algo]]) for algo in ALGOS]
        rows.append(
            [
                env_id.split("/")[-1],
                ", ".join(str(result["seed"]) for result in task["fpo"]),
                *(spread(deterministic[algo]) for algo in ALGOS),
                f"{deterministic['fpo'].mean() / deterministic['ppo'].mean():.2f}",
                *(spread(stochastic[algo]) for algo in ALGOS),
                *(f"{speed:.0f}" for speed in speeds),
            ]
        )
    fpo, ppo, fpo_stochastic, ppo_stochastic = np.array(means).T
    if relative:
        ratio, stochastic_ratio = np.mean(fpo / ppo), np.mean(fpo_stochastic / ppo_stochastic)
        rows.append(["**mean**", "", "", "", f"**{ratio:.2f}**", "", "", "", ""])
    else:
        ratio, stochastic_ratio = fpo.mean() / ppo.mean(), fpo_stochastic.mean() / ppo_stochastic.mean()
        mean_row = [f"{fpo.mean():.0f}", f"{ppo.mean():.0f}", f"{ratio:.2f}",
                    f"{fpo_stochastic.mean():.0f}", f"{ppo_stochastic.mean():.0f}"]  # fmt: skip
        rows.append(["**mean**", "", *(f"**{cell}**" for cell in mean_row), "", ""])
    wins, stochastic_wins = (sum(row[k] > row[k + 1] for row in means) for k in (0, 2))
    # One seed has no interval
    intervals = ["Where there is a single seed: others may differ by as much as the algorithms do.", ""]
    if min(len(task["fpo"]) for task in runs.values()) > 1:
        estimates = aggregates(runs, relative)
        cell = "{:.2f} [{:.2f}, {:.2f}]" if relative else "{:.0f} [{:.0f}, {:.0f}]"
        aggregate_rows = [[name, *(cell.format(*estimates[algo][name]) for algo in ALGOS)] for name in ("IQM", "mean")]
        unit = ", in units of PPO's mean on the task" if relative else ""
        intervals = [
            f"Over tasks and seeds{unit}, with 95 % stratified bootstrap intervals:",
            "",
            table(["", "FPO", "PPO"], aggregate_rows),
        ]
    plot_curves(runs, figure)
    n_steps = {result["steps"] for task in runs.values() for results in task.values() for result in results}
    n_envs = {
        algo: sorted({result["hyperparameters"].get("n_envs", 1) for task in runs.values() for result in task[algo]})
        for algo in ALGOS
    }
    environments = ", ".join(f"{algo.upper()} {' or '.join(map(str, numbers))}" for algo, numbers in n_envs.items())
    return "\n".join(
        [
            title,
            "-" * len(title),
            "",
            f"{', '.join(f'{n:,}' for n in sorted(n_steps))} steps. Deterministic return (FPO: from zero noise, PPO: of the",
            f"mean action) over {N_EVAL_EPISODES} episodes at the end, mean ± standard deviation over seeds. Steps per second",
            "are those of the training, with one thread, while other runs shared the machine; environments at once:",
            f"{environments}.",
            "",
            table(header, rows),
            f"FPO is ahead on {wins} of {len(runs)} tasks. With actions that are sampled it has "
            f"{stochastic_ratio:.2f} times PPO's return{' (mean over tasks)' if relative else ''}, "
            f"and is ahead on {stochastic_wins}.",
            "",
            *intervals,
            f".. image:: ../../{figure.relative_to(ROOT)}",
            "",
            "Lines: mean over seeds; bands: from the worst to the best seed.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    dmc, mujoco = load(DMC), load(MUJOCO)
    sections = []
    if dmc:
        sections += [section("DeepMind Control", dmc, False, RESULTS / "dmc.png")]
        sections += [
            f"The paper has {PAPER_RATIO} times the mean of tuned PPO and {PAPER_WINS} of 10 tasks ahead, with FPO's actions\n"
            "sampled, 60 million steps of another simulator, 2048 environments and 5 seeds.\n"
        ]
    if mujoco:
        sections += [section("MuJoCo", mujoco, True, RESULTS / "mujoco.png")]
        sections += [same_geometry(list(mujoco))]
    if not dmc and not mujoco:
        parser.error("no task has results of both algorithms, with the same seed and the hyperparameters of now")
    results = [result for task in [*dmc.values(), *mujoco.values()] for runs in task.values() for result in runs]
    versions, hardware = results[0]["versions"], sorted({result["hardware"] for result in results})
    n_former = sum(map(is_of_former_code, results))
    n_dirty = sum(result["commit"].endswith("-dirty") for result in results)
    page = "\n".join(
        [
            ".. Made by benchmarks/report.py: change it there",
            "",
            "Results",
            "=======",
            "",
            "FPO against PPO. FPO has the hyperparameters of ``hyperparams/fpo.yml``; PPO has those of ``benchmarks/ppo.yml``",
            "on the tasks of the DeepMind Control suite, and those of rl-zoo3 on MuJoCo's. Those of the DeepMind Control",
            "suite were found with seeds from 1000 on (``benchmarks/results/tuning``): on four of the ten tasks with 250,000",
            "steps (``benchmarks/tune.py``), where PPO's were the best of 12 trials and FPO's the best of 8, and then by",
            f"hand, with single runs of up to 1,000,000 steps: {tuned_by_hand(DMC)}, finished ones. What",
            "FPO and PPO have in common has the same values, but for ``vf_coef`` (0.25 and 0.5), and for",
            "``ent_coef``, which acted at about twice its value in FPO (0.01, and 0.03 on cartpole-balance; PPO 0.01). On",
            "MuJoCo FPO differs from that in the width of exploration, the entropy coefficient and the discount, chosen with",
            f"seed 1000: {tuned_by_hand(MUJOCO)}.",
            "",
            f"{n_former} runs of FPO are of the code up to commit baea80a, with half the ``ent_coef`` and 1.14 times the",
            "``action_scale`` of today's ``hyperparams/fpo.yml``: for a Gaussian policy, that was the same. Observations and",
            "rewards were normalized by ``VecNormalize``, where the policy does it today.",
            "",
            *sections,
            "To replicate (interrupted, it goes on where it stopped):",
            "",
            ".. code-block:: bash",
            "",
            "    python benchmarks/dmc.py --jobs 2",
            "    python benchmarks/report.py",
            "",
            f"Raw results of the {len(results)} runs, with curves, commands and commits ({n_dirty} with changes that were\n"
            "not committed, ``-dirty``): ``benchmarks/results/dmc``. "
            + ", ".join(f"{name} {number}" for name, number in versions.items())
            + f"; {'; '.join(hardware)}.",
            "",
        ]
    )
    PAGE.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
