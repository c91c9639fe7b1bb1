"""The config of every experiment, made of its declared keys; a file in `experiments/` changes some and adds its own."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_jax import commands, family, shipped
from phi3_jax.errors import UserError, nearest
from phi3_jax.keys import (
    BELOW_ONE,
    MOST,
    MOST_RANK,
    MOST_SEED,
    OPTIMIZERS,
    PREFERENCES,
    SCHEDULES,
    SEED,
    TRAIN,
    Key,
    local,
    number,
    parse_count,
    share,
    switch,
    text,
    whole,
    word,
)

if (
    TYPE_CHECKING
):  # it takes as long to import as all of this file, and the help of a command needs the declarations alone
    from ml_collections import ConfigDict


def _tokens(value: str, shown: str) -> None:
    if value not in ("matched", "published"):
        parse_count(value, "a token budget (matched, published or a number)")


SOURCE = "facts"  # of the data, where a study names none

KEYS: dict[str, Any] = dict(
    name=local("of the study's folder; default: made of its words", ""),
    sizes=Key(
        "what to train", family.TRIO, tuple, 1, item=word("a size", None, family.SIZES, family.GIVEN), unique=True
    ),
    scale=word(
        "auto: full where the attached devices hold it, else pico; given: the model of train.init as it is",
        "auto",
        "auto",
        "full",
        *family.SCALES,
        family.GIVEN,
    ),
    ladder=word("how proxies differ: one recipe, each member's architecture, or width alone", "clean", *family.LADDERS),
    mup=Key("proxies are trained under muP; false: standard parametrisation", True, bool),
    tokens=Key("of each run: matched (4.8T), published, or a number", "matched", check=_tokens),
    budgets=Key(
        "tokens to evaluate at, all from one trunk; default: budget_shares", (), tuple, item=whole("tokens", None, 1)
    ),
    ratios=Key(
        "tokens per non-embedding parameter to evaluate at, of every size, instead of budgets",
        (),
        tuple,
        item=number("a ratio", None, 1e-3, 1e6),
        unique=True,
    ),
    flops=Key(
        "compute C to evaluate every size at: C / 6N tokens, N non-embedding parameters, instead of budgets",
        (),
        tuple,
        item=number("FLOPs", None, 1.0, 1e30),
        unique=True,
    ),
    budget_shares=Key("shares of tokens to evaluate at", (1.0,), tuple, 1, item=number("a share", None, 1e-9, 1.0)),
    seed=SEED,
    seeds=whole("how many seeds", 1, 1, 1000),
    topology=word("planned for and asked a scheduler for, for example v5p:4x4x8"),
    context=word("of the full models: the short one (4k/8k/4k) or 128k", "", "", "4k", "8k", "128k"),
    data=dict(
        source=local(f"as --data of phi3_jax.data.export names it; default {SOURCE}", ""),
        tokenizer=local("bytes, or a tokenizer's file or folder", "bytes"),
        window=whole("sequence length, in tokens", None, 2, 2**24),
        text_field=word("field of JSON lines that holds the text", "text"),
        rows=word(
            "what the rows of conversations must be; default: what they are", "", "", "conversations", "preferences"
        ),
        images=local("folder of the pictures in rows of conversations, for a phi-3-vision"),
        crops=whole("tiles that a picture is cut into at most; default: what the model's files say", None, 1, 64),
        last_answer=switch("conversations: loss on the last answer only"),
        on_error=word("rows of conversations that are wrong", "stop", "stop", "skip"),
        repeat=switch("text may be passed over more than once to reach ratios or flops"),
        original=whole("mixed windows (long:SPEC): tokens that a short document may have", None, 2, 2**24),
        mix=share("mixed windows (long:SPEC): share of the rows that hold short documents; default .5", None),
        needles=share("share of the windows that hold needles (needles:SPEC, long:SPEC)", None),
        eval=local("rows of conversations that are evaluated and not trained on; default: a share held out"),
        held_out=share("share of documents that are evaluated and never trained on; default .02", None, BELOW_ONE),
        template=word("chat template of conversations; default: the one that the tokenizer's folder brings"),
        facts=whole("facts in the corpus; default 4,500 at pico"),
        universe=whole("facts the benchmark asks for; default 9,000 at pico", None, 1),
        frequency=word("how often facts are seen", "uniform", "uniform", "power_law", "inverse_rank"),
        value_bits=whole("bits a value holds", 8, 0, 8),
        reading=share("share of tokens that teach to answer from a sentence in context; default 0", None, BELOW_ONE),
        unheard=share("share of tokens that say of strangers that nobody knows them; default 0", None, BELOW_ONE),
        strangers=whole("persons of no corpus who are asked about, for what is invented; default 0"),
        seed=whole("of the corpora", 0, 0, MOST_SEED),
    ),
    optim=dict(
        name=word("the optimiser; another one needs another peak_lr", None, *OPTIMIZERS),
        peak_lr=number("learning rate after warm-up", None, 1e-12, 1e3),
        b1=share("decay of Adam's first moment", None, BELOW_ONE),
        b2=share("decay of Adam's second moment", None, BELOW_ONE),
        eps=number("added to the root of Adam's second moment", None, 0.0, 1.0),
        weight_decay=number("decoupled weight decay", None, 0.0, 1e3),
        clip=number("global gradient norm; 0: off", None, 0.0, 1e9),
        schedule=word("of the learning rate", None, *SCHEDULES),
        warmup_from_zero=Key(
            "rates step by step as transformers counts them: the first is 0 where there is a warm-up", False, bool
        ),
        warmup=share("share of the largest budget's steps"),
        decay=share("share of each budget's own steps"),
        final_lr=share("share of the peak"),
        z_loss=number("weight of the squared log-normaliser in the loss", None, 0.0, 1e3),
        spike_factor=number(
            "steps of a larger multiple of the mean gradient norm are skipped; 0: none", None, 0.0, 1e9
        ),
    ),
    preference=dict(  # for data of preference pairs
        loss=word("of a pair; see phi3_jax.training.preference", "sigmoid", *PREFERENCES),
        beta=number("strength of the pull to the reference", 0.1, 1e-6, 1e3),
        label_smoothing=share("share of pairs whose label is taken to be wrong", 0.0, 0.499),
        gamma=number("SimPO's target margin", 0.5, 0.0, 1e3),
        sft=number("weight of the mean nll of chosen responses, added to the loss", 0.0, 0.0, 1e3),
        on_the_fly=switch("with adapters: the frozen weights are the reference in each step; no pass before the first"),
    ),
    lora=dict(  # adapters beside the frozen weights train.init
        rank=whole("rank of adapters, which are trained instead of the weights; default: none", None, 1, MOST_RANK),
        alpha=number("they count alpha / rank times; default: so that they count twice", None, 1e-6, 1e9),
        rslora=switch("they count alpha / sqrt(rank) times"),
        targets=Key(
            "projections that have them: qkv, out, gate_up, down, published names, or all-linear; default: all",
            ("all-linear",),
            tuple,
            1,
            item=word("a projection", None),
            unique=True,
        ),
        rank_pattern=Key("NAME:RANK of some projections", (), tuple, item=word("NAME:RANK", None)),
        alpha_pattern=Key("NAME:ALPHA of some projections", (), tuple, item=word("NAME:ALPHA", None)),
        continued=switch("go on with the adapters of train.init, on their base"),
    ),
    train=TRAIN,
    cluster=dict(  # for launch/submit.py
        image=word("container with this repository as its working directory (gke, tpu-vm)"),
        volume=word("where studies are kept: a ReadWriteMany claim (gke), an NFS share HOST:/PATH (tpu-vm)"),
        project=word("tpu-vm"),
        zone=word("tpu-vm"),
        queue=word("Slurm partition, or Kueue's local queue (xpk: multislice-queue)"),
        options=word("more options of sbatch or of gcloud's create; node labels KEY=VALUE on gke"),
    ),
)


# What studies with arms add; counts of an arm are at pico scale.
OWN: dict[str, Key] = {
    "universe": whole("facts the benchmark asks for, at pico scale", 9000, 1),
    "rows": local("the table that gets a line of every run as it finishes", ""),
    "size_factor": number("multiplies all counts", 1.0, 1e-6, 1e6),
    "seed_sd": number("points between seeds, as a pilot found", 1.0, 1e-6, 100.0),
    "data.share": share("share of tokens that are facts", 0.0),
    "data.text_share": share("share of tokens that are text", 0.0),
}


SOURCES = ("knowledge", "reasoning", "reading", "text", "unheard")  # that an arm may give tokens to


@dataclasses.dataclass(frozen=True)
class Arm:
    """One condition of a study: what its runs are trained on, and where they differ from the study.

    Counts are at pico scale; `study.arms` multiplies them at others, and by the study's `size_factor`. None: as the study.

    Attributes:
      facts: in the corpus.
      data: what it is trained on instead of facts and reasoning, as `data.source` names it; budgets are then the study's.
      knowledge, reasoning, reading, text, unheard: tokens of each source.
      seeds: how many of the study's seeds it takes part in.
      sizes, ladder, mup, value_bits, frequency, peak_lr, weighting: as the keys of these names.
      budgets: {size: tokens} of the sizes that train on another number than the sum of the sources.
      ratios: tokens a non-embedding parameter, which every size trains to, instead of a number of tokens; the sources then
        give the mixture alone.

    Raises:
      UserError: an unknown name, naming the nearest; a value out of range; no tokens.
    """

    facts: float = 0
    data: str | None = None
    knowledge: float = 0
    reasoning: float = 0
    reading: float = 0
    text: float = 0
    unheard: float = 0
    seeds: int | None = None
    sizes: tuple[str, ...] | None = None
    ladder: str | None = None
    mup: bool | None = None
    value_bits: int | None = None
    frequency: str | None = None
    peak_lr: float | None = None
    weighting: str | None = None
    budgets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ratios: tuple[float, ...] = ()

    def __new__(cls, *_: Any, **given: Any) -> Arm:
        _known(given, "arm.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _check_arm(self.given, "arm.")

    @property
    def given(self) -> dict[str, Any]:
        """The fields that say something, as a study's config and its study.json have them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: value for name, value in values.items() if value or (value == 0 and name not in ("facts", *SOURCES))
        }

    @property
    def tokens(self) -> float:
        """Of all sources."""
        return sum(getattr(self, name) for name in SOURCES)

    def fact_weight(self, weighting: str) -> float:
        """Weight of a value in the loss each time it is seen, in units of one that is the same in all arms by token.

        "domain": a mean over the domains that are there (reading counts as reasoning), in each over its own targets.
        """
        if weighting == "token":
            return 1.0
        known = self.knowledge + self.unheard
        domains = sum(map(bool, (known, self.reasoning + self.reading, self.text)))
        return self.tokens / (domains * known)


def arms_config(arms: Mapping[str, Arm]) -> ConfigDict:
    """The arms of a study as the `arms` of its config."""
    from ml_collections import ConfigDict

    return ConfigDict({name: arm.given for name, arm in arms.items()})


def take_arms(words: dict[str, Any], arms: Mapping[str, Arm], default: Sequence[str] = ()) -> dict[str, Arm]:
    """The arms that the word `arms=A+B` names, which is taken out of the words; without it those of `default`, or all.

    Raises:
      UserError: an unknown arm, naming the nearest.
    """
    names = words.pop("arms").split("+") if "arms" in words else default or arms
    for name in names:
        if name not in arms:
            raise UserError(f"unknown arm {name!r}{nearest(name, arms)}")
    return {name: arms[name] for name in names}


def arms_of(config: Mapping[str, Any]) -> dict[str, Arm]:
    """The arms of a study's config, in its order; {} for a study without."""
    arms: Mapping[str, Mapping[str, Any]] = config.get("arms") or {}
    return {name: Arm(**{**arm, "budgets": dict(arm.get("budgets", {}))}) for name, arm in arms.items()}


# Ranges of an arm's fields; those of other names are declared among `KEYS`.
ARM: dict[str, Key] = {
    **{name: number(f"{name} of an arm", 0.0, 0.0, MOST) for name in ("facts", *SOURCES)},
    "seeds": whole("how many of the study's seeds it takes part in", None, 1, 1000),
    "data": local("of an arm of text", None),
}
_OF_ARM = ("ratios", "sizes", "ladder", "mup", "data.value_bits", "data.frequency", "optim.peak_lr", "train.weighting")


def declared(node: Mapping[str, Any] = KEYS, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """(dotted name, declaration) of every key."""
    for name, value in node.items():
        if isinstance(value, Key):
            yield prefix + name, value
        else:
            yield from declared(value, f"{prefix}{name}.")


TABLE: dict[str, Key] = dict(declared())


def with_keys(command: commands.Command) -> commands.Command:
    """A command that takes --config.KEY=VALUE of every key."""
    return dataclasses.replace(command, keys=TABLE)


def base_config() -> ConfigDict:
    """A new config of plain defaults; None is a key that the recipe of the scale decides."""
    return _config(KEYS)


def _config(node: Mapping[str, Any]) -> ConfigDict:
    from ml_collections import ConfigDict, config_dict

    made = ConfigDict()
    for name, key in node.items():
        if not isinstance(key, Key):
            made[name] = _config(key)
        else:
            made[name] = config_dict.placeholder(key.kind) if key.default is None else key.default
    return made


def apply(config: ConfigDict, words: Mapping[str, Any], places: Mapping[str, str]) -> ConfigDict:
    """Writes the words of a command line into their keys, `places` (word -> a.b) where the names differ.

    Raises:
      UserError: a value out of its key's range.
    """
    for typed, value in words.items():
        name = places.get(typed, typed)
        if name in TABLE:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            TABLE[name].valid(value, f"{typed}={shown}")
        *path, last = name.split(".")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    return config


def parse_arguments(argument: str, targets: Sequence[str], words: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Splits `medium,tokens=4.8T,budgets=1M,2M` into a target and typed words.

    A word's kind is int, str, list (of numbers of tokens), a `Key`, or the texts that are valid. A comma separates words;
    after a word whose value is a list it also continues the list.

    Raises:
      UserError: unknown target, word or value, naming the nearest valid ones.
    """
    values: dict[str, Any] = {}
    target, last = targets[0], None
    for i, piece in enumerate(p.strip() for p in argument.split(",")) if argument else ():
        key, equals, value = piece.partition("=")
        if not equals:
            if last and words.get(last) is list:
                values[last].append(parse_count(piece))
            elif last and isinstance(several := words.get(last), Key) and several.kind is tuple:
                values[last] += several.read(piece, f"{last}={piece}")
            elif i == 0:
                if piece not in targets:
                    raise UserError(f"unknown target {piece!r}{nearest(piece, targets)}")
                target = piece
            elif last and words.get(last) is str:
                raise UserError(
                    f"unknown word {piece!r} after {last}={values[last]}: a comma ends a value; give one with a comma by "
                    "its key, such as --config.data.source=PATH"
                )
            else:
                raise UserError(f"unknown word {piece!r}{nearest(piece, [f'{w}=' for w in words])}")
            continue
        if key not in words:
            raise UserError(f"unknown word {key!r}{nearest(key, words)}")
        if key in values:
            raise UserError(f"the word {key}= is given twice")
        last, kind = key, words[key]
        if kind is list:
            values[key] = [parse_count(value)]
        elif kind is int:
            if not (value.isascii() and value.isdigit() and len(value) < 20):
                raise UserError(f"{key}={value!r} must be a whole number, 0 or more")
            values[key] = int(value)
        elif kind is str:
            if not value:
                raise UserError(f"{key}= needs a value")
            values[key] = value
        elif isinstance(kind, Key):
            values[key] = kind.read(value, f"{key}={value}")
        elif value not in kind:
            raise UserError(f"unknown {key} {value!r}{nearest(value, kind)}")
        else:
            values[key] = value
    return target, {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


@dataclasses.dataclass
class Command:
    """What a command line asks of a study."""

    config: ConfigDict
    experiment: str
    workdir: Path | None
    resume: str
    overrides: tuple[str, ...] = ()  # as typed: a.b=VALUE
    runs: tuple[str, ...] = ()  # train only these


def asked(flags: commands.Flags) -> Command:
    """The experiment that flags name, with its overrides.

    Raises:
      UserError: see `load_config` and `override`.
    """
    config, overrides = load_config(flags["config"]), flags[commands.OVERRIDES]
    for path, value in overrides.items():
        override(config, path, value)
    if overrides:
        check(config)
    workdir = Path(flags["workdir"]) if flags.get("workdir") else None
    typed = tuple(f"{path}={value}" for path, value in overrides.items())
    return Command(
        config, flags["config"], workdir, flags.get("resume") or "auto", typed, tuple(flags.get("run") or ())
    )


def load_config(text: str) -> ConfigDict:
    """The ConfigDict of `FILE[:WORDS]`, a study's, of which all keys are in range.

    Raises:
      UserError: see `made`, or keys missing or out of range.
    """
    config = made(text)
    check(config, f"{text.partition(':')[0]}: config.")
    return config


def made(text: str) -> ConfigDict:
    """The ConfigDict of `FILE[:WORDS]`: the file's `get_config(WORDS)`.

    Raises:
      UserError: no such file, no Python, or an error of its own (with file and line).
    """
    import traceback

    from ml_collections import ConfigDict

    file, _, words = text.partition(":")
    path = shipped.find(file)
    if not path.is_file():
        ours = ", ".join(shipped.names("experiments", "*.py"))
        raise UserError(f"no experiment file {file!r}; give a path, or one that comes along: {ours}")
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        make = getattr(module, "get_config", None)
        config = make(words) if callable(make) else None
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(
            f"{file} is no Python file: {error.msg}, line {error.lineno}; write an experiment.py"
        ) from error
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"line {lines[-1]}: " if lines else ""
        raise UserError(f"{file} failed: {where}{type(error).__name__}: {error}; mend the file") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file} has no get_config(argument) that returns a ConfigDict; see experiments/scaling.py")
    return config


def override(config: ConfigDict, path: str, text: str) -> None:
    """Sets one field from text, in the field's own type."""
    from ml_collections import ConfigDict

    *parents, last = path.split(".")
    node = config
    for i, part in enumerate(parents):
        if part not in node or not isinstance(node[part], ConfigDict):
            known = [k for k in node if isinstance(node[k], ConfigDict)]
            raise UserError(f"unknown section config.{'.'.join(parents[: i + 1])}{nearest(part, known)}")
        node = node[part]
    if last not in node or isinstance(node[last], ConfigDict):
        raise UserError(f"unknown field config.{path}{nearest(last, [k for k in node])}")
    if path in TABLE:
        node[last] = TABLE[path].read(text, f"config.{path}={text}")
        return
    kind = node.get_type(last)
    try:
        if kind is bool:
            value: Any = {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        elif kind is tuple:
            sample = node[last]
            value = tuple((type(sample[0]) if sample else str)(p.strip()) for p in text.strip("()").split(",") if p)
        else:
            value = kind(text)
    except (ValueError, KeyError) as error:
        raise UserError(f"config.{path}={text!r} is not of type {kind.__name__}") from error
    node[last] = value


def study_name(config: ConfigDict, scale: str) -> str:
    """Folder name: what was asked for, in words that are safe in a path."""
    if config.name:
        return config.name
    parts = ["sweep" if len(config.sizes) > 1 else config.sizes[0], scale]
    if scale != "full":
        parts.append(config.ladder)
    source = config.data.source
    if source not in ("", SOURCE):
        parts.append("".join(c if c.isalnum() else "-" for c in Path(source).name).strip("-"))
    if config.tokens != "matched":
        parts.append(f"tokens-{config.tokens}")
    return "-".join(parts)


def check(config: Mapping[str, Any], where: str = "config.") -> None:
    """Checks all keys of a config; errors show `where` before a key's name.

    Raises:
      UserError: a key is missing or out of range, or a number of an experiment's own is not finite.
    """
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    found = dict(_leaves({name: value for name, value in plain.items() if name not in ("arms", "rule")}))
    for name in TABLE:
        if name not in found:
            raise UserError(f"{where}{name} is missing; start from phi3_jax.experiment.base_config()")
    for name, value in found.items():
        key = TABLE.get(name) or OWN.get(name)
        shown = f"{where}{name}={text(value)}"
        if key is not None:
            key.valid(value, shown)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{shown} must be a finite number")
    for name, arm in (plain.get("arms") or {}).items():
        _check_arm(arm, f"{where}arms.{name}.")


def _known(arm: Mapping[str, Any], where: str) -> None:
    """Every name is a field of `Arm`."""
    fields = [field.name for field in dataclasses.fields(Arm)]
    for name in arm:
        if name not in fields:
            raise UserError(f"unknown key {where}{name}{nearest(name, fields)}")


def _check_arm(arm: Mapping[str, Any], where: str) -> None:
    _known(arm, where)
    ranges = ARM | {name.rpartition(".")[2]: TABLE[name] for name in _OF_ARM}
    for name, value in arm.items():
        if name == "budgets":
            for size, tokens in value.items():
                word("a size", None, family.SIZES).valid(size, f"{where}budgets.{size}")
                Key("tokens", 1, int, 1, MOST).valid(tokens, f"{where}budgets.{size}={text(tokens)}")
        else:
            ranges[name].valid(value, f"{where}{name}={text(value)}")
    counted = sum(arm.get(name, 0) for name in SOURCES)
    if arm.get("data") and (counted or arm.get("facts")):
        raise UserError(
            f"{where}data={text(arm['data'])} is all that the arm is trained on; leave facts and tokens out"
        )
    if not counted and not arm.get("data"):
        raise UserError(
            f"{where.rstrip('.')} has no tokens; give knowledge, reasoning, reading or text a number of them"
        )


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
