"""The configurations in `configs/`: they parse, say first what they are, and hold the paper's numbers."""

from pathlib import Path

import pytest

from clara_jax.config import TrainConfig
from clara_jax.curriculum import parse_curriculum
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"
FAMILIES = ("mistral_7b", "phi_4_mini")
STAGES = ("compression_pretraining", "instruction_tuning", "end_to_end")
# Paper, Table 10: batch, learning rate.
COMPRESSION, RETRIEVAL = (128, 1e-4), (32, 5e-6)


def parse(path: Path, *overrides: str) -> list[TrainConfig]:
    return list(parse_curriculum(["--config", str(path), *overrides]).runs)


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS).with_suffix(""))
)
def test_every_config_parses_and_says_what_it_is(path: Path):
    """A config in the repository must not be refused, and its reader must learn what it trains, on what, where."""
    assert parse(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = "\n".join(lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))])
    assert "Data:" in comment and "Hardware:" in comment
    assert "Trains:" in comment or "curriculum" in path.stem


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", [*STAGES, "retrieval_pretraining"])
def test_stage_has_the_papers_settings(family: str, stage: str):
    """Who runs these files expects the paper's run."""
    (config,) = parse(CONFIGS / family / f"{stage}.yaml")
    assert config.stage == stage
    compresses = stage in ("compression_pretraining", "instruction_tuning")
    assert (config.batch_size, config.optimizer.learning_rate) == (COMPRESSION if compresses else RETRIEVAL)
    assert (config.steps, config.epochs) == (None, 1)
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (16, 32, 0.1)
    optimizer = config.optimizer
    assert (optimizer.schedule, optimizer.warmup_ratio, optimizer.final_ratio) == ("cosine", 0.03, 0.1)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 0, 1)
    assert (config.objective.mse_weight, config.objective.top_k, config.objective.temperature) == (0.1, 5, 0.02)
    assert config.model.doc_max_length == 256
    assert config.model.dtype == "bfloat16"
    assert config.evaluation.path and config.keep_best


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", [*STAGES, "retrieval_pretraining"])
def test_batch_fits_the_meshes_that_the_comment_names(family: str, stage: str):
    """The mesh in the file, and the one for a TPU in its comment, divide batch and micro-batches."""
    path = CONFIGS / family / f"{stage}.yaml"
    (tpu,) = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# TPU v5e-16: ")]
    flags = [word.rstrip(",") for word in tpu.split() if word.startswith("--")]
    for devices, config in ((8, *parse(path)), (16, *parse(path, *flags))):
        mesh = config.mesh
        assert mesh.data * mesh.fsdp * mesh.tensor == devices
        assert config.batch_size % (mesh.data * mesh.fsdp * config.micro_batches) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_curriculum_is_its_stages_each_from_the_one_before(family: str):
    """The curriculum and the single files are the same runs in the same folders: one can go on with the other."""
    runs = parse(CONFIGS / family / "curriculum.yaml")
    assert [run.stage for run in runs] == list(STAGES)
    assert [run.run_dir for run in runs] == [f"runs/{family}/{n}_{stage}" for n, stage in enumerate(STAGES, 1)]
    assert [run.model.start_from for run in runs] == [None, *(run.run_dir for run in runs[:-1])]
    assert runs == [parse(CONFIGS / family / f"{stage}.yaml")[0] for stage in STAGES]


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_share_one_model(family: str):
    """A stage with another base, rate or document length could not start from the one before."""
    files = [CONFIGS / family / f"{stage}.yaml" for stage in (*STAGES, "retrieval_pretraining")]
    models = [parse(path)[0].model for path in files]
    assert len({(model.base, model.doc_max_length, model.compression_rate) for model in models}) == 1


def test_quickstart_is_its_stages_each_from_the_one_before():
    """Who tries one stage of the quickstart by itself goes on with the same runs in the same folders."""
    runs = parse(CONFIGS / "quickstart.yaml")
    assert [run.stage for run in runs] == list(STAGES)
    assert runs == [parse(CONFIGS / "quickstart" / f"{stage}.yaml")[0] for stage in STAGES]
