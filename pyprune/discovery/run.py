"""Running a model once under the tracer, and leaving it exactly as it was.

The model runs on fake tensors (shapes without data), so weights on the meta device do as well as real ones and nothing
is allocated. Where an op needs values that fakes do not have, the run is repeated on real tensors.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from pyprune.discovery import axes as ax
from pyprune.discovery.intercept import Interceptor
from pyprune.discovery.tracer import Info, Tracer, iter_tensors
from pyprune.discovery.valueless import ValuelessOps
from pyprune.errors import PyPruneError

# Different from each other and from 1, so that no dimension of data broadcasts.
BATCH, LENGTH = 3, 11
MANY = 59
# What stands in for the model's tensors: shapes on the meta device; fakes, which know constants and a device to be on,
# at four times the cost an op; the tensors themselves.
META, FAKE, REAL = "meta", "fake", "real"
_DEVICE = {META: "meta", FAKE: "cpu"}
_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


@dataclass
class Trace:
    """What one run showed.

    Attributes:
        tracer: labels' side effects (uses, seen tuples, problems).
        tensors: name -> axes, for every parameter and buffer (tied ones once, under their first name).
        shapes: name -> shape, the same keys.
        parameters: the names that are parameters.
        tied: other name -> the name in ``tensors``.
        blocks: module path of a ModuleList -> facts of each of its children that ran, in order.
        outputs: axes of the model's outputs.
    """

    tracer: Tracer
    tensors: dict[str, tuple[ax.Axis, ...]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)
    tied: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, list[Block]] = field(default_factory=dict)
    outputs: list[Info] = field(default_factory=list)


@dataclass
class Block:
    """One call of a child of a ModuleList: does it map a tensor to one of the same axes, and is it a residual path?"""

    path: str
    given: tuple[ax.Axis, ...]
    returned: tuple[ax.Axis, ...] = ()
    residual: bool = False


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper, or the model itself."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def trace(model: nn.Module, example_inputs: Any = None) -> Trace:
    """Run ``model`` once on ``example_inputs`` (or a few token ids) and return what its tensors are.

    Raises:
        PyPruneError: the model cannot be run on the inputs, or its weights are quantised.
    """
    _check_weights(model)
    args, kwargs = _inputs(model, example_inputs)
    # Anything at all may go wrong on the meta device: what has no values there, or is made on another device.
    with contextlib.suppress(Exception):
        return _run(model, args, kwargs, META)
    try:
        return _run(model, args, kwargs, FAKE)
    except _NEEDS_VALUES as error:
        if any(t.device.type == "meta" for t in [*model.parameters(), *model.buffers()]):
            raise PyPruneError(
                "model", type(model).__name__, f"its forward pass depends on values ({_first_line(error)})",
                "Load the weights: the meta device has none.",
            ) from error  # fmt: skip
    result = _run(model, args, kwargs, REAL)
    if example_inputs is None and result.parameters - result.tracer.touched:
        # A list of many experts needs many tokens before each has had one; a position table may be too short for them.
        with contextlib.suppress(PyPruneError):
            args, kwargs = _inputs(model, None, MANY)
            result = _run(model, args, kwargs, REAL)
    return result


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _check_weights(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise PyPruneError("model", type(model).__name__, "is not a torch.nn.Module")
    for name, p in model.named_parameters():
        if not p.is_floating_point() or p.element_size() < 2:
            raise PyPruneError(
                "model", type(model).__name__, f"has quantised weights ({name} is {p.dtype})",
                "Load it in float32, bfloat16 or float16, prune, and quantise the result.",
            )  # fmt: skip


def _inputs(model: nn.Module, example: Any, length: int = LENGTH) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    if isinstance(example, torch.Tensor):
        return (example,), {}
    if example is not None:
        raise PyPruneError(
            "example_inputs", type(example).__name__, "is not a tensor, a tuple of arguments or a dict of them"
        )
    names = inspect.signature(model.forward).parameters
    if "input_ids" not in names and not any(isinstance(m, nn.Embedding) for m in model.modules()):
        raise PyPruneError(
            "example_inputs", None, f"{type(model).__name__} does not take input_ids, and no inputs were given",
            "Pass a tensor, a tuple of arguments or a dict of them.",
        )  # fmt: skip
    vocabulary = min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=16)
    ids = (torch.arange(BATCH * length).view(BATCH, length) * 5 + 3) % vocabulary
    if "input_ids" not in names:
        return (ids,), {}
    return (), {"input_ids": ids} | ({"use_cache": False} if "use_cache" in names else {})


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], data: str) -> Trace:
    tracer = Tracer(rotate=data == REAL, run=ValuelessOps() if data == META else None)
    result = Trace(tracer)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_collector_paused())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_restored(model))
        if data == FAKE:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        _swap_tensors(model, result, data)
        _watch(model, result)
        # With real values inputs must be where the weights are.
        device = next((p.device for p in model.parameters()), None) if data == REAL else None
        args, kwargs = _convert(args, tracer, data, device), _convert(kwargs, tracer, data, device)
        stack.enter_context(Interceptor(tracer, fake=data != REAL))
        stack.enter_context(tracer)
        try:
            out = model(*args, **kwargs)
        except (*_NEEDS_VALUES, PyPruneError, AssertionError):
            raise
        except Exception as error:
            shown = ", ".join(str(tuple(t.shape)) for t in iter_tensors([args, kwargs]))
            raise PyPruneError(
                "example_inputs", None, f"{type(model).__name__} cannot run on inputs of shape {shown} "
                f"({_first_line(error)})", "Pass example_inputs that its forward pass accepts.",
            ) from error  # fmt: skip
    if hasattr(out, "__dict__") and not isinstance(out, (torch.Tensor, dict)):
        out = dict(vars(out))
    result.outputs = [tracer.info(t) for t in iter_tensors(out)]
    return result


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection: so many small objects, all of which stay, would set off several over the whole heap."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put every module's attributes back afterwards; inside, hooks are off and all modules are in eval mode.

    Hooks of ``torch.nn.utils`` (weight normalisation) compute weights and stay. Hooks that wrapped ``forward`` itself
    (offloading) are stepped around.
    """
    modules = list(model.modules())
    saved = [dict(m.__dict__) for m in modules]
    try:
        for m in modules:
            own = m.__dict__
            for name in ("_parameters", "_buffers", "_modules"):
                own[name] = dict(own[name])
            for name in list(own):
                if "_hooks" in name and isinstance(own[name], dict):
                    kept = {k: h for k, h in own[name].items() if type(h).__module__.startswith("torch.nn.utils")}
                    own[name] = type(own[name])(kept)
            own["training"] = False
            own["_compiled_call_impl"] = None
            if "_old_forward" in own and "forward" in own:
                own["forward"] = own["_old_forward"]
        yield
    finally:
        for m, state in zip(modules, saved, strict=True):
            m.__dict__.clear()
            m.__dict__.update(state)


def _swap_tensors(model: nn.Module, result: Trace, data: str) -> None:
    """Put labelled stand-ins (fakes, or aliases of parameters and copies of buffers) where the model's tensors are."""
    entries = [
        (f"{prefix}.{key}" if prefix else key, table, key, tensor, table is module._parameters)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for table in (module._parameters, module._buffers)
        for key, tensor in table.items()
        if tensor is not None
    ]
    stand_ins: dict[int, torch.Tensor] = {}
    names: dict[int, str] = {}
    for name, table, key, tensor, is_parameter in entries:
        if id(tensor) not in stand_ins:
            stand_ins[id(tensor)] = new = _stand_in(tensor, is_parameter, data)
            names[id(tensor)] = name
            _register(result, name, new, is_parameter)
        elif name != names[id(tensor)]:
            result.tied[name] = names[id(tensor)]
        table[key] = stand_ins[id(tensor)]
    if data != REAL:
        _swap_attributes(model, stand_ins, data)


def _stand_in(tensor: torch.Tensor, is_parameter: bool, data: str) -> torch.Tensor:
    if data == REAL:
        new = tensor.detach() if is_parameter else tensor.detach().clone()
    else:
        new = torch.empty(tensor.shape, dtype=tensor.dtype, device=_DEVICE[data])
    return nn.Parameter(new, requires_grad=False) if is_parameter else new


def _register(result: Trace, name: str, tensor: torch.Tensor, is_parameter: bool) -> None:
    axes = tuple(ax.atom(n) for n in tensor.shape)
    source = (name, tuple(range(len(axes))))
    # Masking zeroes a buffer's slices as it does a parameter's.
    result.tracer.label(tensor, Info(axes, (True,) * len(axes), source=source))
    result.tensors[name] = axes
    result.shapes[name] = tuple(tensor.shape)
    if is_parameter:
        result.parameters.add(name)


def _swap_attributes(model: nn.Module, stand_ins: dict[int, torch.Tensor], data: str) -> None:
    """Plain tensor attributes would sit on another device than the fakes; they are constants unless they alias."""
    for module in model.modules():
        for key, value in list(module.__dict__.items()):
            if isinstance(value, torch.Tensor):
                known = stand_ins.get(id(value))
                module.__dict__[key] = torch.empty_like(value, device=_DEVICE[data]) if known is None else known


def _convert(value: Any, tracer: Tracer, data: str, device: torch.device | None) -> Any:
    """Inputs as labelled stand-ins, on ``device`` if there is one; containers are copied."""
    if isinstance(value, torch.Tensor):
        if data == FAKE:
            new = torch.empty(value.shape, dtype=value.dtype)
        else:
            new = value.detach().to(device=device, copy=True)
        info = Info(tuple(ax.atom(n) for n in new.shape), (False,) * new.dim(), active=True)
        for axis in info.axes:
            ax.freeze(axis, "is a dimension of the model's input")
        tracer.label(new, info)
        return new
    if isinstance(value, Mapping):
        return {k: _convert(v, tracer, data, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_convert(v, tracer, data, device) for v in value)
    return value


def _watch(model: nn.Module, result: Trace) -> None:
    """Keep the tracer's module path, and look at what ModuleList children take and return."""
    tracer = result.tracer
    stack: list[str] = []
    listed = {
        id(child): (path, f"{path}.{i}" if path else str(i))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for i, child in enumerate(module)
    }
    open_blocks: list[tuple[Block, Info]] = []

    def before(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        stack.append(path)
        tracer.module = path
        if id(module) in listed:
            given = next(iter(iter_tensors([args, kwargs])), None)
            info = Info((), ()) if given is None else tracer.info(given)
            block = Block(listed[id(module)][1], info.axes)
            info.skips = info.skips | {id(block)}
            open_blocks.append((block, info))

    def after(module: nn.Module, out: Any) -> None:
        stack.pop()
        tracer.module = stack[-1] if stack else ""
        if id(module) in listed:
            block, _ = open_blocks.pop()
            returned = next(iter(iter_tensors(out)), None)
            if returned is not None:
                info = tracer.info(returned)
                block.returned, block.residual = info.axes, id(block) in info.skips
            result.blocks.setdefault(listed[id(module)][0], []).append(block)

    for path, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda m, args, kwargs, path=path: before(path, m, args, kwargs), with_kwargs=True
        )
        module.register_forward_hook(lambda m, args, out: after(m, out))
