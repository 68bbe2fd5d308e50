"""Text that grows token by token is the tokenizer's text; stop strings are found wherever tokens part them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_fakes import FakeCodec

from ds_inference.errors import RequestError
from ds_inference.serve.text import HuggingFaceCodec, StopText, TextStream

CODEC = FakeCodec()
TEXTS = st.text(alphabet="ab é€𝄞 \u0301\n", max_size=40)


def grown(tokens: list[int], prompt: list[int], sizes: list[int]) -> str:
    stream = TextStream(CODEC.decode, prompt)
    pieces = []
    while tokens:
        size = sizes.pop() if sizes else 1
        pieces.append(stream.push(tokens[:size]))
        tokens = tokens[size:]
    return "".join(pieces) + stream.finish()


class TestTextStream:
    @given(TEXTS, TEXTS, st.lists(st.integers(1, 5), max_size=40))
    def test_pieces_are_the_text(self, text: str, prompt: str, sizes: list[int]) -> None:
        assert grown(list(text.encode()), list(prompt.encode()), sizes) == text

    @given(st.binary(max_size=40))
    def test_any_bytes_end(self, content: bytes) -> None:
        """Bytes that are no text lose at most how many replacement characters there are."""
        text = grown(list(content), [], [])
        assert text.replace("\ufffd", "") == content.decode(errors="replace").replace("\ufffd", "")

    def test_a_character_comes_when_it_is_complete(self) -> None:
        stream = TextStream(CODEC.decode)
        assert [stream.push([byte]) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]
        assert stream.finish() == ""

    def test_what_is_never_completed_comes_at_the_end(self) -> None:
        stream = TextStream(CODEC.decode)
        assert stream.push(list("€".encode())[:2]) == ""
        assert stream.finish() == "\ufffd"

    def test_each_token_is_decoded_a_few_times_only(self) -> None:
        decoded = 0

        def decode(tokens: Any) -> str:
            nonlocal decoded
            decoded += len(tokens)
            return CODEC.decode(tokens)

        stream = TextStream(decode, list(b"x" * 1000))
        for _ in range(1000):
            stream.push([97])
        assert decoded < 5000

    def test_leading_space_of_sentencepiece(self) -> None:
        """A tokenizer that drops the space of the first token: the prompt before it keeps it."""
        words = ["Once", " upon", " a", " time"]
        stream = TextStream(lambda tokens: "".join(words[token] for token in tokens).removeprefix(" "), [0, 1])
        assert stream.push([2]) + stream.push([3]) == " a time"


class TestStopText:
    @given(
        st.lists(st.text(alphabet="ab", min_size=1, max_size=3), max_size=20),
        st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    )
    def test_the_text_ends_before_the_first_stop_that_is_complete(self, pieces: list[str], stops: list[str]) -> None:
        out = StopText(tuple(stops))
        given_out = ""
        for count, piece in enumerate(pieces, 1):
            given_out += out.push(piece)
            text = "".join(pieces[:count])
            found = [at for stop in stops if (at := text.find(stop)) >= 0]
            if found:
                assert out.stopped in stops
                assert given_out == text[: min(found)]
                return
            assert text.startswith(given_out)
            assert len(text) - len(given_out) < max(map(len, stops))
        assert out.stopped is None
        assert given_out + out.finish() == "".join(pieces)

    def test_only_a_possible_beginning_is_held_back(self) -> None:
        out = StopText(("END",))
        assert [out.push(piece) for piece in ("abcE", "N", "T", "E", "ND?")] == ["abc", "", "ENT", "", ""]
        assert out.stopped == "END"


class TestHuggingFaceCodec:
    @pytest.fixture
    def tokenizer(self) -> Any:
        transformers = pytest.importorskip("transformers")
        tokenizers = pytest.importorskip("tokenizers")
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        inner.train_from_iterator(["the cat and the dog and the horse"] * 10, trainer)
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
        made.chat_template = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
        return made

    @pytest.mark.parametrize("text", ["the cat", "naïve € 𝄞 dog", "  and\n"])
    def test_round_trip_and_growing(self, tokenizer: Any, text: str) -> None:
        codec = HuggingFaceCodec(tokenizer)
        tokens = codec.encode(text)
        assert tokens == tokenizer.encode(text)
        stream = TextStream(codec.decode)
        assert "".join(stream.push([token]) for token in tokens) + stream.finish() == text
        assert b"".join(codec.token_bytes(token) for token in tokens) == text.encode()

    def test_special_tokens_are_not_text(self, tokenizer: Any) -> None:
        codec = HuggingFaceCodec(tokenizer)
        end = tokenizer.eos_token_id
        assert codec.decode([*codec.encode("dog"), end]) == "dog"
        assert codec.token_bytes(end) == b"</s>"

    def test_template(self, tokenizer: Any) -> None:
        codec = HuggingFaceCodec(tokenizer)
        assert codec.chat([{"role": "user", "content": "hi"}], continue_last=False, options={}) == "user=hi;"
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(RequestError, match="roles must alternate"):
            codec.chat([{"role": "user", "content": "hi"}], continue_last=False, options={})
        tokenizer.chat_template = None
        with pytest.raises(RequestError, match="no chat template"):
            codec.chat([{"role": "user", "content": "hi"}], continue_last=False, options={})
