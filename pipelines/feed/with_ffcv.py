"""What is used of FFCV's package, which is imported here and nowhere else: its import does things that have to be undone."""

from __future__ import annotations

import sys
from unittest import mock

from teacher_cache.kernels import pointers  # noqa: F401 - isort: skip - before numba, whose threading layer it chooses

import numba
import numba.typed
import torch

if sys.version_info >= (3, 12):
    import setuptools  # noqa: F401 - it brings distutils, which ffcv 1.0.2 imports and Python has no more

_torch_threads = torch.get_num_threads()
# FFCV's table of two image modes, which compiled code never sees, takes seconds as a typed one.
with mock.patch.object(numba.typed, "Dict", dict):
    from ffcv.loader.epoch_iterator import select_buffer as select_buffer
    from ffcv.pipeline import PipelineSpec as PipelineSpec
    from ffcv.pipeline.allocation_query import AllocationQuery as AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.graph import Graph as Graph
    from ffcv.pipeline.operation import Operation as Operation
    from ffcv.reader import Reader as Reader

torch.set_num_threads(_torch_threads)  # importing ffcv leaves both torch and numba with one thread
numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


def stages_of(graph: Graph) -> tuple[list, list]:
    """The stages of a graph and the nodes whose results come out, as its `codegen_all` gives them; nothing is compiled: our
    operations only call loops that are compiled and kept already, and compiling the calls anew in each process gains nothing."""
    _, code = graph.collect_requirements()
    with mock.patch.object(Compiler, "is_enabled", False):
        return graph.codegen_all(code)
