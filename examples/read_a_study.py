"""Read the runs of a study, fit a loss law to them, and ask it about a run that is not there.

    python examples/read_a_study.py                      # a study that comes along; seconds
    python examples/read_a_study.py runs/NAME/runs.csv   # your own

Every study writes runs.csv, a row per run: what it is, what it cost, and each score of its last evaluation as
suite/task/metric. `python -m phi3_jax.scaling.fit` does the same from a command line, with the checks that a paper needs.
"""

import csv
import sys
from pathlib import Path

from phi3_jax.scaling import intervals, laws

TABLE = Path(__file__).parents[1] / "analysis/results/laws/runs.csv"
LOSS = "text/text/loss"


def main() -> None:
    with open(sys.argv[1] if len(sys.argv) > 1 else TABLE) as file:
        runs = [run for run in csv.DictReader(file) if run["status"] == "finished" and run.get(LOSS)]
    print(f"{len(runs)} finished runs, for example {runs[0]['name']}: {float(runs[0][LOSS]):.3f} nats per token")

    # L(N, D) = E + A / N^alpha + B / D^beta, of parameters without embeddings and of tokens.
    n, d, loss = ([float(run[column]) for run in runs] for column in ("non_embedding", "budget", LOSS))
    fitted = laws.fit(n, d, loss)

    # What the fit is worth. Forks share the noise of their trunk, so that they count as one cluster.
    worth = intervals.worth(fitted, clusters=[run["parent"] or run["name"] for run in runs])
    if reason := intervals.undetermined(fitted, worth):
        print(f"the constants of the law are not determined: {reason}")
    else:
        print("95 % intervals:", {name: f"{low:.2f} to {high:.2f}" for name, (low, high) in worth.constants().items()})

    # Near the runs a law may predict even where its constants say nothing.
    larger, longer = 2 * max(n), 2 * max(d)
    (low,), (high,) = worth.new_runs(larger, longer)
    print(f"{larger:,.0f} parameters at {longer:,.0f} tokens: 95 % of new runs from {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
