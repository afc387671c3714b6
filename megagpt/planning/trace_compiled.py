"""torch.compile as a trace sees it, on a machine without a GPU or a compiler.

AOTAutograd cuts each compiled function into its forward and backward graph, as in a run: that decides what is saved.
Inductor is not asked, because it would need a GPU; of its kernels one thing counts here: operators between two matrix
products are fused, so only the results are written that a product, an attention kernel, a reduction or the graph's
output takes."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from megagpt.planning.trace_counter import Counter

# Operators that are kernels of their own: the word in their name.
_KERNELS = ("mm", "all_gather", "all_to_all", "attention", "embedding_dense_backward", "index_put", "rng_state")
_REDUCTIONS = ("sum", "amax", "amin", "var_mean", "mean", "max")
_VIEWS = ("view", "permute", "transpose", "expand", "squeeze", "slice", "split", "as_strided", "select", "alias",
          "detach", "getitem", "wait_tensor")  # fmt: skip

Keep = Callable[..., CheckpointPolicy]
"""Whether activation checkpointing keeps the output of an operator: (context, operator, *arguments)."""


class PretendCompiler:
    """Stands for `torch.compile` of a model's parts: equal parts share one pair of graphs."""

    def __init__(self, counter: Counter, keep: Keep | None) -> None:
        """`keep`: the rule of selective activation checkpointing; None: checkpointed blocks keep nothing."""
        self._counter, self._keep = counter, keep
        self._graphs: dict[Any, Callable[..., Any]] = {}
        self._tracing = False

    def compile(self, function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        """The function in graphs. It may be a module's method, wrapped in activation checkpointing or not."""
        inner = getattr(function, "__wrapped__", function)
        owner = getattr(inner, "__self__", None)

        @functools.wraps(function)
        def compiled(*arguments: Any) -> Any:
            names, weights = zip(*owner.named_parameters(), strict=True) if owner is not None else ((), ())
            tensors = [*weights, *(a for a in arguments if isinstance(a, Tensor))]
            others = [None if isinstance(a, Tensor) else (a,) for a in arguments]
            key = (inner.__qualname__, inner is function, repr(others), _form(owner), *map(_describe, tensors))
            with self._counter.paused():
                if key not in self._graphs:
                    flat = functools.partial(_call, inner, owner, names, others)
                    self._graphs[key] = self._trace(flat, tensors, checkpointed=inner is not function)
                return self._graphs[key](*tensors)

        return compiled

    def _trace(self, flat: Callable[..., Any], tensors: list[Tensor], checkpointed: bool) -> Callable[..., Any]:
        cut = functools.partial(self._cut, checkpointed)
        tables = select_decomp_table()
        graphs = aot_function(flat, self._run, self._run, partition_fn=cut, decompositions=tables)
        # With tensors of its own, because the graphs keep those that they were traced with.
        self._tracing = True
        graphs(*(torch.empty_like(t).requires_grad_(t.requires_grad) for t in tensors))
        self._tracing = False
        return graphs

    def _cut(self, checkpointed: bool, joint: fx.GraphModule, inputs: Any, **settings: Any) -> Any:
        """The forward and backward graph, with what the user's activation checkpointing recomputes."""
        if checkpointed:
            for node in joint.graph.nodes:
                if node.op == "call_function" and node.meta.get("partitioner_tag") != "is_backward":
                    node.meta["recompute"] = self._rule(node)
                    node.meta["ac_graph_id"] = 0
        return min_cut_rematerialization_partition(joint, inputs, **settings)

    def _rule(self, node: fx.Node) -> Any:
        if self._keep is None:
            return CheckpointPolicy.PREFER_RECOMPUTE
        if _name(node) == "getitem":
            return node.args[0].meta["recompute"]  # type: ignore[union-attr]
        return self._keep(None, node.target, *(a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args))

    def _run(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[[list[Any]], Any]:
        interpreter = _Interpreter(gm, self._written)

        def boxed(arguments: list[Any]) -> Any:
            taken = list(arguments)
            arguments.clear()
            with self._counter.paused():
                try:
                    return interpreter.boxed_run(taken)
                finally:
                    interpreter.env, interpreter.args_iter = {}, iter(())  # so that nothing outlives the run

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    def _written(self, result: Any, operator: str) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not self._tracing:
                self._counter.add(leaf, operator)


class _Interpreter(fx.Interpreter):
    """Runs a graph on fake tensors, and tells of those results that a compiled graph writes to memory."""

    def __init__(self, graph: fx.GraphModule, on_write: Callable[[Any, str], None]) -> None:
        super().__init__(graph)
        self._on_write = on_write
        self._written = {node for node in graph.graph.nodes if node.op == "call_function" and _is_written(node)}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if node in self._written:
            self._on_write(result, f"compiled {_name(node)}")
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # A recomputed kernel that may draw random numbers is wrapped in the generator's state.
        name = getattr(target, "__name__", "")
        if name == "run_and_save_rng_state":
            return torch.empty(16, dtype=torch.uint8), args[0](*args[1:], **kwargs)
        if name == "run_with_rng_state":
            return args[1](*args[2:], **kwargs)
        if name == "wait_tensor.default":  # it returns what it waits for; of a fake tensor it would make another one
            return args[0]
        return super().call_function(target, args, kwargs)


def _is_written(node: fx.Node) -> bool:
    name = _name(node)
    if any(word in name for word in _KERNELS) or name in _REDUCTIONS:
        return True
    return not _is_view(node) and _is_read(node)


def _is_read(node: fx.Node) -> bool:
    """Whether a kernel or the graph's caller reads the value itself, or a view of it."""
    for user in node.users:
        kernel = user.op == "output" or any(word in _name(user) for word in _KERNELS)
        if kernel or (_is_view(user) and _is_read(user)):
            return True
    return False


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and any(word in _name(node) for word in _VIEWS)


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", str(node.target))


def _call(function: Any, owner: nn.Module | None, names: Any, others: list[Any], *tensors: Tensor) -> Any:
    given = iter(tensors[len(names) :])
    arguments = [next(given) if other is None else other[0] for other in others]
    if owner is None:
        return function(*arguments)
    with _reparametrize_module(owner, dict(zip(names, tensors, strict=False))):
        return function(*arguments)


def _form(owner: nn.Module | None) -> Any:
    """The property that tells parts of one class apart: the window of a block's attention."""
    return getattr(getattr(owner, "attention", None), "window", None)


def _describe(tensor: Tensor) -> Any:
    return tuple(tensor.shape), tensor.dtype, tensor.requires_grad
