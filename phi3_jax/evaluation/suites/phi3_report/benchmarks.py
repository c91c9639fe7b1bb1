"""The table of benchmarks: shots and metrics of the Phi-3 report (arXiv:2404.14219v4, section 3), and where items are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from phi3_jax.errors import UserError
from phi3_jax.evaluation.suites.phi3_report import convert
from phi3_jax.family import TRIO

Row = dict[str, Any]
BOTH = ("letter", "harness")
LM_EVAL = "lm_eval"  # few-shot "split" of benchmarks whose exemplars are not on the Hub: those that lm-eval ships


class Hub(NamedTuple):
    """Where the items are on the Hugging Face Hub; `{subset}` stands for each name in Benchmark.subsets in turn."""

    dataset: str
    config: str | None
    split: str
    fewshot: str | None  # a split, LM_EVAL, or None for 0 shots


@dataclass(frozen=True)
class Benchmark:
    """One row of the report's table.

    Attributes:
      name, title: key here, and the name people know.
      shots: exemplars in the prompt, always the first ones of the few-shot file.
      kind: multiple_choice, generate or code.
      chance: what a uniform guess scores, 0 to 1; where options vary, the mean over the items of ../shared/benchmarks
        (TruthfulQA: of letter; that of mc2 is 0.46, and rows of `summarise` say exactly how much).
      size: items of the full test set.
      hub, convert: where the items are online, and what turns a row there into the common shape.
      key: row of the tables in analysis/published/, None where the report has none.
      cot: whether exemplars and replies reason first.
      scorings: letter, harness or both where there are options, else empty.
      metric: headline metric of the harness scoring (its stock task's), or of the benchmark where there are no options.
      by_subset: whether exemplars come from the item's own subset, and scores are also given a subset.
      subsets: the subsets that the Hub keeps apart.
      fewshot_subset: the only subset of the few-shot file that is used.
    """

    name: str
    title: str
    shots: int
    kind: str
    chance: float
    size: int
    hub: Hub
    convert: Callable[[Row], Row]
    key: str | None
    cot: bool = False
    scorings: tuple[str, ...] = ()
    metric: str = "acc"
    by_subset: bool = False
    subsets: tuple[str, ...] = ()
    fewshot_subset: str | None = None

    @property
    def published(self) -> dict[str, float]:
        """Scores (0 to 1) of mini, small and medium in the report; empty where it has none, and outside a clone."""
        from phi3_jax.scaling import published

        try:
            row = next((r for r in published.table("phi3_academic") if r["benchmark"] == self.key), {})
        except UserError:
            return {}
        scores = {size: row.get(f"phi3_{size}") for size in TRIO}
        return {size: round(float(score) / 100, 6) for size, score in scores.items() if score}


AGIEVAL = (
    *("aqua-rat", "sat-en", "sat-en-without-passage", "sat-math", "lsat-ar", "lsat-lr", "lsat-rc"),
    *("logiqa-en", "gaokao-english"),
)
BBH = (
    *("boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages"),
    *("formal_fallacies", "geometric_shapes", "hyperbaton"),
    *(f"logical_deduction_{count}_objects" for count in ("five", "seven", "three")),
    *("movie_recommendation", "multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table"),
    *("reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks"),
    *("sports_understanding", "temporal_sequences"),
    *(f"tracking_shuffled_objects_{count}_objects" for count in ("five", "seven", "three")),
    *("web_of_lies", "word_sorting"),
)
MATH = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra"),
    "precalculus",
)


def _options(name: str, title: str, shots: int, chance: float, size: int, hub: Hub, key: str, **rest: Any) -> Benchmark:
    function = getattr(convert, name)
    return Benchmark(name, title, shots, "multiple_choice", chance, size, hub, function, key, scorings=BOTH, **rest)


def _math(name: str, title: str, size: int, key: str | None) -> Benchmark:
    hub = Hub("EleutherAI/hendrycks_math", "{subset}", "test", None)
    return Benchmark(
        *(name, title, 0, "generate", 0.0, size, hub, convert.math, key),
        cot=True,
        metric="exact_match",
        subsets=MATH,
    )


_TABLE = (
    _options(
        *("mmlu", "MMLU", 5, 1 / 4, 14042, Hub("cais/mmlu", "all", "test", "dev"), "MMLU"),
        by_subset=True,
    ),
    _options(
        *("hellaswag", "HellaSwag", 5, 1 / 4, 10042, Hub("Rowan/hellaswag", None, "validation", "train"), "HellaSwag"),
        metric="acc_norm",
    ),
    _options(
        *("anli", "ANLI", 7, 1 / 3, 3200, Hub("facebook/anli", None, "test_{subset}", "train_{subset}"), "ANLI"),
        by_subset=True,
        subsets=("r1", "r2", "r3"),
    ),
    Benchmark(
        *("gsm8k", "GSM-8K", 8, "generate", 0.0, 1319, Hub("openai/gsm8k", "main", "test", LM_EVAL)),
        *(convert.gsm8k, "GSM-8K", True),
        metric="exact_match",
        fewshot_subset="wei2022-cot",
    ),
    _math("math", "MATH", 5000, "MATH"),
    _math("math_format_sample", "format sample, not MATH", 28, None),
    _options(
        *("medqa", "MedQA (USMLE, 4 options)", 2, 1 / 4, 1273),
        *(Hub("GBaker/MedQA-USMLE-4-options-hf", None, "test", "train"), "MedQA"),
    ),
    _options(
        *("agieval", "AGIEval (English, multiple choice)", 0, 0.228, 2852),
        *(Hub("hails/agieval-{subset}", None, "test", None), "AGIEval"),
        by_subset=True,
        subsets=AGIEVAL,
    ),
    Benchmark(
        *("triviaqa", "TriviaQA", 5, "generate", 0.0, 11313),
        *(Hub("mandarjoshi/trivia_qa", "unfiltered.nocontext", "validation", "train"), convert.triviaqa, "TriviaQA"),
        metric="exact_match",
    ),
    _options(
        *("arc_challenge", "ARC-Challenge", 10, 1 / 4, 1172),
        *(Hub("allenai/ai2_arc", "ARC-Challenge", "test", "train"), "Arc-C"),
        metric="acc_norm",
    ),
    _options(
        *("arc_easy", "ARC-Easy", 10, 1 / 4, 2376, Hub("allenai/ai2_arc", "ARC-Easy", "test", "train"), "Arc-E"),
        metric="acc_norm",
    ),
    _options(
        *("piqa", "PIQA", 5, 1 / 2, 1838, Hub("baber/piqa", None, "validation", "train"), "PIQA"),
        metric="acc_norm",
    ),
    _options(
        *("social_iqa", "SociQA", 5, 1 / 3, 1954, Hub("lighteval/siqa", None, "validation", "train"), "SociQA"),
    ),
    Benchmark(
        *("bbh", "BIG-Bench Hard", 3, "generate", 0.266, 6511, Hub("SaylorTwift/bbh", "{subset}", "test", LM_EVAL)),
        *(convert.bbh, "BigBench-Hard", True),
        metric="exact_match",
        by_subset=True,
        subsets=BBH,
    ),
    _options(
        *("winogrande", "WinoGrande", 5, 1 / 2, 1267),
        *(Hub("allenai/winogrande", "winogrande_xl", "validation", "train"), "WinoGrande"),
    ),
    _options(
        *("openbookqa", "OpenBookQA", 10, 1 / 4, 500, Hub("allenai/openbookqa", "main", "test", "train"), "OpenBookQA"),
        metric="acc_norm",
    ),
    _options("boolq", "BoolQ", 2, 1 / 2, 3270, Hub("aps/super_glue", "boolq", "validation", "train"), "BoolQ"),
    _options(
        *("commonsense_qa", "CommonSenseQA", 10, 1 / 5, 1221),
        *(Hub("tau/commonsense_qa", None, "validation", "train"), "CommonSenseQA"),
    ),
    _options(
        *("truthfulqa", "TruthfulQA", 10, 0.227, 817),
        *(Hub("truthfulqa/truthful_qa", "multiple_choice", "validation[:-20]", "validation[-20:]"), "TruthfulQA"),
        metric="mc2",
    ),
    Benchmark(
        *("humaneval", "HumanEval", 0, "code", 0.0, 164, Hub("openai/openai_humaneval", None, "test", None)),
        *(convert.humaneval, "HumanEval"),
        metric="pass@1",
    ),
    Benchmark(
        *("mbpp", "MBPP", 3, "code", 0.0, 500, Hub("google-research-datasets/mbpp", "full", "test", "prompt")),
        *(convert.mbpp, "MBPP"),
        metric="pass@1",
    ),
    _options(
        *("gpqa", "GPQA (main)", 2, 1 / 4, 448, Hub("Idavidrein/gpqa", "gpqa_main", "train[2:]", "train[:2]"), "GPQA"),
        cot=True,
    ),
)
BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _TABLE}
