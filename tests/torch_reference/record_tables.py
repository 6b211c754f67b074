"""Record the small files beside the case folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from .small_tokenizers import write_json
from .tables import metric_table, prompt_entry, schedule, topk_inputs, topk_results

# Tokenizer name in prompts.json -> case whose base folder it is copied from.
TOKENIZERS = {
    "qwen_chatml_no_bos": "qwen2_bias",
    "metaspace_system_merged": "mistral_window",
    "legacy_system_rejected": "llama2_linear",
    "phi_template_inside": "phi3_default",
}
PROMPT_KEYS = [
    "qwen_chatml_no_bos|doc32|rate8|k3",
    "metaspace_system_merged|doc24|rate12|k1",
    "legacy_system_rejected|doc32|rate16|k2",
    "phi_template_inside|doc40|rate10|k1",
]
TEXTS = [
    "A tin clock.",
    "",
    "Façade, naïve café – 東京 🙂;\n\ttwo  spaces and a trailing one ",
    " ".join(f"Step {i} of a long recipe." for i in range(30)),
    "Literal <MEM0> and <SEP> and </s> and <|im_end|> inside.",
]
QUESTIONS = ["Which mill is older, Verek's or Dronor's?", "How much oil is needed?"]
ANSWERS = ["Verek's mill", "17 litres"]
PAIRS = [
    ("The Salt Mine!", "salt mine"),
    ("slate and tin", "tin"),
    ("True", "yes"),
    ("no", "No."),
    ("yes, of course", "yes"),
    ("", ""),
    ("tin tin slate", "slate tin"),
    ("an organist", "the organist"),
]
RANKINGS = [
    ([[2], [0, 4], []], [[2, 1, 0], [3, 4, 0], [1, 0, 2]], [1, 2, 3]),
    ([[1, 3, 5]], [[3]], [1, 3]),
]
SCHEDULES = [
    ("cosine_with_min_lr", 2e-4, 0.03, 1, 12),
    ("cosine_with_min_lr", 5e-5, 0.1, 3, 30),
    ("constant", 1e-5, 0.03, 1, 6),
]


def record_tables(root: Path) -> None:
    """prompts.json, topk.npz, metrics.json and lr_schedule.json."""
    if not all((root / case / "base").is_dir() for case in TOKENIZERS.values()):
        return
    for name, case in TOKENIZERS.items():
        target = root / "tokenizers" / name
        target.mkdir(parents=True, exist_ok=True)
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            if (root / case / "base" / file).is_file():
                shutil.copy(root / case / "base" / file, target / file)
    entries = {key: prompt_entry(root, key, TEXTS, QUESTIONS, ANSWERS) for key in PROMPT_KEYS}
    compact = json.dumps(entries, ensure_ascii=False, separators=(",", ":"))
    (root / "prompts.json").write_text(compact + "\n", encoding="utf-8")
    inputs = topk_inputs(seed=5, rows=3, candidates=6, ks=[1, 2, 4, 6])
    np.savez_compressed(root / "topk.npz", **inputs, **topk_results(inputs))
    write_json(root / "metrics.json", metric_table(PAIRS, RANKINGS))
    write_json(root / "lr_schedule.json", [schedule(*row) for row in SCHEDULES])
