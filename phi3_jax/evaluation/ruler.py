"""Items of RULER's tasks (arXiv:2404.06654) by our own generators, token-exact at any length, and its scoring.

Prompts have the words of RULER as lm-eval has them. What differs: names and words are of our own lists; a haystack of text
is the user's; the last unit of a haystack is cut, so that prompt and room for the answer have just the tokens asked for;
below 4,096 tokens the room is what the answer needs, and instructions are left out where a task would not fit otherwise; vt
and cwe have no worked example before them.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.data.chat import chat_ids, common
from phi3_jax.data.tokenizers import Tokenizer
from phi3_jax.errors import UserError
from phi3_jax.records import files

THRESHOLD = 85.6  # percent: RULER's effective length is the longest at which the mean of its tasks reaches it
FULL = 4096  # tokens from which RULER's own settings hold
SPARE = 8  # tokens of room beside the answer, below that
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_HEAD = (
    "Some special magic {v} are hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{v} afterwards.\n"
)
_ASK = "\nWhat are all the special magic {v} for {q} mentioned in the provided text?"
_PREFIX = " The special magic {v} for {q} mentioned in the provided text are"
_NEEDLE = "One of the special magic {v} for {k} is: {value}."
_CHAIN = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_COUNT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear "
    "most often.\n"
)
_CODED = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. "
)
_QA = "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
_PASSKEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about "
    "the important information there.\n"
)


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      prompt: ids; with `room` more they are as long as was asked for.
      answers: texts that a right reply holds, all of them, or one where `any_of`.
      room: tokens that a reply may have.
      depth: where the needle that is asked for stands, 0 to 1; None where several are.
    """

    prompt: list[int]
    answers: list[str]
    room: int
    depth: float | None = None
    any_of: bool = False

    def score(self, reply: str) -> float:
        """RULER's string match: the share of answers that the reply holds."""
        said = re.sub(r"[\x00-\x1f]", "\n", reply).lower()
        found = [answer.lower() in said for answer in self.answers]
        return float(any(found)) if self.any_of else float(np.mean(found))


class Writer:
    """Puts prompts together for a tokenizer, in a chat frame where there is one.

    Args:
      haystack: ids of text, more than the longest prompt.
      template: chat template, or None.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: np.ndarray, template: str | None = None) -> None:
        self.tokenizer, self._haystack = tokenizer, haystack
        self._frame: tuple[list[int], list[int]] = ([], [])
        if template:
            one, two = (chat_ids(tokenizer, [{"role": "user", "content": c}], template) for c in ("1", "x y"))
            before, after = common(one, two), common(one[::-1], two[::-1])
            self._frame = list(one[:before]), list(one[len(one) - after :])

    def room(self, length: int, most: int, answers: Sequence[str]) -> int:
        """Tokens for a reply: RULER's from `FULL` tokens on, below what the answers need."""
        needed = len(self.tokenizer.encode(" " + ", ".join(answers))) + SPARE
        return most if length >= FULL else min(most, needed)

    def text(self, count: int, rng: np.random.Generator) -> list[list[int]]:
        """`count` ids of the haystack from a random place, cut after its sentences."""
        start = int(rng.integers(max(1, len(self._haystack) - count)))
        found = (
            np.resize(self._haystack[start:], count) if len(self._haystack) - start < count else self._haystack[start:]
        )
        return [found[:count].tolist()]

    def put(
        self,
        task: str,
        length: int,
        room: int,
        head: str,
        filler: Callable[[int], list[list[int]]],
        pieces: Sequence[str],
        ask: str,
        prefix: str,
        rng: np.random.Generator,
        depths: Sequence[float] | None = None,
    ) -> list[int]:
        """Ids of a prompt of `length` - `room` tokens.

        Args:
          filler: filler(n) gives units of haystack with n ids together; between them the pieces stand.
          pieces: texts that must be in it, in their order.
          depths: of the pieces; default: drawn.

        Raises:
          UserError: it does not fit; names the least length.
        """
        encode = self.tokenizer.encode
        before, after = self._frame
        end = [*encode(ask), *after, *encode(prefix)]
        inside = [encode(piece + "\n") for piece in pieces]
        needed = len(before) + len(end) + sum(map(len, inside)) + room
        begin = encode(head)
        if needed + len(begin) > length:
            begin = []  # the instructions
        budget = length - needed - len(begin)
        if budget < 0:
            raise UserError(f"{task} needs {needed} tokens or more in this tokenizer; leave --lengths {length} out")
        units = filler(budget)
        flat = [token for unit in units for token in unit][:budget]
        ends = np.r_[0, np.minimum(np.cumsum([len(unit) for unit in units]), budget)].astype(int)
        wanted = np.sort(rng.random(len(inside))) if depths is None else np.asarray(depths)
        places = [int(ends[np.abs(ends - d * budget).argmin()]) if len(ends) > 2 else round(d * budget) for d in wanted]
        body, at = [], 0
        for place, piece in zip(places, inside, strict=True):
            body += [*flat[at:place], *piece]
            at = max(at, place)
        return [*before, *begin, *body, *flat[at:], *end]


def _repeated(unit: Callable[[], str], tokenizer: Tokenizer) -> Callable[[int], list[list[int]]]:
    """Units of text until they have n ids."""

    def filler(count: int) -> list[list[int]]:
        units: list[list[int]] = []
        total = 0
        while total < count:
            units.append(tokenizer.encode(unit() + "\n"))
            total += len(units[-1])
        return units

    return filler


# ------------------------------------------------------------------------------------------------ what is drawn

_ADJECTIVES = (  # noqa: SIM905
    "able amber ancient bold brave brief bright broad calm clean clear clever cold cool crisp curious damp dark deep "
    "dry early eager even faint fair fast fine firm flat fresh gentle glad grand grave green happy hard high honest "
    "humble icy idle keen kind large late lean light lively lone long loud lucky mellow mild modest narrow neat noble "
    "odd old open pale plain polite proud quick quiet rapid rare ready rich ripe rough round royal rude safe sharp "
    "short shy silent simple sleek slim slow small smart smooth soft solid sour stern strong sunny sweet swift tall "
    "tame tender thick thin tidy tiny tough true vast vivid warm weary wide wild wise young"
).split()
_NOUNS = (  # noqa: SIM905
    "acorn anchor apple arrow badge barn basin beach beacon bell bench berry bird blade boat book bottle bow branch "
    "bread brick bridge brook brush bucket button cabin cable candle canoe canyon card carpet castle cedar chair "
    "chalk chest cliff clock cloud coast coin comb coral cottage cradle crane creek crown cup curtain desk door drum "
    "eagle ember engine farm feather fence fern field flag flame flask flower flute forest fork fountain fox garden "
    "gate glove goat grape hammer harbor hat hill horn house island jacket jar kettle key kite ladder lake lamp "
    "lantern leaf lemon letter lily lock maple market meadow mill mirror moon mountain needle nest oak ocean orchard "
    "owl paddle page path pebble pencil pepper piano pillow pine pond porch queen quilt rabbit raft rain ribbon river "
    "road robin rope rose saddle sail seed shell ship shore spoon spring star stone storm stove summit table tent "
    "tower trail tree tulip tunnel valley vase village violin wagon wall well wheel willow window wolf"
).split()


def _word(rng: np.random.Generator) -> str:
    return f"{_ADJECTIVES[rng.integers(len(_ADJECTIVES))]}-{_NOUNS[rng.integers(len(_NOUNS))]}"


def _number(rng: np.random.Generator) -> str:
    return str(rng.integers(10**6, 10**7))


def _uuid(rng: np.random.Generator) -> str:
    import uuid

    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


_DRAWN = {"words": _word, "numbers": _number, "uuids": _uuid}


# ------------------------------------------------------------------------------------------------ the tasks

Make = Callable[[Writer, int, np.random.Generator, float], Item]


def _niah(
    task: str, hay: str, key: str = "words", value: str = "numbers", keys: int = 1, values: int = 1, queries: int = 1
) -> Make:
    """Needles in a haystack: `keys` of them with `values` values each, of which `queries` are asked for."""

    def make(writer: Writer, length: int, rng: np.random.Generator, depth: float) -> Item:
        count = max(keys, queries)
        found: dict[str, list[str]] = {}
        while len(found) < count:
            found.setdefault(_DRAWN[key](rng), [_DRAWN[value](rng) for _ in range(values)])
        asked = list(found)[:queries]
        answers = [v for k in asked for v in found[k]]
        stated = [_NEEDLE.format(v=value, k=k, value=v) for k, vs in found.items() for v in vs]
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        head, ask, prefix = (text.format(v="{v}", q=query) for text in (_HEAD, _ASK, _PREFIX))
        if len(answers) == 1:
            for old, new in (("Some", "A"), ("are all", "is"), ("are", "is")):
                head, ask, prefix = (text.replace(old, new) for text in (head, ask, prefix))
        name = value[:-1] if len(answers) == 1 else value
        head, ask, prefix = (text.format(v=name) for text in (head, ask, prefix))
        if hay == "text":
            filler: Callable[[int], list[list[int]]] = lambda n: writer.text(n, rng)  # noqa: E731
        elif hay == "repeat":
            filler = _repeated(lambda: GRASS, writer.tokenizer)
        else:
            other = lambda: _NEEDLE.format(v=value, k=_DRAWN[key](rng), value=_DRAWN[value](rng))  # noqa: E731
            filler = _repeated(other, writer.tokenizer)
        rest = rng.random(len(stated) - 1)
        order = np.argsort(depths := np.r_[depth, rest], kind="stable")
        room = writer.room(length, 128, answers)
        pieces = [stated[i] for i in order]
        prompt = writer.put(task, length, room, head, filler, pieces, ask, prefix, rng, depths[order])
        return Item(prompt, answers, room, depth if len(stated) == 1 or len(answers) == 1 else None)

    return make


def _variables(writer: Writer, length: int, rng: np.random.Generator, depth: float, hops: int = 4) -> Item:
    """A chain VAR A = 12345, VAR B = VAR A, ..: which variables have the value?"""
    names: list[str] = []
    while len(names) < hops + 1:
        name = "".join(string.ascii_uppercase[i] for i in rng.integers(26, size=5))
        names += [name] * (name not in names)
    value = str(rng.integers(10_000, 100_000))
    chain = [
        f"VAR {names[0]} = {value}",
        *(f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names)),
    ]
    ask = f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
    prefix = (  # misspelt as RULER has it
        f" Answer: According to the chain(s) of variable assignment in the text above, {hops + 1} variables are assgined "
        f"the value {value}, they are: "
    )
    room = writer.room(length, 30, names)
    filler = _repeated(lambda: GRASS, writer.tokenizer)
    return Item(writer.put("vt", length, room, _CHAIN, filler, chain, ask, prefix, rng), names, room)


def _numbered(words: Sequence[str]) -> list[str]:
    return [f"{i}. {word}" for i, word in enumerate(words, 1)]


def _common_words(writer: Writer, length: int, rng: np.random.Generator, depth: float) -> Item:
    """Ten words appear more often than all others: which? Below `FULL` twice as often as two others, and four are asked."""
    often, seldom, wanted = (30, 3, 10) if length >= FULL else (4, 1, 4)
    pool = list(rng.permutation([f"{a}{n}" for a in _ADJECTIVES for n in _NOUNS]))
    answers, others = pool[:wanted], pool[wanted:]
    ask = f"\nQuestion: What are the {wanted} most common words in the above list?"
    prefix = f" Answer: The top {wanted} words that appear most often in the list are:"
    room = writer.room(length, 120, answers)
    encode = writer.tokenizer.encode

    def drawn(count: int) -> list[str]:
        words = [*answers * often, *others[:count] * seldom]
        return [words[i] for i in rng.permutation(len(words))]

    def filler(budget: int) -> list[list[int]]:
        # as many others as fit: the list is whole, and blanks fill what is left
        low, high = 0, len(others)
        size = lambda n: len(encode(" ".join(_numbered([*answers * often, *others[:n] * seldom]))))  # noqa: E731
        if size(1) > budget:
            raise UserError(f"cwe needs {size(1) - budget} tokens more in this tokenizer; leave --lengths {length} out")
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if size(middle) <= 0.97 * budget else (low, middle - 1)
        ids = encode(" ".join(_numbered(drawn(max(1, low)))))
        blank = encode("\n")
        return [[*ids[:budget], *(blank * budget)[: max(0, budget - len(ids))]]]

    return Item(writer.put("cwe", length, room, _COUNT, filler, (), ask, prefix, rng), answers, room)


def _frequent_words(writer: Writer, length: int, rng: np.random.Generator, depth: float) -> Item:
    """Coded words, of which the k-th appears k^-2 times as often as the first, which is dots: the next three?"""
    names: dict[str, None] = {}
    while len(names) < max(8, length // 50):
        names["".join(string.ascii_lowercase[i] for i in rng.integers(26, size=6))] = None
    coded = ["...", *list(names)[1:]]
    shares = np.arange(1, len(coded) + 1) ** -2.0
    encode = writer.tokenizer.encode

    def filler(budget: int) -> list[list[int]]:
        mean = np.mean([len(encode(" " + word)) for word in coded[:8]])
        count = int(0.97 * budget / mean)
        counts = np.floor(count * shares / shares.sum()).astype(int)
        if len(set(counts[:5].tolist())) < 5:
            raise UserError(f"fwe has too few words to count at {length} tokens; leave --lengths {length} out")
        words = np.repeat(np.arange(len(coded)), counts)
        ids = encode(" ".join(coded[i] for i in rng.permutation(words)))
        dots = encode(" ...")
        return [[*ids[:budget], *(dots * budget)[: max(0, budget - len(ids))]]]

    ask = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?"
    )
    prefix = " Answer: According to the coded text above, the three most frequently appeared words are:"
    answers = coded[1:4]
    room = writer.room(length, 50, answers)
    return Item(writer.put("fwe", length, room, _CODED, filler, (), ask, prefix, rng), answers, room)


def _passkey(writer: Writer, length: int, rng: np.random.Generator, depth: float) -> Item:
    """LongRoPE's passkey: a number from 1 to 50,000 in repeated sentences."""
    key = str(rng.integers(1, 50_001))
    piece = f"The pass key is {key}. Remember it. {key} is the pass key."
    room = writer.room(length, 16, [key])
    filler, ask = _repeated(lambda: GRASS, writer.tokenizer), "\nWhat is the pass key?"
    prompt = writer.put("passkey", length, room, _PASSKEY, filler, [piece], ask, " The pass key is", rng, [depth])
    return Item(prompt, [key], room, depth)


RULER: dict[str, Make] = {
    "niah_single_1": _niah("niah_single_1", "repeat"),
    "niah_single_2": _niah("niah_single_2", "text"),
    "niah_single_3": _niah("niah_single_3", "text", value="uuids"),
    "niah_multikey_1": _niah("niah_multikey_1", "text", keys=4),
    "niah_multikey_2": _niah("niah_multikey_2", "needles"),
    "niah_multikey_3": _niah("niah_multikey_3", "needles", key="uuids", value="uuids"),
    "niah_multivalue": _niah("niah_multivalue", "text", values=4),
    "niah_multiquery": _niah("niah_multiquery", "text", queries=4),
    "vt": _variables,
    "cwe": _common_words,
    "fwe": _frequent_words,
}
TASKS: dict[str, Make] = {**RULER, "passkey": _passkey}


def questions(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of questions about documents: question, context, answers.

    Raises:
      UserError: not there, or a row without them.
    """
    try:
        rows = [files.parse_json(line, path) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"qa needs {path}, lines of JSON with question, context and answers ({error})") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(row.get(name) for name in ("question", "context", "answers")):
            raise UserError(f"{path}:{number} lacks question, context or answers, a list of texts")
    if len(rows) < 2:
        raise UserError(f"{path} holds {len(rows)} questions; other documents are what hides one, give two or more")
    return rows


def qa(rows: Sequence[dict[str, Any]]) -> Make:
    """A question about one of many documents, those of other questions."""

    def make(writer: Writer, length: int, rng: np.random.Generator, depth: float) -> Item:
        row = rows[int(rng.integers(len(rows)))]
        others = [other["context"] for other in rows if other["context"] != row["context"]]
        ask = f"\n{_QA}Question: {row['question']}"
        room = writer.room(length, 32, row["answers"][:1])
        filler = _repeated(lambda: f"Document:\n{others[rng.integers(len(others))]}\n", writer.tokenizer)
        piece = f"Document:\n{row['context']}\n"
        prompt = writer.put("qa", length, room, _QA, filler, [piece], ask, " Answer:", rng, [depth])
        return Item(prompt, list(row["answers"]), room, depth, any_of=True)

    return make
