"""The one place that registers operators in `torch.ops.sdmp`: schema, implementation, fake, autograd.

By `torch.library.Library`. `torch.library.custom_op` wraps every implementation for the compiler, so that the first
call of any op imports that (a second and a hundred megabytes), and its autograd takes lists of tensors apart by a
general walk over trees, which costs more on the host than all arithmetic on a few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from sdmp_kernels._checks import REAL

_LIBRARY = torch.library.Library("sdmp", "FRAGMENT")
_BELOW_AUTOGRAD = _C._after_autograd_keyset
_BELOW_VERSIONS = _C._after_ADInplaceOrView_keyset
_DEVICES = (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)


class Operator:
    """An operator of `torch.ops.sdmp`; its implementation serves every device.

    Autocast recasts none of its arguments. Unless `register_autograd` gives a formula, a backward pass through it
    raises: what has no derivative must not silently have a zero one.

    Attributes:
        name: of the operator.
        overload: what is called.
    """

    def __init__(self, name: str, run: Callable[..., Any], mutates: Sequence[str]) -> None:
        _LIBRARY.define(
            name + torch.library.infer_schema(run, mutates_args=mutates), tags=(torch.Tag.pt2_compliant_tag,)
        )
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        self.name = name
        self.overload = getattr(torch.ops.sdmp, name).default
        self._run = run
        self._written: list[int] = []
        self._record = self._refuse
        self._watched: Callable[[tuple[Any, ...]], Sequence[Any]] = _flat
        _LIBRARY.impl(name, self._autograd, "Autograd", with_keyset=True)
        if mutates:
            self._register_versions(mutates)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Say what shapes, dtypes and strides come out, for tensors without data."""
        torch.library.register_fake(f"sdmp::{self.name}", fake, lib=_LIBRARY)
        return fake

    def register_autograd(
        self, backward: Callable[..., tuple[Any, ...]], *, setup_context: Callable[..., None], of: Sequence[str]
    ) -> None:
        """Give the formula of the gradient.

        Args:
            backward: (ctx, *gradients of the results) to the gradients of the arguments `of`, one for every tensor.
            setup_context: (ctx, inputs, output), saves what `backward` needs; `inputs` are all arguments.
            of: names of the arguments that autograd watches: tensors, None, or lists of tensors, which are taken
                apart. `ctx.needs_input_grad` has one entry for each of these, after two for what is handed through.
        """
        places = self._places(of)
        arguments = self.overload._schema.arguments
        if any(str(arguments[place].type).startswith("List[Tensor") for place in places):
            self._watched = lambda args: _flat([args[place] for place in places])
        else:
            self._watched = lambda args: [args[place] for place in places]

        class Recorded(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, keyset: Any, args: tuple[Any, ...], *watched: Tensor) -> Any:
                output = self._below(keyset, args)
                setup_context(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return None, None, *backward(ctx, *grads)

        self._record = Recorded.apply

    def __call__(self, *args: Any) -> Any:
        """The operator: at once where its dispatcher would do nothing but come here, as for plain tensors of a CPU."""
        if self._written or not _unseen(args):
            return self.overload(*args)
        return self._recorded(None, args)

    def _autograd(self, keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(_has_tangent(tensor) for tensor in _flat(args)):
            raise NotImplementedError(
                f"{self.overload} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad), and a "
                "zero one would be wrong; use reverse mode (backward, torch.func.grad, torch.func.vjp)"
            )
        return self._recorded(keyset, args)

    def _recorded(self, keyset: Any, args: tuple[Any, ...]) -> Any:
        if torch.is_grad_enabled():
            watched = self._watched(args)
            if _C._any_requires_grad(*watched):
                return self._record(keyset, args, *watched)
        return self._below(keyset, args)

    def _below(self, keyset: Any, args: tuple[Any, ...]) -> Any:
        """Run the operator below autograd: by the dispatcher, or at once where it would do nothing else (or was not
        asked: no keyset).
        """
        with _C._AutoDispatchBelowAutograd():
            if keyset is None or (keyset & _BELOW_VERSIONS).highestPriorityTypeId() in _DEVICES:
                self._count_writes(args)
                return self._run(*args)
            return self.overload.redispatch(keyset & _BELOW_AUTOGRAD, *args)

    def _refuse(self, keyset: Any, args: tuple[Any, ...], *watched: Tensor) -> Any:
        """Without a formula: the results require a gradient, and a backward pass through them raises."""
        outputs: list[Any] = []

        class Refused(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *watched: Tensor) -> Any:
                outputs.append(self._below(keyset, args))
                return tuple(_flat(outputs))

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                raise RuntimeError(
                    f"{self.overload} has no autograd formula: its results cannot be differentiated; detach them first"
                )

        tensors = iter(Refused.apply(*watched))
        return _like(outputs[0], tensors)

    def _count_writes(self, args: tuple[Any, ...]) -> None:
        for place in self._written:
            if args[place] is not None and not args[place].is_inference():
                torch.autograd.graph.increment_version(args[place])

    def _places(self, names: Sequence[str]) -> list[int]:
        known = [argument.name for argument in self.overload._schema.arguments]
        return [known.index(name) for name in names]

    def _register_versions(self, mutates: Sequence[str]) -> None:
        """Count writes to the arguments `mutates`, so that autograd notices where it had saved one."""
        self._written = self._places(mutates)

        def counted(keyset: Any, *args: Any) -> Any:
            self._count_writes(args)
            return self.overload.redispatch(keyset & _BELOW_VERSIONS, *args)

        _LIBRARY.impl(self.name, counted, "ADInplaceOrView", with_keyset=True)


def unwatched() -> bool:
    """Whether nothing but its kernel answers to an operator of plain tensors called now: no graph, trace, transform,
    mode or forward-mode derivative. Whether a gradient is wanted, the tensors say.
    """
    return not (
        torch.compiler.is_compiling()  # first: a compiler must not look at the others
        or _C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or _C._functorch.peek_interpreter_stack() is not None
        or _C._get_tracing_state() is not None
    )


def operator(name: str, *, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Decorates the implementation of `torch.ops.sdmp.<name>`, whose annotations are its schema.

    Args:
        name: of the operator.
        mutates: names of the tensor arguments that are written to.

    Returns:
        The decorator, which makes an `Operator` of a function.
    """
    return lambda run: Operator(name, run, mutates)


def _unseen(args: tuple[Any, ...]) -> bool:
    """Whether no mode, transform, tracer, profiler or subclass of a tensor would see the operator on its way."""
    if not unwatched() or _C._is_torch_function_mode_enabled() or _C._autograd._profiler_enabled():
        return False
    for value in args:
        if isinstance(value, Tensor):
            if type(value) not in REAL or not value.is_cpu:
                return False
        elif type(value) is list:
            for item in value:
                if isinstance(item, Tensor) and (type(item) not in REAL or not item.is_cpu):
                    return False
    return True


def _flat(values: Sequence[Any]) -> list[Any]:
    """The tensors among values that are tensors, lists of tensors, or something else."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _flat(value)
    return found


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def _like(output: Any, tensors: Iterator[Tensor]) -> Any:
    """`output` with its tensors replaced by `tensors`, in order."""
    if isinstance(output, Tensor):
        return next(tensors)
    if isinstance(output, (list, tuple)):
        return type(output)(_like(item, tensors) for item in output)
    return output
