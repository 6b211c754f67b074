"""The lens: what it shows is what the model's head says of the memories that everything else uses."""

import jax
import numpy as np
import pytest

from clara_jax.clara import Clara
from clara_jax.errors import UserError
from clara_jax.inspection.lens import logit_lens, token_name
from tests.conftest import FIXTURES

TEXTS = ["Who wrote the book?", "The river is long and the city lies on it", "A"]


@pytest.fixture(scope="module")
def clara():
    return Clara.from_pretrained(FIXTURES / "mistral_window" / "ckpt_stage2")


@pytest.mark.parametrize("role", ["query_reasoner", "compressor"])
def test_memory_tokens_decode_as_the_head_says(clara, role):
    """If this broke, the table would show other states than those that are searched and read."""
    memories = clara.encode_query(TEXTS) if role == "query_reasoner" else clara.compress(TEXTS)
    probabilities = np.asarray(jax.nn.softmax(clara.model.logits(clara.params, memories), axis=-1))
    best = np.argsort(-probabilities, axis=-1)[..., :3]
    for row, lens in enumerate(logit_lens(clara.loaded, role, TEXTS, top=3)):
        assert lens.text == TEXTS[row] and lens.tokens == []
        assert [position.token for position in lens.memory] == [f"<MEM{i}>" for i in range(len(lens.memory))]
        for i, position in enumerate(lens.memory):
            assert [name for name, _ in position.decoded] == [
                token_name(clara.tokenizer, t) for t in best[row, i].tolist()
            ]
            expected = probabilities[row, i, best[row, i]]
            # The rows of a batch are padded differently: rounding of float32 sums.
            np.testing.assert_allclose([p for _, p in position.decoded], expected, rtol=1e-4)


def test_all_tokens_adds_the_texts_own(clara):
    """If this broke, rows would be attributed to the wrong tokens: the memory must not move when the text is shown."""
    plain = logit_lens(clara.loaded, "compressor", TEXTS, top=2)
    for lens, without in zip(logit_lens(clara.loaded, "compressor", TEXTS, 2, all_tokens=True), plain, strict=True):
        ids, _ = clara.tokenizer.encode_passage(lens.text, clara.doc_max_length)
        assert [position.token for position in lens.tokens] == [token_name(clara.tokenizer, i) for i in ids]
        assert lens.tokens[0].token == "<ENC>"
        assert [p.decoded[0][0] for p in lens.memory] == [p.decoded[0][0] for p in without.memory]


def test_topics_count_memory_tokens(clara):
    """If this broke, the summary would not be of the table above it."""
    (lens,) = logit_lens(clara.loaded, "compressor", TEXTS[1:2], top=6)
    assert lens.topics
    assert [t.count for t in lens.topics] == sorted((t.count for t in lens.topics), reverse=True)
    for topic in lens.topics:
        rows = [position for position in lens.memory if topic.word in dict(position.decoded)]
        assert topic.count == len(rows)


def test_a_long_document_says_that_it_is_cut(clara):
    """If this broke, the reader would take the memory for that of the whole document."""
    long, short = logit_lens(clara.loaded, "compressor", ["word " * 500, "word"])
    assert long.cut and not short.cut


@pytest.mark.parametrize(
    ("texts", "top", "message"), [(["A", " "], 5, "document 2 is blank"), (["A"], 0, "--top is 0")]
)
def test_refusals(clara, texts, top, message):
    """A wrong input is named."""
    with pytest.raises(UserError, match=message):
        logit_lens(clara.loaded, "compressor", texts, top)
