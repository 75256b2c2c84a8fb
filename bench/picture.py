"""The picture of docs/performance.md: python bench/picture.py RESULTS.jsonl docs/performance.png

Tokens a second against the size of the model, from the lines that bench/compare.py wrote: the best
of each side at each size, and what the measured matrix matmul would allow.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def main(results: str, picture: str) -> None:
    curves, roof = defaultdict(dict), {}
    for line in map(json.loads, Path(results).read_text().splitlines()):
        size = line["parameters"]
        roof[size] = max(roof.get(size, 0), line["roof"] / (6 * size))
        for name, side in line["sides"].items():
            if "tokens_per_second" in side:
                rate = max(curves[name].get(size, 0), side["tokens_per_second"])
                curves[name][size] = rate
    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.plot(*zip(*sorted(roof.items()), strict=True), "k--", label="roof: bf16 matrix matmul")
    for name, curve in curves.items():
        ours = name.startswith(("resident", "streaming"))
        sizes, rates = zip(*sorted(curve.items()), strict=True)
        axes.plot(sizes, rates, "o-" if ours else "x:", label=name, linewidth=2 if ours else 1)
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="tokens a second")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
