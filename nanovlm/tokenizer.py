"""A thin tokenizer over tokenizer.json; transformers is not asked.

Unusual: transformers 5's AutoTokenizer rebuilds SmolLM2's pre-tokenizer from a class name and loses its
digit rule, so ids change in silence wherever two white spaces precede a digit. Here ids are what
tokenizer.json says. ``byte`` is an offline tokenizer made in memory: one token a byte, three special ones.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers
from tokenizers import AddedToken

from nanovlm import hub, prompts
from nanovlm.config import CHATML, VLMConfig
from nanovlm.errors import PromptError, TokenizerError, WeightsError

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
BYTE_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MAX_TOKENIZER_BYTES = 200_000_000


def get_tokenizer(
    name: str | VLMConfig,
    extra_special_tokens: Mapping[str, str] | None = None,
    chat_template: str | None = None,
    *,
    revision: str | None = None,
    rows: int | None = None,
) -> Tokenizer:
    """The tokenizer of a folder or a Hub repository, or ``byte``; a VLMConfig says all of it at once.

    extra_special_tokens: {attribute: token}, appended to the vocabulary in order. As upstream does, padding
    is the end token.
    rows: of the language model's embedding before that. Added tokens beyond have no weights, as Gemma 3's
    <image_soft_token> in its models of text alone, and are left out.
    Raises TokenizerError, SourceNotFound.
    """
    if isinstance(name, VLMConfig):
        cfg = name
        template, rows = cfg.lm_chat_template or None, cfg.lm_base_vocab_size
        made = get_tokenizer(cfg.lm_tokenizer, cfg.vlm_extra_tokens, template, rows=rows)
        if cfg.image_token_id is not None and made.image_token_id != cfg.image_token_id:
            raise TokenizerError(
                f"tokenizer {cfg.lm_tokenizer} has {len(made) - len(made.extra_tokens)} tokens itself, so "
                f"its image token is {made.image_token_id}; the model's is {cfg.image_token_id}, because "
                f"lm_base_vocab_size={cfg.lm_base_vocab_size}"
            )
        # Idefics3's processor appends a token of its own, which its models do not know and no prompt holds
        named = [*made.special_tokens.values(), *made.extra_tokens.values()]
        needed = max(made.vocab_size, *(number + 1 for number in made.ids_of(named)))
        if needed > cfg.lm_vocab_size:
            raise TokenizerError(
                f"tokenizer {cfg.lm_tokenizer} has {needed} tokens, more than "
                f"lm_vocab_size={cfg.lm_vocab_size}"
            )
        return made
    if name == "byte":
        backend, special = byte_backend(), {"bos_token": BYTE_SPECIALS[1], "eos_token": BYTE_SPECIALS[2]}
        own_template: str | None = CHATML
    else:
        known = set((extra_special_tokens or {}).values())
        backend, special, own_template = _read(
            name, revision, lambda number, token: rows is None or number < rows or token in known
        )
    return Tokenizer(
        backend, special, extra_special_tokens or {}, chat_template or own_template, name=str(name)
    )


class Tokenizer:
    """Text to ids and back. Each extra token is an attribute, and its id another: ``image_token_id``.

    ``eos_token`` and its like may be set; their ids follow.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: Mapping[str, str],
        extra: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        name: str = "",
    ) -> None:
        self.name = name
        self.backend = backend
        self.chat_template = chat_template
        self.extra_tokens = dict(extra or {})
        backend.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in self.extra_tokens.values()]
        )
        self.special_tokens = {key: token for key, token in special.items() if token is not None}
        if "eos_token" not in self.special_tokens:
            raise TokenizerError(f"tokenizer {name} names no eos_token; without it no answer would end")
        self.special_tokens["pad_token"] = self.special_tokens["eos_token"]
        for key, token in self.special_tokens.items():
            if backend.token_to_id(token) is None:
                raise TokenizerError(f"tokenizer {name}: {key} is {token!r}, which is not in its vocabulary")

    def __getattr__(self, name: str) -> Any:
        known = {**self.__dict__.get("special_tokens", {}), **self.__dict__.get("extra_tokens", {})}
        if name in known:
            return known[name]
        if name.endswith("_id") and name[:-3] in known:
            return self.backend.token_to_id(known[name[:-3]])
        raise AttributeError(
            f"this tokenizer has no {name!r}; it has {', '.join(known) or 'no special tokens'}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in NAMES:
            if self.backend.token_to_id(value) is None:
                raise TokenizerError(f"{name}={value!r} is not in the vocabulary")
            self.special_tokens[name] = value
        else:
            super().__setattr__(name, value)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, {len(self)} tokens)"

    @property
    def vocab_size(self) -> int:
        """Tokens without the added ones, as transformers counts."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the end token, then what the chat template puts behind an assistant.

        They differ where a model was taught to talk after its tokenizer was made: Gemma 3 ends a text with
        <eos> and an answer with <end_of_turn>.
        """
        ids = [self.eos_token_id]
        if self.chat_template:
            messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
            prompt = prompts.chat(
                self.chat_template, messages, self.all_special_tokens, variables=self.special_tokens
            )
            ids += [self.backend.token_to_id(prompt.text[a + 1 : b]) for a, b in prompt.answers if b > a + 1]
        return tuple(dict.fromkeys(ids))

    @property
    def all_special_tokens(self) -> list[str]:
        """Every token that is no text."""
        added = self.backend.get_added_tokens_decoder()
        return [token.content for _, token in sorted(added.items()) if token.special]

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids."""
        return self.ids_of(self.all_special_tokens)

    def ids_of(self, tokens: Iterable[str]) -> list[int]:
        """Ids of those tokens that are in the vocabulary."""
        found = (self.backend.token_to_id(token) for token in tokens)
        return [number for number in found if number is not None]

    @cached_property
    def markup(self) -> list[str]:
        """Special tokens that an answer is written with, as Granite-Docling's <doctag> and <otsl> are.

        Those that stand for a picture, end a text or make a turn are none; nor has any other family such tokens.
        """
        if "fake_image_token" not in self.extra_tokens:
            return []
        from nanovlm.granite_docling import MAX_TILES, idefics3_tokens

        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        specials = self.all_special_tokens
        written = prompts.chat(self.chat_template, turn, specials, variables=self.special_tokens).text
        used = {written[start:end] for start, end in prompts.special_spans(written, specials)}
        used |= {*self.special_tokens.values(), *self.extra_tokens.values()}
        used |= set(idefics3_tokens(MAX_TILES).values())
        return [token for token in specials if token not in used and not token.startswith("<|")]

    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | None | list[str | None]:
        """The vocabulary's own spelling of ids; None beyond it."""
        return (
            self.backend.id_to_token(ids)
            if isinstance(ids, int)
            else [self.backend.id_to_token(int(i)) for i in ids]
        )

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | None | list[int | None]:
        """Ids of tokens spelled as in the vocabulary; None for what is none."""
        return (
            self.backend.token_to_id(tokens)
            if isinstance(tokens, str)
            else [self.backend.token_to_id(t) for t in tokens]
        )

    # -- text -------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids as tokenizer.json gives them; special tokens in ``text`` are recognised."""
        return self.backend.encode(str(text), add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int] | int, skip_special_tokens: bool = False) -> str:
        """Text of one row of ids (a list or a tensor)."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        return self.backend.decode(
            [ids] if isinstance(ids, int) else [int(i) for i in ids], skip_special_tokens=skip_special_tokens
        )

    def batch_decode(self, rows: Iterable, skip_special_tokens: bool = False) -> list[str]:
        """Text of each row."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def apply_chat_template(
        self,
        messages: Sequence,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        *,
        add_special_tokens: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
    ) -> Any:
        """Ids of a conversation, or of each of a list of conversations; without ``tokenize`` the text.

        Special tokens count where the template or ``image_string`` put them; in other words they stay words.
        return_dict: {"input_ids", "attention_mask"}; with return_assistant_tokens_mask also
        "assistant_masks", 1 where the assistant speaks, its end token included.
        """
        if messages and isinstance(messages[0], list | tuple):
            options = {
                "add_special_tokens": add_special_tokens,
                "return_dict": return_dict,
                "return_assistant_tokens_mask": return_assistant_tokens_mask,
            }
            rows = [
                self.apply_chat_template(row, tokenize, add_generation_prompt, **options) for row in messages
            ]
            return {key: [row[key] for row in rows] for key in rows[0]} if return_dict and tokenize else rows
        if not self.chat_template:
            raise PromptError(f"tokenizer {self.name} has no chat template; set lm_chat_template")
        prompt = prompts.chat(
            self.chat_template,
            messages,
            self.all_special_tokens,
            add_generation_prompt=add_generation_prompt,
            variables=self.special_tokens,
            image_token=self.extra_tokens.get("image_token"),
            markup=self.markup,
        )
        if not tokenize:
            return prompt.text.replace(prompt.mark, "")
        ids, offsets = self.encode_prompt(prompt, add_special_tokens)
        if not return_dict:
            return ids
        out = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if return_assistant_tokens_mask:
            out["assistant_masks"] = [
                int(any(a <= start < b for a, b in prompt.answers)) for start, _ in offsets
            ]
        return out

    def encode_prompt(
        self, prompt: prompts.Prompt, add_special_tokens: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, [start, end) of each in ``prompt.text``); text is cut at meant special tokens only."""
        text, mark = prompt.text, prompt.mark
        if mark not in text:
            made = self.backend.encode(text, add_special_tokens=add_special_tokens)
            return made.ids, made.offsets
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for start, end in [*prompts.special_spans(text, self.all_special_tokens), (len(text), len(text))]:
            words = text[at:start]
            kept = [i for i, character in enumerate(words) if character != mark] + [len(words)]
            made = self._words.encode(words.replace(mark, ""), add_special_tokens=False)
            ids += made.ids
            offsets += [(at + kept[a], at + kept[b]) for a, b in made.offsets]
            if end > start:
                ids += self.ids_of([text[start:end]])
                offsets.append((start, end))
            at = end
        return ids, offsets

    @cached_property
    def _words(self) -> tokenizers.Tokenizer:
        """A second backend that takes special tokens for words."""
        backend = copy.deepcopy(self.backend)
        backend.encode_special_tokens = True
        return backend


def byte_backend() -> tokenizers.Tokenizer:
    """Special tokens 0 to 2, then the 256 bytes."""
    from tokenizers import decoders, models, pre_tokenizers

    # byte-level BPE writes each byte as a printable character: https://github.com/openai/gpt-2 encoder.py
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {
        **{byte: chr(byte) for byte in printable},
        **{byte: chr(256 + n) for n, byte in enumerate(others)},
    }
    vocabulary = {
        token: number
        for number, token in enumerate([*BYTE_SPECIALS, *(symbols[byte] for byte in range(256))])
    }
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in BYTE_SPECIALS])
    return backend


def _read(
    name: str, revision: str | None, wanted: Callable[[int, str], bool]
) -> tuple[tokenizers.Tokenizer, dict[str, str], str | None]:
    """(backend, special tokens by name, chat template) of a folder or repository.

    wanted(id, token): whether an added token is kept.
    """
    revision = hub.pin(name, "tokenizer.json", revision)
    path = hub.fetch(name, "tokenizer.json", revision=revision)
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise TokenizerError(
            f"{path} has {path.stat().st_size:,} bytes; at most {MAX_TOKENIZER_BYTES:,} are read"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises nothing narrower
        raise TokenizerError(f"{path} cannot be read as a tokenizer: {error}") from None
    if not all(wanted(number, str(token)) for number, token in backend.get_added_tokens_decoder().items()):
        content = json.loads(backend.to_str())
        content["added_tokens"] = [t for t in content["added_tokens"] if wanted(t["id"], t["content"])]
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.no_truncation()
    backend.no_padding()
    config: dict[str, Any] = {}
    for filename in ("special_tokens_map.json", "tokenizer_config.json"):
        found = hub.find(name, filename, revision=revision)
        content = hub.parse_json(found) if found else {}
        if not isinstance(content, dict):
            raise WeightsError(f"{found} holds a {type(content).__name__}, expected an object")
        config.update(content)
    added = {int(number): token for number, token in (config.get("added_tokens_decoder") or {}).items()}
    added = {number: token for number, token in added.items() if wanted(number, token["content"])}
    _add_missing(backend, added, name)
    special: dict[str, Any] = {key: token.get("content") if isinstance(token, dict) else token
               for key in NAMES if (token := config.get(key)) is not None}  # fmt: skip
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    separate = hub.find(name, "chat_template.jinja", revision=revision)
    return backend, special, separate.read_text(encoding="utf-8") if separate else template


def _add_missing(backend: tokenizers.Tokenizer, decoder: Mapping[int, Any], name: str) -> None:
    """Add tokens of tokenizer_config.json that tokenizer.json lacks; ids must come out as written there."""
    for number, token in sorted(decoder.items()):
        if backend.token_to_id(token["content"]) is None:
            flags = {
                key: bool(token.get(key))
                for key in ("special", "normalized", "lstrip", "rstrip", "single_word")
            }
            backend.add_tokens([AddedToken(token["content"], **flags)])
        if backend.token_to_id(token["content"]) != number:
            raise TokenizerError(
                f"tokenizer {name}: {token['content']!r} is {number} in tokenizer_config.json, "
                f"{backend.token_to_id(token['content'])} in tokenizer.json"
            )
