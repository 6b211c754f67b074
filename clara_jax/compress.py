"""`python -m clara_jax.compress --model RUN --corpus FILE... --store DIR`: documents into a memory store.

Documents that the store has already are not compressed again, those that have changed replace what the store has of
them, and `--delete ID...` (without a corpus) removes some. A killed run goes on when the same command is given again.
"""

import sys
from pathlib import Path

import jax
import jsonargparse

from clara_jax.cluster import ClusterConfig, is_main, joined
from clara_jax.command_line import parse
from clara_jax.errors import fail, run_command
from clara_jax.indexing import IndexConfig, Indexed, index_corpus
from clara_jax.retrieval.integrity import damaged_segments
from clara_jax.retrieval.manifest import read_documents_table, require_manifest
from clara_jax.retrieval.objects import Objects
from clara_jax.retrieval.writer import StoreWriter
from clara_jax.sharding import MeshConfig, make_mesh
from clara_jax.training.runs import load_model


def main() -> None:
    """Parse, compress, and say what the store holds."""
    arguments = _parse()
    if arguments.delete is not None:
        _delete(arguments.store, arguments.delete)
        return
    if arguments.check:
        _check(arguments.store)
        return
    if not arguments.corpus or not arguments.model:
        fail("nothing to compress", "Give --model and --corpus (or --delete, or --check)")
    config = IndexConfig(**{key: getattr(arguments, key) for key in IndexConfig.__dataclass_fields__})
    with joined(arguments.cluster):
        mesh = make_mesh(arguments.mesh, jax.local_devices())
        loaded = load_model(Path(arguments.model), arguments.base, arguments.dtype, mesh)
        indexed = index_corpus(loaded, arguments.store, arguments.corpus, config, mesh)
        if is_main():
            print(_summary(indexed, arguments.store), flush=True)


def _parse() -> jsonargparse.Namespace:
    parser = jsonargparse.ArgumentParser(
        prog="python -m clara_jax.compress",
        description="Compress the documents of a corpus into a memory store, or delete some from it.",
        exit_on_error=False,
    )
    parser.add_argument("--model", help="directory of a run or curriculum, checkpoints/STEP, or CLaRa folder")
    parser.add_argument("--base", help="base model to use instead of the one that the model names")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute type (default: by the device)")
    parser.add_argument("--corpus", nargs="+", help="files, folders, or hub ids of data sets")
    parser.add_argument("--store", required=True, help="folder or URL (gs://, s3://) of the memory store")
    parser.add_argument("--delete", nargs="+", metavar="ID", help="delete the documents of these ids")
    parser.add_argument("--check", action="store_true", help="read the whole store and compare its checksums")
    parser.add_argument("--prune", action="store_true", help="delete documents that the corpus does not have")
    parser.add_argument("--repair", action="store_true", help="compress the documents of damaged segments anew")
    parser.add_class_arguments(IndexConfig, skip={"prune", "repair"})
    parser.add_class_arguments(MeshConfig, "mesh")
    parser.add_class_arguments(ClusterConfig, "cluster")
    return parse(parser)


def _delete(location: str, names: list[str]) -> None:
    writer = StoreWriter(location)
    known = writer.digests()
    unknown = [name for name in names if name not in known]
    if unknown:
        fail(f"{location} has no document {unknown[0]!r} ({len(unknown)} such)", "Give ids of its documents")
    manifest = writer.commit([], names)
    print(f"Deleted {len(set(names))} documents. {location} holds {_holds(manifest.documents, manifest.passages)}.")


def _check(location: str) -> None:
    objects = Objects(location)
    manifest = require_manifest(objects)
    read_documents_table(objects, manifest)
    damaged = damaged_segments(objects, manifest)
    for problem in damaged.values():
        sys.stderr.write(f"{problem}\n")
    if damaged:
        fail(
            f"{len(damaged)} of {len(manifest.segments)} segments of {location} are damaged, see above",
            "Run clara_jax.compress --repair with the corpus",
        )
    print(f"{location} is whole: {_holds(manifest.documents, manifest.passages)}.")


def _summary(indexed: Indexed, location: str) -> str:
    lines = [*indexed.remarks]
    counts = ", ".join(
        f"{number} {name}"
        for name in ("new", "changed", "unchanged", "deleted")
        if (number := getattr(indexed, name)) or name == "new"
    )
    lines.append(f"Documents: {counts}.")
    if indexed.found:
        lines.append(f"An earlier run had compressed {indexed.found} of them.")
    if indexed.passages:
        compressed = indexed.new + indexed.changed - indexed.found
        lines.append(
            f"Compressed {indexed.passages} passages in {indexed.seconds:.1f} s ({compressed / indexed.seconds:.3g} "
            f"documents/s, {indexed.passages / indexed.seconds:.4g} passages/s), {indexed.padding:.1%} of the columns "
            "padding."
        )
    if indexed.store is not None:
        holds = _holds(indexed.store.documents, indexed.store.passages)
        lines.append(f"{location} holds {holds} (generation {indexed.store.generation}).")
    return "\n".join(lines)


def _holds(documents: int, passages: int) -> str:
    return f"{documents} documents in {passages} passages"


if __name__ == "__main__":
    run_command(main)
