"""`python -m experiments.memories TABLE --runs DIR --out DIR`: stages 1 and 2 of the quickstart in variants.

Each variant runs both stages with a few keys changed; what is finished is not run again. Its model then answers the
test questions given the right document (per cent of exact match): from its memory, from the text, from the text cut to
as many tokens as the memory has. Beside it is recall@1 among ten candidates before any training of retrieval. Written
are TABLE.csv, .md and .png (see `experiments.results`).
"""

import dataclasses
from pathlib import Path

from clara_jax.errors import run_command
from experiments.results import Row
from experiments.tables import Overrides, evaluate, per_cent, run_tables, train

ASKED = ("--setting", "oracle", "--k", 1, "--systems", "memory,text,truncated_text")


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from the quickstart, in both stages and in one."""

    both: Overrides = dataclasses.field(default_factory=dict)
    stage_1: Overrides = dataclasses.field(default_factory=dict)
    stage_2: Overrides = dataclasses.field(default_factory=dict)


TABLES: dict[str, dict[str, Variant]] = {
    # Paper, Table 5. The longest document has 34 tokens: memories of 17, 11, 8, 5, 2 and 1 token.
    "compression": {f"{rate}x": Variant(both={"model.compression_rate": rate}) for rate in (2, 3, 4, 6, 17, 34)},
    # Paper, ablation of the alignment loss; 0.1 is the paper's.
    "alignment": {f"mse weight {weight}": Variant(both={"objective.mse_weight": weight}) for weight in (0.0, 0.1, 1.0)},
    "generator": {
        "new in stage 2": Variant(),
        "kept": Variant(stage_2={"model.start_fresh": "[]"}),
        "frozen in stage 1, new in stage 2": Variant(stage_1={"trainable": "[compressor,memory_tokens]"}),
    },
}


def run_variant(run_dir: Path, variant: Variant, shared: Overrides) -> Row:
    """The figures of one variant of one seed."""
    first, second = run_dir / "1_compression_pretraining", run_dir / "2_instruction_tuning"
    train(first, "compression_pretraining", {**shared, **variant.both, **variant.stage_1})
    train(second, "instruction_tuning", {"model.start_from": first, **shared, **variant.both, **variant.stage_2})
    found = evaluate(second, run_dir / "evaluation", *ASKED)
    return {
        **{system: per_cent(found["answers"][system]["em"]) for system in ("memory", "text", "truncated_text")},
        "recall@1": per_cent(found["retrieval"]["model"]["recall@1"]),
    }


def main() -> None:
    """Run, and write the table."""
    run_tables(__doc__, TABLES, run_variant)


if __name__ == "__main__":
    run_command(main)
