"""What is wrong with a store, found by reading all of it."""

import numpy as np

from clara_jax.errors import UserError
from clara_jax.retrieval.manifest import Manifest
from clara_jax.retrieval.objects import Objects
from clara_jax.retrieval.segments import Segment, open_memories, read_passages, reading


def damaged_segments(objects: Objects, manifest: Manifest) -> dict[int, str]:
    """The numbers of the segments that are not as they were written, each with what is wrong, on one line."""
    there = set(objects.names())
    found = {number: _problem(objects, segment, there) for number, segment in enumerate(manifest.segments)}
    return {number: problem for number, problem in found.items() if problem}


def _problem(objects: Objects, segment: Segment, there: set[str]) -> str:
    missing = sorted(set(segment.objects) - there)
    if missing:
        return f"{objects.path(missing[0])} is missing."
    try:
        read_passages(objects, segment)
        with reading(objects, segment):
            np.asarray(open_memories(objects, segment).read().result())
    except UserError as error:
        return str(error)
    return ""
