"""The Python API: load a model, compress documents, encode questions, generate answers.

clara = Clara.from_pretrained("checkpoint")
memories = clara.compress(["A document.", "Another one."])
answer = clara.generate(["A question?"], memories[None]).texts[0]
"""

import dataclasses
import functools
import random
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clara_jax import generation, pretrained
from clara_jax.data.collate import pad_encoder_inputs, pad_exchanges, round_up
from clara_jax.data.prompts import Prompt, answer_prompt, paraphrase_prompt
from clara_jax.data.samples import Exchange
from clara_jax.errors import fail
from clara_jax.files import new_folder
from clara_jax.models.roles import EncoderInputs, Params, Role, RoleModel, cosine_scores
from clara_jax.pretrained import Pretrained, with_query_reasoner
from clara_jax.training.runs import load_model

# The reference cuts prompts to this many tokens in generation.
PROMPT_LIMIT = 1024
_ROWS = 32  # passages encoded in one call


@dataclasses.dataclass(frozen=True)
class Generation:
    """Generated texts, one per row, and how they came about.

    `token_ids` holds the new tokens, padded after the end. With retrieval, `selected` are the indices of
    the candidates in the prompt, best first, and `scores` their cosine similarity with the question.
    """

    texts: list[str]
    token_ids: Int[np.ndarray, "rows new_tokens"]
    selected: Int[np.ndarray, "rows k"] | None = None
    scores: Float[np.ndarray, "rows candidates"] | None = None


class Clara:
    """A CLaRa model that compresses, retrieves and answers."""

    def __init__(self, loaded: Pretrained):
        """Wrap a loaded model; use `Clara.from_pretrained` for a folder."""
        self.loaded = loaded
        self.model: RoleModel = loaded.model
        self.params: Params = with_query_reasoner(loaded.params)
        self.tokenizer = loaded.tokenizer
        self.doc_max_length = loaded.checkpoint.doc_max_length
        self.top_k = loaded.checkpoint.top_k

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, base: str | None = None, dtype: str | None = None) -> "Clara":
        """Load a run directory, or a CLaRa checkpoint in the reference's format.

        `base` overrides the base model that the checkpoint names (folder or hub id). `dtype` is the
        compute type; by default float32 on the CPU and bfloat16 on an accelerator.
        """
        return cls(load_model(Path(folder), base, dtype))

    def compress(self, documents: Sequence[str]) -> Float[Array, "documents memory hidden"]:
        """One memory per document. Documents longer than the model's limit are cut on the right."""
        return self._encode("compressor", documents)

    def encode_query(
        self, questions: str | Sequence[str], max_length: int | None = None
    ) -> Float[Array, "questions memory hidden"]:
        """Each question in the space of memories, by the query reasoner.

        `max_length` (tokens) is the document limit by default, as in the reference's generation.
        """
        texts = [questions] if isinstance(questions, str) else questions
        return self._encode("query_reasoner", texts, max_length)

    def generate(
        self,
        questions: Sequence[str],
        memories: Float[Array, "rows documents memory hidden"],
        max_new_tokens: int = 128,
    ) -> Generation:
        """Answer each question from its row of memories (made by `compress`)."""
        return self._generate([answer_prompt(q) for q in questions], memories, max_new_tokens)

    def generate_from_documents(
        self, questions: Sequence[str], documents: Sequence[Sequence[str]], max_new_tokens: int = 128
    ) -> Generation:
        """Answer each question from all of its documents (the reference's generate_from_text)."""
        return self.generate(questions, self._compress_rows(documents), max_new_tokens)

    def generate_from_paraphrase(
        self,
        documents: Sequence[Sequence[str]],
        max_new_tokens: int = 128,
        rng: random.Random | None = None,
    ) -> Generation:
        """Write each row's documents out again, by an instruction drawn with `rng` for every row."""
        rng = rng or random.Random(0)
        prompts = [paraphrase_prompt(rng) for _ in documents]
        return self._generate(prompts, self._compress_rows(documents), max_new_tokens)

    def generate_from_questions(
        self,
        questions: Sequence[str],
        documents: Sequence[Sequence[str]],
        max_new_tokens: int = 128,
        k: int | None = None,
    ) -> Generation:
        """Retrieve the `k` best of each question's candidate documents, then answer from them."""
        candidates = self._compress_rows(documents)
        scores = cosine_scores(self.encode_query(questions), candidates)
        k = k or self.top_k
        if k > scores.shape[1]:
            fail(f"k is {k} for {scores.shape[1]} candidate documents", "Give more documents or a smaller k")
        selected = jax.lax.top_k(scores, k)[1]
        memories = jnp.take_along_axis(candidates, selected[:, :, None, None], axis=1)
        answers = self.generate(questions, memories, max_new_tokens)
        return dataclasses.replace(answers, selected=np.asarray(selected), scores=np.asarray(scores))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the reference's checkpoint format. Needs the extra `convert` (PyTorch)."""
        with new_folder(Path(folder)) as partial:
            pretrained.save_checkpoint(partial, self.loaded)

    def _compress_rows(self, documents: Sequence[Sequence[str]]) -> Float[Array, "rows n memory hidden"]:
        sizes = {len(row) for row in documents}
        if len(sizes) != 1:
            fail(
                f"rows have {sorted(sizes)} documents",
                "Give every question the same number of documents, or call once per question",
            )
        flat = self.compress([document for row in documents for document in row])
        return flat.reshape(len(documents), -1, *flat.shape[1:])

    def _encode(self, role: Role, texts: Sequence[str], max_length: int | None = None) -> Array:
        if not texts:
            fail("there are no texts to encode", "Give at least one")
        limit = max_length or self.doc_max_length
        passages = [self.tokenizer.encode_passage(text, limit)[0] for text in texts]
        memory = self.tokenizer.special.num_memory
        parts = []
        for start in range(0, len(passages), _ROWS):
            rows = passages[start : start + _ROWS]
            length = round_up(max(map(len, rows)) + memory, limit + 3 + memory)
            inputs = pad_encoder_inputs(rows, self.tokenizer.special, length)
            parts.append(_encode(self.model, self.params, role, inputs))
        return jnp.concatenate(parts)

    def _generate(self, prompts: list[Prompt], memories: Array, max_new_tokens: int) -> Generation:
        if len(prompts) != memories.shape[0]:
            fail(f"{len(prompts)} prompts for {memories.shape[0]} rows of memories", "Give one row per prompt")
        documents = memories.shape[1]
        special = self.tokenizer.special
        tokens = [self.tokenizer.encode(p.text(self.tokenizer, documents))[:PROMPT_LIMIT] for p in prompts]
        exchanges = [Exchange(ids, len(ids)) for ids in tokens]
        length = round_up(max(map(len, tokens)), PROMPT_LIMIT)
        inputs = pad_exchanges(exchanges, [documents] * len(prompts), special, length, 1, "left")
        new = np.asarray(
            generation.generate(
                self.model,
                self.params,
                inputs,
                memories,
                max_new_tokens=max_new_tokens,
                stop_ids=self.loaded.stop_ids,
                pad_id=special.pad,
            )
        )
        return Generation([self.tokenizer.decode(row.tolist()) for row in new], new)


@functools.partial(jax.jit, static_argnames=("model", "role"))
def _encode(model: RoleModel, params: Params, role: Role, inputs: EncoderInputs) -> Array:
    return model.encode(params, role, inputs)[0]
