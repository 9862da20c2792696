"""python tests/benchmarks/packing.py [CHECKOUT ...] [--tokens N]: peak memory of packing, storing and reading text.

For each checkout (this one where none is named) and each kind of text a process of its own packs documents of 500
random ids, made one after another, into blocks of 512, writes them as a stage does and reads them again. Shown are
bytes a token at the peak of each step, above what the process had before it, and the sha256 of the file.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCUMENT, BLOCK = 500, 512
KINDS: dict[str, dict[str, Any]] = {
    "text": {},
    "text, a prefix in each block": {"prefix": (1,), "begin_blocks": True},
    "conversations": {"answers": True},
    "conversations, documents apart": {"answers": True, "document_masks": True},
    "the same, a prefix in each block": {
        "answers": True,
        "document_masks": True,
        "prefix": (1,),
        "begin_blocks": True,
    },
}


def main() -> None:
    """Measure each checkout in processes of their own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path(__file__).resolve().parents[2]])
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(KINDS[options.measure], options.tokens)))
        return
    print(f"bytes a token at the peak, {options.tokens:,} tokens")
    print(f"{'':<34}{'packing':>9}{'storing':>9}{'reading':>9}  file")
    for checkout in options.checkouts:
        print(checkout.resolve().name)
        for kind in KINDS:
            peaks = in_a_process(checkout, kind, options.tokens)
            steps = "".join(f"{peaks[step]:>9.1f}" for step in ("packing", "storing", "reading"))
            print(f"  {kind:<32}{steps}  {peaks['file'][:12]}")


def in_a_process(checkout: Path, kind: str, num_tokens: int) -> dict[str, Any]:
    """`measure` with a checkout's code, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", kind, "--tokens", str(num_tokens)]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    peaks: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def measure(kind: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """Bytes a token at the peak of packing, storing and reading."""
    from cascade.data.blocks import load_blocks, save_blocks
    from cascade.data.framing import Framing

    framing = Framing(kind.get("prefix", ()), (2,), begin_blocks=kind.get("begin_blocks", False))
    masks, answers = kind.get("document_masks", False), kind.get("answers", False)

    def pack(count: int) -> Any:
        texts = documents(count, framing.prefix, answers)
        try:
            from cascade.data.packing import BlockFormat, Tokenized, pack_blocks
        except ImportError:  # a checkout from before there was this module
            from cascade.data.blocks import pack_tokens

            return pack_tokens(texts, block_size=BLOCK, document_masks=masks, framing=framing)
        block_format = BlockFormat(block_size=BLOCK, document_masks=masks, framing=framing)
        return pack_blocks((Tokenized(*parts) for parts in texts), block_format, name="text")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "blocks.safetensors"
        save_blocks(pack(20_000), path)
        load_blocks(path)
        packed, packing = at_peak(lambda: [pack(num_tokens)])
        _, storing = at_peak(lambda: save_blocks(packed[0], path))
        packed.clear()
        loaded, reading = at_peak(lambda: load_blocks(path))
        peaks = {"packing": packing, "storing": storing, "reading": reading}
        file = hashlib.sha256(path.read_bytes()).hexdigest()
        return {name: size / num_tokens for name, size in peaks.items()} | {"file": file, "blocks": len(loaded)}


def documents(num_tokens: int, prefix: tuple[int, ...], answers: bool) -> Iterator[tuple[Any, ...]]:
    """Documents of so many tokens together; with `answers` only the second half of each counts."""
    draw = random.Random(0)
    for _ in range(num_tokens // DOCUMENT):
        ids = [*prefix, *(draw.randrange(300, 30_000) for _ in range(DOCUMENT - len(prefix)))]
        labels = [-100] * (DOCUMENT // 2) + ids[DOCUMENT // 2 :] if answers else None
        yield ids, labels, 4 * DOCUMENT


def at_peak(action: Callable[[], Any]) -> tuple[Any, int]:
    """(what an action gives, bytes of resident memory at its peak above those before it)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
    before = status_bytes("VmRSS")
    result = action()
    return result, status_bytes("VmHWM") - before


def status_bytes(key: str) -> int:
    """A number of /proc/self/status, such as VmRSS, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(lines[key].split()[0]) * 1024


if __name__ == "__main__":
    main()
