"""Train a model, then go on from its weights with other data.

    python examples/fine_tune.py            # a minute on two cores

The word `init=` starts a run from given weights: a run, one of its checkpoints, or `hf:FOLDER`. Optimiser and schedule
start anew. On conversations and preferences, see experiments/posttrain.py, which does this with other objectives.
"""

import csv
import subprocess
from pathlib import Path

RUNS = Path("runs/example-fine-tune")
TEXT = RUNS / "text"
BASE, TUNED = RUNS / "base", RUNS / "tuned"


def run(words: str, folder: Path) -> float:
    """Trains a proxy of phi-3-mini as the words say; its loss on held-out text, in nats per token."""
    config = f"experiments/scaling.py:mini,scale=pico,{words}"
    subprocess.run(["phi3-jax", "run", "--config", config, "--workdir", str(folder)], check=True)
    with (folder / "runs.csv").open() as file:  # one row per run
        (row,) = csv.DictReader(file)
    return float(row["text/text/loss"])


def main() -> None:
    # Text of your own is a file or a folder: .txt, .jsonl, .json, .parquet. Here it is the squares of 1 to 3,000.
    TEXT.mkdir(parents=True, exist_ok=True)
    for i in range(100):
        lines = [f"The square of {n} is {n * n}.\n" for n in range(i * 30 + 1, i * 30 + 31)]
        (TEXT / f"{i:03}.txt").write_text("".join(lines))

    run("data=pydocs,budgets=200k", BASE)
    scratch = run(f"data={TEXT},budgets=100k", RUNS / "scratch")
    tuned = run(f"data={TEXT},budgets=100k,init={BASE}", TUNED)
    print(f"loss on held-out squares: {scratch:.3f} from random weights, {tuned:.3f} from those of {BASE}")


if __name__ == "__main__":
    main()
