"""What a compiled program is said to exchange and to read: a plan for a pod is only as good as these counts."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from clara_jax.errors import UserError
from clara_jax.planning.hlo import Program, read_program
from clara_jax.planning.hlo_text import group_of, parse_type, slices_of

# Compiled by libtpu 0.0.52 for v5e:2x2 (sparse_core for tpu7x:2x2x1, between_slices for two slices); only
# `backend_config`s and stack frames were cut away.
TPU = Path(__file__).parent / "tpu"
OUTER, INNER, WIDTH = 3, 5, 64
MIB = 2**20


def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def floats(*shape: int):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def compiled(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def sharded(function, in_specs) -> str:
    def whole(*arguments):
        return jax.shard_map(function, mesh=mesh(), in_specs=in_specs, out_specs=P(), check_vma=False)(*arguments)

    return compiled(whole, floats(INNER, WIDTH, WIDTH), floats(16, WIDTH))


def nested() -> str:
    """A scan over stacked, divided weights within a scan, with collectives over either axis in both."""

    def run(weights, x):
        def layer(x, weight):
            x = jnp.tanh(x @ jax.lax.all_gather(weight, "fsdp", tiled=True))
            return jax.lax.ppermute(x, "fsdp", [(place, (place + 1) % 4) for place in range(4)]), None

        def turn(x, _):
            x, _ = jax.lax.scan(layer, x, weights)
            return jax.lax.psum(x, "data"), None

        return jax.lax.scan(turn, x, None, length=OUTER)[0]

    return sharded(run, (P(None, "fsdp"), P()))


def collectives(program: Program):
    """(kind, bytes, devices, times) of each; its group is as large as its devices say."""
    assert all(one.group == len(one.devices) for one in program.collectives)
    return [(one.kind, one.bytes, one.devices, one.times) for one in program.collectives]


def test_collectives_in_loops_count_as_often_as_the_loops_turn():
    """A plan that counted a scan's body once would promise a step `layers` times faster than it is."""
    program = read_program(nested())
    weight, x = WIDTH * WIDTH * 4, 16 * WIDTH * 4
    assert sorted(collectives(program)) == [
        ("all-gather", weight, (0, 1, 2, 3), OUTER * INNER),
        ("all-reduce", x, (0, 4), OUTER),
        ("collective-permute", x, (0, 1), OUTER * INNER),
    ]
    assert [(loop.turns, loop.times) for loop in program.loops] == [(OUTER, OUTER), (INNER, OUTER * INNER)]
    gather = next(one for one in program.collectives if one.kind == "all-gather")
    assert (gather.dtype, gather.shape) == ("f32", (WIDTH, WIDTH)) and gather.source.endswith("all_gather")


def test_turns_are_told_from_the_condition_where_the_compiler_does_not_say():
    """TPU's text has no `known_trip_count`: without this no program for a TPU could be planned."""
    text = nested()
    unsaid = re.sub(r', backend_config=\{[^\n]*"known_trip_count"[^\n]*', "", text)
    assert text != unsaid and read_program(unsaid) == read_program(text)


@pytest.mark.parametrize(("start", "stop", "step"), [(0, 7, 1), (2, 9, 3), (9, -1, -2), (4, 4, 1)])
def test_turns_of_counters_with_any_start_and_step(start, stop, step):
    """A loop that counts down or in steps must not be taken for one of `stop` turns."""

    def run(x):
        def more(state):
            return state[0] < stop if step > 0 else state[0] > stop

        return jax.lax.while_loop(more, lambda state: (state[0] + step, state[1] @ state[1]), (start, x))

    text = compiled(run, floats(256, 256))  # small loops go into a `call` on a CPU
    unsaid = re.sub(r', backend_config=\{[^\n]*"known_trip_count"[^\n]*', "", text)
    found = [loop.turns for loop in read_program(unsaid).loops]
    assert found == [len(range(start, stop, step))] or (not found and start == stop)  # XLA removes what never turns


def test_a_loop_whose_length_depends_on_data_is_refused():
    """Counted as one turn it would make any decoding loop look free."""
    text = compiled(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x * 2, x), floats(4))
    with pytest.raises(UserError, match="turns as often as its data say"):
        read_program(text)


def test_the_most_expensive_branch_counts():
    """Both branches together, or the cheaper one, would be no step that ever runs."""

    def run(weights, x):
        cheap, dear = (lambda x: jax.lax.psum(x, "data")), (lambda x: jax.lax.psum(jax.lax.psum(x, "data"), "fsdp"))
        return jax.lax.cond(x[0, 0] > 0, dear, cheap, x)

    found = collectives(read_program(sharded(run, (P(), P()))))
    assert [(kind, devices) for kind, _, devices, _ in found] == [("all-reduce", (0, 4)), ("all-reduce", (0, 1, 2, 3))]


def test_collectives_that_the_partitioner_makes():
    """Shardings give the groups in another notation than `shard_map`; a group misread is a wrong axis of the pod."""

    def of(*spec):
        return NamedSharding(mesh(), P(*spec))

    def run(weight, x):
        gathered = jax.lax.with_sharding_constraint(weight, of(None, None))
        return jax.lax.with_sharding_constraint(x @ gathered, of("data", None)).sum()

    weight, x = floats(WIDTH, WIDTH), floats(16, WIDTH)
    text = jax.jit(run, in_shardings=(of("fsdp"), of("data"))).lower(weight, x).compile().as_text()
    assert sorted(collectives(read_program(text))) == [
        ("all-gather", WIDTH * WIDTH * 4, (0, 1, 2, 3), 1),
        ("all-reduce", 4, (0, 4), 1),
    ]


@pytest.mark.parametrize("back", [False, True])
def test_stacked_weights_are_read_slice_by_slice(back):
    """The whole stack counted at each turn would make the traffic grow with the square of the number of layers."""
    layers = 32

    def run(weights, x):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight),) * 2, x, weights)[1].sum()

    weights, x = floats(layers, WIDTH, WIDTH), floats(WIDTH, WIDTH)  # a layer's activations are as large as its weight
    traffic = read_program(compiled(jax.grad(run, argnums=(0, 1)) if back else run, weights, x)).traffic
    stack = layers * WIDTH * WIDTH * 4
    # Each turn the CPU copies what it slices and stores three activations: 10 stacks forward, 38 with the backward
    # pass. One stack read whole at each turn would be 32 more.
    assert 4 * stack < traffic < (45 if back else 14) * stack


def test_tpu_loops_and_on_chip_memory():
    """A TPU scan: turns told by its condition; what stays in VMEM must not be taken for slow memory's traffic."""
    program = read_program((TPU / "nested_scans.txt").read_text())
    assert collectives(program) == [("all-gather", MIB // 2, (0, 1), 15), ("all-reduce", MIB // 4, (0, 2), 3)]
    assert [(loop.turns, loop.times) for loop in program.loops] == [(3, 3), (5, 15)]
    # x is read and written once, each shard of a weight read at its turn, each kept output written at its own; of
    # 256 KiB each. Besides there are only the counters.
    assert program.traffic == pytest.approx((2 + 15 + 3) * MIB / 4, abs=1000)


def test_tpu_asynchronous_gather():
    """TPU writes one gather into three fusions (begin, beside a product, end): it must count once, and so its bytes."""
    program = read_program((TPU / "async_gather.txt").read_text())
    assert collectives(program) == [("all-gather", 128 * MIB, (0, 1, 2, 3), 1)] * 2
    shards, gathers = 64 + 32 + 32, 128 + 128  # both shards are sliced, one into slow memory and read from there again
    products = (128 + 64) + (64 + 128 + 64)  # the first reads x from VMEM
    assert program.traffic == pytest.approx(
        (shards + gathers + products + 2 * 64) * MIB, abs=1000
    )  # x is fetched twice


def test_tpu_reduce_scatter():
    """TPU writes it as an all-reduce and a slice in one fusion: taken as written it would cost twice as much."""
    program = read_program((TPU / "reduce_scatter.txt").read_text())
    assert collectives(program) == [("reduce-scatter", MIB // 2, (0, 1, 2, 3), 1)]
    assert program.collectives[0].shape == (256, 1024) and program.collectives[0].source == "jit(rs)/dot_general"
    assert program.traffic == 2 * MIB + MIB // 2


def test_tpu_sparse_cores():
    """TPU hides what its SparseCores do in custom calls: an exchange there must not be left out."""
    program = read_program((TPU / "sparse_core.txt").read_text())
    assert collectives(program) == [("all-reduce", MIB, tuple(range(8)), 1)]
    copied, reduced, scattered = 2 * 2, 2, 3 / 4  # of 1 MiB; a quarter is added to, in place
    assert program.traffic == pytest.approx((copied + reduced + scattered) * MIB, abs=4000)  # and places


def test_tpu_exchange_between_slices():
    """TPU writes it as a send and a receive: left out, the network would look free, and twice, twice as slow."""
    program = read_program((TPU / "between_slices.txt").read_text())
    assert sorted(collectives(program)) == [
        ("all-gather", MIB, (0, 1, 2, 3), 7),
        ("all-gather", 2 * MIB, (0, 4), 1),
        ("all-reduce", MIB // 4, (0, 4), 7),  # one sum over all devices is this, the first and the last together
        ("collective-permute", 2 * MIB, (0, 4), 1),
        ("reduce-scatter", MIB // 4, (0, 1, 2, 3), 7),
    ]
    # Each turn reads x and makes it anew, and passes its quarter on four times; a send only reads.
    turn, after = 2 + 4 / 4, (1 + 2) + (2 + 2)
    assert program.traffic == pytest.approx((2 + 7 * turn + after + 4) * MIB, abs=1000)


@pytest.mark.parametrize(
    ("target", "first"),
    [
        ('"{1,2,3}x{0:3}"', (0, 4, 8)),
        ("{{100000,300000},{100001,300001},{200000,400000}}", (0, 8)),
        ("{{100000,100001,200000,200001}}", (0, 4)),
        ("{{200002->300000},{300002->200000}}", (4, 8)),
    ],
)
def test_slices_in_every_notation(target, first):
    """Slices misread would be taken for one, and what passes between them for links."""
    assert slices_of(f', _xla_megascale_target={target},_xla_megascale_transfer_type="ALL_REDUCE"', 4) == first


# In the form that XLA gives such pairs on a GPU (written by hand).
ASYNCHRONOUS = """HloModule jit_f, num_partitions=8

%wrapped (p: f32[8,64]) -> f32[2,64] {
  %p = f32[8,64]{1,0} parameter(0)
  ROOT %rs = f32[2,64]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[8,64]) -> f32[64] {
  %x = f32[8,64]{1,0} parameter(0)
  %gather = (f32[8,64]{1,0}, f32[16,64]{1,0}) all-gather-start(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %gathered = f32[16,64]{1,0} all-gather-done(%gather)
  %sum = (f32[4]{0}, bf16[6]{0}) all-reduce-start(%a, %b), replica_groups={}, to_apply=%add
  %summed = (f32[4]{0}, bf16[6]{0}) all-reduce-done(%sum)
  %rs = ((f32[8,64]{1,0}), f32[2,64]{1,0}) async-start(%x), calls=%wrapped
  %rs-done = f32[2,64]{1,0} async-done(%rs)
  ROOT %copy = f32[64]{0} copy(%a)
}
"""


def test_starts_count_once_and_by_their_result():
    """The tuple of a start also holds its operand, and its `done` names the collective again: neither may count."""
    text = ASYNCHRONOUS.replace("(%a, %b)", "(%x, %x)").replace("copy(%a)", "copy(%gathered)")
    assert collectives(read_program(text)) == [
        ("all-gather", 4096, (0, 4), 1),
        ("all-reduce", 16, tuple(range(8)), 1),
        ("all-reduce", 12, tuple(range(8)), 1),
        ("reduce-scatter", 512, (0, 1, 2, 3), 1),
    ]


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,2,2]T(0,2,1)", (0, 2)),
        ("{}", tuple(range(8))),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
    ],
)
def test_groups_in_every_notation(groups, first):
    """Each notation must lead to the same devices, or traffic is charged to the wrong links."""
    assert group_of(f", channel_id=1, replica_groups={groups}, dimensions={{0}}", 8) == first


def test_a_permutation_is_seen_by_a_pair_that_moves():
    """A device that keeps its part would tell nothing of the axis."""
    assert group_of(", source_target_pairs={{0,0},{2,1},{1,2},{3,3}}", 4) == (2, 1)


def test_sizes_of_types():
    """A wrong width of a type scales every count; VMEM is told by the layout."""
    text = (
        "(s4[3]{0}, (pred[5]{0}, /*index=2*/f8e4m3fn[4]{0}), bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, c64[], token[], u4[<=8])"
    )
    found = [(place, leaf.bytes, leaf.space) for place, leaf in parse_type(text)]
    assert found == [(0, 2, 0), (1, 5, 0), (1, 4, 0), (2, 32, 1), (3, 8, 0), (4, 0, 0), (5, 4, 0)]


def test_other_text_is_refused():
    """An empty plan for a text that is no program would promise that it costs nothing."""
    with pytest.raises(UserError, match="as_text"):
        read_program("module @jit_f {}\n")
