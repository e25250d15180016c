"""
A study of Optuna that several workers share. A trial of a worker that was killed is taken over by another: it is neither
lost nor counted twice.
"""

import contextlib
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

#: A worker tells that its trial is alive this often, in seconds
HEARTBEAT_INTERVAL = 30
#: After so many seconds without a sign of life, a trial is failed and retried with the same hyperparameters
GRACE_PERIOD = 120
#: So many times, for it may be the trial that kills its worker
MAX_RETRIES = 3
#: As rl-zoo3 counts them for --max-total-trials
COUNTED_STATES = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


class JournalHeartbeatStorage(JournalStorage, BaseHeartbeat):
    """
    Optuna's journal file, with the heartbeat that it has for databases only: the time, in an attribute of the trial.
    The clocks of the workers have to agree within the grace period.
    """

    KEY = "heartbeat"

    def record_heartbeat(self, trial_id: int) -> None:
        # Too late: another worker took it for dead
        with contextlib.suppress(UpdateFinishedTrialError):
            self.set_trial_system_attr(trial_id, self.KEY, time.time())

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        stale = []
        for trial in self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,)):
            assert trial.datetime_start is not None
            # (a trial that is retried has the heartbeat of the one before)
            last_sign = max(trial.system_attrs.get(self.KEY, 0.0), trial.datetime_start.timestamp())
            if time.time() - last_sign > GRACE_PERIOD:
                stale.append(trial._trial_id)
        return stale

    def get_heartbeat_interval(self) -> int | None:
        return HEARTBEAT_INTERVAL

    def get_heartbeat_stale_trial_callback(self) -> RetryHeartbeatStaleTrialCallback:
        return _retry()


def _retry() -> RetryHeartbeatStaleTrialCallback:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RetryHeartbeatStaleTrialCallback(MAX_RETRIES)


def open_storage(storage: str) -> BaseStorage:
    """
    :param storage: Path of a journal file (``.log``), or URL of a database, as for ``--storage``
    :return: the storage, with a heartbeat
    """
    if storage.endswith(".log"):
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        return JournalHeartbeatStorage(JournalFileBackend(storage))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RDBStorage(
            storage,
            # A connection may be lost during a long trial
            engine_kwargs=dict(pool_pre_ping=True),
            heartbeat_interval=HEARTBEAT_INTERVAL,
            grace_period=GRACE_PERIOD,
            heartbeat_stale_trial_callback=_retry(),
        )


def optimize_together(
    study: optuna.Study, objective: Callable[[optuna.Trial], float], max_total_trials: int, n_jobs: int = 1
) -> None:
    """
    Run trials until ``max_total_trials`` of all workers are finished, those of the workers that were killed included.

    :param study: The study, in a storage with a heartbeat
    :param objective: What a trial is to maximize
    :param max_total_trials: Number of trials, completed or pruned
    :param n_jobs: Number of trials at once in this worker
    """

    begun: set[int] = set()

    def wanted_objective(trial: optuna.Trial) -> float:
        begun.add(trial.number)
        earlier = [t for t in study.get_trials(deepcopy=False, states=COUNTED_STATES) if t.number < trial.number]
        if len(earlier) >= max_total_trials:
            print(f"Trial {trial.number} is not needed: another worker began the last one at the same moment")
            return float("nan")  # which fails it
        return objective(trial)

    waits = False
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
        trials = study.get_trials(deepcopy=False, states=COUNTED_STATES)
        running = [trial.number for trial in trials if trial.state == TrialState.RUNNING]
        if len(trials) < max_total_trials:
            n_trials = min(n_jobs, max_total_trials - len(trials))
            begun.clear()
            try:
                study.optimize(wanted_objective, n_trials, n_jobs=n_jobs, gc_after_trial=True)
            except (UpdateFinishedTrialError, ValueError):
                # The result of a trial that was failed meanwhile is refused
                retried = {
                    number for t in study.get_trials(deepcopy=False) for number in t.system_attrs.get("retry_history", ())
                }
                if not begun & retried:
                    raise
                print(f"The trials {sorted(begun & retried)} were taken over: this worker showed no sign of life for too long")
        elif running:
            if not waits:
                print(f"Waiting for the trials {running} of other workers, to take them over if they are killed")
            waits = True
            time.sleep(1)
        else:
            return
