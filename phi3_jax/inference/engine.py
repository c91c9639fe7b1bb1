"""`Engine`: prompts in, text or scores out; batches, buckets of lengths, stops, streaming.

Programs are compiled for a few shapes only: rows are rounded up to powers of two, the lengths of prompts and the positions
that a step reads to half octaves (`trees.length_of`), so that lengths grow without a new program for each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax import checks
from phi3_jax.configs import ModelConfig
from phi3_jax.data import pictured
from phi3_jax.data.images import Picture
from phi3_jax.data.tokenizers import Tokenizer
from phi3_jax.errors import UserError
from phi3_jax.inference import decode, scoring, trees
from phi3_jax.inference.before import Before
from phi3_jax.inference.cache import KVCache, reads_in_place
from phi3_jax.inference.reply import Completion, Reply
from phi3_jax.inference.sampling import Kind, Numbers, Sampling, choose
from phi3_jax.inference.trees import length_of
from phi3_jax.interop import templates
from phi3_jax.interop.loading import Model, token_ids
from phi3_jax.models import vision
from phi3_jax.models.attention import platform_of
from phi3_jax.models.layout import ANYWHERE, Layout
from phi3_jax.models.rotary import REGIMES

ORIGINAL = "original"
STRIDE = 128  # positions that are read, at least
WRITTEN = 2**22  # scores of a head and row that attention after what is shared may write out; more are read whole
Ids = Sequence[int]
Place = tuple[trees.Read, int, list[int]]  # what is read, after which of its tokens something is asked for, and what
# phi-3.5-vision's window is longer, phi-3-vision's is this; nothing else in their files says which is which.
REREADS = 2**17


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-probability of a continuation in nats, whether it is the greedy one, and its number of tokens."""

    logprob: float
    greedy: bool
    tokens: int


def bucket(n: int, most: int) -> int:
    """The first of 1, 2, 4, .. that is n or more; at most `most`."""
    return min(1 << (n - 1).bit_length(), most)


def part_of(capacity: int, needed: int) -> int:
    """The least quarter of quarters of so many positions that holds those that are needed, and `STRIDE` of them.

    Reading half of an array takes longer than reading all of it, as the half is copied first.
    """
    while capacity % 4 == 0 and capacity // 4 >= max(needed, STRIDE):
        capacity //= 4
    return capacity


class Engine:
    """Generates and scores with one model.

    Args:
      model: of `phi3_jax.load`. Its parameters are used as they are, a layer each.
      batch: rows at a time.
      layout: how activations lie on a mesh, of `sharding.rules.layout_of`, where the parameters are sharded.
      rope_regime: LongRoPE list: "short", "long", or "auto": long for the rows that read more tokens than the original
        context (the prompt and max_new_tokens - 1: the last is not read), decided before the first token, so that it never
        changes inside a reply. "original", of a phi-3-vision: as the released code decodes, for comparisons. The list goes
        by the tokens read so far; at the first that needs the long one, phi-3.5-vision reads everything again, and
        phi-3-vision leaves the keys that it has as they are.
    """

    def __init__(self, model: Model, batch: int = 8, *, layout: Layout = ANYWHERE, rope_regime: str = "auto") -> None:
        batch = checks.integer(batch, "batch", 1)
        if rope_regime not in (*REGIMES, ORIGINAL):
            raise UserError(f"rope_regime={rope_regime!r}; valid: {', '.join((*REGIMES, ORIGINAL))}")
        if rope_regime == ORIGINAL and model.config.vision is None:
            raise UserError(f"rope_regime={ORIGINAL} is phi-3-vision's, and {model.config.label} is none; take auto")
        self.config: ModelConfig = model.config
        self.tokenizer: Tokenizer | None = model.tokenizer
        assert model.stop_ids is not None  # a model fills them in
        self.stop_ids: tuple[int, ...] = model.stop_ids
        self._kept = model.kept
        self.batch, self._layout, self._regime = batch, layout, rope_regime
        self._params, self._dtype = decode.unstack(model.params), jnp.dtype(model.dtype)
        self.compilations = 0
        self._kept_before: dict[tuple[tuple[int, ...], Any], Before] = {}

    @property
    def dtype(self) -> str:
        """What is computed with."""
        return str(self._dtype.name)

    @functools.cached_property
    def template(self) -> templates.Template:
        """The model's chat template, of `templates.template_of`, which raises UserError where it has none."""
        return templates.template_of(self._kept, self.config)

    # ------------------------------------------------------------------------------------------ programs

    def _program(self, run: Callable[..., Any], *static: str, donate: tuple[int, ...] = ()) -> Callable[..., Any]:
        """`run` compiled, its compilations counted."""
        names = (*static, *(("long",) if self._fixed else ()))
        return jax.jit(self._counted(run), static_argnames=names, donate_argnums=donate)

    def _counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def counted(*args: Any, **options: Any) -> Any:
            self.compilations += 1
            return run(*args, **options)

        return counted

    @functools.cached_property
    def _prefill(self) -> Callable[..., Any]:
        def run(
            params: decode.Tree,
            tokens: jax.Array,
            lengths: jax.Array,
            long: str | jax.Array,
            capacity: int,
            pictures: tuple[jax.Array, jax.Array] | None = None,
            before: Before | None = None,
        ) -> tuple[jax.Array, KVCache]:
            return decode.prefill(
                params, tokens, lengths, self.config, capacity, dtype=self._dtype, long=long, layout=self._layout,
                pictures=pictures, before=before,
            )  # fmt: skip

        return self._program(run, "capacity")

    @functools.cached_property
    def _in_place(self) -> bool:
        """Whether each row's own slots alone are read, however many all have: one program serves all lengths."""
        return reads_in_place(self.config, platform_of(jax.tree.leaves(self._params)[0]), self._dtype)

    @functools.cached_property
    def _see(self) -> Callable[..., Any]:
        def run(params: decode.Tree, tiles: jax.Array) -> jax.Array:
            return vision.rows_of(params, tiles, self.config, self._dtype)

        return jax.jit(self._counted(run))

    @functools.cached_property
    def _step(self) -> Callable[..., Any]:
        def run(
            params: decode.Tree,
            token: jax.Array,
            cache: KVCache,
            long: str | jax.Array,
            extent: int,
            before: Before | None = None,
        ) -> tuple[jax.Array, KVCache]:
            return decode.step(
                params, token, cache, self.config, extent, dtype=self._dtype, long=long, layout=self._layout,
                before=before,
            )  # fmt: skip

        return self._program(run, "extent", donate=(2,))

    @functools.cached_property
    def _scores(self) -> Callable[..., Any]:
        def run(
            params: decode.Tree, rows: scoring.Rows, long: str | jax.Array, before: Before | None = None
        ) -> tuple[jax.Array, jax.Array]:
            return scoring.scores(
                params, rows, self.config, dtype=self._dtype, long=long, layout=self._layout, before=before
            )

        return self._program(run)

    @functools.cached_property
    def _begin(self) -> Callable[..., Before]:
        def run(params: decode.Tree, tokens: jax.Array, count: jax.Array, long: str | jax.Array) -> Before:
            return decode.begin(params, tokens, count, self.config, dtype=self._dtype, long=long)

        return self._program(run)

    @property
    def _fixed(self) -> bool:
        """Whether one LongRoPE list, or none, serves every row."""
        return self.config.longrope is None or self._regime not in ("auto", ORIGINAL)

    def _long(self, ends: np.ndarray) -> str | jax.Array:
        """The LongRoPE choice for rows that end with so many tokens."""
        longrope = self.config.longrope
        if longrope is None or self._fixed:
            return "short" if longrope is None else self._regime
        return jnp.asarray(ends > longrope.original_context)

    # ------------------------------------------------------------------------------------------ generation

    def encode(self, prompt: str | Ids) -> list[int]:
        """Token ids of a prompt.

        Raises:
          UserError: an empty prompt, text without a tokenizer, ids that are no whole numbers or outside the vocabulary.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError(f"{self.config.name} came without a tokenizer; give token ids, or add its files")
            prompt = self.tokenizer.encode(prompt)
        ids = token_ids(prompt, self.config, "a string or a list of integers")
        if ids.ndim != 1:
            raise UserError(f"a prompt of shape {ids.shape}; give a string or a list of integers")
        if not ids.size:
            raise UserError("the prompt is empty; give at least one token")
        return ids.tolist()

    def generate(
        self,
        prompts: Sequence[str | Ids],
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008
        stop: Sequence[str] = (),
        stop_ids: Ids | None = None,
        on_text: Callable[[int, str], None] | None = None,
        *,
        images: Sequence[Sequence[Any]] | None = None,
        crops: int | None = None,
        exif: bool = False,
        draws: Sequence[int] | None = None,
        shared: int = 0,
    ) -> list[Completion]:
        """Continues each prompt.

        Args:
          prompts: strings (no begin token is added) or token ids, of any lengths.
          max_new_tokens: of each reply.
          sampling: how tokens are drawn; row i of a call draws the same tokens whatever else is in the batch.
          stop: strings that end a reply; neither they nor what follows is in its text.
          stop_ids: tokens that end a reply (default: `self.stop_ids`).
          on_text: called as on_text(row, piece) with text that can no longer change.
          images: for each prompt the pictures in it (`data.images.Picture`), of a phi-3-vision. A string says with
            `<|image_k|>` where picture k stands, and begins with `<s>`; ids are -k there (`data.pictured`). A picture that
            several prompts of a batch share is encoded once.
          crops: tiles that a picture is cut into at most; default: what the model's files say.
          exif: turn pictures as their EXIF orientation says, which the released code does not.
          draws: for each prompt the number, 0 to 2**32 - 1, that stands for its row in what is drawn; default: its row. A
            prompt with a number of its own draws the same tokens in any call.
          shared: as in `score`; text prompts alone share.

        Raises:
          UserError: see `encode`, `data.pictured` and `data.images`; a prompt that leaves no room in the context; a stop
            string without a tokenizer; prompts that do not share so many tokens.
        """
        max_new_tokens = checks.integer(max_new_tokens, "max_new_tokens", 1)
        if isinstance(prompts, str) or not len(prompts):
            raise UserError(f"prompts={prompts!r:.60}; give a list with one prompt at least")
        if isinstance(stop, str) or not all(isinstance(s, str) for s in stop):
            raise UserError(f"stop={stop!r:.60}; give a list of strings")
        if any(not s for s in stop):
            raise UserError("a stop string is empty; leave it out")
        if stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer; give stop_ids")
        context, album = self.config.context, None
        if images is not None:
            album = self._album(images, len(prompts), crops, exif)
        opened = [[] for _ in prompts] if album is None or images is None else [album.open(some) for some in images]
        asked = [self._prompt(p, some, album) for p, some in zip(prompts, opened, strict=True)]
        encoded = [prompt.ids for prompt in asked]
        for ids in encoded:
            if (over := len(ids) + max_new_tokens - context) > 0:
                raise UserError(
                    f"{len(ids)} prompt tokens and max_new_tokens={max_new_tokens} exceed the context of {context} by "
                    f"{over}; shorten the prompt or ask for fewer"
                )
        if stop_ids is not None:
            stop_ids = token_ids(list(stop_ids), self.config, "a list of integers").tolist()
        last = frozenset(self.stop_ids if stop_ids is None else stop_ids)
        replies = [Reply(i, ids, self.tokenizer, tuple(stop), last, on_text) for i, ids in enumerate(encoded)]
        for reply, draw in zip(replies, range(len(replies)) if draws is None else draws, strict=True):
            reply.draw = checks.integer(draw, "draws", 0, 2**32 - 1)
        if album is not None or self._regime == ORIGINAL:
            shared = 0
        self._kept_before = self._kept_before if shared else {}
        ends = [len(ids) + max_new_tokens - 1 for ids in encoded]  # the last token is never read
        groups = self._begun(encoded, ends, shared) if shared else [(None, "", range(len(encoded)))]
        for before, _, members in groups:
            order = sorted(members, key=lambda i: -len(encoded[i]))
            for start in range(0, len(order), self.batch):
                rows = order[start : start + self.batch]
                own = len(encoded[rows[0]]) - shared
                after = before if before is None or own * (own + before.slots) <= WRITTEN else None
                self._run([asked[i] for i in rows], [replies[i] for i in rows], max_new_tokens, sampling, album, after)
        return [reply.finished() for reply in replies]

    def _album(self, images: Sequence[Any], prompts: int, crops: int | None, exif: bool) -> pictured.Album:
        if self._layout != ANYWHERE:
            raise UserError("pictures are read on one device here; load the model without shardings")
        if isinstance(images, (str, bytes)) or len(images) != prompts:
            raise UserError(f"images={images!r:.60}; give a list of pictures for each of {prompts} prompts")
        return pictured.Album(self.config, crops, exif)

    def _prompt(self, prompt: str | Ids, pictures: list[Picture], album: pictured.Album | None) -> pictured.Prompt:
        if album is None:
            return pictured.Prompt(self.encode(prompt), [])
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError(f"{self.config.name} came without a tokenizer; give token ids, or add its files")
            return pictured.Prompt(pictured.text_ids(self.tokenizer, prompt, album.counts(pictures)), pictures)
        self.encode([max(int(i), 0) for i in prompt])
        found = pictured.Prompt([int(i) for i in prompt], pictures)
        pictured.check(found, album)
        return found

    def _run(
        self,
        prompts: list[pictured.Prompt],
        replies: list[Reply],
        more: int,
        sampling: Sampling,
        album: pictured.Album | None,
        before: Before | None,
    ) -> None:
        known = 0 if before is None else int(before.count)
        rows, longest = bucket(len(prompts), self.batch), max(len(prompt.ids) for prompt in prompts) - known
        time = min(length_of(longest), self.config.context)
        capacity = min(length_of(max(time, longest + more), STRIDE), max(self.config.context, time))
        tokens, lengths = np.zeros((rows, time), np.int32), np.ones(rows, np.int32)
        for i, prompt in enumerate(prompts):
            count = len(prompt.ids) - known
            tokens[i, :count], lengths[i] = pictured.tokens_of(prompt.ids[known:]), count
        pictures = None
        if album is not None and any(prompt.pictures for prompt in prompts):
            tiles, index = pictured.batch(prompts, (rows, time), album)
            pictures = self._see(self._params, tiles), index
        long = self._long(known + lengths + (more - 1))  # the last token is never read
        if as_read := self._regime == ORIGINAL:
            long = self._long(lengths)
        numbers, kind = sampling.numbers(), sampling.kind
        names = np.array([r.draw for r in replies] + [0] * (rows - len(replies)), np.uint32)
        keys = _keys(np.uint32(sampling.seed & 0xFFFFFFFF), np.uint32(sampling.seed >> 32), names)
        logits, cache = self._prefill(self._params, tokens, lengths, long, capacity, pictures, before)
        seen = _seen(*_whole(prompts, rows), self.config.vocab) if kind.penalty else None
        alive: list[Reply | None] = [*replies, *[None] * (rows - len(replies))]
        said: list[jax.Array] = []
        pending = None  # the step before is read while the next one runs
        for i in range(more):
            token, logprob, seen = _choose(logits, keys, cache.lengths, kind, numbers, seen)
            if pending is not None and not self._read(alive, *pending):
                return
            pending = token, logprob
            if i + 1 < more:
                said.append(token)
                long = self._long(lengths + i + 1) if as_read else long
                if as_read and self._reads_again(lengths[: len(prompts)] + i + 1):
                    logits, cache = self._again(tokens, lengths, said, long, capacity, pictures)
                    continue
                extent = capacity if self._in_place else part_of(capacity, longest + i + 1)
                logits, cache = self._step(self._params, token, cache, long, extent, before)
        assert pending is not None  # `more` is 1 at least
        self._read(alive, *pending)

    def _reads_again(self, lengths: np.ndarray) -> bool:
        """Whether the released code drops its cache before it reads the last of so many tokens of each row."""
        cfg = self.config
        rereads = cfg.longrope is not None and cfg.sliding_window is not None and cfg.sliding_window > REREADS
        return rereads and bool((lengths == cfg.longrope.original_context + 1).any())  # type: ignore[union-attr]

    def _again(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        said: Sequence[jax.Array],
        long: str | jax.Array,
        capacity: int,
        pictures: tuple[jax.Array, np.ndarray] | None,
    ) -> tuple[jax.Array, KVCache]:
        """Prompts and what was said after them, read from the start; rows of pictures are at hand."""
        time = min(length_of(int(lengths.max()) + len(said)), self.config.context)
        whole = np.zeros((len(tokens), time), np.int32)
        width = min(time, tokens.shape[1])
        whole[:, :width] = tokens[:, :width]
        replies = np.stack([np.asarray(one) for one in said], axis=1)
        for row, length in enumerate(lengths):
            whole[row, length : length + len(said)] = replies[row]
        if pictures is not None:
            index = np.full(whole.shape, -1, np.int32)
            index[:, :width] = pictures[1][:, :width]
            pictures = pictures[0], index
        return self._prefill(self._params, whole, lengths + len(said), long, capacity, pictures)

    def _read(self, alive: list[Reply | None], tokens: jax.Array, logprobs: jax.Array) -> bool:
        """Hands each row its token; whether any row goes on."""
        ids, nats = np.asarray(tokens), np.asarray(logprobs)
        for i, reply in enumerate(alive):
            if reply is not None:
                self._finite(nats[i])
                alive[i] = reply if reply.take(int(ids[i]), float(nats[i])) else None
        return any(reply is not None for reply in alive)

    def _finite(self, logprobs: np.ndarray) -> None:
        """Refuses what would look like a reply or a score and is none."""
        if not np.isfinite(logprobs).all():
            bad = np.ravel(logprobs)[~np.isfinite(np.ravel(logprobs))][0]
            raise UserError(
                f"{self.config.name} computes a log-probability of {bad}: its weights are not finite, or beyond what "
                f"{self._dtype.name} computes with; check them, or load the model with dtype=float32"
            )

    # ------------------------------------------------------------------------------------------ scoring

    def score(self, pairs: Sequence[tuple[Ids, Ids]], shared: int = 0) -> list[Score]:
        """Log-probability of each continuation after its context.

        Args:
          pairs: (context ids, continuation ids), each with one token at least.
          shared: tokens at the beginning of every context, the same in all, that are read once and not in every row; fewer
            than the shortest context has. The engine keeps what it read of them for calls that begin alike. Rows that
            LongRoPE's lists part read them once a list.

        Raises:
          UserError: an empty part, ids outside the vocabulary, more tokens than the context (the last one is not read);
            contexts that do not share so many tokens.
        """
        # The last token is not read, so continuations that differ in it only (lettered options) share one read.
        places: list[Place] = []
        for context, continuation in pairs:
            whole = self.encode(context) + self.encode(continuation)
            if (over := len(whole) - 1 - self.config.context) > 0:
                raise UserError(
                    f"{len(whole)} tokens exceed the context of {self.config.context} by {over}; cut the start"
                )
            places.append((tuple(whole[:-1]), len(context) - 1, whole[len(context) :]))
        results: list[Score | None] = [None] * len(places)
        contexts = [read[: start + 1] for read, start, _ in places]
        for before, long, members in self._begun(contexts, [len(read) for read, _, _ in places], shared):
            for number, logprobs, hits in self._scored([places[i] for i in members], before, long):
                total = logprobs.sum(dtype=np.float64)
                self._finite(total)
                results[members[number]] = Score(float(total), bool(hits.all()), logprobs.size)
        return [score for score in results if score is not None]

    def _begun(
        self, contexts: Sequence[Ids], ends: Sequence[int], shared: int
    ) -> Iterator[tuple[Before | None, str | bool, Sequence[int]]]:
        """(what they share, read; LongRoPE's list; which contexts they are), a group for each list.

        A row reads `ends` tokens, its context's and those that come after.
        """
        ids = tuple(contexts[0][:shared]) if contexts else ()
        if any(len(one) <= shared or tuple(one[:shared]) != ids for one in contexts):
            raise UserError(f"contexts do not begin with the same {shared} tokens and one more; share fewer")
        groups: dict[str | bool, list[int]] = {}
        chosen = self._long(np.array(ends))
        for number, one in enumerate([chosen] * len(ends) if isinstance(chosen, str) else np.asarray(chosen).tolist()):
            groups.setdefault(one, []).append(number)
        shares = shared > 0 and self._layout == ANYWHERE
        # Whoever shares nothing needs the memory, and a beginning is soon read again.
        self._kept_before = {key: one for key, one in self._kept_before.items() if shares and key[0] == ids}
        for one, members in groups.items():
            if shares and (ids, one) not in self._kept_before:
                tokens = np.zeros((1, min(length_of(shared, STRIDE), self.config.context)), np.int32)
                tokens[0, :shared] = ids
                long = one if isinstance(one, str) else jnp.array([one])
                self._kept_before[ids, one] = self._begin(self._params, tokens, np.int32(shared), long)
            yield self._kept_before.get((ids, one)), one, members

    def _scored(
        self, places: Sequence[Place], before: Before | None, long: str | bool
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(number, log-probabilities of what was asked for, whether each is the likeliest) of every place."""
        known = 0 if before is None else int(before.count)
        asked: dict[trees.Read, dict[tuple[int, ...], list[int]]] = {}  # read -> (start, what is said) -> which pairs
        for number, (read, start, said) in enumerate(places):
            asked.setdefault(read[known:], {}).setdefault((start - known, *said), []).append(number)
        counts = {read: sum(len(key) - 1 for key in keys) for read, keys in asked.items()}
        most, full = (trees.MOST, trees.FULL) if self._layout == ANYWHERE else (0, 0)  # a mesh knows rows of one read
        for packed in trees.pack(trees.grow(counts, most), self.batch, full):
            where = [
                (numbers, *packed.ask(read, key[0], key[1:]))
                for read in packed.places
                for key, numbers in asked[read].items()
            ]
            parted = packed.parted or before is not None
            apart = packed.documents if parted else None, packed.branches if packed.branches.any() else None
            given: list[Any] = [packed.tokens, packed.positions, *apart, packed.at, packed.said, packed.counts.max()]
            rows = scoring.Rows._make(x if x is None else jnp.asarray(x) for x in given)
            lists = long if isinstance(long, str) else np.full(packed.tokens.shape, long)
            logprobs, hits = map(np.asarray, self._scores(self._params, rows, lists, before))
            for numbers, row, columns in where:
                for number in numbers:
                    yield number, logprobs[row, columns], hits[row, columns]


@jax.jit
def _keys(low: jax.Array, high: jax.Array, rows: jax.Array) -> jax.Array:
    """A key for each row, of a seed's two halves."""
    key = jax.random.fold_in(jax.random.key(low), high)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


@functools.partial(jax.jit, static_argnames="kind")
def _choose(
    logits: jax.Array,
    keys: jax.Array,
    positions: jax.Array,
    kind: Kind,
    numbers: Numbers,
    seen: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Next tokens, their log-probabilities, and what the penalty falls on from now on."""
    token, logprob = choose(logits, jax.vmap(jax.random.fold_in)(keys, positions), kind, numbers, seen)
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    return token, logprob, seen


def _whole(prompts: Sequence[pictured.Prompt], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of prompts, side by side in rows of one length, and which of them are text."""
    length = length_of(max(len(prompt.ids) for prompt in prompts))
    tokens, real = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    real[len(prompts) :, 0] = True
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt.ids)] = pictured.tokens_of(prompt.ids)
        real[i, : len(prompt.ids)] = np.asarray(prompt.ids) >= 0
    return tokens, real


@functools.partial(jax.jit, static_argnums=2)
def _seen(tokens: jax.Array, real: jax.Array, vocab: int) -> jax.Array:
    rows = jnp.arange(len(tokens))[:, None]
    return jnp.zeros((len(tokens), vocab), bool).at[rows, tokens].max(real)
