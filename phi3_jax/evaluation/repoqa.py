"""RepoQA from a given file: find the function that a description means in the code around it (arXiv:2406.06025).

The file is that of RepoQA's release: an object of languages, each a list of repositories with `repo`, `content` (path:
code), `dependency` (path: paths) and `needles` (name, path, start_byte, end_byte, start_line, end_line, description).
Instruction, order of the prompt and scoring are RepoQA's: a reply passes where, of all needles of its repository, the one
that was asked for is the most similar, with BLEU of at least .8 over words between white space. What differs: prompts have
just the tokens asked for, with the room for the reply; and a reply's function is its first code block, of Python the first
function in it, where RepoQA asks tree-sitter for every language.
"""

from __future__ import annotations

import ast
import collections
import gzip
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.errors import UserError
from phi3_jax.evaluation.ruler import Item, Make, Writer
from phi3_jax.records import files

PASSES = 0.8
ROOM = 1024  # tokens of a reply from ruler.FULL tokens on
_ASK = (
    "Based on the function description and code context, please retrieve and repeat the exact described function from the "
    "code context in a code block wrapped by ```:"
)
_COMMENT = collections.defaultdict(lambda: "//", python="#")
_NEEDLE = ("name", "path", "start_byte", "end_byte", "start_line", "end_line", "description")
_REPO = ("repo", "content", "dependency", "needles")


@dataclass(frozen=True)
class Repo:
    """The code of a repository, in an order in which what a file needs comes before it."""

    language: str
    name: str
    code: Mapping[str, str]
    needles: Sequence[Mapping[str, Any]]

    def around(self, needle: Mapping[str, Any]) -> tuple[str, str, str]:
        """The code before a needle, the needle, and the code after it; every file begins with its path."""
        mark, paths = _COMMENT[self.language], list(self.code)
        at, raw = paths.index(needle["path"]), self.code[needle["path"]].encode()

        def whole(path: str, code: str) -> str:
            return f"{mark} Path: {path}\n{code}\n"

        start, end = needle["start_byte"], needle["end_byte"]
        before = "".join(whole(path, self.code[path]) for path in paths[:at])
        before += f"{mark} Path: {paths[at]}\n{raw[:start].decode(errors='replace')}"
        after = raw[end:].decode(errors="replace") + "\n"
        return (
            before, raw[start:end].decode(errors="replace"),
            after + "".join(whole(path, self.code[path]) for path in paths[at + 1 :]),
        )  # fmt: skip

    def functions(self) -> list[str]:
        """The lines of every needle, which replies are compared with."""
        return ["\n".join(self.code[n["path"]].split("\n")[n["start_line"] : n["end_line"]]) for n in self.needles]


def find(folder: Path | None) -> Path | None:
    """The file of a data folder, FOLDER/repoqa/*.json or *.json.gz; None where there is none."""
    found = sorted(path for path in (folder / "repoqa").glob("*") if _is_json(path)) if folder else []
    return found[-1] if found else None  # the newest, by its date


def _is_json(path: Path) -> bool:
    return path.name.endswith((".json", ".json.gz"))


def read(path: Path) -> list[Repo]:
    """The repositories of a file that have needles.

    Raises:
      UserError: not there, not JSON of this form; names what is missing.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); give RepoQA's released file") from error
    tree, found = files.parse_json(content, path), []
    if not isinstance(tree, dict) or not all(isinstance(repos, list) for repos in tree.values()):
        raise UserError(f"{path} is no object of languages with lists of repositories; give RepoQA's released file")
    for language, repos in tree.items():
        for number, repo in enumerate(repos):
            where = f"{path}: {language}[{number}]"
            if not isinstance(repo, dict) or "needles" not in repo:
                continue
            _require(repo, _REPO, where)
            for i, needle in enumerate(repo["needles"]):
                _require(needle, _NEEDLE, f"{where}.needles[{i}]")
                if needle["path"] not in repo["content"]:
                    raise UserError(f"{where}.needles[{i}]: path {needle['path']!r} is not in content")
            order = _sorted(repo["dependency"])
            order += [path for path in repo["content"] if path not in order]
            code = {path: repo["content"][path] for path in order if path in repo["content"]}
            found.append(Repo(language, repo["repo"], code, repo["needles"]))
    if not found:
        raise UserError(f"{path} has no repository with needles; give RepoQA's released file")
    return found


def _require(tree: Any, names: Sequence[str], where: str) -> None:
    for name in names:
        if not isinstance(tree, dict) or name not in tree:
            raise UserError(f"{where} has no {name}; give RepoQA's released file")


def _sorted(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Paths, each after those that it needs, where that is possible."""
    found: dict[str, None] = {}
    for first in needs:
        pending: list[tuple[str, Iterator[str]]] = [(first, iter(needs.get(first, ())))]
        seen = {first}
        while pending:
            path, rest = pending[-1]
            following = next((p for p in rest if p not in found and p not in seen), None)
            if following is None:
                found.setdefault(path)
                pending.pop()
            else:
                seen.add(following)
                pending.append((following, iter(needs.get(following, ()))))
    return list(found)


@dataclass(frozen=True)
class Function(Item):
    """An item whose reply is a function; `answers` begins with its code.

    Attributes:
      functions: all that may be meant, that which is asked for among them.
      language: of the repository.
    """

    functions: tuple[str, ...] = ()
    language: str = ""

    def score(self, reply: str) -> float:
        """1 where the reply is more like the function asked for than like any other, and like enough."""
        said = code_of(reply, self.language)
        like = [similarity(said, function) for function in self.functions]
        best = int(np.argmax(like))
        return float(self.functions[best] == self.answers[0] and like[best] >= PASSES)


def task(repos: Sequence[Repo]) -> Make:
    """Items in a drawn order of all needles; those that do not fit into a length are passed over."""
    every = [(repo, i) for repo in repos for i in range(len(repo.needles))]
    left: list[Iterator[int]] = []

    def make(writer: Writer, length: int, rng: np.random.Generator, depth: float) -> Item:
        if not left:
            left.append(itertools.cycle(rng.permutation(len(every)).tolist()))
        error: UserError | None = None
        for number in itertools.islice(left[0], len(every)):
            repo, i = every[number]
            needle, functions = repo.needles[i], repo.functions()
            ids = [writer.tokenizer.encode(part) for part in repo.around(needle)]
            room = writer.room(length, ROOM, [f"```\n{functions[i]}\n```"])
            ask = f"\nFunction Description:{needle['description']}\n{_ASK}"
            placed = _Placed(ids, depth)
            try:
                prompt = writer.put("repoqa", length, room, _ASK, placed, [], ask, "\n", rng)
            except UserError as this:
                error = this
                continue
            return Function(prompt, [functions[i]], room, placed.depth, False, tuple(functions), repo.language)
        raise error or UserError("repoqa has no needles")

    return make


class _Placed:
    """Filler for `Writer.put`: n ids of code with the needle at a depth, as far as the code on a side reaches."""

    def __init__(self, ids: Sequence[list[int]], depth: float) -> None:
        self.ids, self.depth = ids, depth

    def __call__(self, count: int) -> list[list[int]]:
        before, needle, after = self.ids
        rest = count - len(needle)
        if not 0 <= rest <= len(before) + len(after):
            raise UserError(
                f"repoqa needs room for a function of {len(needle):,} tokens, and as much code around it as a length asks "
                f"for: its repository has {len(before) + len(after):,} tokens, {count:,} are to be filled"
            )
        first = min(len(before), max(round(self.depth * rest), rest - len(after)))
        self.depth = first / rest if rest else 0.0
        return [[*before[len(before) - first :], *needle, *after[: rest - first]]]


def code_of(reply: str, language: str) -> str:
    """The function of a reply: its first code block, of Python the first function in it; without a block all of it."""
    block = re.search(r"^```(?:\w+)?\s*\n(.*?)^```", reply.strip(), re.DOTALL | re.MULTILINE)
    if block is None:
        return reply.strip()
    code = block.group(1)
    if language == "python":
        try:
            tree = ast.parse(code)
        except (SyntaxError, ValueError):
            return code
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                return "\n".join(code.split("\n")[node.lineno - 1 : node.end_lineno])
    return code


def similarity(said: str, function: str) -> float:
    """BLEU-4 of two texts over words between white space, 0 to 1; 0 where they share no run of four words.

    RepoQA smooths counts of 0, which never lifts a pair above .8 that has more than a few words.
    """
    hypothesis, reference = said.split(), function.split()
    if not hypothesis:
        return 0.0
    logs = 0.0
    for n in range(1, 5):
        mine, theirs = (
            collections.Counter(zip(*(words[k:] for k in range(n)), strict=False)) for words in (hypothesis, reference)
        )
        shared = sum((mine & theirs).values())
        if not shared:
            return 0.0
        logs += math.log(shared / mine.total()) / 4
    return math.exp(logs + min(0.0, 1 - len(reference) / len(hypothesis)))
