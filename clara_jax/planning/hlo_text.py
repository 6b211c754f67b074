"""The text of a compiled XLA program as data: instructions, types, groups of devices and the turns of loops."""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from clara_jax.errors import fail

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)")
_END_OF_OPERANDS = re.compile(r"\)(?:, [a-z_]+=|$)")
_NAME = re.compile(r"%([\w.\-]+)")
_TYPE = re.compile(r"[(),]|([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_BITS = re.compile(r"[a-z]+?(\d+)")
_SPACE = re.compile(r"S\((\d+)\)")
_IOTA = re.compile(r"\[[\d,]+\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_AXIS = re.compile(r"(.+?)(?::\((\d+)\)(\d+))?$")
_SLICE = 100_000  # TPU: a device's id is its slice's number times this, plus its own within the slice

Linear = tuple[int | None, int]  # (element of the loop's state, or None for a number alone; plus how much)
Values = tuple[Linear | None, ...]
Comparison = tuple[str, Linear | None, Linear | None]  # direction, left, right
_SAME = frozenset(
    {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier"}
)  # hand on a value


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array: its size in bytes (without the padding of tiles) and its memory (0 is the device's main memory)."""

    dtype: str
    shape: tuple[int, ...]
    bits: int
    space: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the whole array."""
        return -(-self.size * self.bits // 8)


@dataclass(frozen=True, slots=True)
class Instruction:
    """`placed` are the arrays of the result, each with its place in the outermost tuple."""

    name: str
    op: str
    placed: tuple[tuple[int, Leaf], ...]
    operands: tuple[str, ...]
    inside: str  # what stands between the parentheses
    attributes: str  # what follows them

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """All arrays of the result."""
        return tuple(leaf for _, leaf in self.placed)

    @property
    def source(self) -> str:
        """The operation of the JAX program; "" if it is not said."""
        return self.attributes.partition('op_name="')[2].partition('"')[0]

    def called(self, attribute: str) -> str:
        """The name (of a computation, mostly) that stands behind `attribute=`; "" if there is none."""
        found = re.search(rf"\b{attribute}=\{{?%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text."""

    name: str
    root: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Names by number."""
        return {int(i.inside): i.name for i in self.instructions.values() if i.op == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """For each value, who uses it and as which operand."""
        users: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in self.instructions.values():
            for position, name in enumerate(instruction.operands):
                users.setdefault(name, []).append((instruction, position))
        return users


@dataclass(frozen=True)
class Module:
    """`loops` says for a body or a condition in which computation its `while` stands."""

    entry: str
    computations: Mapping[str, Computation]
    devices: int
    loops: Mapping[str, tuple[Computation, Instruction]]


@functools.lru_cache(maxsize=8192)
def parse_type(text: str) -> tuple[tuple[int, Leaf], ...]:
    """The arrays of a type, each with its place in the outermost tuple: `(f32[2]{0}, (s4[3], pred[]))` has 0, 1, 1."""
    found, depth, place = [], 0, 0
    for match in _TYPE.finditer(text):
        if dtype := match[1]:
            bits, space = _BITS.match(dtype), _SPACE.search(match[3] or "")
            width = 8 if dtype == "pred" else int(bits[1]) if bits else 0
            found.append((place, Leaf(dtype, _ints(match[2]), width, int(space[1]) if space else 0)))
        place += match[0] == "," and depth == 1
        depth += (match[0] == "(") - (match[0] == ")")
    return tuple(found)


def parse(text: str) -> Module:
    """Read the text of a whole compiled module."""
    computations: dict[str, Computation] = {}
    instructions: dict[str, Instruction] = {}
    entry = name = root = ""
    for line in text.splitlines():
        if line.startswith(" ") and name:
            if match := _INSTRUCTION.match(line):
                instructions[match[2]] = _instruction(*match.groups()[1:])
                root = match[2] if match[1] else root
        elif line.startswith("}") and name:
            computations[name] = Computation(name, root, instructions)
            name, instructions = "", {}
        elif line.endswith("{") and (match := _COMPUTATION.match(line)):
            name = match[2]
            entry = name if match[1] else entry
    if not entry:
        fail("this text holds no compiled XLA program", "Give the text of `compiled.as_text()`")
    loops = {
        loop.called(part): (computation, loop)
        for computation in computations.values()
        for loop in computation.instructions.values()
        if loop.op == "while"
        for part in ("body", "condition")
    }
    devices = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
    return Module(entry, computations, math.prod(map(int, devices)), loops)


def _instruction(name: str, type_text: str, op: str, rest: str) -> Instruction:
    end = found.start() if (found := _END_OF_OPERANDS.search(rest)) else len(rest)
    return Instruction(name, op, parse_type(type_text), tuple(_NAME.findall(rest[:end])), rest[:end], rest[end + 1 :])


def group_of(attributes: str, devices: int) -> tuple[int, ...]:
    """The devices of a collective's first group, by their place in the program's mesh.

    Groups are lists {{0,1},{2,3}}, as pairs are, or [2,4]<=[4,2]T(1,0), or mesh['a'=2,'b'=4] {'b'}, or {} for all.
    """
    text = attributes.partition("replica_groups=")[2] or attributes.partition("source_target_pairs=")[2]
    if mesh := _MESH.match(text):
        return _axes_of_mesh(*mesh.groups())
    if iota := _IOTA.match(text):
        return tuple(_iota(iota[1], iota[2]).reshape(_ints(text[1 : text.index("]")]))[0].tolist())
    if not text.startswith("{{"):
        return tuple(range(devices))
    listed = [_ints(group) for group in text.partition("}}")[0].split("},{")]
    return next((group for group in listed if group[0] != group[-1]), listed[0])


def slices_of(attributes: str, devices: int) -> tuple[int, ...]:
    """Of an exchange between slices, with `devices` each: the first device of each slice of its first group, as places.

    Groups are "{1,2}x{0:3}", slices and devices of each, or lists of device ids {{100000,200000},{100001,200001}}, or
    {{100000->200000},{200000->100000}}. Slices count from 1, and lie in the mesh one after another.
    """
    text = attributes.partition("_xla_megascale_target=")[2]
    numbers = _ints(text.partition("}")[0])
    slices = dict.fromkeys(number // _SLICE for number in numbers) if text.startswith("{{") else numbers
    return tuple((number - 1) * devices for number in slices)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _iota(dimensions: str, transposed: str | None) -> np.ndarray:
    shape = _ints(dimensions)
    return np.arange(math.prod(shape)).reshape(shape).transpose(_ints(transposed) if transposed else range(len(shape)))


def _axes_of_mesh(sizes: str, order: str | None, grouped: str) -> tuple[int, ...]:
    """`'a':(2)4` is the part of axis a that has 4 places and stands below a part of 2."""
    mesh = {name: int(size) for name, size in (axis.rsplit("=", 1) for axis in sizes.split(","))}
    iota = re.search(r"\[([\d,]+)\]T\(([\d,]+)\)", order or "")
    ids = _iota(iota[1], iota[2]).ravel() if iota else np.array(_ints(order)) if order else None
    places = np.zeros(1, np.int64)  # of the group's members, in the flattened mesh
    strides = dict(zip(mesh, np.cumprod([1, *list(mesh.values())[:0:-1]])[::-1], strict=True))
    for axis in grouped.split(","):
        name, before, part = _AXIS.match(axis).groups()  # type: ignore[union-attr]
        size = int(part) if part else mesh[name]
        step = strides[name] * (mesh[name] // (int(before) * size) if part else 1)
        places = (places[:, None] + step * np.arange(size)).ravel()
    return tuple((places if ids is None else ids[places]).tolist())


def turns(module: Module, computation: Computation, loop: Instruction) -> int:
    """How often a `while` runs its body, as the compiler says or its counter tells; UserError if neither does."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    count = _counted(module, computation, loop)
    if count is None:
        fail(f"Loop {loop.source or loop.name} turns as often as its data say", "Give it a fixed length")
    return count


def _counted(module: Module, computation: Computation, loop: Instruction) -> int | None:
    condition, body = (module.computations[loop.called(part)] for part in ("condition", "body"))
    direction, left, right = _comparison(module, condition, condition.root, ()) or ("", None, None)
    if left and left[0] is None:
        direction, left, right = direction.translate(str.maketrans("LG", "GL")), right, left
    if not left or left[0] is None:
        return None
    start = _constant(module, computation, _state(module, computation, loop.operands[0], left[0]))
    limit, after = _constant(module, condition, right), _state(module, body, body.root, left[0])
    if start is None or limit is None or not after or after[0] != left[0]:
        return None
    return _steps(direction, limit - start - left[1], after[1])


def _steps(direction: str, distance: int, step: int) -> int | None:
    """Steps that a counter takes until it has gone `distance`; None if it never stops there."""
    if direction in ("GT", "GE"):
        distance, step = -distance, -step
    if direction == "NE":
        return distance // step if step and distance % step == 0 and distance // step >= 0 else None
    distance += direction in ("LE", "GE")
    stops = direction in ("LT", "LE", "GT", "GE") and step > 0
    return max(0, -(-distance // step)) if stops else None


def _values(module: Module, inside: Computation, user: Instruction, arguments: Values) -> Values:
    return tuple(_linear(module, inside, operand, arguments) for operand in user.operands)


def _comparison(module: Module, inside: Computation, name: str, arguments: Values) -> Comparison | None:
    """The comparison that a condition's value is; None if it is something else."""
    found = inside.instructions[name]
    if found.op == "compare":
        left, right = _values(module, inside, found, arguments)
        return found.called("direction"), left, right
    if found.op in _SAME:
        return _comparison(module, inside, found.operands[0], arguments)
    if found.op in ("fusion", "call"):
        callee = module.computations[found.called("(?:calls|to_apply)")]
        return _comparison(module, callee, callee.root, _values(module, inside, found, arguments))
    return None


def _linear(module: Module, inside: Computation, name: str, arguments: Values = ()) -> Linear | None:
    """A value as an element of its loop's state plus a number; `arguments` are a fused computation's parameters."""
    found = inside.instructions[name]
    if found.op == "constant":
        return (None, int(found.inside)) if re.fullmatch(r"-?\d+", found.inside) else None
    if found.op == "parameter":
        return arguments[int(found.inside)] if int(found.inside) < len(arguments) else None
    if found.op in _SAME:
        return _linear(module, inside, found.operands[0], arguments)
    if found.op == "get-tuple-element":
        return _state(module, inside, found.operands[0], int(found.called("index")))
    if found.op in ("add", "subtract"):
        left, right = _values(module, inside, found, arguments)
        if left and right and found.op == "subtract" and right[0] is None:
            return left[0], left[1] - right[1]
        if left and right and found.op == "add" and None in (left[0], right[0]):
            return (right[0] if left[0] is None else left[0]), left[1] + right[1]
    if found.op in ("fusion", "call"):
        callee = module.computations[found.called("(?:calls|to_apply)")]
        return _linear(module, callee, callee.root, _values(module, inside, found, arguments))
    return None


def _state(module: Module, inside: Computation, name: str, index: int) -> Linear | None:
    """Element `index` of the tuple `name`; of an inner loop's result, if that loop hands the element on."""
    found = inside.instructions[name]
    if found.op == "parameter":
        return (index, 0) if inside.name in module.loops else None
    if found.op == "tuple":
        return _linear(module, inside, found.operands[index])
    if found.op == "while":
        body = module.computations[found.called("body")]
        handed_on = _state(module, body, body.root, index) == (index, 0)
    else:
        handed_on = found.op in _SAME
    return _state(module, inside, found.operands[0], index) if handed_on else None


def _constant(module: Module, inside: Computation, value: Linear | None) -> int | None:
    """The number that `value` always is: an element of a loop's state counts if the loop never changes it."""
    if value is None or value[0] is None:
        return value[1] if value else None
    outside, loop = module.loops[inside.name]
    body = module.computations[loop.called("body")]
    unchanged = _state(module, body, body.root, value[0]) == (value[0], 0)
    start = _constant(module, outside, _state(module, outside, loop.operands[0], value[0])) if unchanged else None
    return None if start is None else start + value[1]
