"""`python -m tests.parity.report DIR`: the largest error of each kind over all recorded cases in DIR, as Markdown."""

import json
import random
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from tests.parity.case import STAGE_FILES, StageCase, load_clara, named_gradients, relative_norm, to_host, worst_entry
from tests.parity.test_stages import differentiated, run_stage


def stage_errors(case: StageCase) -> dict[str, float]:
    """Largest errors of one stage file, in this project's layout."""
    arrays, batch = case.arrays, case.batch("right")
    result = to_host(run_stage(case, differentiated(case, case.clara.params), batch))
    recorded = float(arrays["loss"] if case.stage.startswith("stage2") else arrays["total_loss"])
    exists = np.asarray(batch.candidates)
    memories, alignment = result.states["compressor"]
    mse = float(arrays["mse_loss"])
    errors = {
        "contrastive loss" if "retrieval" in case.stage else "loss": abs(float(result.loss) - recorded) / recorded,
        "MSE": abs(float(alignment[exists].mean()) - mse) / mse,
        "memories": worst_entry(memories[exists], arrays["compressed"]),
    }
    if "scores" in arrays:
        errors["scores"] = worst_entry(result.metrics["scores"], arrays["scores"])
    if "logits" in arrays:
        logits = result.states["logits"][np.asarray(batch.prompts.target_weights, bool)]
        errors["logits"] = worst_entry(logits[arrays["logits_sel"]], arrays["logits"])
    kind = "gradients, end to end and retrieval" if case.stage.startswith("stage2") else "gradients, compression"
    got = named_gradients(case, result.gradients)
    names = [name for name in arrays if name.startswith("grad::")]
    if names:
        errors[kind] = max(relative_norm(got[name.removeprefix("grad::")], arrays[name]) for name in names)
    return errors


def same_tokens(folder: Path) -> bool:
    """Whether greedy generation from documents writes the recorded tokens (the other entry points are tested)."""
    run = json.loads((folder / "generation.json").read_text(encoding="utf-8"))["generate_from_paraphrase_k1"]
    clara = load_clara(folder.parent / run["checkpoint"])
    rng = random.Random(run["random_seed"])
    got = clara.generate_from_paraphrase(run["documents"], run["max_new_tokens"], rng)
    return got.texts == run["texts"]


def main() -> None:
    """Print the table."""
    folder = Path(sys.argv[1])
    worst: dict[str, dict[str, float]] = defaultdict(dict)
    cases = sorted(path for path in folder.iterdir() if (path / "tokens.json").exists())
    for path in cases:
        assert same_tokens(path), f"{path.name}: generated tokens differ"
        for stage in STAGE_FILES:
            for kind, error in stage_errors(StageCase(path, stage)).items():
                worst[kind][path.name] = max(error, worst[kind].get(path.name, 0.0))
    print("| largest error of | " + " | ".join(path.name for path in cases) + " |")
    print("|---" * (len(cases) + 1) + "|")
    for kind in sorted(worst):
        print(f"| {kind} | " + " | ".join(f"{worst[kind][path.name]:.1e}" for path in cases) + " |")


if __name__ == "__main__":
    main()
