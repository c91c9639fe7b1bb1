"""Scores a model on benchmarks: `python launch/evaluate.py --model runs/phi3-mini --suite phi3_report`.

--model RUN|hf:FOLDER      a run, one of its checkpoints, or a Hugging Face folder; with a tokenizer
--suite SUITE              phi3_report (default): the benchmarks of the Phi-3 report, with its shots
                           lm-eval:TASK,TASK: tasks of lm-eval by name, with data from the Hugging Face Hub
--tasks A,B                some of the suite's benchmarks (default: all there is data for), such as arc_challenge,mt_bench
--scoring both             of benchmarks with options: letter (the report's way), harness (log-likelihoods), or both
--limit N                  the first N items a task only; the scores are then of a subset
--data_dir DIR             benchmarks as JSONL files (DIR/<name>/test.jsonl); default: the Hugging Face Hub
--chat                     prompts in the member's chat template
--batch 8                  rows at a time
--seed 0                   of sampled replies
--allow_code_execution     HumanEval and MBPP may run what the model writes, in a sandbox
--judge URL                an OpenAI-compatible server that rates MT-Bench's replies; key in $OPENAI_API_KEY
--judge_model NAME         its model; without a judge MT-Bench gives replies and no score
--out DIR                  default: the run's own folder, or runs/evals/<name> for a Hugging Face folder

Writes evals.jsonl (a row a task; rows of the same model, suite and task are replaced) and items/<suite>-<task>.jsonl.
"""

from __future__ import annotations

import sys

from phi3_jax.commands import run
from phi3_jax.evaluation.command import command
from phi3_jax.training.compile_cache import kept

if __name__ == "__main__":
    with kept():
        sys.exit(run(sys.argv[1:], __doc__, command))
