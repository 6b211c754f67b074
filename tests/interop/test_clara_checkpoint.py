"""The reference's checkpoints and PEFT folders: the reference and PEFT must be able to read what we write."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clara_jax.errors import UserError
from clara_jax.interop import clara_checkpoint, names
from clara_jax.interop.adapters import adapter_from_tensors, adapter_to_tensors, write_peft
from clara_jax.interop.base import load_base
from clara_jax.interop.clara_checkpoint import ADAPTERS, CONFIG, TABLES, CheckpointConfig
from clara_jax.models.config import read_decoder_config
from clara_jax.models.decoder import Decoder
from clara_jax.models.lora import LoraConfig, adapter_shapes
from clara_jax.pretrained import load_checkpoint, save_checkpoint
from tests.conftest import FIXTURES

CASES = ("llama2_linear", "mistral_window", "phi3_default", "qwen2_bias")
CHECKPOINTS = ("ckpt_stage1", "ckpt_stage1_2", "ckpt_stage2")
COPIES = (names.EMBED, names.HEAD)  # the full tables inside freshly made adapters, which nobody reads


def random_adapter(config, rank, seed):
    rng, shapes = np.random.default_rng(seed), adapter_shapes(config, rank)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize("case", CASES)
def test_written_checkpoints_have_the_recorded_layout(case, tmp_path):
    """The reference loads its checkpoints key by key: one name or shape off, and it refuses or skips a tensor."""
    layout = json.loads((FIXTURES / case / "checkpoints.json").read_text())["layout"]["ckpt_stage2"]
    recorded = json.loads((FIXTURES / case / "ckpt_stage2" / CONFIG).read_text())
    config, rank = read_decoder_config(FIXTURES / case / "base"), recorded["lora_r"]
    vocabulary = layout["first_last"][names.EMBED][0]
    table = np.zeros((vocabulary, config.hidden_size), np.float32)
    adapters = {r: random_adapter(config, rank, i) for i, r in enumerate(clara_checkpoint.REFERENCE_NAMES)}
    fresh = CheckpointConfig(
        recorded["decoder_model_name"], recorded["doc_max_length"], recorded["compr_rate"], rank,
        recorded["generation_top_k"], recorded["training_stage"],
    )  # fmt: skip
    clara_checkpoint.write_checkpoint(tmp_path, fresh, config, adapters, table, None if config.tied_head else table)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, ADAPTERS, TABLES}
    written = torch.load(tmp_path / ADAPTERS, weights_only=True)
    assert set(written) == set(layout["adapters"])
    for name, expected in layout["adapters"].items():
        shapes = {key: shape for key, shape in expected.items() if key not in COPIES}
        assert {key: list(tensor.shape) for key, tensor in written[name].items()} == shapes
        assert {tensor.dtype for tensor in written[name].values()} == {torch.float32}
    tables = torch.load(tmp_path / TABLES, weights_only=True)
    assert {key: list(tensor.shape) for key, tensor in tables.items()} == layout["first_last"]
    # Every setting the reference reads; transformers adds these two when it saves and does not need them.
    by_transformers = {"transformers_version", "_attn_implementation_autoset"}
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert set(fields) - by_transformers == set(recorded) - by_transformers
    chosen = {key for key in recorded if key not in by_transformers and recorded[key] != fields[key]}
    assert chosen <= {"attn_implementation"}  # a matter of the machine, not of the model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_load_save_load_is_bit_exact(case, checkpoint, tmp_path):
    """Opening a published checkpoint and saving it again would change it."""
    source, target = FIXTURES / case / checkpoint, tmp_path / "out"
    loaded = load_checkpoint(source, str(FIXTURES / case / "base"), "float32")
    save_checkpoint(target, loaded)
    for file in (ADAPTERS, TABLES):
        before, after = torch.load(source / file), torch.load(target / file)
        if file == TABLES:
            before, after = {"": before}, {"": after}
        assert set(before) == set(after)
        for group, tensors in before.items():
            expected = {key: tensor for key, tensor in tensors.items() if file == TABLES or key not in COPIES}
            assert set(after[group]) == set(expected)
            for key, tensor in expected.items():
                assert torch.equal(after[group][key].view(torch.int32), tensor.contiguous().view(torch.int32)), key
    assert json.loads((target / CONFIG).read_text()) == json.loads((source / CONFIG).read_text())
    again = load_checkpoint(target, str(FIXTURES / case / "base"), "float32")
    for got, expected in zip(jax.tree.leaves(again.params), jax.tree.leaves(loaded.params), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert again.checkpoint == loaded.checkpoint


@pytest.fixture
def copy(tmp_path) -> Path:
    """A checkpoint to damage, beside its base."""
    shutil.copytree(FIXTURES / "qwen2_bias" / "ckpt_stage1", tmp_path / "qwen2_bias" / "checkpoint")
    shutil.copytree(FIXTURES / "qwen2_bias" / "base", tmp_path / "qwen2_bias" / "base")
    return tmp_path / "qwen2_bias" / "checkpoint"


def damage(path: Path, change):
    content = torch.load(path) if path.suffix == ".pth" else json.loads(path.read_text())
    content = change(content) or content
    if path.suffix == ".pth":
        torch.save(content, path)
    else:
        path.write_text(json.dumps(content))


A = "model.layers.1.self_attn.k_proj.lora_A.weight"


def drop(key):
    """Remove an entry."""

    def change(content):
        del content[key]

    return change


def encoder(change):
    """The same change, of the encoder adapter's tensors."""
    return lambda content: change(content["encoder_adapter"])


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        (TABLES, lambda t: t.update({names.EMBED: t[names.EMBED][:-1]}), f"{TABLES}.*'{names.EMBED}' has shape"),
        (TABLES, lambda t: t.update({names.HEAD: t[names.HEAD][:, :-1]}), f"{TABLES}.*'{names.HEAD}' has shape"),
        (TABLES, drop(names.EMBED), f"{TABLES}.*'{names.EMBED}' is missing"),
        (TABLES, drop(names.HEAD), f"{TABLES}.*'{names.HEAD}' is missing"),
        (TABLES, lambda t: t.update({"model.norm.weight": torch.ones(2)}), f"{TABLES}.*model.norm.weight"),
        (TABLES, lambda t: {names.EMBED: {"w": t[names.EMBED]}, names.HEAD: t[names.HEAD]}, TABLES),
        (TABLES, lambda t: t.update({names.EMBED: t[names.EMBED].to(torch.int64)}), TABLES),
        (ADAPTERS, lambda a: a.update({"reranker_adapter": a["encoder_adapter"]}), "reranker_adapter"),
        (ADAPTERS, drop("encoder_adapter"), "no 'encoder_adapter'"),
        (ADAPTERS, encoder(drop(A)), f"encoder_adapter.*'{A}' is missing"),
        (ADAPTERS, encoder(lambda t: t.update({A: t[A][:1]})), f"encoder_adapter.*'{A}' has shape"),
        (ADAPTERS, encoder(lambda t: t.update({A: t[A].T})), f"encoder_adapter.*'{A}' has shape"),
        (ADAPTERS, encoder(lambda t: t.update({A: t[A].to(torch.int32)})), f"encoder_adapter.*'{A}'.*int32"),
        (ADAPTERS, encoder(lambda t: t.update({"model.layers.9.mlp.up_proj.lora_A.weight": t[A]})), r"layers\.9"),
        (ADAPTERS, encoder(lambda t: t.update({A: {"deep": t[A]}})), ADAPTERS),
        (ADAPTERS, lambda a: {"encoder_adapter": a["encoder_adapter"][A]}, ADAPTERS),
        (CONFIG, lambda c: c.update(lora_r=8), "rank 8.*lora_r"),
        (CONFIG, lambda c: c.update(model_type="qwen2"), "model_type 'qwen2'.*CLaRa"),
        (CONFIG, lambda c: c.update(different_mem_tokens=False), "'different_mem_tokens' is False"),
        (CONFIG, lambda c: c.update(quantization="int4"), "'quantization' is 'int4'"),
        (CONFIG, lambda c: c.update(sep=False), "'sep' is False"),
        (CONFIG, lambda c: c.update(compr_use_mlp=True), "'compr_use_mlp' is True"),
        (CONFIG, drop("compr_rate"), "'compr_rate' is missing"),
        (CONFIG, drop("decoder_model_name"), "'decoder_model_name' is missing"),
        (CONFIG, lambda c: c.update(compr_rate=0), "compr_rate"),
        (CONFIG, lambda c: c.update(compr_rate=1000), "compression rate|compr_rate"),
        (CONFIG, lambda c: c.update(doc_max_length="40"), "doc_max_length"),
        (CONFIG, lambda c: c.update(lora_r=0), "lora"),
        (CONFIG, lambda c: [c], CONFIG),
        (CONFIG, lambda c: c.update(decoder_model_name="./nowhere/base"), "nowhere/base"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_damage_is_named(copy, file, change, named):
    """Each of these would give a model that answers nonsense, or a traceback that names no file."""
    damage(copy / file, change)
    with pytest.raises(UserError, match=named):
        load_checkpoint(copy, dtype="float32")


@pytest.mark.parametrize("file", [CONFIG, ADAPTERS, TABLES])
def test_missing_and_garbled_files_are_named(copy, file):
    """An interrupted copy of a checkpoint is the commonest damage."""
    (copy / file).write_text("garbage")
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        load_checkpoint(copy, dtype="float32")
    (copy / file).unlink()
    with pytest.raises(UserError, match=rf"{file.replace('.', '[.]')} does not exist"):
        load_checkpoint(copy, dtype="float32")


def test_a_base_model_is_no_checkpoint(copy):
    """Pointing at the base instead of the checkpoint is the commonest mistake."""
    with pytest.raises(UserError, match="model_type 'qwen2', not 'CLaRa'"):
        load_checkpoint(copy.parent / "base")


def test_the_checkpoint_of_another_base_is_refused(copy):
    """Adapters of one model on another of a like shape would load and answer nonsense."""
    with pytest.raises(UserError):
        load_checkpoint(copy, str(FIXTURES / "mistral_window" / "base"), "float32")


def test_undamaged_copy_loads(copy):
    """The refusals above would prove nothing if the copy itself were refused."""
    assert set(load_checkpoint(copy, dtype="float32").params) >= {"compressor", "generator", "memory_tokens"}


@pytest.mark.parametrize("case", ["mistral_window", "phi3_default"])
def test_adapter_names_there_and_back(case):
    """A transposed or exchanged matrix would not show in shapes where they are square."""
    config = read_decoder_config(FIXTURES / case / "base")
    adapter = random_adapter(config, 3, 0)
    back = adapter_from_tensors(adapter_to_tensors(adapter, config), config, 3, "here")
    assert jax.tree.structure(back) == jax.tree.structure(adapter)
    for got, expected in zip(jax.tree.leaves(back), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls what transformers will rename
@pytest.mark.parametrize("case", ["llama2_linear", "phi3_default"])
def test_peft_computes_the_same_with_an_exported_adapter(case, tmp_path):
    """Adapters trained here would be of no use in the PyTorch world."""
    peft = pytest.importorskip("peft", reason="the peft library is not installed")
    import transformers

    base_folder, rank = FIXTURES / case / "base", 3
    config = read_decoder_config(base_folder)
    adapter = random_adapter(config, rank, 1)
    write_peft(tmp_path, adapter, config, LoraConfig(rank, 5.0, 0.1), str(base_folder))
    tokens = np.random.default_rng(0).integers(0, 300, (2, 9))
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="eager")
    with torch.no_grad():
        without = base(torch.tensor(tokens)).logits.numpy()
        expected = peft.PeftModel.from_pretrained(base, tmp_path).eval()(torch.tensor(tokens)).logits.numpy()
    decoder = Decoder(config, jnp.float32, lora_alpha=5.0)

    @jax.jit
    def run(base, adapter):
        variables = {"params": base, "lora": adapter}
        embeddings = decoder.apply(variables, jnp.asarray(tokens), method="embed")
        hidden = decoder.apply(variables, embeddings, jnp.ones(tokens.shape, bool))[0]
        return decoder.apply(variables, hidden, method="logits")

    got = np.asarray(run(load_base(base_folder, config), adapter))
    # 1e-4 of the largest entry, the bound of the parity suite; the adapter itself moves far more than that.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected - without).max() > 0.1 * np.abs(expected).max()
