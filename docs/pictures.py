"""Makes the pictures of these pages from their data: python docs/pictures.py"""

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
OURS, OTHERS = "#1f6fb4", "#b8b8b8"
NAMES = {
    "resident": "gigaGPT",
    "transformers-compiled": "transformers, compiled",
    "nanogpt-bf16-compiled": "nanoGPT, compiled",
    "transformers": "transformers",
    "nanogpt-bf16": "nanoGPT",
    "litgpt-compiled": "litgpt, compiled",
}


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (DOCS / name).read_text().splitlines()]


def draw(axes: Axes, name: str, title: str) -> None:
    """Saves the picture of these axes under a title that says what is to be seen."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.savefig(DOCS / name, dpi=110)


def new_axes(width: float = 8, height: float = 4) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").subplots()


def speed() -> None:
    """The best of each side for 111M parameters and 2,048 tokens a step."""
    line = next(line for line in lines("performance.jsonl") if line["name"] == "111m-zen5")
    rates = {NAMES[side]: values["tokens_per_second"] for side, values in line["sides"].items()}
    best = dict(sorted(rates.items(), key=lambda item: item[1]))
    axes = new_axes()
    colors = [OURS if name == "gigaGPT" else OTHERS for name in best]
    axes.bar_label(axes.barh(list(best), list(best.values()), color=colors), fmt="%.0f", padding=3)
    axes.set(xlabel="tokens a second, two cores of an AMD EPYC of the fifth generation")
    draw(axes, "speed.png", "Training steps of GPT-2 111M on a CPU")


def streaming() -> None:
    """How much of resident's speed streaming from disk has, by tokens a step."""
    ratios = {}
    for line in lines("streaming.jsonl"):
        tokens = line["batch_size"] * line["sequence_length"]
        rates = {side: values["tokens_per_second"] for side, values in line["sides"].items()}
        ratio = rates["streaming-disk"] / rates["resident"]
        ratios[tokens] = max(ratios.get(tokens, 0), ratio)
    axes = new_axes()
    axes.axhline(1, color=OTHERS, linestyle="--")
    axes.plot(*zip(*sorted(ratios.items()), strict=True), "o-", color=OURS)
    for tokens, ratio in ratios.items():
        axes.annotate(
            f"{ratio:.2f}", (tokens, ratio), (0, -16), textcoords="offset points", ha="center"
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ratios), [f"{tokens:,}" for tokens in ratios])
    axes.set(ylim=(0, 1.1), xlabel="tokens a step", ylabel="speed, resident is 1")
    draw(axes, "streaming.png", "Streaming from disk costs less, the more tokens a step has (111M)")


def killed() -> None:
    """The losses of the undisturbed run below those of the killed one."""
    undisturbed, other = lines("killed.jsonl")
    axes = new_axes()
    steps = range(1, len(undisturbed["losses"]) + 1)
    axes.plot(steps, undisturbed["losses"], color="#f2b56b", linewidth=5, label="undisturbed")
    label = f"killed {len(other['kills'])} times"
    axes.plot(steps, other["losses"], color=OURS, linewidth=0.8, label=label)
    kills = [step for step in other["kills"] if step]
    heights = [other["losses"][step - 1] for step in kills]
    axes.plot(kills, heights, "rx", markersize=8, markeredgewidth=2, label="a kill")
    axes.set(xlabel="step", ylabel="loss (nats a character)")
    axes.legend(frameon=False)
    draw(axes, "killed.png", "A run that is killed and resumed has the losses of one that is not")


def start_of_111m() -> None:
    """The steps of configs/111m.yaml that were run."""
    steps = [record for record in lines("111m.jsonl") if "loss" in record]
    axes = new_axes()
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], "o-", color=OURS)
    axes.set(xlabel="step of 120 × 2,048 tokens", ylabel="loss (nats a token)")
    axes.set_xticks([r["step"] for r in steps])
    draw(axes, "111m.png", f"The first {len(steps)} steps of configs/111m.yaml, on two cores")


if __name__ == "__main__":
    for make in (speed, streaming, killed, start_of_111m):
        make()
