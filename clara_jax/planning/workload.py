"""The programs that a configuration runs, as shapes alone: nothing is read, downloaded or allocated.

`train` is the real step of `clara_jax.training.step`, `compress` one batch of the compressor, `decode` some new tokens
of a batch of prompts. Sizes that only data can tell (how long prompts are) are given as `Sizes`.
"""

import dataclasses
import math
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clara_jax.config import TrainConfig
from clara_jax.data.collate import Batch
from clara_jax.data.length_classes import MULTIPLE
from clara_jax.data.tokenizer import LAYOUT_TOKENS
from clara_jax.errors import fail
from clara_jax.generation import best_token
from clara_jax.models.config import DecoderConfig
from clara_jax.models.decoder import Decoder
from clara_jax.models.decoding import decodes_apart
from clara_jax.models.lora import adapter_shapes
from clara_jax.models.roles import EncoderInputs, GeneratorInputs, Params, RoleModel
from clara_jax.pretrained import default_dtype
from clara_jax.sharding import DATA, FSDP, TENSOR, base_sharding, batch_sharding, check_heads, on_mesh, replicated
from clara_jax.training.candidates import uses_store
from clara_jax.training.optimizer import make_optimizer
from clara_jax.training.stages import STAGES, split_trainable
from clara_jax.training.state import init_state
from clara_jax.training.step import check_batch, make_step

# A jitted function, the shapes of its arguments, and what one execution does: how many of what.
Program = tuple[jax.stages.Wrapped, tuple[Any, ...], int, str]
Task = Literal["train", "compress", "decode"]
_NEW_TOKENS = 16  # of each row, in one execution of `decode`
_SPECIAL = 3  # <AE>, <ENC> and <SEP>, beside the memory tokens


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What one batch is padded to, where data does not say it. Lengths are in tokens.

    Args:
        candidates: Documents of a record (default by stage: 1, 5 and 20).
        prompt: Prompt with answer (default by stage: memories and 384, 128 or 128 more).
        targets: Answer (default by stage: 256, 64 and 64).
        question: Question for the query reasoner, without its memory tokens.
        batch_tokens: Columns of a compress batch on each device.
        decode_batch: Prompts that each device decodes at once.
        decode_length: Columns of the key-value cache when decoding.

    """

    candidates: int | None = None
    prompt: int | None = None
    targets: int | None = None
    question: int = 64
    batch_tokens: int = 8192
    decode_batch: int = 16
    decode_length: int = 512

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                fail(f"sizes.{field.name} is {value}", "Give at least 1")


@dataclasses.dataclass(frozen=True)
class Workload:
    """A program with the shapes and places of its arguments; `items` is what one execution does, with `unit`."""

    function: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    mesh: Mesh
    base_bytes: int  # base weights on each device
    items: int
    unit: str


def make_workload(
    config: TrainConfig, shape: DecoderConfig, mesh: Mesh, sizes: Sizes, task: Task = "train"
) -> Workload:
    """The program of `task`. Raises `UserError` where the mesh does not divide the model or the batch."""
    check_heads(mesh, shape.num_heads, shape.num_kv_heads)
    memory = config.model.doc_max_length // config.model.compression_rate
    decoder = _decoder(config, shape, memory, mesh)
    model = RoleModel(decoder, shape.vocab_size)
    params = _params(config, model, memory, mesh)
    base_bytes = sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(params["base"])
    )
    make = {"train": _train, "compress": _compress, "decode": _decode}[task]
    function, arguments, items, unit = make(config, model, params, memory, mesh, sizes)
    return Workload(function, arguments, mesh, base_bytes, items, unit)


def _train(config: TrainConfig, model: RoleModel, params: Params, memory: int, mesh: Mesh, sizes: Sizes) -> Program:
    check_batch(mesh, config.batch_size, config.micro_batches)
    trainable, frozen = split_trainable(params, config.trains)
    optimizer = make_optimizer(config.optimizer, 1000)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer, config.seed), trainable)
    objective = STAGES[config.stage].objective(model, config.objective)
    step = make_step(objective, optimizer, mesh, config.micro_batches)
    batch = abstract_batch(config, model, memory, sizes)
    arguments = (_placed(state, replicated(mesh)), frozen, _placed(batch, batch_sharding(mesh)))
    return cast(jax.stages.Wrapped, step), arguments, config.batch_size, "records"


def _compress(config: TrainConfig, model: RoleModel, params: Params, memory: int, mesh: Mesh, sizes: Sizes) -> Program:
    length = _rounded(config.model.doc_max_length + LAYOUT_TOKENS + memory)
    rows = max(1, sizes.batch_tokens // length) * mesh.shape[DATA] * mesh.shape[FSDP]

    def encode(params: Params, inputs: EncoderInputs) -> jax.Array:
        return model.encode(params, "compressor", inputs)[0]

    jitted = jax.jit(on_mesh(mesh, encode), out_shardings=replicated(mesh))
    inputs = _placed(_encoder_inputs((rows,), length, memory), batch_sharding(mesh))
    return jitted, (params, inputs), rows, "documents"


def _decode(config: TrainConfig, model: RoleModel, params: Params, memory: int, mesh: Mesh, sizes: Sizes) -> Program:
    rows = sizes.decode_batch * mesh.shape[DATA] * mesh.shape[FSDP]
    cache = jax.eval_shape(lambda: model.decoder.empty_cache(rows, sizes.decode_length).with_room())
    by_layer = NamedSharding(mesh, P(None, (DATA, FSDP), TENSOR))
    cache = dataclasses.replace(
        _placed(cache, replicated(mesh)),
        keys=_placed(cache.keys, by_layer),
        values=_placed(cache.values, by_layer),
        valid=_placed(cache.valid, batch_sharding(mesh)),
    )
    weights = None
    if decodes_apart(mesh.devices.flat[0].platform):
        weights = _decoding_weights(model, params, mesh)
        layers = len(weights.layers)
        params = {**params, "base": {name: leaf for name, leaf in params["base"].items() if name != "layers"}}
        of_layer = NamedSharding(mesh, P((DATA, FSDP), TENSOR))
        keys, values = (
            (jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=of_layer),) * layers
            for x in (cache.keys, cache.values)
        )
        cache = dataclasses.replace(cache, keys=keys, values=values)

    def advance(held: tuple[Params, Any], token: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        params, weights = held

        def one(carry: Any, _: None) -> Any:
            token, cache = carry
            embeddings = model.embed(params, token)
            logits, grown = model.continue_prompt(params, embeddings, jnp.ones(token.shape, bool), cache, weights)
            return (best_token(logits)[:, None], grown), None

        return jax.lax.scan(one, (token, cache), length=_NEW_TOKENS)[0]

    token = jax.ShapeDtypeStruct((rows, 1), jnp.int32, sharding=batch_sharding(mesh))
    jitted = jax.jit(on_mesh(mesh, advance), donate_argnums=2)
    return jitted, ((params, weights), token, cache), rows * _NEW_TOKENS, "tokens"


def _decoding_weights(model: RoleModel, params: Params, mesh: Mesh) -> Any:
    """Shapes of `RoleModel.decoding_weights`, each where the weight lies that it is made of."""

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
        if not names:  # the head, [vocab, hidden]
            sharding = base_sharding(mesh, ("embed",), leaf.shape)
        elif names[0] == "lora":
            sharding = replicated(mesh)
        elif names[0] == "transposed" and names[-1] == "kernel":
            spec = base_sharding(mesh, ("layers", *names[1:]), leaf.shape[::-1]).spec
            sharding = NamedSharding(mesh, P(*spec[::-1]))
        else:
            sharding = base_sharding(mesh, ("layers", *names[1:]), leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(model.decoding_weights, params))


def compute_dtype(config: TrainConfig, mesh: Mesh) -> str:
    """The compute type of a run on the mesh's devices."""
    return default_dtype(mesh.devices.flat[0].platform) if config.model.dtype == "auto" else config.model.dtype


def abstract_batch(config: TrainConfig, model: RoleModel, memory: int, sizes: Sizes) -> Batch:
    """The shapes of a training batch of the configured stage."""
    stage, rows = STAGES[config.stage], config.batch_size
    candidates, more, targets = {"compression": (1, 128, 256), "instruction": (5, 64, 64), "retrieval": (20, 64, 64)}[
        stage.samples
    ]
    candidates, targets = sizes.candidates or candidates, sizes.targets or targets
    retrieves = stage.samples == "retrieval"
    slots = min(config.objective.top_k, candidates) if retrieves else candidates
    prompt = sizes.prompt or min(slots * (memory + 1) + more + targets, config.data.prompt_max_length)
    prompt, targets = _rounded(prompt), min(targets, prompt)
    document = _rounded(config.model.doc_max_length + LAYOUT_TOKENS + memory)
    hidden, dtype = model.decoder.config.hidden_size, model.decoder.dtype
    stored = uses_store(config)
    flag = _array((rows, candidates), jnp.bool_)
    return Batch(
        documents=None if stored else _encoder_inputs((rows, candidates), document, memory),
        candidates=flag,
        prompts=_generator_inputs(rows, prompt, slots, memory, targets),
        questions=_encoder_inputs((rows,), _rounded(sizes.question + memory), memory) if retrieves else None,
        positives=flag if retrieves else None,
        rows=_array((rows,), jnp.int32),
        memories=_array((rows, candidates, memory, hidden), dtype) if stored else None,
    )


def _decoder(config: TrainConfig, shape: DecoderConfig, memory: int, mesh: Mesh) -> Decoder:
    return Decoder(
        dataclasses.replace(shape, vocab_size=shape.vocab_size + memory + _SPECIAL),
        dtype=jnp.dtype(compute_dtype(config, mesh)),
        remat=config.model.remat,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        attention=config.model.attention,
    )


def _params(config: TrainConfig, model: RoleModel, memory: int, mesh: Mesh) -> Params:
    decoder, whole = model.decoder, replicated(mesh)

    def of_base(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = tuple(entry.key for entry in path)
        return jax.ShapeDtypeStruct(leaf.shape, decoder.dtype, sharding=base_sharding(mesh, names, leaf.shape))

    params: Params = {"base": jax.tree_util.tree_map_with_path(of_base, decoder.abstract_base())}
    adapter = _placed(adapter_shapes(decoder.config, config.lora.rank), whole)
    roles = ["compressor", "generator"] + (["query_reasoner"] if STAGES[config.stage].samples == "retrieval" else [])
    params |= dict.fromkeys(roles, adapter)
    tokens = jax.ShapeDtypeStruct((memory, decoder.config.hidden_size), jnp.float32, sharding=whole)
    return params | {"memory_tokens": tokens}


def _rounded(length: int) -> int:
    """As batches of data are, whose lengths are multiples of some columns."""
    return -(-length // MULTIPLE) * MULTIPLE


def _array(shape: tuple[int, ...], dtype: Any) -> Any:
    """A shape where the classes of a batch declare an array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _encoder_inputs(lead: tuple[int, ...], length: int, memory: int) -> EncoderInputs:
    return EncoderInputs(
        _array((*lead, length), jnp.int32),
        _array((*lead, length), jnp.bool_),
        _array((*lead, memory), jnp.int32),
    )


def _generator_inputs(rows: int, length: int, slots: int, memory: int, targets: int) -> GeneratorInputs:
    target = _array((rows, targets), jnp.int32)
    return GeneratorInputs(
        _array((rows, length), jnp.int32),
        _array((rows, length), jnp.bool_),
        _array((rows, slots, memory), jnp.int32),
        target,
        target,
        _array((rows, targets), jnp.float32),
    )


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
