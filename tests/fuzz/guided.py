"""One target under atheris, which keeps inputs that reach new code: a child of ``make fuzz``."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["service", "PIL", "json", "zipfile", "numpy.lib"]):
    from tests.fuzz.targets import TARGETS
    from tests.fuzz.watch import Watch


def main(name: str, folder: Path, inputs: int, *flags: str) -> None:
    """Fuzzes a target; ends the process with libFuzzer's exit code.

    Args:
        name: Of the target.
        folder: For the corpus, what is found, and the record of the run.
        inputs: To run.
        flags: Of libFuzzer.
    """
    target = TARGETS[name](folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for index, seed in enumerate(target.seeds()):
        (corpus / f"seed-{index}").write_bytes(seed)
    watch = Watch(target.check_golden, folder / "record.jsonl")

    def run(data: bytes) -> None:
        target.run(data)
        watch.count(1)

    atheris.Setup(
        [
            sys.argv[0], str(corpus), f"-runs={inputs}", f"-max_len={target.max_bytes}",
            f"-artifact_prefix={folder}/found-", "-timeout=20", "-rss_limit_mb=1024",
            # A shape that lies makes numpy reserve memory that it never touches.
            "-malloc_limit_mb=0", "-verbosity=0", *flags,
        ],
        run,
    )  # fmt: skip
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
