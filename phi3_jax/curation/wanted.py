"""What synthetic text is asked for: the section `synthetic` of a config, and the requests that it makes.

A request is known by its key: a hash of the template, what fills it, the model and the sampling. So an answer that is
there serves every config that asks for it, and none is asked for twice.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phi3_jax.curation import against, store, templates
from phi3_jax.curation.templates import Seed, Template
from phi3_jax.data.corpora import files as listing
from phi3_jax.errors import UserError, nearest
from phi3_jax.keys import Key, local, number, whole, word
from phi3_jax.records import files

SHARD = 256  # requests of a part
MODEL = "model"  # of the section: whose answers they are, set by the command
KEYS: dict[str, Key] = {
    "templates": Key("names of the templates", (), tuple, 1, item=word("a template", None), unique=True),
    "count": whole("requests in all, spread evenly over the templates", 120, 1, 10**9),
    "subjects": local("file of subjects, one a line, in place of those that the templates bring", ""),
    "pages": local("curated folder whose pages are rephrased or begun with", ""),
    "page_words": whole("words of a page that a prompt shows", 400, 10, 10**6),
    "temperature": number("of the draws; 0 takes the most likely token", 0.8, 0.0, 100.0),
    "top_p": number("draws from the most likely tokens that have this mass together", 0.95, 1e-9, 1.0),
    "max_tokens": whole("of an answer; one that reaches it is dropped", 1024, 1, 10**6),
    "seed": whole("of the requests and of the draws", 0, 0, 2**31 - 1),
    "licence": word("licence of what the model writes, as its terms say", ""),
}
SAMPLING = ("temperature", "top_p", "max_tokens")


@dataclasses.dataclass(frozen=True)
class Request:
    """One request: the template's name, what fills it, its key (32 hex digits)."""

    template: str
    seed: Seed
    key: str

    @property
    def draw(self) -> int:
        """A number of 31 bits for the draws of this request."""
        return int(self.key[:8], 16) >> 1


def check(asked: Mapping[str, Any]) -> None:
    """Checks the section of a config.

    Raises:
      UserError: an unknown key, a value out of range, an unknown template, or one that needs pages and has none.
    """
    for name in asked:
        if name not in KEYS and name != MODEL:
            raise UserError(f"unknown key config.synthetic.{name}{nearest(name, KEYS)}")
    for name, key in KEYS.items():
        if name not in asked:
            raise UserError(f"config.synthetic.{name} is missing; start from experiments/synthetic.py")
        key.valid(asked[name], f"config.synthetic.{name}={asked[name]}")
    for name, template in templates.chosen(tuple(asked["templates"]), asked["subjects"]).items():
        if template.pages and not asked["pages"]:
            raise UserError(f"template {name} needs pages; name a curated folder with web=FOLDER, or leave it out")


def described(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder keeps of the section: everything that changes its result, by content and not by place."""
    found = {name: asked[name] for name in (*KEYS, MODEL) if name not in ("templates", "subjects", "pages")}
    chosen = templates.chosen(tuple(asked["templates"]), asked["subjects"])
    found |= {f"template {name}": template.hash for name, template in chosen.items()}
    if asked["pages"]:
        found["pages"] = against.content(asked["pages"])
    return found


def sampling(asked: Mapping[str, Any]) -> dict[str, Any]:
    """How answers are drawn."""
    return {name: asked[name] for name in SAMPLING}


class Pages:
    """The documents of a curated folder, by number."""

    def __init__(self, folder: str) -> None:
        self._parts = against.parts_of(folder) if folder else []
        entries = files.read_json(Path(folder) / listing.MANIFEST)["parts"] if folder else []
        self._starts = list(itertools.accumulate((entry["rows"] for entry in entries), initial=0))
        self._read = functools.lru_cache(4)(self._part)

    def __len__(self) -> int:
        return self._starts[-1]

    def _part(self, number: int) -> dict[str, Any]:
        return store.read(self._parts[number], ["id", "text", "licence", "source"])

    def __getitem__(self, at: int) -> dict[str, str]:
        """id, text, licence and source of one; all empty for a number below 0."""
        if at < 0:
            return dict.fromkeys(("id", "text", "licence", "source"), "")
        number = bisect.bisect_right(self._starts, at) - 1
        return {name: column[at - self._starts[number]].as_py() for name, column in self._read(number).items()}


def requests(asked: Mapping[str, Any], chosen: Mapping[str, Template], pages: Pages) -> Iterator[Request]:
    """All requests in their order, the templates in turn; those of a smaller count are the first of a larger one's."""
    model, how = str(asked[MODEL]), sampling(asked)
    each = {name: templates.seeds(template, asked["seed"], len(pages)) for name, template in chosen.items()}
    for name in itertools.islice(itertools.cycle(chosen), asked["count"]):
        seed = next(each[name])
        page = pages[seed.page]["id"]
        content = json.dumps(
            [chosen[name].hash, dict(seed.values), page, asked["page_words"] if page else 0, seed.draw, asked["seed"],
             model, how], sort_keys=True,
        )  # fmt: skip
        yield Request(name, seed, hashlib.sha256(content.encode()).hexdigest()[:32])


def shards(found: Iterator[Request]) -> Iterator[list[Request]]:
    """Requests in lists of `SHARD`."""
    while shard := list(itertools.islice(found, SHARD)):
        yield shard
