"""The tokenizer with CLaRa's tokens: what it needs is checked by name, and long texts are cut and counted."""

import json
import random
import shutil

import pytest

from clara_jax.data.prompts import answer_prompt
from clara_jax.data.records import FieldError, Record
from clara_jax.data.samples import Limits, compression_sample, instruction_sample, retrieval_sample
from clara_jax.data.tokenizer import ClaraTokenizer
from clara_jax.errors import UserError
from tests.conftest import FIXTURES

TOKENIZERS = FIXTURES / "tokenizers"
NAMES = ("legacy_system_rejected", "metaspace_system_merged", "phi_template_inside", "qwen_chatml_no_bos")


@pytest.fixture
def folder(tmp_path, request):
    """A copy of a tokenizer's folder, to be changed."""
    return shutil.copytree(TOKENIZERS / request.param, tmp_path / request.param)


def edit(folder, **fields):
    """Set (or with ... remove) fields of every configuration file that has any of them."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.exists():
            old = json.loads(path.read_text())
            path.write_text(json.dumps({k: v for k, v in (old | fields).items() if v is not ...}))


@pytest.mark.parametrize("folder", NAMES, indirect=True)
def test_untouched_copies_load(folder):
    """The refusals below would prove nothing if the copies themselves were refused."""
    assert len(ClaraTokenizer(folder, 3)) > 300


@pytest.mark.parametrize("folder", NAMES, indirect=True)
def test_no_chat_template(folder):
    """A base model that was never tuned for chat would fail in the first prompt, deep inside transformers."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit(folder, chat_template=...)
    with pytest.raises(UserError, match=rf"{folder.name}: the tokenizer has no chat template.*chat_template\.jinja"):
        ClaraTokenizer(folder, 2)


@pytest.mark.parametrize("folder", ["phi_template_inside"], indirect=True)
def test_no_tokenizer_json(folder):
    """Folders with only a SentencePiece model are common among old checkpoints."""
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist.*save_pretrained"):
        ClaraTokenizer(folder, 2)


@pytest.mark.parametrize("folder", ["metaspace_system_merged", "phi_template_inside"], indirect=True)
@pytest.mark.parametrize("token", ["bos", "eos"])
def test_no_bos_or_eos(folder, token):
    """Without them the encoder's layout cannot be written, and generation would never stop."""
    edit(folder, **{f"{token}_token": ..., "additional_special_tokens": ..., "extra_special_tokens": ...})
    with pytest.raises(UserError, match=rf"{folder.name}: the tokenizer has no {token} token"):
        ClaraTokenizer(folder, 2)


@pytest.mark.parametrize("folder", ["qwen_chatml_no_bos"], indirect=True)
def test_qwen_without_special_tokens_has_no_bos(folder):
    """The stand-in for Qwen's bos comes from a list that may be absent."""
    edit(folder, additional_special_tokens=..., extra_special_tokens=...)
    with pytest.raises(UserError, match="no bos token"):
        ClaraTokenizer(folder, 2)


@pytest.mark.parametrize("folder", ["qwen_chatml_no_bos", "phi_template_inside"], indirect=True)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "garbage"])
def test_garbled_files_are_named(folder, file, text):
    """A half-downloaded tokenizer would end in a traceback of a Rust library."""
    assert (folder / file).exists()
    (folder / file).write_text(text)
    try:
        ClaraTokenizer(folder, 2)  # transformers does not read every file of every folder
    except UserError as error:
        assert folder.name in str(error)
    else:
        assert file == "special_tokens_map.json"


@pytest.mark.parametrize("number", [0, -1])
def test_no_memory_tokens(number):
    """A compression rate above the document length leaves no memory."""
    with pytest.raises(UserError, match="compression rate"):
        ClaraTokenizer(TOKENIZERS / NAMES[0], number)


TEMPLATES = {
    "refuses everything": "{{ raise_exception('System role not supported') }}",
    "another refusal": "{{ raise_exception('roles must alternate') }}",
    "not a template": "{% for %}",
    "an undefined name": "{{ nothing.at_all }}",
    "a wrong operation": "{{ 'a' + 1 }}",
}


@pytest.mark.parametrize("folder", ["metaspace_system_merged"], indirect=True)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_fails_is_named(folder, template):
    """A template of another model, or a hand-written one, would end in a jinja traceback."""
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=f"{folder.name}.*template"):
        answer_prompt("Why?").text(ClaraTokenizer(folder, 2), 1, "So.")


@pytest.mark.parametrize("name", NAMES)
def test_a_long_passage_is_cut_on_the_right_and_said_to_be(name):
    """Text would be lost without a word, or a text of just the limit called cut."""
    tokenizer = ClaraTokenizer(TOKENIZERS / name, 2)
    special = tokenizer.special
    text = "the cat sat on the mat and the dog ran away"
    whole, cut = tokenizer.encode_passage(text, 1000)
    assert (whole[0], whole[-1], cut) == (special.enc, special.eos, False)
    size = len(whole) - 3  # tokens of the text itself, where tokenisation of the parts adds none
    assert size > 5
    assert tokenizer.encode_passage(text, size) == (whole, False)
    assert tokenizer.encode_passage(text, size - 1) == (whole[:-1], True)  # it loses its eos, as in the reference
    assert tokenizer.encode_passage(text, 2) == (whole[:5], True)


def test_cut_texts_are_counted():
    """The count of cut texts is how a user learns that the limit is too small."""
    tokenizer = ClaraTokenizer(TOKENIZERS / "phi_template_inside", 2)
    long, short = "word " * 40, "word"
    record = Record((long, short, long), (long,), (short,), positives=(1,))
    roomy = Limits(document=1000, question=1000, prompt=2000)
    for limits, expected in ((roomy, 0), (Limits(10, 1000, 2000), 2), (Limits(10, 10, 2000), 3)):
        assert retrieval_sample(record, tokenizer, limits, 2).cut == expected
    assert instruction_sample(record, tokenizer, Limits(10, 10, 2000), random.Random(0)).cut == 2
    whole = instruction_sample(record, tokenizer, roomy, random.Random(0)).exchange
    less = Limits(1000, 1000, len(whole.tokens) - 1)
    cut = instruction_sample(record, tokenizer, less, random.Random(0))
    assert cut.cut == 1
    assert cut.exchange.tokens == whole.tokens[:-1]


@pytest.mark.parametrize("make", [instruction_sample, lambda r, t, li, _: retrieval_sample(r, t, li, 1)])
def test_a_record_without_a_question_is_refused(make):
    """A paraphrase record in instruction tuning or end-to-end training would end in an IndexError hours in."""
    tokenizer = ClaraTokenizer(TOKENIZERS / "phi_template_inside", 2)
    record = Record(("text",), (), ("again",), "paraphrase")
    with pytest.raises(FieldError, match="'question' is missing; paraphrase rows belong to compression_pretraining"):
        make(record, tokenizer, Limits(), random.Random(0))


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_texts_give_the_same_ids(name):
    """Training would see other tokens than a single text at inference."""
    tokenizer = ClaraTokenizer(TOKENIZERS / name, 2)
    texts = ["a cat", "", "the dog <MEM0> ran <SEP>\n\n", "a cat " * 50, "na\u00efve \u2028 \U0001f600"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_passages(texts, 8) == [tokenizer.encode_passage(text, 8) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_question_list_record_in_stage_one_without_slots_left_over():
    """The prompt has as many memories as the record has documents, and the targets are the answers' tokens."""
    tokenizer = ClaraTokenizer(TOKENIZERS / "phi_template_inside", 2)
    record = Record(("one", "two"), ("Who?", "When?"), ("Ada", "1843"), question_list=True)
    sample = compression_sample(record, tokenizer, Limits(), random.Random(0))
    ids = sample.exchange.tokens
    assert sample.slots == 2
    assert [ids.count(i) for i in tokenizer.special.memory_ids] == [2, 2]
    target = tokenizer.decode(ids[sample.exchange.prompt_length :])
    assert "Question: Who?" in target
    assert "Answer: 1843" in target
    assert "Background" not in target
