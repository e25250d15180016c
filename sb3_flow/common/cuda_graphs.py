"""
Updates as one CUDA graph each: with networks of this size, starting kernels one by one takes longer than what they compute.

A graph replays the kernels of its capture, on the same memory: whatever it depends on is a tensor that stays where it is, or
part of what :class:`Graphs` compares before each replay. What is not known to be captured as it is written, see
:func:`find_obstacle`, takes the plain path. On a CPU the same functions run as they are, without a graph.
"""

import gc
import itertools
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, TypeVar, cast

import torch as th
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor, NatureCNN
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import _has_any_global_hook
from torch.optim import optimizer as optimizers

from sb3_flow.common.activations import ELEMENTWISE, is_transformed
from sb3_flow.common.in_place import hidden_attributes, hooks_of
from sb3_flow.common.networks import EnsembleMLP, FlowNetwork, ImpalaCNN, Residual, TimestepEmbedding
from sb3_flow.common.normalization import (
    NormalizedCombinedExtractor,
    NormalizedFlattenExtractor,
    RunningNormalization,
    RunningStatistics,
    ValueNormalization,
)

#: Calls that run without a graph before the capture: libraries are initialized, the state of an optimizer is created
N_WARM_UP = 3
#: Modules that a graph replays as they are: no chance, no buffers, nothing that is decided by the values of tensors
KNOWN_MODULES = {
    *(nn.Linear, nn.Conv2d, nn.MaxPool2d, nn.Flatten, nn.LayerNorm, nn.Sequential),
    *(nn.ModuleList, nn.ModuleDict, nn.ParameterList),
    *(FlattenExtractor, CombinedExtractor, NatureCNN, MlpExtractor),
    *(NormalizedFlattenExtractor, NormalizedCombinedExtractor, RunningNormalization, RunningStatistics, ValueNormalization),
    *(TimestepEmbedding, FlowNetwork, EnsembleMLP, ImpalaCNN, Residual),
    *ELEMENTWISE,
}  # fmt: skip
#: Samplers without a decision in them
CAPTURED_SAMPLERS = ("euler", "sde")
_data_ptr, _requires_grad, _shape = th.Tensor.data_ptr, attrgetter("requires_grad"), attrgetter("shape")

Tree = TypeVar("Tree")


def leaves(tree: Any) -> list[th.Tensor]:
    """
    :param tree: Tensors in dictionaries and (named) tuples, or None
    :return: the tensors
    """
    if isinstance(tree, th.Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree or ()
    return [leaf for child in children for leaf in leaves(child)]


def layout(tree: Any) -> tuple:
    """
    :param tree: Tensors
    :return: what tells whether others can be copied into them
    """
    return tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves(tree))


def clone(tree: Any) -> Any:
    """
    :param tree: Tensors
    :return: a copy of them, in the same dictionaries and tuples
    """
    if isinstance(tree, th.Tensor):
        return tree.detach().clone(memory_format=th.contiguous_format)
    if isinstance(tree, dict):
        return {key: clone(child) for key, child in tree.items()}
    return None if tree is None else type(tree)(*map(clone, tree))


def copy_into(static: Tree, tree: Tree) -> None:
    """
    :param static: Tensors that stay where they are
    :param tree: Their new values
    """
    th._foreach_copy_(leaves(static), leaves(tree))


#: Streams beside the main one, while an update is captured
_side_streams: list[th.cuda.Stream] | None = None


def in_parallel(*functions: Callable[[], Any]) -> list[Any]:
    """
    Call functions that do not depend on each other: in the graph of an update, their kernels may run at the same time.

    :param functions: Functions without arguments
    :return: what they return
    """
    if _side_streams is None:
        return [function() for function in functions]
    main = th.cuda.current_stream()
    others = [th.cuda.Stream() for _ in functions[1:]]
    _side_streams.extend(others)
    for stream in others:
        stream.wait_stream(main)
    results = []
    for stream, function in zip([main, *others], functions, strict=True):
        with th.cuda.stream(stream):
            results.append(function())
    for stream in others:
        main.wait_stream(stream)
    return results


@contextmanager
def _side_by_side() -> Iterator[None]:
    """
    While an update is captured, :func:`in_parallel` has streams of its own, and the gradients too.

    When a tensor is gone, the stream that it was allocated on may use its memory again, whoever else still reads it. A batch
    that is saved for the gradients of another stream would be overwritten: what is saved is kept until all streams are done.
    """
    global _side_streams
    if not (th.cuda.is_initialized() and th.cuda.is_current_stream_capturing()):
        yield
        return
    kept: list[th.Tensor] = []

    def keep(x: th.Tensor) -> th.Tensor:
        kept.append(x)
        return x

    _side_streams = []
    # Gradients of a parameter that come from several streams are waited for: there is nothing to warn of
    warn = getattr(th.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", lambda enabled: None)
    warn(False)
    try:
        with saved_tensors_hooks(keep, lambda x: x):
            yield
        for stream in _side_streams:
            th.cuda.current_stream().wait_stream(stream)
    finally:
        warn(True)
        _side_streams = None


class CapturedFunction:
    """
    A function of tensors that stay where they are. The first calls run it as it is (warm-up, and they count), then it is
    captured. On a CPU, or if the capture fails (there is a warning), it always runs as it is.

    :param function: Function without arguments, to a tensor
    :param device: PyTorch device of what it computes
    """

    def __init__(self, function: Callable[[], th.Tensor], device: th.device):
        self.function = function
        self.device = device
        self.n_calls = 0
        self.graph: th.cuda.CUDAGraph | None = None

    def __call__(self) -> th.Tensor:
        """:return: the result, overwritten by the next call"""
        if self.device.type != "cuda":
            return self.function()
        self.n_calls += 1
        if self.n_calls == N_WARM_UP + 1:
            self._capture()
        if self.graph is None:
            # Not on the stream that others use, which a capture would wait for
            stream, current = th.cuda.Stream(self.device), th.cuda.current_stream(self.device)
            stream.wait_stream(current)
            with th.cuda.stream(stream):
                self.result = self.function()
            current.wait_stream(stream)
            self.result.record_stream(current)
        else:
            self.graph.replay()
        return self.result

    def _capture(self) -> None:
        graph, stream = th.cuda.CUDAGraph(), th.cuda.current_stream(self.device)
        generator = th.cuda.default_generators[stream.device_index]
        state = generator.clone_state()
        # What is no longer used must not be freed during the capture
        gc.collect()
        enabled = gc.isenabled()
        gc.disable()
        try:
            # (other threads may do what they like meanwhile)
            capture = th.cuda.graph(graph, stream=th.cuda.Stream(self.device), capture_error_mode="thread_local")
            with th.cuda.device(self.device), capture:
                self.result = self.function()
            self.graph = graph
        except RuntimeError as error:
            # As if nothing had been tried: the calls are not made before the replay
            th.cuda.set_stream(stream)
            generator.graphsafe_set_state(state)
            warnings.warn(f"`compile=True` has no effect here, the capture failed: {str(error).splitlines()[0]}")
        finally:
            if enabled:
                gc.enable()


class Guard:
    """
    What is remembered on the device of the first update that was not finite. Neither it nor those after it change weights.

    :param n_values: Number of statistics
    :param device: PyTorch device
    """

    def __init__(self, n_values: int, device: th.device):
        #: One if there was such an update, else zero
        self.failed = th.zeros((), device=device)
        #: Its statistics
        self.values = th.zeros(n_values, device=device)

    def update(self, values: th.Tensor, checked: th.Tensor) -> None:
        """
        :param values: Statistics of an update
        :param checked: What must be finite
        """
        self.values.copy_(th.where(self.failed > 0, self.values, values))
        self.failed.copy_(th.maximum(self.failed, 1 - th.isfinite(checked).all().to(self.failed)))

    def read(self) -> list[float] | None:
        """
        Wait for the device, and start anew.

        :return: statistics of the first update that was not finite, None if there was none
        """
        if not self.failed.item():
            return None
        values = self.values.tolist()
        self.failed.zero_()
        return values


@contextmanager
def _step_in_graph(optimizer: th.optim.Optimizer, lr: th.Tensor, found_inf: th.Tensor) -> Iterator[None]:
    """Adam with a learning rate that can change after the capture, and without effect if ``found_inf`` is one."""
    before = [(group["lr"], group["capturable"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["capturable"] = lr.is_cuda and th.cuda.is_current_stream_capturing()
    # (as th.amp.GradScaler tells a fused optimizer)
    cast(Any, optimizer).found_inf = found_inf
    try:
        yield
    finally:
        del cast(Any, optimizer).found_inf
        for group, (learning_rate, capturable) in zip(optimizer.param_groups, before, strict=True):
            group["lr"], group["capturable"] = learning_rate, capturable


class CapturedUpdate:
    """
    One update of the weights: losses, gradients, and the step of the optimizer, which is left out from the first one on that
    is not finite.

    :param optimizer: Optimizer of the weights, see :func:`find_obstacle`
    :param losses: Function to the loss and its statistics
    :param backward: Function of the loss that computes its gradients, to what must be finite (None: the statistics)
    :param device: PyTorch device
    :param guards: Where the guard of the updates is kept, by the names of the statistics
    :param before_step: Called before the step, with one, or zero where it is left out
    """

    def __init__(
        self,
        optimizer: th.optim.Optimizer,
        losses: Callable[[], tuple[th.Tensor, dict[str, th.Tensor]]],
        backward: Callable[[th.Tensor], th.Tensor | None],
        device: th.device,
        guards: dict[tuple[str, ...], Guard],
        before_step: Callable[[th.Tensor], None] | None = None,
    ):
        self.optimizer = optimizer
        self.losses = losses
        self.backward = backward
        self.before_step = before_step
        self.guards = guards
        self.learning_rate: float | None = None
        self.lr = th.zeros((), device=device)
        self.names: tuple[str, ...] = ()
        self.function = CapturedFunction(self._update, device)

    def _update(self) -> th.Tensor:
        with _side_by_side():
            loss, statistics = self.losses()
            checked = self.backward(loss)
        values = th.stack([*statistics.values()]).detach()
        self.names = tuple(statistics)
        if self.names not in self.guards:
            self.guards[self.names] = Guard(len(values), values.device)
        guard = self.guards[self.names]
        guard.update(values, values if checked is None else checked)
        if self.before_step is not None:
            self.before_step(1 - guard.failed)
        with _step_in_graph(self.optimizer, self.lr, guard.failed):
            self.optimizer.step()
        return values

    def __call__(self) -> th.Tensor:
        """:return: statistics, see ``names``"""
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if learning_rate != self.learning_rate:
            self.learning_rate = learning_rate
            self.lr.fill_(learning_rate)
        return self.function().clone()


class ModuleState:
    """
    What a graph that calls a module depends on, but for the values of parameters. It is compared before each replay, in few
    calls.

    :param module: The module
    """

    def __init__(self, module: nn.Module):
        self.modules = [*module.modules()]
        self._types = [*map(type, self.modules)]
        self._hooks = [hooks for part in self.modules for hooks in hooks_of(part)]
        # Dictionaries, and copies of them. Most of what they have is the same object
        self._attributes = [part.__dict__ for part in self.modules]
        self._attributes += [part._modules for part in self.modules]
        self._kept = [*map(dict, self._attributes)]
        self._dicts: list[dict[str, Any]] = [tensors for part in self.modules for tensors in (part._parameters, part._buffers)]
        # (they must not go: an object of later may have the same address)
        self._tensors = [x for x in self._get_tensors() if x is not None]
        self._state = self._get_state()

    def _get_tensors(self) -> list[th.Tensor | None]:
        return [*itertools.chain.from_iterable([tensors.values() for tensors in self._dicts])]

    def _get_state(self) -> tuple[list, ...]:
        tensors = self._tensors
        ids, sizes = [*map(id, self._get_tensors())], [*map(len, self._dicts)]
        return ids, sizes, [*map(_data_ptr, tensors)], [*map(_shape, tensors)], [*map(_requires_grad, tensors)]

    def has_changed(self) -> bool:
        """:return: whether another capture is needed"""
        try:
            return (
                any(self._hooks)
                or _has_any_global_hook()
                or [*map(type, self.modules)] != self._types
                or self._attributes != self._kept
                or self._get_state() != self._state
            )
        except (RuntimeError, ValueError):
            # Attributes that are other arrays or tensors now
            return True


class OptimizerState:
    """
    What a graph that steps an optimizer depends on, but for the learning rate.

    :param optimizer: The optimizer
    """

    def __init__(self, optimizer: th.optim.Optimizer):
        self.optimizer = optimizer
        self._tensors = self._get_tensors()
        self._state = self._get_state()

    def _get_tensors(self) -> list[Any]:
        tensors = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        tensors += itertools.chain.from_iterable([state.values() for state in self.optimizer.state.values()])
        return tensors

    def _get_state(self) -> tuple[list, ...]:
        groups = self.optimizer.param_groups
        options = [value for group in groups for name, value in group.items() if name not in ("params", "lr")]
        return options, [*map(id, self._get_tensors())], [*map(_data_ptr, self._tensors)]

    def has_changed(self) -> bool:
        """:return: whether another capture is needed"""
        return self._get_state() != self._state


def attributes_state(x: object) -> list:
    """
    :param x: Object, which may have tensors
    :return: what its attributes are, but for the values of tensors
    """
    return [
        [(leaf.data_ptr(), leaf.shape) for leaf in leaves(value)] if isinstance(value, (th.Tensor, dict)) else value
        for value in vars(x).values()
    ]


def global_state() -> tuple:
    """:return: settings of PyTorch that choose kernels"""
    return (
        th.get_float32_matmul_precision(),
        th.backends.cudnn.allow_tf32,
        th.backends.cudnn.deterministic,
        th.backends.cudnn.benchmark,
        th.are_deterministic_algorithms_enabled(),
        th.is_autocast_enabled("cuda"),
        th.is_anomaly_enabled(),
        is_distributed(),
    )


def is_distributed() -> bool:
    """:return: whether there are several processes"""
    return th.distributed.is_available() and th.distributed.is_initialized()


class Graphs(dict):
    """
    Captured functions, by what they are for, and the state that all of them depend on. They are not copied or saved with what
    keeps them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.module_state: ModuleState | None = None
        self.optimizer_state: OptimizerState | None = None
        self.key: Any = None
        self.guards: dict[tuple[str, ...], Guard] = {}
        #: Why nothing is captured, if so
        self.obstacle: str | None = None
        #: Names, and values for each update, of statistics that are not logged yet
        self.unread: tuple[Iterable[str], list[th.Tensor]] = (), []
        #: Whether somebody else waits for the updates
        self.is_queue = False
        self._announced: set[str] = set()

    def __reduce__(self) -> tuple:
        return Graphs, ()

    def is_current(self, key: Hashable, module: nn.Module, optimizer: th.optim.Optimizer | None = None) -> bool:
        """
        :param key: What the functions depend on, but for
        :param module: what they call
        :param optimizer: and what they step
        :return: whether what was captured can be replayed
        """
        of_module, of_optimizer = self.module_state, self.optimizer_state
        if of_module is None or of_module.modules[0] is not module or of_module.has_changed() or key != self.key:
            return False
        if of_optimizer is None or optimizer is None:
            return of_optimizer is optimizer
        return of_optimizer.optimizer is optimizer and not of_optimizer.has_changed()

    def restart(
        self, obstacle: str | None, key: Hashable, module: nn.Module, optimizer: th.optim.Optimizer | None = None
    ) -> None:
        """
        Forget what was captured.

        :param obstacle: Why nothing is captured from now on, if so (there is one warning of it)
        :param key: What the functions will depend on, but for
        :param module: what they will call
        :param optimizer: and what they will step
        """
        self.clear()
        self.obstacle, self.key, self.module_state = obstacle, key, ModuleState(module)
        self.optimizer_state = None if optimizer is None else OptimizerState(optimizer)
        if obstacle is not None and obstacle not in self._announced:
            self._announced.add(obstacle)
            warnings.warn(f"`compile=True` has no effect here: {obstacle}")

    def failure(self) -> dict[str, float] | None:
        """
        Wait for the device.

        :return: statistics of the first update that was not finite (since the last call), None if there was none
        """
        for names, guard in self.guards.items():
            values = guard.read()
            if values is not None:
                return dict(zip(names, values, strict=True))
        return None


def has_replaced_methods(model: object, kind: type) -> bool:
    """
    :param model: Algorithm
    :param kind: Class whose updates are captured
    :return: whether it may do something else: it is of a subclass, or has attributes in place of methods
    """
    return type(model) is not kind or any(callable(model.__dict__[name]) for name in hidden_attributes(model))


def find_obstacle(module: nn.Module, containers: Iterable[type], optimizer: th.optim.Optimizer | None = None) -> str | None:
    """
    :param module: What a graph would call
    :param containers: Classes of modules that are known besides ``KNOWN_MODULES``
    :param optimizer: What it would step
    :return: why it is not captured, None if it is
    """
    known = {*containers, *KNOWN_MODULES}
    for part in module.modules():
        name = type(part).__name__
        if type(part) not in known:
            return f"the module {name} is not one of those that are known to be replayed as they are"
        if any(hooks_of(part)) or _has_any_global_hook():
            return f"{name} has hooks"
        if any(callable(part.__dict__[attribute]) for attribute in hidden_attributes(part)):
            return f"a method of {name} was replaced"
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if type(tensor) not in (nn.Parameter, th.Tensor) or tensor.layout is not th.strided:
            return f"there is a parameter of type {type(tensor).__name__}"
    if optimizer is not None:
        if type(optimizer) not in (th.optim.Adam, th.optim.AdamW):
            return f"the optimizer {type(optimizer).__name__} is not Adam or AdamW"
        groups = optimizer.param_groups
        if any(group["lr"] != groups[0]["lr"] or isinstance(group["lr"], th.Tensor) for group in groups):
            return "the learning rate of the optimizer is not one number"
        if not all(group["fused"] and not group["differentiable"] for group in groups):
            return "the optimizer is not fused"
        hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
        if any(hooks) or optimizers._global_optimizer_pre_hooks or optimizers._global_optimizer_post_hooks:
            return "the optimizer has hooks"
        if "step" in optimizer.__dict__:
            return "a method of the optimizer was replaced"
    if is_distributed():
        return "there are several processes"
    if th.is_autocast_enabled("cuda") or th.is_anomaly_enabled() or is_transformed():
        return "PyTorch does something else with operations than to compute them"
    return None
