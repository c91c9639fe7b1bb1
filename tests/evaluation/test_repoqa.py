"""RepoQA: prompts hold the function at its depth in the tokens asked for, and replies are scored as RepoQA's."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_jax.data import tokenizers
from phi3_jax.errors import UserError
from phi3_jax.evaluation import repoqa, ruler

BYTES = tokenizers.load("bytes")


def function(i: int) -> str:
    lines = [
        f"def find_{i}(rows, limit={i}):",
        f'    """Größe {i}."""',
        f"    kept_{i} = [r for r in rows if r > limit]",
    ]
    return "\n".join(
        [*lines, f"    print('kept', len(kept_{i}), 'of', len(rows), 'rows above {i}')", f"    return kept_{i}"]
    )


def release(folder: Path, functions: int = 6, **changes: Any) -> Path:
    """A file of RepoQA's form: one repository, two files of which the second in `content` is needed by the first."""
    parts = {"b.py": range(functions // 2), "a.py": range(functions // 2, functions)}
    content, needles = {}, []
    for path, numbers in parts.items():
        code = "import sys\n\n\n"
        for i in numbers:
            start = len(code.encode())
            code += function(i)
            lines = code[: len(code) - len(function(i))].count("\n"), code.count("\n") + 1
            needles.append({
                "name": f"find_{i}", "path": path, "start_byte": start, "end_byte": len(code.encode()),
                "start_line": lines[0], "end_line": lines[1], "description": f" keeps rows above {i}",
            })  # fmt: skip
            code += "\n\n\n"
        content[path] = code
    repo = {
        "repo": "o/r",
        "content": content,
        "dependency": {"b.py": ["a.py"], "a.py": []},
        "needles": needles,
    } | changes
    (folder / "repoqa").mkdir(exist_ok=True)
    path = folder / "repoqa" / "repoqa-2024-06-23.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"python": [repo, {"repo": "without"}]}).encode()))
    return path


def writer() -> ruler.Writer:
    return ruler.Writer(BYTES, np.asarray(BYTES.encode("some words. " * 900), np.int32))


def test_a_prompt_holds_its_function_at_its_depth(tmp_path: Path) -> None:
    path = release(tmp_path)
    assert repoqa.find(tmp_path) == path and repoqa.find(None) is None
    (repo,) = repoqa.read(path)
    assert list(repo.code) == ["a.py", "b.py"]  # what is needed comes first
    make, rng = repoqa.task([repo]), np.random.default_rng(0)
    seen = set()
    for _ in range(6):
        item = make(writer(), 1400, rng, 0.5)
        said = BYTES.decode(item.prompt)
        assert len(item.prompt) + item.room == 1400
        asked = item.answers[0]
        assert asked in said and asked.split("(")[0][-1] == said.rsplit("Function Description: keeps rows above ")[1][0]
        assert said.startswith("Based on the function description") and said.endswith("wrapped by ```:\n")
        assert item.depth is not None
        begin = said.index("```:") + 4
        body = said[begin : said.index("\nFunction Description")]
        rest = len(body.encode()) - len(asked.encode())
        assert len(body[: body.index(asked)].encode()) == round(item.depth * rest)
        seen.add(asked)
    assert len(seen) == 6  # each needle once before any comes again
    deep = [make(writer(), 1400, rng, depth).depth for depth in (0.0, 0.0, 1.0, 1.0)]
    assert min(d for d in deep if d is not None) < 0.3 < 0.7 < max(d for d in deep if d is not None)


def test_replies_are_scored_by_the_most_similar_needle(tmp_path: Path) -> None:
    (repo,) = repoqa.read(release(tmp_path))
    functions = tuple(repo.functions())
    assert functions == tuple(function(i) for i in range(6))
    item = repoqa.Function([], [functions[2]], 9, 0.5, False, functions, "python")
    fenced = f"Here it is:\n```python\nimport sys\n\n{functions[2]}\n```\nIt keeps rows."
    assert item.score(fenced) == 1 and item.score(functions[2]) == 1
    assert item.score(f"```\n{functions[3]}\n```") == 0  # another needle
    assert (
        item.score(functions[2].replace("print", "log(); print").replace("return", "# why\n    return")) == 0
    )  # not alike
    assert item.score("") == 0 and item.score("```python\ndef (:\n```") == 0


def test_similarity_is_bleu() -> None:
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    said, meant = "a b c d e f g h", "a b c d e f x y z"
    smooth = bleu.SmoothingFunction().method4
    for one, two in ((said, meant), (meant, said), (said, said), (said[:9], said)):
        assert repoqa.similarity(one, two) == pytest.approx(
            bleu.sentence_bleu([two.split()], one.split(), smoothing_function=smooth)
        )


def test_what_is_no_repoqa_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"python\[0\] has no dependency"):
        path = release(tmp_path)
        tree = json.loads(gzip.decompress(path.read_bytes()))
        del tree["python"][0]["dependency"]
        path.write_bytes(gzip.compress(json.dumps(tree).encode()))
        repoqa.read(path)
    with pytest.raises(UserError, match="needles.0. has no description"):
        repoqa.read(release(tmp_path, needles=[dict.fromkeys(repoqa._NEEDLE[:-1], 0)]))
    with pytest.raises(UserError, match="no repository with needles"):
        path.write_bytes(gzip.compress(b'{"python": []}'))
        repoqa.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        path.write_bytes(b"\x1f\x8b")
        repoqa.read(path)
    (repo,) = repoqa.read(release(tmp_path))
    with pytest.raises(UserError, match="repoqa needs"):
        repoqa.task([repo])(writer(), 5000, np.random.default_rng(0), 0.5)
