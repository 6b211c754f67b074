"""The decoder computes what Hugging Face's models compute, whatever the padding, the cache or the remat policy."""

import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from clara_jax.errors import UserError
from clara_jax.interop.base import load_base
from clara_jax.models.config import Rope, decoder_config_from_hf, read_decoder_config
from clara_jax.models.decoder import Decoder
from clara_jax.models.remat import RematPolicy
from tests.models.tiny import jit, random_adapter, random_base, random_embeddings, tiny_config

COMMON = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10.0,  # slow and fast frequencies, and the ramp between them, among four pairs
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.5, 4.0],
    "partial_rotary_factor": 0.75,
}
# Name -> (transformers class, what differs from COMMON). Sequences are 12 tokens long.
MODELS = {
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_window_head_dim": ("Mistral", {"sliding_window": 5, "head_dim": 12, "num_key_value_heads": 2}),
    "llama": ("Llama", {"rms_norm_eps": 1e-3, "tie_word_embeddings": True}),
    "llama_biased_linear": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
        },
    ),
    "llama_dynamic_past_its_length": (
        "Llama",
        {
            "max_position_embeddings": 8,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 3.0},
        },
    ),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", {}),
    "qwen2_window_in_the_second_layer": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 12, "attention_bias": True}),
    "phi3": ("Phi3", {"sliding_window": 6, "original_max_position_embeddings": 64}),
    "phi3_longrope_short": (
        "Phi3",
        {
            "rope_parameters": LONGROPE | {"original_max_position_embeddings": 32},
            "original_max_position_embeddings": 32,
        },
    ),
    "phi3_longrope_past_its_length": (
        "Phi3",
        {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 8}, "original_max_position_embeddings": 8},
    ),
}
LENGTH = 12


def make_model(name: str) -> torch.nn.Module:
    """A random model of transformers whose norms differ from one and whose biases differ from zero."""
    family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**(COMMON | changes), attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                tensor += 0.3 * torch.randn_like(tensor)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_logits_equal_transformers(name, tmp_path):
    """A converted model of this family would answer differently from the model it was converted from."""
    model = make_model(name)
    model.save_pretrained(tmp_path)
    config = read_decoder_config(tmp_path)
    decoder, base = Decoder(config, jnp.float32), load_base(tmp_path, config)
    tokens = np.random.default_rng(1).integers(0, 40, (2, LENGTH))
    # The second row is shorter where the model's scaling does not look at lengths: transformers takes the longest
    # row's length for all, this decoder each row's own (see `rotary_tables`).
    past = "past_its_length" in name
    valid = np.arange(LENGTH) < np.array([LENGTH, LENGTH if past else LENGTH - 3])[:, None]
    with torch.no_grad():
        mask = torch.tensor(valid.astype(np.int64))
        output = model(torch.tensor(tokens), attention_mask=mask, output_hidden_states=True)
    hidden, logits = run_with_logits(decoder, base, tokens, valid)
    for got, expected in ((hidden, output.hidden_states[-1]), (logits, output.logits)):
        expected = expected.numpy()
        # 1e-4 of the largest entry, the bound of the parity suite.
        np.testing.assert_allclose(got[valid], expected[valid], rtol=0, atol=1e-4 * np.abs(expected[valid]).max())


def run_with_logits(decoder, base, tokens, valid):
    @jit
    def run(base):
        variables = {"params": base}
        embeddings = decoder.apply(variables, jnp.asarray(tokens), method="embed")
        hidden = decoder.apply(variables, embeddings, jnp.asarray(valid))[0]
        return hidden, decoder.apply(variables, hidden, method="logits")

    return [np.asarray(x) for x in run(base)]


@pytest.mark.parametrize("name", ["llama_dynamic_past_its_length", "phi3_longrope_past_its_length"])
def test_the_models_above_are_past_their_length(name):
    """The comparison above would prove nothing of the scaling if it did not reach past the original length."""
    config = decoder_config_from_hf(make_model(name).config.to_dict())
    assert 0 < config.rope.original_length < LENGTH


def test_configs_of_transformers_4_and_5_mean_the_same():
    """A model saved before transformers 5 (`rope_scaling`, `rope_theta`, `type`) would get other frequencies."""
    for name, (family, changes) in MODELS.items():
        new = getattr(transformers, f"{family}Config")(**(COMMON | changes)).to_dict()
        rope = dict(new["rope_parameters"])
        old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")}
        old["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        rope["type"] = rope.pop("rope_type")
        old["rope_scaling"] = None if rope["type"] == "default" else rope
        old = json.loads(json.dumps(old))
        assert decoder_config_from_hf(old) == decoder_config_from_hf(json.loads(json.dumps(new))), name


WINDOWED = tiny_config(windows=(3, 0), biased=("q_proj",), qk_norm=True)


def test_padding_on_either_side_gives_the_same_numbers():
    """The reference pads left, this project right: published checkpoints would be fed other positions."""
    decoder = Decoder(WINDOWED, jnp.float32)
    base, x = random_base(decoder), random_embeddings(1, 6)
    apply = jit(decoder.apply)

    def padded(left, right):
        inside = jnp.pad(x, ((0, 0), (left, right), (0, 0)), constant_values=3.0)
        valid = jnp.arange(10)[None] - left
        return apply({"params": base}, inside, (valid >= 0) & (valid < 6))[0][:, left : left + 6]

    alone = jit(decoder.apply)({"params": base}, x, jnp.ones((1, 6), bool))[0]
    for left in (0, 4, 2):
        # Angles of shifted positions are the same numbers here (positions count real tokens): sums only reorder.
        np.testing.assert_allclose(padded(left, 4 - left), alone, rtol=0, atol=1e-5 * float(jnp.abs(alone).max()))


@pytest.mark.parametrize("rope", [Rope(100.0, 8), Rope(100.0, 8, "dynamic", factor=2.0, original_length=4)])
def test_a_row_does_not_depend_on_its_batch(rope):
    """A document's memory would change with the documents it is compressed together with."""
    decoder = Decoder(tiny_config(rope=rope), jnp.float32)
    base, x = random_base(decoder), random_embeddings(2, 7)
    apply = jit(decoder.apply)
    short = jnp.arange(7)[None] < 3
    together = apply({"params": base}, x, jnp.concatenate([short, jnp.ones((1, 7), bool)]))[0][:1, :3]
    twice = apply({"params": base}, jnp.concatenate([x[:1], x[:1]]), jnp.concatenate([short, short]))[0][:1, :3]
    np.testing.assert_allclose(together, twice, rtol=0, atol=1e-6)  # the same program on the same row


@pytest.mark.parametrize("side", ["left", "right"])
def test_cache_in_chunks_equals_one_pass(side):
    """Generation would write other tokens than the model that was trained."""
    decoder = Decoder(WINDOWED, jnp.float32)
    base, adapter = random_base(decoder), random_adapter(WINDOWED, 2)
    variables = {"params": base, "lora": adapter}
    x = random_embeddings(2, 8)
    # Row 0 is full; row 1 has padding before its text, or in the middle (its prompt was padded on the right).
    valid = np.ones((2, 8), bool)
    valid[1, :3] = side == "right"
    valid[1, 4:6] = side == "left"
    valid = jnp.asarray(valid)
    whole, none = jit(decoder.apply)(variables, x, valid)
    assert none is None
    step = jit(decoder.apply)
    cache, parts = decoder.empty_cache(2, 10), []
    for start in (0, 4):  # chunks of one shape, compiled once; two columns of the cache stay empty
        part, cache = step(variables, x[:, start : start + 4], valid[:, start : start + 4], cache)
        parts.append(part)
    got, expected = np.asarray(jnp.concatenate(parts, axis=1)), np.asarray(whole)
    real = np.asarray(valid)
    np.testing.assert_allclose(got[real], expected[real], rtol=0, atol=1e-5 * np.abs(expected[real]).max())
    assert int(cache.filled) == 8
    np.testing.assert_array_equal(cache.valid[:, :8], valid)
    assert not cache.valid[:, 8:].any()


def test_remat_policies_give_the_same_gradients():
    """Choosing a policy that fits the memory would change what is learned."""
    config = tiny_config()
    base, adapter = random_base(Decoder(config, jnp.float32)), random_adapter(config, 2)
    x, valid = random_embeddings(2, 5), jnp.ones((2, 5), bool)
    key = jax.random.key(0, impl="unsafe_rbg")  # quick to compile
    gradients = {}
    for policy in typing.get_args(RematPolicy):
        decoder = Decoder(config, jnp.float32, remat=policy, lora_dropout=0.3)

        def loss(adapter, decoder=decoder):
            variables, rngs = {"params": base, "lora": adapter}, {"dropout": key}
            return jnp.sum(jnp.sin(decoder.apply(variables, x, valid, rngs=rngs)[0]))

        gradients[policy] = jit(jax.grad(loss))(adapter)
    plain = gradients.pop("everything")
    assert set(gradients) == {"lora", "dots", "offload", "nothing"}
    for gradient in gradients.values():
        for got, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain), strict=True):
            # The same arithmetic (the same dropout too), scheduled otherwise: float32 rounding.
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


def test_bfloat16_decoder_keeps_logits_in_float32():
    """Losses of a bfloat16 model would be rounded to two digits."""
    decoder = Decoder(tiny_config(), jnp.bfloat16)
    variables = {"params": decoder.abstract_base()}
    hidden = jax.eval_shape(decoder.apply, variables, random_embeddings(1, 3), jnp.ones((1, 3), bool))[0]
    assert hidden.dtype == jnp.bfloat16
    logits = jax.eval_shape(lambda v, h: decoder.apply(v, h, method="logits"), variables, hidden)
    assert logits.dtype == jnp.float32


BASE_FIELDS = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-6,
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"model_type": None}, "None"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"resid_pdrop": 0.1}, "resid_pdrop"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_key_value_heads"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["full_attention", "chunked_attention"],
            },
            "layer_types",
        ),
    ],
)
def test_refused_settings_are_named(changes, named, tmp_path):
    """A feature that is not computed would give wrong numbers without a word, or a traceback without a name."""
    (tmp_path / "config.json").write_text(json.dumps(BASE_FIELDS | changes))
    with pytest.raises(UserError, match=named) as error:
        read_decoder_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("key", [key for key in BASE_FIELDS if key != "model_type"])
def test_missing_keys_are_named(key):
    """A damaged config.json would end in a KeyError deep inside."""
    with pytest.raises(UserError, match=f"'{key}'"):
        decoder_config_from_hf({name: value for name, value in BASE_FIELDS.items() if name != key})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"text"', "\ufeff{}", "null"])
def test_config_that_is_no_json_object(text, tmp_path):
    """A half-downloaded config.json would end in a traceback."""
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json"):
        read_decoder_config(tmp_path)


def test_no_config_at_all(tmp_path):
    """Pointing at the wrong folder is the commonest mistake."""
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        read_decoder_config(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", "40"),
        ("num_attention_heads", 0),
        ("hidden_size", None),
        ("rope_scaling", {"type": "linear", "factor": "x"}),
    ],
)
def test_values_of_the_wrong_kind_are_named(key, value):
    """A hand-edited config would fail in the middle of loading, with a traceback that names no key."""
    with pytest.raises(UserError, match=key if key != "rope_scaling" else "factor"):
        decoder_config_from_hf(BASE_FIELDS | {key: value})
