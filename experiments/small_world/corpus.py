"""`python -m experiments.small_world.corpus RECORDS OUT`: the documents of a file of records as a corpus."""

import json
import sys
from pathlib import Path


def main() -> None:
    """Read, and write."""
    records, out = map(Path, sys.argv[1:])
    lines = records.read_text(encoding="utf-8").splitlines()
    documents = dict.fromkeys(document for line in lines for document in json.loads(line)["docs"])
    rows = [json.dumps({"id": f"w{number}", "text": document}) for number, document in enumerate(documents)]
    out.write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(rows)} documents in {out}")


if __name__ == "__main__":
    main()
