"""
Optuna's search spaces of the algorithms, in the form that rl-zoo3 has for its own algorithms: a sampler, which suggests
parameters, and a converter, which makes hyperparameters of those of a finished trial.
"""

from typing import Any

import optuna

from sb3_flow.offline.values import Q_AGGREGATIONS

ON_POLICY_NET_ARCHS = {
    "flat": dict(pi=[64] * 2, vf=[256] * 2),
    "tiny": dict(pi=[32] * 4, vf=[64] * 2),
    "small": dict(pi=[32] * 4, vf=[256] * 2),
    "medium": dict(pi=[64] * 3, vf=[256] * 2),
    "large": dict(pi=[256] * 2, vf=[256] * 3),
}
NET_ARCHS: dict[str, dict[str, Any]] = {
    "fpo": ON_POLICY_NET_ARCHS,
    "dppo": ON_POLICY_NET_ARCHS,
    "offline": {"small": [128] * 3, "medium": [256] * 3, "large": [512] * 4},
}


def sample_on_policy_params(trial: optuna.Trial, n_envs: int, algo: str) -> dict[str, Any]:
    """
    :param trial: Trial
    :param n_envs: Number of environments
    :param algo: Name of the algorithm
    :return: parameters that on-policy algorithms have in common
    """
    # Rollouts of 1,024 to 16,384 transitions. A power of two up to the smallest divides them all: the bounds are the same
    # in each trial, as the sampler wants them
    n_envs_pow = (n_envs & -n_envs).bit_length() - 1
    min_n_steps_pow = max(10 - n_envs_pow, 3)
    return {
        "n_steps_pow": trial.suggest_int("n_steps_pow", min_n_steps_pow, min_n_steps_pow + 4),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 10),
        "n_epochs": trial.suggest_categorical("n_epochs", [5, 10, 16, 20]),
        "learning_rate": trial.suggest_float("learning_rate", 3e-5, 3e-3, log=True),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.001, 0.1, log=True),
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.01, 0.2, log=True),
        # (log_ratio_clip of FPO has to be more than -log(1 - clip_range))
        "clip_range": trial.suggest_float("clip_range", 0.05, 0.35, log=True),
        "max_grad_norm": trial.suggest_float("max_grad_norm", 0.2, 2, log=True),
        "action_scale": trial.suggest_float("action_scale", 0.1, 1, log=True),
        "net_arch": trial.suggest_categorical("net_arch", list(NET_ARCHS[algo])),
    }


def convert_on_policy_params(sampled_params: dict[str, Any], algo: str, of_policy: tuple[str, ...]) -> dict[str, Any]:
    """
    :param sampled_params: Parameters of a trial
    :param algo: Name of the algorithm
    :param of_policy: Those of its policy
    :return: hyperparameters
    """
    hyperparams = sampled_params.copy()
    for name in ("gamma", "gae_lambda"):
        hyperparams[name] = 1 - hyperparams.pop(f"one_minus_{name}")
    for name in ("n_steps", "batch_size"):
        hyperparams[name] = 2 ** hyperparams.pop(f"{name}_pow")
    policy_kwargs = {name: hyperparams.pop(name) for name in of_policy}
    policy_kwargs["net_arch"] = NET_ARCHS[algo][hyperparams.pop("net_arch")]
    return {"policy_kwargs": policy_kwargs, **hyperparams}


def show_values(trial: optuna.Trial, hyperparams: dict[str, Any], *names: str) -> dict[str, Any]:
    """
    :param trial: Trial
    :param hyperparams: Hyperparameters
    :param names: Those that the trial has other numbers of
    :return: the same hyperparameters, whose true values are displayed
    """
    for name in names:
        trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def sample_fpo_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict) -> dict[str, Any]:
    """
    Sampler for FPO hyperparams.

    :param trial: Trial
    :param n_actions: Number of action dimensions
    :param n_envs: Number of environments
    :param additional_args: What samplers of rl-zoo3 get, not used
    :return: hyperparameters
    """
    params = sample_on_policy_params(trial, n_envs, "fpo") | {
        "ent_coef": trial.suggest_float("ent_coef", 1e-5, 0.1, log=True),
        "n_mc_samples": trial.suggest_categorical("n_mc_samples", [4, 8, 16]),
        "ratio_type": trial.suggest_categorical("ratio_type", ["averaged", "per_sample"]),
        "action_perturbation_std": trial.suggest_categorical("action_perturbation_std", [0.0, 0.1, 0.2]),
    }
    return show_values(trial, convert_fpo_params(params), "n_steps", "batch_size", "gamma", "gae_lambda")


def convert_fpo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: Parameters of a trial of :func:`sample_fpo_params`
    :return: hyperparameters
    """
    return convert_on_policy_params(sampled_params, "fpo", ("action_scale", "action_perturbation_std"))


def sample_dppo_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict) -> dict[str, Any]:
    """
    Sampler for DPPO hyperparams.

    :param trial: Trial
    :param n_actions: Number of action dimensions
    :param n_envs: Number of environments
    :param additional_args: What samplers of rl-zoo3 get, not used
    :return: hyperparameters
    """
    params = sample_on_policy_params(trial, n_envs, "dppo") | {
        "gamma_denoising": trial.suggest_categorical("gamma_denoising", [0.9, 0.99, 1.0]),
        "n_flow_steps": trial.suggest_categorical("n_flow_steps", [2, 4, 10]),
        "noise_std": trial.suggest_float("noise_std", 0.05, 0.8, log=True),
    }
    return show_values(trial, convert_dppo_params(params), "n_steps", "batch_size", "gamma", "gae_lambda")


def convert_dppo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: Parameters of a trial of :func:`sample_dppo_params`
    :return: hyperparameters
    """
    return convert_on_policy_params(sampled_params, "dppo", ("action_scale", "n_flow_steps", "noise_std"))


def sample_offline_params(trial: optuna.Trial, has_values: bool = True) -> dict[str, Any]:
    """
    :param trial: Trial
    :param has_values: Whether the algorithm learns values
    :return: parameters that offline algorithms have in common
    """
    params = {
        "learning_rate": trial.suggest_float("learning_rate", 3e-5, 1e-3, log=True),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 7, 10),
        "n_flow_steps": trial.suggest_categorical("n_flow_steps", [5, 10]),
        "net_arch": trial.suggest_categorical("net_arch", list(NET_ARCHS["offline"])),
    }
    if has_values:
        params |= {
            "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.001, 0.05, log=True),
            "tau": trial.suggest_float("tau", 0.002, 0.05, log=True),
        }
    return params


def convert_offline_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: Parameters of a trial of one of the offline algorithms
    :return: hyperparameters
    """
    hyperparams = sampled_params.copy()
    hyperparams["batch_size"] = 2 ** hyperparams.pop("batch_size_pow")
    if "one_minus_gamma" in hyperparams:
        hyperparams["gamma"] = 1 - hyperparams.pop("one_minus_gamma")
    of_policy = [name for name in ("n_flow_steps", "n_samples") if name in hyperparams]
    policy_kwargs: dict[str, Any] = {name: hyperparams.pop(name) for name in of_policy}
    policy_kwargs["net_arch"] = NET_ARCHS["offline"][hyperparams.pop("net_arch")]
    return {"policy_kwargs": policy_kwargs, **hyperparams}


def convert_normalized_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: Parameters of a trial of an algorithm whose ``alpha`` is that of a normalized Q term
    :return: hyperparameters
    """
    return {"normalize_q_loss": True, **convert_offline_params(sampled_params)}


def sample_fql_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict) -> dict[str, Any]:
    """
    Sampler for FQL and FBRAC hyperparams. ``alpha`` is that of a normalized Q term, for which the authors of FQL recommend
    this range.

    :param trial: Trial
    :param n_actions: Number of action dimensions
    :param n_envs: Number of environments
    :param additional_args: What samplers of rl-zoo3 get, not used
    :return: hyperparameters
    """
    params = sample_offline_params(trial) | {
        "q_agg": trial.suggest_categorical("q_agg", Q_AGGREGATIONS),
        "alpha": trial.suggest_float("alpha", 0.03, 10, log=True),
    }
    return show_values(trial, convert_normalized_params(params), "batch_size", "gamma")


def sample_ifql_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict) -> dict[str, Any]:
    """
    Sampler for IFQL hyperparams.

    :param trial: Trial
    :param n_actions: Number of action dimensions
    :param n_envs: Number of environments
    :param additional_args: What samplers of rl-zoo3 get, not used
    :return: hyperparameters
    """
    params = sample_offline_params(trial) | {
        "q_agg": trial.suggest_categorical("q_agg", Q_AGGREGATIONS),
        "expectile": trial.suggest_categorical("expectile", [0.7, 0.9, 0.95]),
        "n_samples": trial.suggest_categorical("n_samples", [8, 32, 128]),
    }
    return show_values(trial, convert_offline_params(params), "batch_size", "gamma")


def sample_qc_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict) -> dict[str, Any]:
    """
    Sampler for QC hyperparams.

    :param trial: Trial
    :param n_actions: Number of action dimensions
    :param n_envs: Number of environments
    :param additional_args: What samplers of rl-zoo3 get, not used
    :return: hyperparameters
    """
    params = sample_offline_params(trial) | {
        "chunk_size": trial.suggest_categorical("chunk_size", [3, 5, 10]),
        "n_samples": trial.suggest_categorical("n_samples", [8, 32, 128]),
    }
    return show_values(trial, convert_offline_params(params), "batch_size", "gamma")


def sample_fawac_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict) -> dict[str, Any]:
    """
    Sampler for FAWAC hyperparams.

    :param trial: Trial
    :param n_actions: Number of action dimensions
    :param n_envs: Number of environments
    :param additional_args: What samplers of rl-zoo3 get, not used
    :return: hyperparameters
    """
    params = sample_offline_params(trial) | {
        "q_agg": trial.suggest_categorical("q_agg", Q_AGGREGATIONS),
        "alpha": trial.suggest_float("alpha", 0.1, 10, log=True),
    }
    return show_values(trial, convert_offline_params(params), "batch_size", "gamma")


def sample_flow_bc_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict) -> dict[str, Any]:
    """
    Sampler for FlowBC hyperparams.

    :param trial: Trial
    :param n_actions: Number of action dimensions
    :param n_envs: Number of environments
    :param additional_args: What samplers of rl-zoo3 get, not used
    :return: hyperparameters
    """
    return show_values(trial, convert_offline_params(sample_offline_params(trial, has_values=False)), "batch_size")


SAMPLERS = {
    "fpo": sample_fpo_params,
    "dppo": sample_dppo_params,
    "fql": sample_fql_params,
    "ifql": sample_ifql_params,
    "qc": sample_qc_params,
    "fbrac": sample_fql_params,
    "fawac": sample_fawac_params,
    "flow_bc": sample_flow_bc_params,
}
CONVERTERS = {
    "fpo": convert_fpo_params,
    "dppo": convert_dppo_params,
    "fql": convert_normalized_params,
    "ifql": convert_offline_params,
    "qc": convert_offline_params,
    "fbrac": convert_normalized_params,
    "fawac": convert_offline_params,
    "flow_bc": convert_offline_params,
}
