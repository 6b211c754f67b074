"""What a run would cost, before it is run: on shapes alone, with the real programs."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from clara_jax import benchmark as benchmark_command
from clara_jax import preflight
from clara_jax.config import TrainConfig, parse_train_config
from clara_jax.errors import UserError, run_command
from clara_jax.models.config import DecoderConfig
from clara_jax.models.lora import adapter_shapes
from clara_jax.planning import topology
from clara_jax.planning.chips import Chip
from clara_jax.planning.estimate import Estimate, Memory, estimate, roofline
from clara_jax.planning.flops import program_flops
from clara_jax.planning.hlo import Collective, Program, read_program
from clara_jax.planning.known_models import KNOWN_MODELS, shape_of
from clara_jax.planning.random_inputs import random_arguments
from clara_jax.planning.search import first_that_fits
from clara_jax.planning.workload import Sizes, Workload, make_workload
from clara_jax.sharding import MeshConfig, make_mesh
from clara_jax.training.flops import batch_lengths, step_flops
from tests.conftest import FIXTURES
from tests.models.tiny import tiny_config


@pytest.fixture(autouse=True)
def shapes_for_arrays():
    """Types are checked at run time elsewhere: here shapes stand where arrays are declared."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


STAGES = ("compression_pretraining", "instruction_tuning", "end_to_end", "retrieval_pretraining")
SIZES = Sizes(candidates=2, prompt=24, targets=8, question=5, decode_batch=2, decode_length=24, batch_tokens=96)


def configuration(stage: str = "compression_pretraining", **changes: Any) -> TrainConfig:
    base = FIXTURES / "mistral_window" / "base"
    settings = ["--run_dir=x", f"--stage={stage}", f"--model.base={base}", "--data.path=[x.jsonl]", "--lora.rank=2"]
    settings += ["--model.doc_max_length=16", "--model.compression_rate=8", "--objective.top_k=2", "--batch_size=8"]
    return parse_train_config(settings + [f"--{key}={value}" for key, value in changes.items()])


def shape(**changes: Any) -> DecoderConfig:
    """Four heads and four layers, so that meshes divide it and a stack differs from a layer."""
    return tiny_config(num_layers=4, num_heads=4, num_kv_heads=4, hidden_size=32, intermediate_size=64, **changes)


def workload(config: TrainConfig, task: Any = "train", base: DecoderConfig | None = None) -> Workload:
    return make_workload(config, base or shape(), make_mesh(config.mesh), SIZES, task)


@pytest.mark.parametrize("mesh", [MeshConfig(2, 4, 1), MeshConfig(1, 4, 2), MeshConfig(2, 2, 2)])
@pytest.mark.parametrize(("stage", "tied_head"), [("compression_pretraining", True), ("end_to_end", False)])
def test_no_exchange_is_larger_than_a_projection(stage: str, mesh: MeshConfig, tied_head: bool):
    """If this broke, each device would for a moment hold the whole vocabulary, or all rows of a batch."""
    config = dataclasses.replace(configuration(stage), mesh=mesh, batch_size=8)
    made = workload(config, base=shape(vocab_size=1001, tied_head=tied_head))
    program = read_program(made.function.lower(*made.arguments).compile().as_text())
    gathered = [one.bytes for one in program.collectives if one.kind == "all-gather"]
    # A projection's weights over fsdp, or over tensor the widest activations of a device's own rows. A table of the
    # vocabulary is larger, and so are the activations of all rows of a copy.
    projection = max(np.prod(size) for size in shape().projections.values())
    own_rows = 8 // (mesh.data * mesh.fsdp) * SIZES.prompt * shape().intermediate_size if mesh.tensor > 1 else 0
    assert 0 < max(gathered) <= 4 * max(projection, own_rows)
    # Between copies of the model nothing passes but gradients, losses and counts, once a step.
    copies = mesh.data
    if copies > 1:
        positions = np.arange(8).reshape(copies, -1)
        copy_of = {int(place): copy for copy, places in enumerate(positions) for place in places}
        across = [one for one in program.collectives if len({copy_of[place] for place in one.devices}) > 1]
        trained = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(adapter_shapes(shape(), 2))) * 2 + 2 * 32
        assert {one.kind for one in across} == {"all-reduce"}
        assert sum(one.bytes * one.times for one in across) <= 4 * (trained + 64)


@pytest.mark.parametrize("stage", STAGES)
def test_base_weights_are_divided(stage: str):
    """If this broke, a larger pod would not make a larger model fit."""
    whole = workload(dataclasses.replace(configuration(stage), mesh=MeshConfig(8, 1, 1)))
    divided = workload(dataclasses.replace(configuration(stage), mesh=MeshConfig(1, 4, 2)))
    # Norms are whole everywhere, and the vocabulary is never divided, so tensor leaves the tables as they are.
    assert whole.base_bytes / 8 < divided.base_bytes < whole.base_bytes / 4


@pytest.mark.parametrize("stage", STAGES)
def test_flops_of_the_program_are_those_of_the_model(stage: str):
    """If this broke, utilisation would be told wrong, and loops counted once would look like a fast machine."""
    config = dataclasses.replace(configuration(stage), mesh=MeshConfig(2, 1, 1), micro_batches=2)
    made = workload(config)
    found = program_flops(made.function.trace(*made.arguments).jaxpr)
    batch = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), made.arguments[2])
    lengths = batch_lengths(batch)
    resized = dataclasses.replace(shape(), vocab_size=32 + 2 + 3)
    expected = step_flops(resized, 2, config.stage, config.trains, lengths)
    # The program computes attention whole, the model needs the causal half; gathers of small tables are extra.
    assert expected < found < 1.35 * expected


def test_recomputation_is_counted():
    """If this broke, a policy that computes everything twice would look free."""
    found = {}
    for policy in ("everything", "lora", "nothing"):
        made = workload(dataclasses.replace(configuration(**{"model.remat": policy}), mesh=MeshConfig(1, 1, 1)))
        found[policy] = program_flops(made.function.trace(*made.arguments).jaxpr)
    assert found["everything"] <= found["lora"] < 1.1 * found["everything"] < found["nothing"]


@pytest.mark.parametrize("task", ["compress", "decode"])
@pytest.mark.parametrize("mesh", [MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)])
def test_workloads_run(task: str, mesh: MeshConfig):
    """If this broke, the benchmark and the preflight of compression and decoding would fail, or time an error."""
    made = workload(dataclasses.replace(configuration(), mesh=mesh), task)
    for leaf in jax.tree.leaves(made.function(*random_arguments(made))):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


def test_random_batches_train():
    """If this broke, the benchmark would time a step on nonsense, for instance memories outside their prompt."""
    for stage in STAGES:
        made = workload(dataclasses.replace(configuration(stage), mesh=MeshConfig(2, 2, 1), batch_size=4))
        _, metrics = made.function(*random_arguments(made))
        assert float(metrics["loss"]) > 0 and float(metrics["gradient_norm"]) > 0


def test_known_shapes():
    """If this broke, a plan for a model that is not downloaded would be that of another model."""
    millions = {name: _millions(shape_of(name)) for name in KNOWN_MODELS}
    assert {name: round(value / 100) for name, value in millions.items()} == {
        "mistralai/Mistral-7B-Instruct-v0.2": 72,  # 7.24 B on its model card
        "microsoft/Phi-4-mini-instruct": 38,  # 3.84 B
        "Qwen/Qwen3-4B": 40,  # 4.02 B
        "meta-llama/Llama-3.1-8B-Instruct": 80,  # 8.03 B
    }
    with pytest.raises(UserError, match="whose shape is known"):
        shape_of("somebody/else")


def _millions(config: DecoderConfig) -> float:
    layers = config.num_layers * sum(a * b for a, b in config.projections.values())
    tables = config.vocab_size * config.hidden_size * (1 if config.tied_head else 2)
    return (layers + tables) / 1e6


def test_roofline_within_and_between_slices():
    """If this broke, the gradient exchange between slices would be taken for one over fast links."""

    @dataclasses.dataclass(frozen=True)
    class Device:
        slice_index: int

    devices: Any = [Device(number // 4) for number in range(8)]
    chip = Chip(flops=1.0, memory=1.0, memory_rate=10.0, link_rate=4.0, network_rate=2.0)
    one = Collective("all-reduce", "f32", (4,), 16, 8, tuple(range(8)), 3, "")
    times = roofline(Program((one,), 100, ()), 7.0, chip, devices)
    # Within a slice of 4: 2 x 16 x 3/4 = 24 bytes; between 2: 2 x 16 x 1/2, shared by 4 devices, = 4 bytes.
    assert times == {"matrix units": 7.0, "memory": 10.0, "links": 3 * 24 / 4, "network": 3 * 4 / 2}
    within = dataclasses.replace(one, group=4, devices=(0, 1, 2, 3), kind="all-gather")
    assert roofline(Program((within,), 0, ()), 0.0, chip, devices)["network"] == 0
    # As TPU writes it, of 1 MiB: the quarter of each device passes between slices; then a gather and a permutation do.
    written = read_program((Path(__file__).parent / "tpu" / "between_slices.txt").read_text())
    times = roofline(written, 0.0, chip, devices)
    assert times["links"] == 7 * (3 / 4 + 3 / 4) * 2**20 / 4 and times["network"] == (7 / 4 + 1 + 2) * 2**20 / 2


def test_suggestions_go_on_until_one_fits(monkeypatch: pytest.MonkeyPatch):
    """If this broke, a user whose configuration does not fit would get no advice, or advice that does not fit."""
    tried = []

    def fake(config, *_):
        tried.append(config)
        fits = config.mesh.fsdp == 8 and config.model.remat == "nothing" and config.micro_batches == 2
        memory = Memory(0, 0, 0, 0) if fits else None
        return Estimate(memory, 0 if fits else 10**9, 1.0, 0, 1.0, None, {"memory": 1.0}, 0.0)

    monkeypatch.setattr("clara_jax.planning.search.estimate_config", fake)
    said: list[str] = []
    config = dataclasses.replace(configuration(), batch_size=64)
    found = first_that_fits(config, shape(), jax.devices(), SIZES, "train", said.append)
    assert found is not None and found[0].mesh == MeshConfig(1, 8, 1) and found[0].micro_batches == 2
    assert len(said) == len(tried) and "1.0 GB too few" in said[0] and "it fits" in said[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology=h100:8"], "only where there is one"),
        (["--topology=v5e:4x4"], "pip install 'clara_jax\\[tpu-preflight\\]'"),
        (["--topology=v5e:4x4", "--slices=0"], "slices is 0"),
        (["--topology=v5e:4x4", "--sizes.prompt=0"], "sizes.prompt is 0"),
        (["--topology=v5e:4x4", "--task=fly"], "task"),
        ([], "topology"),
    ],
)
def test_preflight_refuses(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys):
    """A wrong word must be answered with what to write, before minutes of compiling."""
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # the tests' platform stays
    base = ["--run_dir=x", "--stage=compression_pretraining", f"--model.base={FIXTURES / 'mistral_window' / 'base'}"]
    monkeypatch.setattr(sys, "argv", ["preflight", *base, "--data.path=[x.jsonl]", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_command(preflight.main)
    assert stopped.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_benchmark_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """If this broke, nobody could compare two machines."""
    monkeypatch.setattr("clara_jax.planning.timing.measured_peak", lambda *_: 1e9)
    monkeypatch.setattr(benchmark_command, "measured_peak", lambda *_: 1e9)
    config = ["--run_dir=x", "--stage=end_to_end", f"--model.base={FIXTURES / 'mistral_window' / 'base'}"]
    config += ["--data.path=[x.jsonl]", "--model.doc_max_length=16", "--model.compression_rate=8", "--lora.rank=2"]
    more = ["--batch_size=2", "--mesh.data=1", "--sizes.candidates=2", "--sizes.prompt=64", "--sizes.targets=8"]
    more += ["--timed=2", "--warmup=1", "--compilation_cache=", f"--json={tmp_path / 'figures.json'}"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *config, "--objective.top_k=2", *more])
    benchmark_command.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["step_seconds_p50"] <= figures["step_seconds_p90"] and figures["unit"] == "records"
    assert 0 < figures["model_tflops_per_device"] <= figures["hardware_tflops_per_device"]
    assert "| step, median |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "v5p:2x2x2"])
def test_a_text_that_cannot_be_read_back(name: str, monkeypatch: pytest.MonkeyPatch):
    """Libtpu fails to read back its own scatter of a v5p: if this broke, nothing would be told of such a program."""
    if name:
        pytest.importorskip("libtpu")
    monkeypatch.setattr(jax.stages.Compiled, "as_text", lambda _: pytest.fail("read back"))
    monkeypatch.setattr("clara_jax.planning.estimate.chip_of", lambda kind: Chip(1e12, 1e9, 1e11, 1e10, 1e9))
    mesh = make_mesh(MeshConfig(8, 1, 1), topology.topology_devices(name) if name else jax.devices())
    place = NamedSharding(mesh, PartitionSpec("data"))
    table = jax.ShapeDtypeStruct((2048, 512), np.float32, sharding=place)
    places = jax.ShapeDtypeStruct((2048,), np.int32, sharding=place)

    def scatter(table: Any, places: Any) -> Any:
        return jax.lax.psum(table.at[np.arange(256), places].add(1.0), "data")

    by_device = jax.shard_map(scatter, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec())
    found = estimate(Workload(jax.jit(by_device), (table, places), mesh, 0, 1, "scatters"))
    assert found.fits and found.program is not None
    assert found.program.by_kind() == {"all-reduce": (1, 2**19)}


@pytest.mark.parametrize(("memory", "text"), [(1e9, True), (2e5, False)])
def test_preflight_on_devices_at_hand(
    memory: float, text: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """The whole command, with CPU devices for a topology: a user acts on what it says, and on its status."""
    if not text:
        monkeypatch.setattr("clara_jax.planning.estimate._TEXT", "none")
    monkeypatch.setattr(preflight, "topology_devices", lambda *_: jax.devices())
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr("clara_jax.planning.estimate.chip_of", lambda kind: Chip(1e12, memory, 1e11, 1e10, 1e9))
    monkeypatch.setattr("clara_jax.planning.search._smaller", lambda config, devices: iter(()))
    config = ["--run_dir=x", "--stage=compression_pretraining", f"--model.base={FIXTURES / 'mistral_window' / 'base'}"]
    config += ["--data.path=[x.jsonl]", "--model.doc_max_length=16", "--model.compression_rate=8", "--lora.rank=2"]
    more = ["--batch_size=8", "--sizes.prompt=32", "--sizes.targets=8", "--topology=v5e:2x4"]
    more += [f"--json={tmp_path / 'figures.json'}"]
    monkeypatch.setattr(sys, "argv", ["preflight", *config, *more])
    with pytest.raises(SystemExit) as stopped:
        preflight.main()
    said = capsys.readouterr().out
    assert "8 x cpu (data 8 x fsdp 1 x tensor 1)" in said
    assert ("held by" in said) == ("all-reduce" in said) == ("exchanges are not known" not in said) == text
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["memory"] is not None and (figures["exchanged"] is not None) == text
    if memory == 1e9:
        assert stopped.value.code == 0 and "fits: 0.00 GB of 1.0 GB a device" in said
    else:
        assert stopped.value.code == 1 and "does not fit: " in said and "Nothing that was tried fits." in said


def test_preflight_wants_all_devices(monkeypatch: pytest.MonkeyPatch, capsys):
    """A plan for three of sixteen chips would be one for another pod."""
    monkeypatch.setattr(preflight, "topology_devices", lambda *_: jax.devices())
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    base = ["--run_dir=x", "--stage=compression_pretraining", f"--model.base={FIXTURES / 'mistral_window' / 'base'}"]
    monkeypatch.setattr(sys, "argv", ["preflight", *base, "--data.path=[x]", "--topology=v5e:2x4", "--mesh.data=3"])
    with pytest.raises(SystemExit):
        run_command(preflight.main)
    assert "is 3 devices, and the topology has 8" in capsys.readouterr().err
