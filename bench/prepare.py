"""Compare data/prepare.py with the package `tokenizers` used directly, and two processes with one:

    python bench/prepare.py [--megabytes 30] [--rounds 3]

Both encode the same documents with a BPE of 8,000 tokens. The rounds alternate, and the best of
each is printed: tokens per second, and per second of all CPUs' time, which other work on the
machine disturbs less. Shards have half a megabyte, so that a short text has many. Last is the peak
memory of each process, also with ten times the text.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
os.environ["TOKENIZERS_PARALLELISM"] = "false"
DIRECT = """
import json, sys, time
from tokenizers import Tokenizer
texts = [json.loads(line)["text"] for line in open(sys.argv[1])]
tokenizer = Tokenizer.from_file(sys.argv[2])
begun, cpu, tokens = time.perf_counter(), time.process_time(), 0
for start in range(0, len(texts), 100):
    encodings = tokenizer.encode_batch_fast(texts[start : start + 100], add_special_tokens=False)
    tokens += sum(map(len, encodings)) + len(encodings)
print(tokens, time.perf_counter() - begun, time.process_time() - cpu)
"""


def write_texts(path: Path, size: int) -> Path:
    """Documents of 300 to 5,000 characters of the repository's code and pages, in random order."""
    paths = [path for kind in ("py", "md") for path in sorted(ROOT.glob(f"*/*.{kind}"))]
    text, source = "\n".join(path.read_text() for path in paths), random.Random(0)
    with open(path, "w") as file:
        while file.tell() < size:
            begin, length = source.randrange(len(text)), source.randrange(300, 5000)
            file.write(json.dumps({"text": text[begin : begin + length]}) + "\n")
    return path


def prepare(path: Path, tokenizer: Path, num_proc: int) -> tuple[float, float, float, int]:
    """Return tokens, seconds, seconds of CPU and kilobytes of memory of the largest process. The
    seconds are those after the start of Python and its imports."""
    code = """
import resource, sys, time
from data import pieces, prepare
from common.console import command
pieces.SHARD, pieces.GROWTH = 2**19, 0
begun, cpu = time.perf_counter(), time.process_time()
try:
    command(prepare.main)
finally:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = [resource.getrusage(kind) for kind in kinds]
    spent = sum(u.ru_utime + u.ru_stime for u in used) - cpu
    print(time.perf_counter() - begun, spent, max(u.ru_maxrss for u in used))
"""
    with tempfile.TemporaryDirectory() as out:
        args = ["--out", out, "--tokenizer", tokenizer, "--num_proc", num_proc, path]
        words = [sys.executable, "-c", code, *map(str, args)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        tokens = sum(json.loads(Path(out, "meta.json").read_text())["tokens"].values())
    seconds, cpu, memory = done.stdout.split()[-3:]
    return tokens, float(seconds), float(cpu), int(memory)


def direct(path: Path, tokenizer: Path) -> tuple[float, ...]:
    words = [sys.executable, "-c", DIRECT, path, tokenizer]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small = write_texts(Path(folder, "small.jsonl"), 3_000_000)
        path = write_texts(Path(folder, "texts.jsonl"), args.megabytes * 1_000_000)
        flags = ["--out", f"{folder}/bpe", "--tokenizer", "bpe:8000", small]
        words = [sys.executable, ROOT / "data/prepare.py", *flags]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        tokenizer = Path(folder, "bpe/tokenizer.json")
        ways = {
            "tokenizers directly": lambda: direct(path, tokenizer),
            "prepare.py, 1 process": lambda: prepare(path, tokenizer, 1),
            "prepare.py, 2 processes": lambda: prepare(path, tokenizer, 2),
        }
        found = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                found[name].append(way())
        for name, rounds in found.items():
            fastest = max(tokens / seconds for tokens, seconds, *_ in rounds)
            thriftiest = max(tokens / cpu for tokens, _, cpu, *_ in rounds)
            print(f"{name}: {fastest:,.0f} tokens/s, {thriftiest:,.0f} a second of CPU")
        large = write_texts(Path(folder, "large.jsonl"), args.megabytes * 10_000_000)
        for name, file in (("", path), (" of ten times the text", large)):
            print(f"memory{name}: {prepare(file, tokenizer, 2)[3] / 1000:,.0f} MB")


if __name__ == "__main__":
    main()
