"""Traces: the queries, keys and values of a model, in a Zarr store that any client can read."""

from retrace.traces.bundles import bundle_size, bundles_of
from retrace.traces.copy import copy_trace
from retrace.traces.errors import DamageError, RetraceError, UnreachableError
from retrace.traces.location import Location, RemoteLocation, beside, locate
from retrace.traces.marks import Marks, joined_spans
from retrace.traces.noted import noted
from retrace.traces.reader import Layer, Trace, find_traces, half_begun, open_trace
from retrace.traces.rotation import Rotation
from retrace.traces.schema import (
    FORMAT_VERSION,
    PHASES,
    Indexer,
    LayerRules,
    OutputProjection,
    prompts,
)
from retrace.traces.tensors import to_numpy, to_torch
from retrace.traces.verification import Verification, verify_trace
from retrace.traces.writer import TraceWriter, create_trace, resume_trace, tensor_bytes

__all__ = [
    "FORMAT_VERSION",
    "PHASES",
    "DamageError",
    "Indexer",
    "Layer",
    "LayerRules",
    "Location",
    "Marks",
    "OutputProjection",
    "RemoteLocation",
    "RetraceError",
    "Rotation",
    "Trace",
    "TraceWriter",
    "UnreachableError",
    "Verification",
    "beside",
    "bundle_size",
    "bundles_of",
    "copy_trace",
    "create_trace",
    "find_traces",
    "half_begun",
    "joined_spans",
    "locate",
    "noted",
    "open_trace",
    "prompts",
    "resume_trace",
    "tensor_bytes",
    "to_numpy",
    "to_torch",
    "verify_trace",
]
