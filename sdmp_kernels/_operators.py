"""The one place that registers operators in `torch.ops.sdmp`: schema, implementation, fake, autograd.

By `torch.library.Library`. `torch.library.custom_op` wraps every implementation for the compiler, so that the first
call of any op imports that (a second and a hundred megabytes), and its autograd takes lists of tensors apart by a
general walk over trees, which costs more on the host than all arithmetic on a few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("sdmp", "FRAGMENT")
_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
_BELOW_VERSIONS = torch._C._after_ADInplaceOrView_keyset


class Operator:
    """An operator of `torch.ops.sdmp`; its implementation serves every device.

    Autocast recasts none of its arguments. Unless `register_autograd` gives a formula, a backward pass through it
    raises: what has no derivative must not silently have a zero one.
    """

    def __init__(self, name: str, run: Callable[..., Any], mutates: Sequence[str]) -> None:
        _LIBRARY.define(
            name + torch.library.infer_schema(run, mutates_args=mutates), tags=(torch.Tag.pt2_compliant_tag,)
        )
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        self.name = name
        self.overload = getattr(torch.ops.sdmp, name).default
        self._function = _refused(self.overload)
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
        names = [argument.name for argument in self.overload._schema.arguments]
        places = [names.index(name) for name in of]
        lists = [names.index(a.name) for a in self.overload._schema.arguments if str(a.type).startswith("List[Tensor")]
        if any(place in lists for place in places):
            self._watched = lambda args: _flat([args[place] for place in places])
        else:
            self._watched = lambda args: [args[place] for place in places]
        self._function = _function(self.overload, setup_context, backward)

    def _autograd(self, keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            watched = self._watched(args)
            if torch._C._any_requires_grad(*watched):
                return self._function(keyset, args, watched)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload.redispatch(keyset & _BELOW_AUTOGRAD, *args)

    def _register_versions(self, mutates: Sequence[str]) -> None:
        """Count writes to the arguments `mutates`, so that autograd notices where it had saved one."""
        names = [argument.name for argument in self.overload._schema.arguments]
        places = [names.index(name) for name in mutates]
        overload = self.overload

        def counted(keyset: Any, *args: Any) -> Any:
            for place in places:
                if args[place] is not None:
                    torch.autograd.graph.increment_version(args[place])
            return overload.redispatch(keyset & _BELOW_VERSIONS, *args)

        _LIBRARY.impl(self.name, counted, "ADInplaceOrView", with_keyset=True)


def operator(name: str, *, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Decorates the implementation of `torch.ops.sdmp.<name>`, whose annotations are its schema.

    Args:
        name: of the operator.
        mutates: names of the tensor arguments that are written to.
    """
    return lambda run: Operator(name, run, mutates)


def _function(
    overload: Any, setup_context: Callable[..., None], formula: Callable[..., tuple[Any, ...]]
) -> Callable[[Any, tuple[Any, ...], Sequence[Any]], Any]:
    """Runs an operator and records it for the backward pass."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, args: tuple[Any, ...], *watched: Tensor) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = overload.redispatch(keyset & _BELOW_AUTOGRAD, *args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return None, None, *formula(ctx, *grads)

    return lambda keyset, args, watched: Recorded.apply(keyset, args, *watched)


def _refused(overload: Any) -> Callable[[Any, tuple[Any, ...], Sequence[Any]], Any]:
    """Runs an operator that has no formula: its results require a gradient, and a backward pass through them raises."""

    class Refused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, spec: list[Any], keyset: Any, args: tuple[Any, ...], *watched: Tensor) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = overload.redispatch(keyset & _BELOW_AUTOGRAD, *args)
            spec.append(output)
            return tuple(_flat(output if isinstance(output, tuple) else (output,)))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(
                f"{overload} has no autograd formula: a derivative of this result is not computed; detach it first"
            )

    def run(keyset: Any, args: tuple[Any, ...], watched: Sequence[Any]) -> Any:
        spec: list[Any] = []
        tensors = iter(Refused.apply(spec, keyset, args, *watched))
        return _like(spec[0], tensors)

    return run


def _flat(values: Sequence[Any]) -> list[Any]:
    """The tensors among values that are tensors, lists of tensors, or something else."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def _like(output: Any, tensors: Iterator[Tensor]) -> Any:
    """`output` with its tensors replaced by `tensors`, in order."""
    if isinstance(output, Tensor):
        return next(tensors)
    if isinstance(output, (list, tuple)):
        return type(output)(_like(item, tensors) for item in output)
    return output
