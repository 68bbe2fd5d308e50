"""From tokens to text and back: a tokenizer behind one small interface, text that grows token by token, stop strings.

A token need not be a whole number of characters, and what a tokenizer makes of tokens may depend on those before. So
text is made from a **window** of the latest tokens: the new text is what the window says with the new token minus what
it said without, once it does not end in the middle of a character. Each token is decoded about twice, in windows of a
few tokens, and never again: a text of n tokens costs O(n).

Text that could be the beginning of a stop string is held back until it is known not to be; of a stop string nothing is
ever given out.

Invariant: the pieces joined are the tokenizer's own text of the tokens (for bytes that are no UTF-8 at all, up to the
number of replacement characters).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ds_inference.errors import RequestError

__all__ = ["HuggingFaceCodec", "StopText", "TextCodec", "TextStream"]

_BROKEN = "\ufffd"
_GARBAGE = 8
"""So many replacement characters at the end are no beginning of a character."""
_LONGEST_WINDOW = 256
_CONTEXT = 5


class TextCodec(Protocol):
    """A tokenizer as serving needs it. Its methods may be called from several threads."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text; `special`: with the begin token and what else the tokenizer adds by itself."""

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        """The text of tokens."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which need not be whole characters."""

    def chat(self, messages: Sequence[Mapping[str, Any]], *, continue_last: bool, options: Mapping[str, Any]) -> str:
        """The prompt that a conversation makes by the model's template; RequestError when it cannot be made."""


class HuggingFaceCodec:
    """A tokenizer of transformers as a `TextCodec`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # What lies below a fast tokenizer is several times faster, and safe in threads as long as nobody sets its
        # padding or truncation, which the tokenizer itself does at every call.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_padding()
            backend.no_truncation()
        cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._backend = backend
        self._decoder = None if cleans else backend
        self._bytes = _byte_alphabet() if _is_byte_level(backend) else None

    def encode(self, text: str, special: bool = True) -> list[int]:
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=special).ids)
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        source = self.tokenizer if self._decoder is None else self._decoder
        return str(source.decode(list(tokens), skip_special_tokens=skip_special))

    def token_bytes(self, token: int) -> bytes:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self._bytes is not None and token not in self.tokenizer.added_tokens_decoder:
            try:
                return bytes(self._bytes[character] for character in piece)
            except KeyError:
                return str(piece).encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return self.decode([token], skip_special=False).encode()

    def chat(self, messages: Sequence[Mapping[str, Any]], *, continue_last: bool, options: Mapping[str, Any]) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise RequestError("the model's tokenizer has no chat template; send a prompt to /v1/completions instead")
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=not continue_last,
                    continue_final_message=continue_last,
                    **options,
                )
            )
        except Exception as error:  # the template is a program of the model's makers: it may raise anything
            raise RequestError(f"the model's chat template cannot be applied to these messages: {error}") from error


class TextStream:
    """The text of one answer while it grows."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        # A few tokens of the prompt come first: what the answer's first token says may depend on them.
        self._decode = decode
        self._window = list(prompt[-_CONTEXT:])
        self._said = decode(self._window) if self._window else ""
        if self._said.endswith(_BROKEN):
            self._window, self._said = [], ""
        self._settled = len(self._window)

    def push(self, tokens: Sequence[int]) -> str:
        """Text that is settled with these tokens."""
        self._window.extend(tokens)
        text = self._decode(self._window)
        whole = text.rstrip(_BROKEN)
        if text == whole or len(text) - len(whole) >= _GARBAGE or len(self._window) - self._settled >= _LONGEST_WINDOW:
            return self._settle(text)
        # The last character may still be completed; until then the window stays as it is.
        new = whole[len(self._said) :]
        self._said += new
        return new

    def finish(self) -> str:
        """What is left: the last character was never completed."""
        return self._settle(self._decode(self._window)) if len(self._window) > self._settled else ""

    def _settle(self, text: str) -> str:
        new = text[len(self._said) :]
        del self._window[: self._settled]
        self._settled = len(self._window)
        self._said = self._decode(self._window)
        return new


class StopText:
    """Text on its way out, watched for stop strings."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped: str | None = None
        """The stop string that was found; nothing is given out afterwards."""

    def push(self, text: str) -> str:
        """What of the text so far may be given out."""
        text = self._held + text
        found = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, _, self.stopped = min(found)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, short of all of it."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def _is_byte_level(backend: Any) -> bool:
    decoder = getattr(backend, "decoder", None)
    return decoder is not None and "ByteLevel" in repr(decoder)


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes with (Radford et al. 2019, GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in plain}
    for shift, byte in enumerate(sorted(set(range(256)) - set(plain))):
        alphabet[chr(256 + shift)] = byte
    return alphabet
