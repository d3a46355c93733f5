"""Define DALI graphs for a GPU where there is none, and list what DALI would refuse about their devices.

DALI itself looks at devices only when it builds a graph, which takes a GPU. The rules here are those of its
`Pipeline::AddOperator`, on DALI 1.34 and 2.x alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from nvidia.dali import ops
from nvidia.dali.pipeline import Pipeline


@dataclass(frozen=True)
class Devices:
    """One graph: (name, device) of each operator, the device of the output, and what DALI would refuse."""

    operators: list[tuple[str, str]]
    output: str
    faults: list[str]


def define(graph: Callable[..., Any], *arguments: Any, **options: Any) -> Devices:
    """Call `graph`, which makes one pipeline, so that it is not built. Returns the devices in it."""
    pipelines: list[Pipeline] = []
    faults: list[str] = []
    process_arguments = ops._process_argument_inputs

    def named(schema: Any, spec: Any, given: dict[str, Any], name: str) -> Any:
        # Once the graph is made, a named argument looks like any other input. DALI 2.4 refuses it here.
        on_gpu = [key for key, value in given.items() if getattr(value, "device", "cpu") != "cpu"]
        faults.extend(f"{name}: argument {key} is on the gpu" for key in on_gpu)
        return process_arguments(schema, spec, given, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_process_argument_inputs", named)
        patch.setattr(Pipeline, "build", lambda self: pipelines.append(self))
        try:
            made = graph(*arguments, **options)
            (pipeline,) = pipelines or [made]
            pipeline._build_graph()  # checks the arguments of all operators
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            return Devices([], "", [*faults, f"cannot be defined: {str(error).splitlines()[0]}"])
    operators = [(_name(operator), operator._op.device) for operator in pipeline._ops]
    faults += [fault for operator in pipeline._ops for fault in _faults(operator)]
    (output,) = pipeline._graph_outputs
    return Devices(operators, output.device, faults)


def _name(operator: Any) -> str:
    kind = type(operator._op)
    return str(getattr(kind, "schema_name", kind.__name__))


def _faults(operator: Any) -> Iterator[str]:
    name, device = _name(operator), operator._op.device
    backends = {"cpu": ops.cpu_ops, "gpu": ops.gpu_ops, "mixed": ops.mixed_ops}
    if name not in backends[device]():
        yield f"{name}: has no {device} backend"
    if device != "gpu" and any(node.device == "gpu" for node in operator._inputs):
        yield f"{name}: an input is on the gpu, the operator is {device}"
