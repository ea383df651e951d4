"""Messages -> text -> ids: image strings, chat templates, and which tokens a loss counts.

Unusual: special tokens in a user's own words stay words. ``image_string`` returns a str that remembers that
its tokens are meant, and keeps remembering when it is concatenated; everything else that looks like a
special token is broken by a mark (a Unicode noncharacter) before the template runs, and the mark is taken
out again when the text between the true special tokens is encoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from nanovlm import registry
from nanovlm.config import generation_of
from nanovlm.errors import ImageTokenMismatch, PromptError

MAX_IMAGE_TOKENS = 1 << 22  # of one picture: as many as a model may have positions
_TAKES_PARTS = re.compile(r"""\[\s*['"]type['"]\s*\]|\.type\b""")  # content[0]['type'], part.type
# white space that a template's trim takes away with an answer's own: where it stays, that stays too
_EDGES = ["\u205f", "\u2005", "\u2006", "\u2004", "\u1680", "\u2008"]
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # noncharacters: no text holds them on purpose


class Trusted(str):
    """Text whose special tokens are meant. ``parts``: its pieces, each with whether it is trusted."""

    parts: tuple[tuple[str, bool], ...]

    def __new__(cls, text: str, parts: tuple[tuple[str, bool], ...] | None = None) -> Trusted:
        made = super().__new__(cls, text)
        made.parts = ((str(text), True),) if parts is None else parts
        return made

    def __add__(self, other: str) -> Trusted:
        return Trusted(str(self) + str(other), self.parts + parts_of(other))

    def __radd__(self, other: str) -> Trusted:
        return Trusted(str(other) + str(self), parts_of(other) + self.parts)


def parts_of(text: str) -> tuple[tuple[str, bool], ...]:
    """((piece, trusted), ...) of any text."""
    return text.parts if isinstance(text, Trusted) else ((str(text), False),)


def image_string(tokenizer, grids: Sequence[tuple[int, int]], tokens_per_tile: int) -> Trusted:
    """What stands for pictures in the text: for each, its global view and its tiles in reading order.

    grids: (rows, columns) of each picture; tokens_per_tile: image tokens of each cell of them (a config's
    ``tokens_per_cell``). Raises ImageTokenMismatch for a grid beyond the extra tokens.
    """
    names = tokenizer.extra_tokens
    if grids and "image_token" not in names:
        return Trusted("")  # features stand in front of the text
    for rows, columns in grids:
        if min(rows, columns) < 1 or rows * columns * tokens_per_tile > MAX_IMAGE_TOKENS:
            raise ImageTokenMismatch(
                f"a grid of {rows}x{columns} with {tokens_per_tile} tokens a cell; expected 1 to "
                f"{MAX_IMAGE_TOKENS:,} image tokens, from the grid that get_image_processor returns"
            )
    other = registry.tiling(names)
    if other is not None:
        return Trusted(other.image_string(names, grids, tokens_per_tile))
    features = names.get("image_token", "") * tokens_per_tile
    out = []
    for number, (rows, columns) in enumerate(grids):
        if len(grids) > 1:
            out.append(f"<image: {number}>")
        if "r1c1" not in names:  # the picture is one piece, of as many cells as its shape asks for
            out.append(names.get("global_image_token", "") + features * (rows * columns))
            continue
        if "global_image_token" in names:
            out.append(names["global_image_token"] + features)
            if rows == columns == 1:
                continue
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                if f"r{row}c{column}" not in names:
                    raise ImageTokenMismatch(
                        f"a grid of {rows}x{columns} tiles, but there is no extra token r{row}c{column}; "
                        "use a smaller max_img_size"
                    )
                out.append(names[f"r{row}c{column}"] + features)
    return Trusted("".join(out))


def get_image_string(
    tokenizer, splitted_image_counts: Sequence[tuple[int, int]], mp_image_token_length: int
) -> Trusted:
    """``image_string`` under upstream's names."""
    return image_string(tokenizer, splitted_image_counts, mp_image_token_length)


class Prompt(NamedTuple):
    """A rendered prompt: text with ``mark`` inside everything that must stay words; [start, end) to learn."""

    text: str
    mark: str
    answers: list[tuple[int, int]]


def chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    specials: Sequence[str],
    *,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
    image_token: str | None = None,
    markup: Iterable[str] = (),
) -> Prompt:
    """Messages through a chat template. Raises PromptError.

    image_token: what a template that takes contents apart (SmolVLM's) writes for a picture.
    markup: special tokens that are meant where an assistant says them.
    ``answers`` are what an assistant said, up to and with the special token that ends it.
    """
    from nanovlm.templates import render  # imports jinja, which v0.1 and v0.2 can do without

    mark, begin, end, edge = _free_marks(messages)
    in_parts = _TAKES_PARTS.search(template) and "is string" not in template
    pictures: list[str] = []
    meant = set(markup)
    in_answers = [special for special in specials if special not in meant] if meant else specials

    def guarded(value: Any, answer: bool = False) -> Any:
        if isinstance(value, str):
            text = guard(value, in_answers if answer else specials, mark)
            if not answer:
                return text
            core = text.strip()  # marks go inside the white space, so that a template's trim still finds it
            lead = len(text) - len(text.lstrip()) if core else 0
            return edge + text[:lead] + begin + core + end + text[lead + len(core) :] + edge
        if isinstance(value, Mapping):
            return {key: guarded(item, answer and key == "text") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [guarded(item, answer) for item in value]
        return value

    prepared = []
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise PromptError(f"a message is a dict with 'role' and 'content', got {message!r:.80}")
        if in_parts and isinstance(message.get("content"), str):
            content = [part for part in parts_of(message["content"]) if part[0]] or [("", False)]
            pictures += [text for text, trusted in content if trusted]
            shown = [
                {"type": "image"} if trusted else {"type": "text", "text": text} for text, trusted in content
            ]
            message = {**message, "content": shown}
        answers = message["role"] == "assistant"
        prepared.append({key: guarded(value, answers and key == "content") for key, value in message.items()})
    rendered = render(
        template, {**(variables or {}), "messages": prepared, "add_generation_prompt": add_generation_prompt}
    )
    if pictures:
        between = rendered.split(image_token) if image_token else [rendered]
        if len(between) != len(pictures) + 1:
            raise PromptError(
                f"the chat template writes {len(between) - 1} image tokens {image_token} for "
                f"{len(pictures)} pictures"
            )
        rendered = "".join(text for pair in zip(between, [*pictures, ""], strict=True) for text in pair)
    return _collect(rendered, mark, begin, end, edge, specials)


def plain(text: str, specials: Sequence[str]) -> Prompt:
    """Text without a template, as v0.1 and v0.2 ask: special tokens count only in its trusted parts."""
    mark = _free_marks([text])[0]
    return Prompt(guard(text, specials, mark), mark, [])


def question(cfg, tokenizer, text: str, grids: Sequence[tuple[int, int]] = ()) -> list[int]:
    """Ids of one question about the pictures of ``grids``, in the form the config's generation was taught."""
    pictures = image_string(tokenizer, grids, cfg.tokens_per_cell)
    if cfg.generation == "main":
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": pictures + text}], add_generation_prompt=True
        )
    return tokenizer.encode_prompt(
        plain(pictures + in_words(text), tokenizer.all_special_tokens)
    )[0]


def in_words(text: str) -> str:
    """A question as v0.1 and v0.2 ask it."""
    return f"Question: {text} Answer:"


def conversation(
    tokenizer, turns: Sequence[tuple[str, str]], pictures: str = ""
) -> tuple[list[int], list[bool]]:
    """(ids, which of them a loss counts) of a conversation to learn: the answers, each with its end.

    turns: (user, assistant), in order; pictures: their image_string, put before the first. Without tile tokens
    (v0.1 and v0.2) it has the form of ``question``, an end token behind each answer.
    """
    if generation_of(tokenizer.extra_tokens) == "main":
        messages: list[dict[str, str]] = []
        for user, assistant in turns:
            asked = user if messages else pictures + user
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": assistant}]
        made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return made["input_ids"], [mask == 1 for mask in made["assistant_masks"]]
    ids: list[int] = []
    counts: list[bool] = []
    for user, assistant in turns:
        asked = in_words(user) if ids else pictures + in_words(user)
        for text, learned in ((asked, False), (assistant + Trusted(tokenizer.eos_token), True)):
            new = tokenizer.encode_prompt(plain(text, tokenizer.all_special_tokens))[0]
            ids += new
            counts += [learned] * len(new)
    return ids, counts


def guard(text: str, specials: Iterable[str], mark: str) -> str:
    """``text`` with ``mark`` behind the first character of every special token outside its trusted parts.

    An untrusted end that could grow into a special token with what follows is broken too.
    """
    found, beginnings, longest = _scanner(tuple(specials))
    out = []
    for piece, trusted in parts_of(text):
        if not trusted and found is not None:
            piece = found.sub(lambda match: match[2] + mark, piece)
            for start in range(max(0, len(piece) - longest + 1), len(piece)):
                if piece[start:] in beginnings:
                    piece = piece[: start + 1] + mark + piece[start + 1 :]
                    break
        out.append(piece)
    return "".join(out)


def special_spans(text: str, specials: Iterable[str]) -> list[tuple[int, int]]:
    """[start, end) of the special tokens in ``text``."""
    pattern = _any_of(tuple(specials))
    return [match.span() for match in pattern.finditer(text)] if pattern else []


@lru_cache(maxsize=64)
def _any_of(specials: tuple[str, ...]) -> re.Pattern | None:
    longest_first = sorted(set(specials), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


@lru_cache(maxsize=64)
def _scanner(specials: tuple[str, ...]) -> tuple[re.Pattern | None, frozenset[str], int]:
    """(what finds the first character of each special token, all their beginnings, the longest's length)."""
    pattern = _any_of(specials)
    if pattern is None:
        return None, frozenset(), 0
    beginnings = {special[:end] for special in specials for end in range(1, len(special) + 1)}
    found = re.compile(f"(?=({pattern.pattern}))(.)", re.DOTALL)
    return found, frozenset(beginnings), max(map(len, specials))


def _free_marks(values: Any) -> list[str]:
    """Three noncharacters and one white space that occur nowhere in ``values``."""
    text = json.dumps(values, ensure_ascii=False, default=str)
    free = [mark for mark in _MARKS if mark not in text]
    edges = [edge for edge in _EDGES if edge not in text]
    if len(free) < 3:
        raise PromptError("the prompt uses nearly all of the noncharacters U+FDD0 to U+FDEF; remove them")
    if not edges:
        raise PromptError("the prompt uses each of the spaces U+1680, U+2004 to U+2006, U+2008, U+205F; remove one")
    return [*free[:3], edges[0]]


def _collect(rendered: str, mark: str, begin: str, end: str, edge: str, specials: Sequence[str]) -> Prompt:
    """Take the answer marks out of rendered text and note where they were.

    An answer is ``edge`` white space ``begin`` words ``end`` white space ``edge``; trimmed, it has no edges.
    """
    answers: list[list[int]] = []
    pieces: list[str] = []
    length = 0
    outer: int | None = None  # where an edge was seen, and only white space since
    open_at: int | None = None
    for piece in re.split(f"([{begin}{end}{edge}])", rendered):
        if piece == begin:
            open_at = length if outer is None else outer
        elif piece == end:
            if open_at is not None:
                answers.append([open_at, length])
            open_at = outer = None
        elif piece == edge:
            if answers and not "".join(pieces)[answers[-1][1] :].strip() and outer is None:
                answers[-1][1] = length
            outer = length
        else:
            pieces.append(piece)
            length += len(piece)
            if piece.strip():
                outer = None
    text = "".join(pieces)
    closing = dict(special_spans(text, specials))
    for answer in answers:  # what a template writes between an answer and its end is said too
        gap = len(text[answer[1] :]) - len(text[answer[1] :].lstrip())
        answer[1] = closing.get(answer[1] + gap, answer[1])
    return Prompt(text, mark, sorted((start, stop) for start, stop in answers))
