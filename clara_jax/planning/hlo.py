"""What one run of a compiled XLA program does, whole loops included: what its devices exchange and read and write.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as the loop turns, loops within loops
too.
"""

import collections
import dataclasses
import functools
import re
from dataclasses import dataclass

from clara_jax.planning.hlo_text import Computation, Instruction, Leaf, Module, group_of, parse, slices_of, turns

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
# What moves nothing itself.
_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
    | {"add-dependency", "opt-barrier", "domain"}
)
_FREE_CUSTOM_CALLS = frozenset({"AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone"})
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
# What a fused computation does not store: the element read is the element asked for.
_VIEWS = frozenset(
    {"bitcast", "copy", "convert", "reshape", "transpose", "reduce-precision", "tuple", "get-tuple-element"}
)
_KEPT = re.compile(r"\{(\d*)\}: \(\d+, \{")  # results that are operands: an asynchronous collective's state
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_SYNC_FLAG = 2  # TPU: the memory space of the flags that devices wait on


@dataclass(frozen=True)
class Collective:
    """One exchange between devices; one of several results makes one of these for each."""

    kind: str  # "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
    dtype: str
    shape: tuple[int, ...]  # of the result on each device
    bytes: int  # of that result
    group: int  # devices that take part together (2 for a permutation)
    devices: tuple[int, ...]  # the first such group, as places in the mesh's flattened order
    times: int  # executions in one run of the program
    source: str  # the operation in the JAX program, "" if not known


@dataclass(frozen=True)
class Loop:
    """A `while`: it turns `turns` times whenever it is reached, its body runs `times` times in the whole run."""

    name: str
    turns: int
    times: int
    source: str


@dataclass(frozen=True)
class Program:
    """What one run does, on each device. `traffic` is what is read from and written to its memory, in bytes."""

    collectives: tuple[Collective, ...]
    traffic: int
    loops: tuple[Loop, ...]

    @property
    def exchanged(self) -> int:
        """Bytes of the results of all collectives, on each device."""
        return sum(one.bytes * one.times for one in self.collectives)

    @property
    def largest_gather(self) -> int:
        """Bytes of the largest result of an all-gather, which is how weights are exchanged."""
        return max((one.bytes for one in self.collectives if one.kind == "all-gather"), default=0)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Executions and bytes of results by kind of collective."""
        found: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
        for one in self.collectives:
            times, size = found[one.kind]
            found[one.kind] = times + one.times, size + one.bytes * one.times
        return dict(found)


_NOTHING = Program((), 0, ())


def read_program(text: str) -> Program:
    """Read a compiled program's text, of any backend.

    Arrays in on-chip memory (TPU's VMEM) and in the host's memory make no traffic. Of a conditional the branch that
    moves most counts. Raises UserError for a loop whose number of turns depends on data.
    """
    module = parse(text)
    return _run(module, module.computations[module.entry])


def _run(module: Module, computation: Computation) -> Program:
    return functools.reduce(_then, (_execute(module, computation, i) for i in computation.instructions.values()))


def _then(first: Program, second: Program) -> Program:
    if second is _NOTHING:
        return first
    return Program(first.collectives + second.collectives, first.traffic + second.traffic, first.loops + second.loops)


def _repeated(program: Program, times: int) -> Program:
    return Program(
        tuple(dataclasses.replace(one, times=one.times * times) for one in program.collectives),
        program.traffic * times,
        tuple(dataclasses.replace(one, times=one.times * times) for one in program.loops),
    )


def _execute(module: Module, inside: Computation, done: Instruction) -> Program:
    if done.op == "while":
        count = turns(module, inside, done)
        body = _run(module, module.computations[done.called("body")])
        loop = Loop(done.name, count, 1, done.source)
        return _repeated(dataclasses.replace(body, loops=(loop, *body.loops)), count)
    if done.op == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", done.attributes)
        names = (
            re.findall(r"[\w.\-]+", listed[1])
            if listed
            else map(done.called, ("true_computation", "false_computation"))
        )
        branches = [_run(module, module.computations[name]) for name in names]
        return max(branches, key=lambda branch: branch.traffic + branch.exchanged)
    if done.op == "call" or (done.op == "async-start" and done.called("calls")):
        return _run(module, module.computations[done.called("to_apply") or done.called("calls")])
    if stands_for := _stands_for(module, done):
        return _run(module, stands_for)
    if done.op in _FREE or done.op.endswith(("-done", "-update")):
        return _NOTHING
    if done.op == "fusion":
        fused = module.computations[done.called("calls")]
        return Program(_fused_collectives(module, fused, done.source), _fusion_traffic(module, inside, done, fused), ())
    return Program(_collectives(module, done), _traffic(inside, done), ())


def _stands_for(module: Module, done: Instruction) -> Computation | None:
    """What a custom call computes if it is told: TPU writes work of its SparseCores so, collectives too.

    Where it has another result, as that of a comparison, it is but a part of the work.
    """
    called = module.computations.get(done.called("called_computations")) if done.op == "custom-call" else None
    return called if called and _shapes(called.instructions[called.root]) == _shapes(done) else None


def _shapes(done: Instruction) -> list[tuple[str, tuple[int, ...]]]:
    return [(leaf.dtype, leaf.shape) for leaf in done.leaves]


# ---- collectives


def _collectives(module: Module, done: Instruction) -> tuple[Collective, ...]:
    kind = done.op.removesuffix("-start")
    if done.op == "recv" and (between := _BETWEEN_SLICES.search(done.attributes)):
        # TPU's program is that of one slice. What goes beyond it is sent and received, by each device to and from those
        # in its place in the other slices; the part within the slice, if there is one, is a collective of its own.
        kind = {"ONE_TO_ONE": "collective-permute"}.get(between[1], between[1].lower().replace("_", "-"))
        group = slices_of(done.attributes, module.devices)
    elif kind in _KINDS:
        group = group_of(done.attributes, module.devices)
    else:
        return ()
    return tuple(
        Collective(kind, leaf.dtype, leaf.shape, leaf.bytes, len(group), group, 1, done.source)
        for leaf in _results(done)
    )


def _results(done: Instruction) -> tuple[Leaf, ...]:
    """Of an asynchronous start, too: its tuple holds operands and flags besides. A `send` has no more."""
    if done.op == "send":
        return ()
    if done.op in ("recv", "copy-start"):
        return tuple(leaf for place, leaf in done.placed if place == 0)
    if not done.op.endswith("-start") or done.op == "all-reduce-start" or len(done.leaves) < 2:
        return done.leaves
    return tuple(leaf for place, leaf in done.placed if place == 1)


def _fused_collectives(module: Module, fused: Computation, source: str) -> tuple[Collective, ...]:
    """Those that a fusion starts; TPU repeats one in the fusions that it runs beside and in the one that ends it."""
    found: tuple[Collective, ...] = ()
    if _continues(fused):
        return found
    for inner in fused.instructions.values():
        if inner.op == "fusion":
            found += _fused_collectives(module, module.computations[inner.called("calls")], source)
        parts = _only_sliced(fused, inner) if inner.op == "all-reduce" else ()
        if parts:  # TPU writes a reduce-scatter so
            whole = _collectives(module, inner)[0]
            found += tuple(
                dataclasses.replace(whole, kind="reduce-scatter", dtype=part.dtype, shape=part.shape, bytes=part.bytes)
                for part in parts
            )
        else:
            found += _collectives(module, inner)
    return tuple(dataclasses.replace(one, source=one.source or source) for one in found)


def _continues(fused: Computation) -> bool:
    """Whether a fusion is given the flags of a collective under way."""
    given = (leaf for name in fused.parameters.values() for leaf in fused.instructions[name].leaves)
    return any(leaf.space == _SYNC_FLAG for leaf in given)


def _only_sliced(fused: Computation, value: Instruction) -> tuple[Leaf, ...]:
    """The slices that are all that a fused computation takes of a value; () if it takes more."""
    slices: tuple[Leaf, ...] = ()
    for user, _ in fused.users.get(value.name, []):
        part = user.leaves if user.op in _SLICES else _only_sliced(fused, user) if user.op in _VIEWS else ()
        if not part:
            return ()
        slices += part
    return slices


# ---- traffic


def _in_memory(leaf: Leaf, elements: int | None = None) -> int:
    """Bytes of a whole array, or of some elements of it; 0 if it is not in the device's main memory."""
    if leaf.space:
        return 0
    return leaf.bytes if elements is None else min(leaf.bytes, -(-elements * leaf.bits // 8))


def _traffic(inside: Computation, done: Instruction) -> int:
    """Of an instruction that stands alone."""
    target = re.search(r'custom_call_target="([^"]*)"', done.attributes)
    if target and target[1] in _FREE_CUSTOM_CALLS:
        return 0
    results = _results(done)
    changed = _changed(inside, done)
    written = sum(_in_memory(leaf, changed) for leaf in results)
    for position, name in enumerate(done.operands):
        leaves = inside.instructions[name].leaves
        needed = None
        if position == 0 and done.op.removesuffix("-start") in _SLICES:
            needed = results[0].size
        elif position == 0 and changed is not None:
            needed = changed if done.op == "scatter" else 0
        written += sum(_in_memory(leaf, needed) for leaf in leaves)
    return written


def _changed(inside: Computation, done: Instruction) -> int | None:
    """Elements that an instruction changes in its first operand, in place; None if it makes a new array."""
    if done.op == "dynamic-update-slice":
        return inside.instructions[done.operands[1]].leaves[0].size
    if done.op == "scatter" and len(done.operands) == 3:
        return inside.instructions[done.operands[2]].leaves[0].size
    return None


def _fusion_traffic(module: Module, inside: Computation, done: Instruction, fused: Computation) -> int:
    """Operands and results, but of what is only sliced or changed in part no more than that part."""
    beyond = 0 if _continues(fused) else None
    moved = 0
    for position, name in enumerate(done.operands):
        elements = _needed(module, fused, fused.parameters[position], beyond) if position in fused.parameters else 0
        moved += sum(_in_memory(leaf, elements) for leaf in inside.instructions[name].leaves)
    root = fused.instructions[fused.root]
    made = root.operands if root.op == "tuple" else (root.name,)
    kept = set(_KEPT.findall(done.attributes))
    for place, leaf in enumerate(done.leaves):
        if {str(place), "" if len(done.leaves) == 1 else str(place)} & kept:
            continue
        elements = _updated(module, fused, made[place]) if len(made) == len(done.leaves) else None
        moved += _in_memory(leaf, elements or None)
    return moved


def _needed(module: Module, fused: Computation, name: str, beyond: int | None) -> int | None:
    """Elements that a fused computation reads of a value, None for all; `beyond` is what is read of its result."""
    total = 0
    for needed in (
        *((beyond,) if name == fused.root else ()),
        *(_needed_by(module, fused, user, position, beyond) for user, position in fused.users.get(name, [])),
    ):
        if needed is None:
            return None
        total += needed
    return total


def _needed_by(module: Module, fused: Computation, user: Instruction, position: int, beyond: int | None) -> int | None:
    if position == 0 and user.op in _SLICES:
        return user.leaves[0].size
    if position == 0 and _changed(fused, user) is not None:  # in place, unless the fusion goes on to read the result
        touched = _changed(fused, user) if user.op == "scatter" else 0
        rest = _needed(module, fused, user.name, beyond or 0)
        return None if rest is None else rest + (touched or 0)
    if user.op in _VIEWS:
        return _needed(module, fused, user.name, beyond)
    if user.op == "fusion":
        inner = module.computations[user.called("calls")]
        return _needed(module, inner, inner.parameters[position], _needed(module, fused, user.name, beyond))
    if beyond == 0 and (user.op in _KINDS or user.op == "custom-call"):  # a collective under way
        return 0
    return None


def _updated(module: Module, fused: Computation, name: str) -> int | None:
    """Elements that a value differs in from the parameter that it is made of in place; None if it is a new array."""
    found = fused.instructions[name]
    if found.op == "parameter":
        return 0
    if found.op == "fusion":
        inner = module.computations[found.called("calls")]
        return _updated(module, inner, inner.root)
    changed = _changed(fused, found)
    if changed is None and found.op not in _VIEWS:
        return None
    before = _updated(module, fused, found.operands[0])
    return None if before is None else before + (changed or 0)
