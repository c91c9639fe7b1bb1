"""Every command of the package: `phi3-jax VERB ...`; `launch/VERB.py` and `python -m phi3_jax.ROOM` name some too.

A row says what the command is for, which flags it takes, and by name which function does the work, so that help and
mistakes cost no import of it. Choices and defaults stand in the rooms that know them as well; `tests/test_verbs.py` holds
these against those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from phi3_jax import commands
from phi3_jax.commands import Command, Flag
from phi3_jax.errors import UserError, nearest
from phi3_jax.keys import Auto, Key, local, number, share, switch, whole, word

if TYPE_CHECKING:
    from phi3_jax import experiment

STUDY = Flag(local("the study's folder, such as runs/sweep-pico-clean"), "STUDY", needed=True, bare=True)
JSON = Flag(switch("prints one JSON object"))
KEYS = "phi3_jax.experiment:with_keys"
# What every command about a study takes; with --config.KEY=VALUE for every key.
OF_STUDY: dict[str, Flag] = {
    "config": Flag(
        local("the experiment, and words that its file documents: experiments/scaling.py:medium,budgets=1M"),
        "FILE[:WORDS]", needed=True,
    ),
    "workdir": Flag(local("the study's folder; without, runs/NAME"), "DIR"),
    "resume": Flag(word("auto goes on where an interrupted study stopped", "auto", "auto", "never")),
    "run": Flag(
        Key(
            "trains these runs of the study alone, for example mini-s0-4M (size, seed, budget); whichever command finishes "
            "the study writes the report", (), tuple, 1, item=word("a run", None),
        ),
        "NAME,...",
    ),
}  # fmt: skip


def _switch(doc: str) -> Flag:
    return Flag(switch(doc))


RUN = Command(
    "run",
    """Trains a study and writes its report.

The same line on every host or process of a job makes them one run: see phi3_jax/cluster.py. Exit status 75: stopped by a
signal and saved; the same command goes on from there.""",
    "phi3_jax.cluster:train",
    OF_STUDY,
    "--config experiments/scaling.py:medium",
    "python launch/run.py",
    more=KEYS,
)

PLAN = Command(
    "plan",
    """Says what a full-size run takes, before it runs.

Memory per device, what the devices send one another, the least time of a step and what bounds it, chip-hours; and the best
strategy, mesh, remat and microbatch for these devices. Needs no accelerator and takes seconds. The word topology= says on
what: v5p:4x4x8, 2xv5p:4x4x4 (two slices), h200:8, h100:4x8 (nodes x GPUs), cpu:8.""",
    "phi3_jax.study.plan:main",
    {
        "config": OF_STUDY["config"],
        "json": Flag(switch("prints one JSON object instead of the page")),
        "compile": _switch(
            "compiles the training step for the topology as well (TPU; extra [tpu]; minutes) and prints its answer"
        ),
    },
    "--config experiments/scaling.py:medium,topology=v5p:4x4x8",
    "python launch/plan.py",
    more=KEYS,
)

SUBMIT = Command(
    "submit",
    """Sends a study to a scheduler.

The word scale= must be given; the scheduler's keys are config.cluster.*. Sending again skips runs that are finished,
waiting or running, and starts the others where they stopped.""",
    "phi3_jax.submission.command:main",
    {
        "study": Flag(local("with --status alone: the folder of a study"), "DIR", bare=True),
        "config": dataclasses.replace(OF_STUDY["config"], needed=False),
        "workdir": Flag(local("the study's folder as seen from here; without, runs/NAME"), "DIR"),
        "backend": Flag(
            word("JobSets, queued resources, sbatch, or this machine", None, "gke", "tpu-vm", "slurm", "local"), "NAME"
        ),
        "dry_run": _switch("prints the files and commands that would be sent, and writes nothing"),
        "status": _switch("prints a table of the study's runs; with --backend, the scheduler is asked as well"),
        "run": Flag(word("", None), hidden=True),
        "resume": Flag(word("", None), hidden=True),
    },
    "--config experiments/scaling.py:sweep,scale=full,data=DATA,topology=h200:4x8 --backend slurm --dry_run",
    "python launch/submit.py",
    more=KEYS,
)

_MODEL = "a run, one of its checkpoints, or a Hugging Face folder"
_ADAPTER = Flag(local("a run of lora=, or peft:FOLDER: its adapters stand beside the weights of --model"), "RUN")
_MERGED = Flag(local("a run whose adapters are merged into the weights of --model first"), "RUN")

GENERATE = Command(
    "generate",
    """Continues a prompt, or holds a dialogue.

One prompt streams its reply; several run together.""",
    "phi3_jax.inference.command:command",
    {
        "model": Flag(local(f"{_MODEL}, or a quantised run"), "RUN|hf:FOLDER", needed=True),
        "adapter": _ADAPTER,
        "prompt": Flag(word("what is continued", None), repeated=True),
        "file": Flag(local("one prompt per line"), "FILE"),
        "image": Flag(
            local("a picture for a phi-3-vision; <|image_1|> in a prompt is where the first stands"),
            "FILE",
            repeated=True,
        ),
        "crops": Flag(
            whole("tiles that a picture is cut into at most; without, what the model's files say", None, 1, 64)
        ),
        "exif": _switch("turns pictures as their EXIF orientation says, which the released code does not"),
        "chat": _switch("the member's chat template; without --prompt, a dialogue line by line"),
        "system": Flag(word("system message of the dialogue", None)),
        "max_new_tokens": Flag(whole("at most; without, 256, in a dialogue 512, or what the context leaves", None, 1)),
        "temperature": Flag(number("0 takes the most likely token", 0.0, 0.0, 1e6)),
        "top_k": Flag(whole("draws from the K most likely tokens; 0: from all", 0), "K"),
        "top_p": Flag(number("draws from the most likely tokens that have this mass together", 1.0, 1e-9, 1.0), "P"),
        "min_p": Flag(share("leaves out tokens below this share of the most likely one's probability", 0.0), "P"),
        "repetition_penalty": Flag(number("above 1, makes tokens that were there less likely", 1.0, 1e-6, 1e6)),
        "seed": Flag(whole("of the draws", 0, 0, 2**62)),
        "stop": Flag(word("ends the reply before this text", None), repeated=True),
        "logprobs": _switch("prints the log-probability of each token, in nats"),
        "rope_regime": Flag(
            word(
                "LongRoPE's list; auto: by prompt and max_new_tokens; original: as phi-3-vision's own code decodes",
                "auto",
                "auto",
                "short",
                "long",
                "original",
            )
        ),
    },
    '--model runs/phi3-mini --prompt "Explain RoPE in one sentence."',
    "python launch/generate.py",
    cached=True,
)

EVALUATE = Command(
    "evaluate",
    """Scores a model on benchmarks.

Writes evals.jsonl (a row per task; rows of the same model, suite and task are replaced) and items/<suite>-<task>.jsonl.""",
    "phi3_jax.evaluation.command:command",
    {
        "model": Flag(local(f"{_MODEL}; with a tokenizer"), "RUN|hf:FOLDER", needed=True),
        "adapter": _ADAPTER,
        "suite": Flag(
            word(
                "phi3_report: the benchmarks of the Phi-3 report, with its shots; lm-eval:TASK,TASK: tasks of lm-eval by "
                "name, data from the Hugging Face Hub or from --data_dir (single tasks: DIR/<benchmark>/test.jsonl, or "
                "hf/test.jsonl with the Hub's columns), or task files of one's own: lm-eval:task.yaml; longcontext: "
                "needles, RULER's tasks and loss by position at --lengths; phi3_vision_report: questions about pictures "
                "(DIR/<benchmark>/test.jsonl); safety: refusals and bias, from --data_dir; "
                "safety:redteam: conversations that try to get harm, rated by --judge; "
                "calibration: does it know what it knows",
                "phi3_report",
            ),
            "SUITE",
        ),
        "tasks": Flag(word("some of the suite's benchmarks: arc_challenge,mt_bench; without, all with data", None), "A,B"),
        "lengths": Flag(
            word("longcontext: tokens of prompt and answer, such as 1k,2k; without, doubling up to the context", None),
            "N,N",
        ),
        "depths": Flag(whole("longcontext: places of a needle in the text, evenly; without, 10", None, 1, 1000)),
        "scoring": Flag(
            word(
                "of benchmarks with options: letter (the report's way), harness (log-likelihoods), or both",
                "both", "both", "letter", "harness",
            )
        ),
        "limit": Flag(whole("the first N items per task only; the scores are then of a subset", None, 1)),
        "samples": Flag(word("""these items only, by task: '{"boolq": [0, 3]}'""", None), "JSON"),
        "gen_kwargs": Flag(
            word("how replies are drawn, in place of what tasks say: temperature=0.8,top_p=0.95", None), "A=B,..."
        ),
        "system": Flag(word("the system's turn before every prompt; needs --chat", None), "TEXT"),
        "use_cache": Flag(
            local("a file of answers, which is kept: what stands in it is not computed again; without, they are kept until "
                  "the results are written"), "FILE",
        ),
        "data_dir": Flag(local("benchmarks as JSONL files (DIR/<name>/test.jsonl); without, the Hugging Face Hub"), "DIR"),
        "clean": Flag(
            local("a curated corpus: scores of the items that its input did not hold stand beside those of all"), "FOLDER"
        ),
        "chat": _switch("prompts in the member's chat template"),
        "batch": Flag(Auto("rows at a time, on each device; auto: what fits the memory, up to 64", 8, int, 1, 2**16)),
        "devices": Flag(whole("that share the work, with a whole copy of the model each", 1, 1, 2**16)),
        "seed": Flag(whole("of sampled replies", 0, 0, 2**62)),
        "allow_code_execution": _switch("HumanEval and MBPP may run what the model writes, in a sandbox"),
        "judge": Flag(
            word("an OpenAI-compatible server that rates MT-Bench's replies; key in $OPENAI_API_KEY", None), "URL"
        ),
        "judge_model": Flag(word("its model; without a judge MT-Bench gives replies and no score", None), "NAME"),
        "labels": Flag(local("redteam: replies rated by people (CSV, JSON lines), to hold the judge against"), "FILE"),
        "uncalibrated": _switch("redteam: a judge that nobody has held against people, or that failed, may rate"),
        "attacker": Flag(local("redteam: a chat model that leads conversations"), "RUN|hf:FOLDER"),
        "turns": Flag(whole("redteam: of a conversation at most; without, 5", None, 1, 100)),
        "keep_text": _switch("redteam: items hold what was said, and not its hashes alone"),
        "out": Flag(local("results; without, the run's own folder, or runs/evals/<name> for a Hugging Face folder"), "DIR"),
    },
    "--model runs/phi3-mini --suite phi3_report",
    "python launch/evaluate.py",
    cached=True,
)  # fmt: skip

COMPARE = Command(
    "compare",
    """Tests two evaluations on the same items against each other.

Reads the items that evaluate wrote into both folders: paired differences with intervals, McNemar's exact p, and Holm's p
of all tasks together.""",
    "phi3_jax.evaluation.paired:command",
    {
        "first": Flag(local("results of one model"), "FOLDER", needed=True, bare=True),
        "second": Flag(local("of the other, on the same data"), "FOLDER", needed=True, bare=True),
    },
    "runs/evals/mini runs/evals/medium",
)

EXTEND = Command(
    "extend",
    """Gives a model a longer window: searches its RoPE factors.

Writes factors.json (Hugging Face's form, with every baseline's fitness) and a run with the new window, which load,
generate, evaluate and export take. Type the same command again, and a search that was stopped goes on.""",
    "phi3_jax.extension.command:command",
    {
        "model": Flag(local(f"{_MODEL}; with a tokenizer"), "RUN|hf:FOLDER", needed=True),
        "to": Flag(
            word("the new window: a multiple of the original, as 8x, or tokens, as 131072 or 128k", None), needed=True
        ),
        "original": Flag(
            whole("length that is stretched, L0; without, a run's training windows, or the context", None, 2, 2**24)
        ),
        "method": Flag(
            word(
                "longrope2: factors of s and more from a critical pair on, NTK-like before; longrope: all; closed forms",
                "longrope2", "longrope2", "longrope", "yarn", "ntk", "pi", "none",
            )
        ),
        "factors": Flag(local("a list that is taken as it is: a factors.json, or a config.json with LongRoPE"), "FILE"),
        "fitness": Flag(
            word(
                "what a list is judged by: needles' answers, text beyond the original length, or the mean of both",
                "both", "both", "needle", "text",
            )
        ),
        "data": Flag(
            local("text with documents longer than the target: a path or pydocs; without, what the run trained on"),
            "SPEC",
        ),
        "text_field": Flag(word("field of JSON lines that holds the text", "text")),
        "evaluations": Flag(whole("lists that the search tries", 1344, 1, 10**7)),
        "train": Flag(whole("tokens that the model then trains on, in mixed windows; 0: the search alone", 0)),
        "mix": Flag(share("share of the training rows that hold short documents", 0.5)),
        "seed": Flag(whole("of rows, search and training", 0, 0, 2**31)),
        "out": Flag(local("the folder that is written"), "RUN", needed=True),
    },
    "--model runs/NAME --to 8x --data PATH --out runs/NAME-8x",
    "python launch/extend.py",
    cached=True,
)  # fmt: skip

CONVERT = Command(
    "convert",
    """Converts released weights to a run, and back; adapters of PEFT too.

A Hugging Face folder holds config.json and *.safetensors; one of PEFT, adapter_config.json and
adapter_model.safetensors.""",
    "phi3_jax.interop.convert:command",
    {
        "from": Flag(
            local("a Hugging Face folder, an adapter of PEFT, or a run or one of its checkpoints"),
            "hf:FOLDER|peft:FOLDER|RUN", needed=True,
        ),
        "to": Flag(
            local("another kind; must not exist yet, and appears only when whole"), "RUN|hf:FOLDER|peft:FOLDER", needed=True
        ),
        "base": Flag(local("of --from peft:FOLDER: the weights that it is for"), "RUN|hf:FOLDER"),
        "merge": _switch("adds adapters to their weights, in float32; what comes out is a whole model"),
        "adapter": Flag(local("a run whose adapters are merged into --from"), "RUN"),
        "window_rule": Flag(
            word(
                "keys that sliding_window = w means: transformers (the default) w, released (the 2024 code) w + 1",
                None, "transformers", "released",
            )
        ),
    },
    "--from hf:FOLDER --to runs/NAME",
    "python launch/convert.py",
)  # fmt: skip

QUANTIZE = Command(
    "quantize",
    "Quantises a model.",
    "phi3_jax.evaluation.quantisation:command",
    {
        "model": Flag(local("a run or one of its checkpoints"), "RUN", needed=True),
        "adapter": _MERGED,
        "format": Flag(
            word(
                "4 bits, a scale per 32 weights; 8 bits, 32; 4 bits, 128", None, "q4_0", "q8_0", "int4_g128",
            ),
            needed=True,
        ),
        "out": Flag(local("the quantised run; must not exist yet, and appears only when whole"), "RUN", needed=True),
        "calibrate": _switch("rounds so that the products with real inputs stay (GPTQ); minutes for a phi-3-mini"),
        "text": Flag(
            local("text to calibrate on and to measure with; without, the run's own data set, or the Python docs"), "FILE"
        ),
        "tokens": Flag(whole("how many of it, of which models of 1B and more are measured on 2048; 0: none", 8192, 0)),
    },
    "--model runs/NAME --format q4_0 --out runs/NAME-q4",
    "python launch/quantize.py",
    cached=True,
)  # fmt: skip

EXPORT = Command(
    "export",
    "Exports a model for on-device use.",
    "phi3_jax.interop.gguf:command",
    {
        "model": Flag(local(_MODEL), "RUN|hf:FOLDER", needed=True),
        "adapter": _MERGED,
        "to": Flag(
            local(
                "gguf:FILE, one file for llama.cpp (mini and medium), or hf:FOLDER, safetensors (every member); must not "
                "exist yet, and appears only when whole"
            ),
            "gguf:FILE|hf:FOLDER", needed=True,
        ),
        "format": Flag(word("without, what FILE's name says (.F16., .Q8_0., .Q4_0.)", None, "f16", "q8_0", "q4_0")),
        "name": Flag(word("general.name in the GGUF file; without, the model's", None), "NAME"),
    },
    "--model runs/NAME --to gguf:NAME.Q4_0.gguf",
    "python launch/export.py",
)  # fmt: skip

DATA = Command(
    "data",
    """Writes a data set once, so that training only reads.

Text is tokenised in batches, packed into windows with segment ids, and written as ArrayRecord shards plus a manifest
(phi3_jax.data.manifest) into a hidden folder beside DIR that takes DIR's name only when whole. The same input gives the
same fingerprint; an unchanged request on a whole data set is skipped.""",
    "phi3_jax.data.export:command",
    {
        "out": Flag(local("folder to write"), "DIR", needed=True),
        "overwrite": _switch("replaces another data set at --out"),
    },
    "--out runs/text --data path/to/texts",
    "python -m phi3_jax.data.export",
    more="phi3_jax.data.export:with_options",
)

CURATE = Command(
    "curate",
    """Makes a corpus of raw pages: rules, duplicates, personal data, and a report of what each step dropped.

Needs pip install -e '.[curate]'. The same command goes on where it was stopped. Into --output go parts/ (the corpus, which
data=OUTPUT trains on), rejected/ (with reasons), report.html, and manifest.json. The file of --config says which rules
there are; --config.rules.STEP.PARAMETER=VALUE sets a limit. With --config experiments/synthetic.py a model
writes the text, that of --endpoint or of --model; every answer is kept, and the same rules decide.""",
    "phi3_jax.curation.command:command",
    {
        "config": Flag(
            local("the curation, and words that its file documents: experiments/curation.py:fineweb"),
            "FILE[:WORDS]",
        ),
        "input": Flag(local("a file or folder of text, JSON lines, parquet, WARC or WET"), "PATH", repeated=True),
        "more": Flag(local("further inputs, as a shell makes of crawl/*.jsonl.gz"), "PATH", repeated=True, bare=True),
        "output": Flag(local("the folder of the corpus"), "FOLDER"),
        "sample": Flag(
            number("forecasts what each step keeps, from this share of the documents; writes nothing", None, 1e-9, 1.0)
        ),
        "reuse": Flag(
            local("a finished curation of the same input: what it measured is not measured again; of synthetic text: its "
                  "answers are not asked for again"), "FOLDER"
        ),
        "why": Flag(word("prints the fate of the document with this id in the curation at --output", None), "ID"),
        "endpoint": Flag(
            word("synthetic text: an OpenAI-compatible server that writes it; key in $OPENAI_API_KEY", None), "URL"
        ),
        "endpoint_model": Flag(word("its model; without, the only one that it has", None), "NAME"),
        "model": Flag(local(f"synthetic text: {_MODEL}, or a quantised run, that writes it"), "RUN|hf:FOLDER"),
        "at_once": Flag(whole("requests to the server that are under way together", 8, 1, 1024)),
        "timeout": Flag(number("seconds that the server has for an answer", 120.0, 0.01, 86400.0)),
        "engine": Flag(word("this machine, or Ray (pip install 'daft[ray]')", "native", "native", "ray")),
        "workers": Flag(whole("processes; without, one a core", None, 1, 4096)),
    },
    "--config experiments/curation.py --input FOLDER --output curated/mine",
    "python launch/curate.py",
    more="phi3_jax.curation.config:with_keys",
)  # fmt: skip

# What a command about a table of runs takes.
OF_TABLE: dict[str, Flag] = {
    "table": Flag(local("csv file, one line per run; of a study: its runs.csv"), "TABLE", needed=True, bare=True),
    "n": Flag(word("column of parameters", "non_embedding"), "COLUMN"),
    "d": Flag(word("column of tokens", "budget"), "COLUMN"),
    "flops": Flag(word("column of FLOPs: D = FLOPs / (6 N) instead of --d", None), "COLUMN"),
    "loss": Flag(word("column of final losses", "loss"), "COLUMN"),
    "group": Flag(word("column of clusters that share noise; without, parent: the trunk of forks", None), "COLUMN"),
    "only": Flag(word("keeps the runs with this value", None), "COLUMN=VALUE", repeated=True),
    "drop_highest": Flag(whole("leaves out the K highest losses", 0), "K"),
}

FIT = Command(
    "fit",
    """Fits the loss law L(N, D) = E + A / N^alpha + B / D^beta to a table.

Prints the law, what it is worth (Student's t intervals, every start's end) and where it fails (residuals against size and
data, each size predicted from the others). Of a law that the runs do not determine it prints "not determined: ...", the
reason, and no constants. --json prints the same as one object at full precision; rounded constants bias predictions
(arXiv:2404.10102), so copy them from there.""",
    "phi3_jax.scaling.fit:command",
    {
        **OF_TABLE,
        "bootstrap": Flag(whole("draws of resampled runs for standard errors (--json); 0 for none", 0, 0, 100_000)),
        "card": Flag(local("writes the checklist of the fit here"), "FILE"),
        "json": JSON,
    },
    "analysis/results/laws/runs.csv --n non_embedding --d tokens --loss text/text/loss",
    "python -m phi3_jax.scaling.fit",
)

FORECAST = Command(
    "forecast",
    """Forecasts runs beyond those of a table, and scores the forecasts.

Fits the runs of least 6 N D, forecasts the others and says how many of them lie in their 95 % intervals; with --at, fits
all and forecasts runs that have not been. The intervals carry the error of the law's form: laws fitted to the lower part
of the table are scored on the rest, and errors of form in published tables are added with distance. Beside them stand the
interval that would hold if the form did, and the forecast of Gadre's form.""",
    "phi3_jax.scaling.forecast:command",
    {
        **OF_TABLE,
        "held": Flag(share("part of the runs, of most 6 N D, that is forecast and scored", 0.3)),
        "at": Flag(
            Key("parameters and tokens of a run to forecast", None, tuple, 2, item=number("a count", None, 1.0, 1e30)),
            "N,D", repeated=True,
        ),
        "json": JSON,
    },
    "analysis/results/laws/runs.csv --n non_embedding --d tokens --loss text/text/loss",
    "python -m phi3_jax.scaling.forecast",
)  # fmt: skip

POWER = Command(
    "power",
    """Says what a design can see, before it is paid for.

For three sizes the contrast is the second gain per doubling minus the first; with --arms 2 the interaction is its
difference between two arms, paired by seed. Prints the smallest effect that a t test over seeds finds with 80 % power
at level .05, by formula and by simulation.""",
    "phi3_jax.scaling.power:command",
    {
        "sizes": Flag(
            Key(
                "three parameter counts",
                (110_592, 212_992, 416_000),
                tuple,
                1,
                item=number("parameters", None, 1.0, 1e15),
            )
        ),
        "seeds": Flag(whole("seeds per size", 3, 2, 10_000)),
        "items": Flag(whole("test items", 54_000, 1, 10**12)),
        "seed_sd": Flag(
            number("points between seeds, at every size; without, as measured for --endpoint", None, 0.0, 100.0)
        ),
        "endpoint": Flag(
            word(
                "share whose noise between seeds counts; see analysis/results/seed_sd.csv",
                "knowledge/universe/recall_teacher_forced",
            ),
            "SUITE/TASK/METRIC",
        ),
        "accuracy": Flag(share("share of items right", 0.5)),
        "arms": Flag(whole("1: a contrast; 2: an interaction", 1, 1, 2)),
        "json": JSON,
    },
    "--sizes 110592,212992,416000 --seeds 3",
    "python -m phi3_jax.scaling.power",
    alone=True,
)

REPORT = Command(
    "report",
    """Writes the report of any study again, from the runs that are there.

Writes report.html, figures/ and runs.csv into the study's folder.""",
    "phi3_jax.reporting.report:command",
    {
        "study": STUDY,
        "keep": Flag(
            local(
                "writes the small tables that a repository keeps and notebooks read as well: runs.csv without what only a "
                "log needs, and study.json with the design, versions and machine, but no path"
            ),
            "DIR",
        ),
    },
    "runs/NAME",
    "python -m phi3_jax.scaling.report",
)

PROBE = Command(
    "probe",
    """Asks the runs of a study about persons closed-book and after a sentence: does search replace parameters?

Every finished run on a corpus of facts is loaded and asked for the six values of each person of its universe, once a way:

    closed       the item alone, as in the evaluation `knowledge`
    retrieved, oracle, distractor     after the sentence that search finds, one's own, somebody else's
    copied       not what is right, but what is copied from that distractor: who looks at the name does not

and recall.csv, differences.csv and recall.md are written.""",
    "phi3_jax.evaluation.retrieval_probe:command",
    {
        "study": STUDY,
        "out": Flag(local("folder for the tables; without, STUDY/search"), "DIR"),
        "headline": Flag(
            Key("two groups of runs to compare", None, tuple, 1, item=word("runs", None)), "SMALL,LARGE", repeated=True
        ),
    },
    "runs/search --out analysis/results/search",
    "python -m phi3_jax.evaluation.retrieval_probe",
)

VERDICT = Command(
    "verdict",
    """Says which planned runs of a study in blocks ran, and what its rule makes of them.""",
    "phi3_jax.study.verdict:command",
    {
        "experiment": Flag(local("the experiment"), "FILE", needed=True, bare=True),
        "folder": Flag(local("of its tables, one a block"), "FOLDER", needed=True, bare=True),
    },
    "experiments/calibration.py analysis/results/calibration",
    "python -m phi3_jax.study.verdict",
)

# What a command starts: the process of one host (cluster.train), one that trains some runs (study.workers), and one that
# makes an extension of a study (extension.sizes).
LAUNCH = dataclasses.replace(RUN, name="launch", body="phi3_jax.study.launch:main", also="", hidden=True)
EXTENSION = dataclasses.replace(EXTEND, name="extension", body="phi3_jax.extension.sizes:one", also="", hidden=True)
WORKER = Command(
    "worker",
    """Trains runs of a study one after the other.

Prints one JSON object per line: {"run", ...progress}, {"run", "status"}, or {"error"}.""",
    "phi3_jax.study.worker:main",
    {
        "study": STUDY,
        "runs": Flag(
            word("a run, and up to which step", None),
            "RUN[@STEP]",
            True,
            True,
            True,
        ),
    },
    "STUDY RUN",
    hidden=True,
)

TABLE = {
    command.name: command
    for command in (
        RUN, PLAN, SUBMIT, GENERATE, EVALUATE, COMPARE, EXTEND, CONVERT, QUANTIZE, EXPORT, DATA, CURATE, FIT, FORECAST,
        POWER, REPORT, PROBE, VERDICT, LAUNCH, EXTENSION, WORKER,
    )
}  # fmt: skip


def asked(words: Sequence[str]) -> experiment.Command:
    """What words ask of a study, as they are typed after `run`.

    Raises:
      UserError: see `commands.parse` and `experiment.asked`.
    """
    from phi3_jax import experiment

    return experiment.asked(commands.parse(RUN.complete(), words))


def main(words: Sequence[str]) -> int:
    """Runs `VERB ...`; the exit status.

    Raises:
      UserError: no such verb, or see `commands.parse`.
    """
    verbs = [name for name, command in TABLE.items() if not command.hidden]
    if not words or words[0] in ("-h", "--help"):
        rows = [(f"phi3-jax {name}", TABLE[name].title) for name in verbs]
        print(f"{commands.table(rows)}\n\nphi3-jax VERB --help says what each takes.")
        return 0
    if words[0] not in TABLE:
        raise UserError(f"unknown command {words[0]!r}{nearest(words[0], verbs)}")
    return commands.call(TABLE[words[0]], words[1:])
