"""`python -m clara_jax.convert WHAT SOURCE OUT`: weights and memory stores from one format to another.

base        Hugging Face folder or hub id  ->  base model as Orbax (a folder for model.base)
hf          base model, either form        ->  Hugging Face safetensors
checkpoint  run directory or checkpoint    ->  CLaRa checkpoint in the reference's format (needs PyTorch)
peft        run directory or checkpoint    ->  one PEFT safetensors folder per adapter
arrow       memory store (folder or URL)   ->  memories.arrow: passages and vectors
numpy       memory store (folder or URL)   ->  memories.npy and passages.parquet, row for row the same
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from clara_jax import pretrained
from clara_jax.errors import run_command
from clara_jax.files import new_folder
from clara_jax.interop.adapters import write_peft
from clara_jax.interop.base import Progress, base_fingerprint, load_base, read_pieces, save_base
from clara_jax.interop.orbax_base import copy_companions, write_orbax_base
from clara_jax.models.config import read_decoder_config
from clara_jax.models.lora import LoraConfig
from clara_jax.models.roles import ROLES
from clara_jax.retrieval.export import export_arrow, export_numpy
from clara_jax.retrieval.store import MemoryStore
from clara_jax.training.runs import load_model


def convert_base(source: str, out: Path) -> None:
    """A Hugging Face base model as Orbax, one layer in memory at a time."""
    folder = pretrained.resolve_base(source)
    config = read_decoder_config(folder)
    with new_folder(out) as partial, _progress("tensors") as progress:
        write_orbax_base(folder, partial, read_pieces(folder, config, progress), base_fingerprint(folder))


def convert_hf(source: str, out: Path) -> None:
    """A base model as a Hugging Face folder, bit for bit."""
    folder = pretrained.resolve_base(source)
    config = read_decoder_config(folder)
    with new_folder(out) as partial, _progress("tensors") as progress:
        save_base(partial, load_base(folder, config, progress=progress), config)
        copy_companions(folder, partial)


def convert_checkpoint(source: str, out: Path) -> None:
    """A trained model as a checkpoint that the reference's loader reads."""
    model = load_model(Path(source))
    with new_folder(out) as partial:
        pretrained.save_checkpoint(partial, model)


def convert_peft(source: str, out: Path) -> None:
    """Each adapter of a trained model as a PEFT folder named after its role."""
    model = load_model(Path(source))
    decoder = model.model.decoder
    lora = LoraConfig(model.checkpoint.lora_rank, decoder.lora_alpha, 0.0)
    with new_folder(out) as partial:
        for role in tqdm([role for role in ROLES if role in model.params], unit="adapter"):
            write_peft(partial / role, model.params[role], decoder.config, lora, model.checkpoint.base_model)


def convert_arrow(source: str, out: Path) -> None:
    """A memory store as one Arrow file."""
    with _progress("memories") as progress:
        export_arrow(MemoryStore.open(source), out, progress)


def convert_numpy(source: str, out: Path) -> None:
    """A memory store as a NumPy array and a Parquet table."""
    with _progress("memories") as progress:
        export_numpy(MemoryStore.open(source), out, progress)


CONVERSIONS = {
    "base": convert_base,
    "hf": convert_hf,
    "checkpoint": convert_checkpoint,
    "peft": convert_peft,
    "arrow": convert_arrow,
    "numpy": convert_numpy,
}


def main() -> None:
    """Parse, convert, and say where the result is."""
    parser = argparse.ArgumentParser(
        prog="python -m clara_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=CONVERSIONS, help="the kind of conversion")
    parser.add_argument("source", help="folder (or, for a base model, hub id; for a store, URL) to read")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    arguments = parser.parse_args()
    CONVERSIONS[arguments.what](arguments.source, arguments.out)
    print(f"Wrote {arguments.out}")


@contextmanager
def _progress(unit: str) -> Iterator[Progress]:
    with tqdm(unit=unit) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


if __name__ == "__main__":
    run_command(main)
