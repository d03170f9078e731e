import json

import msgspec
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from trio_edge.runtime.bundle.errors import BundleError, ShapeError
from trio_edge.runtime.bundle.manifest import TextSpec
from trio_edge.runtime.prompts.chat import MISTRAL_TEMPLATE, VICUNA_TEMPLATE, build_messages, render_chat
from trio_edge.runtime.prompts.tokenizer import DetokenizeStream, Inset, Tokenizer

CORPUS = [
    "USER: what is shown in this picture? ASSISTANT: a red circle and a green square.",
    "[INST] count them [/INST]",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<image>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def _with_bos(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def _llama_like() -> tokenizers.Tokenizer:
    """SentencePiece-style BPE with byte fallback, as Llama's and Mistral's."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    return _with_bos(tokenizers.Tokenizer.from_str(json.dumps(state)))


def _byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _unigram() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with_bos(tokenizer)


BACKENDS = {"llama": _llama_like(), "byte level": _byte_level(), "unigram": _unigram()}
LLAMA = Tokenizer(BACKENDS["llama"])
IMAGE = TextSpec(
    tokenizer="tokenizer.json",
    chat_template="chat_template.jinja",
    image_token="<image>",
    image_token_id=BACKENDS["llama"].token_to_id("<image>"),
    bos_token="",
    eos_token="</s>",
    stop_token_ids=(),
)
ONE = [Inset()]
"""One image, whose visual tokens are one run without text."""


def _hugging_face(backend: tokenizers.Tokenizer, template: str) -> LlavaNextProcessor:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 56]]
    )
    return LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip


@pytest.mark.parametrize("bos", ["", "{{ bos_token }}"], ids=["template without bos", "template with bos"])
@pytest.mark.parametrize("template", [VICUNA_TEMPLATE, MISTRAL_TEMPLATE], ids=["vicuna", "mistral"])
@pytest.mark.parametrize("name", BACKENDS)
def test_ids_equal_hugging_face_apply_chat_template(name, template, bos):
    template = bos + template
    processor = _hugging_face(BACKENDS[name], template)
    messages = build_messages("count the red squares, 你!", images=[None])
    picture = np.zeros((20, 40, 3), np.uint8)
    conversation = [
        {**messages[0], "content": [{"type": "image", "image": picture}, messages[0]["content"][1]]}
    ]
    theirs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"][0]  # fmt: skip
    image_id = processor.image_token_id

    rendered = render_chat(
        messages, template=template, special_tokens={"bos_token": "<s>", "eos_token": "</s>"}
    )
    spec = msgspec.structs.replace(IMAGE, image_token_id=image_id, bos_token="<s>")
    ids = Tokenizer(BACKENDS[name]).encode_prompt(rendered, spec, ONE)

    first, last = theirs.index(image_id), len(theirs) - theirs[::-1].index(image_id)
    assert last - first > 1
    assert ids.before.tolist() == list(theirs[:first])
    assert ids.after.tolist() == list(theirs[last:])
    assert ids.before.dtype == np.int32


def test_a_prompt_without_image_is_all_before():
    ids = LLAMA.encode_prompt("USER: hi ASSISTANT:", IMAGE)
    assert len(ids.before) > 1
    assert len(ids.after) == 0
    assert ids.text_before == ()


@pytest.mark.parametrize(
    ("text", "num_images", "message"),
    [
        ("<image> what is <image>?", 1, "expected 1 image token '<image>' for 1 image, got 2"),
        ("what?", 2, "expected 2 image tokens '<image>' for 2 images, got 0"),
        ("what is <image>?", 0, "expected 0 image tokens '<image>' for 0 images, got 1"),
    ],
)
def test_another_number_of_image_tokens_is_refused(text, num_images, message):
    with pytest.raises(ShapeError, match=message):
        LLAMA.encode_prompt(text, IMAGE, ONE * num_images)


def test_an_image_token_of_another_tokenizer_is_refused():
    with pytest.raises(BundleError, match="to have id 999, got 3"):
        LLAMA.encode_prompt("<image>", msgspec.structs.replace(IMAGE, image_token_id=999), ONE)


@pytest.mark.parametrize("text", ["a <image> b", "</s>", "x<s>"])
def test_special_tokens_in_a_users_text_are_refused(text):
    with pytest.raises(ShapeError, match="expected plain text, got the special token"):
        LLAMA.check_user_text(text)


@pytest.mark.parametrize("text", ["", "a < b > c", "nul \0 byte", "你好 🙂", "<imagine>"])
def test_ordinary_text_is_accepted(text):
    LLAMA.check_user_text(text)


def test_lone_surrogates_are_refused():
    with pytest.raises(ShapeError, match="a lone surrogate at character 2"):
        LLAMA.encode_prompt("ab\ud800", IMAGE)
    with pytest.raises(ShapeError, match="a lone surrogate at character 0"):
        LLAMA.check_user_text("\udfff")


def test_a_null_character_is_a_character_like_others():
    assert LLAMA.decode(LLAMA.encode_prompt("a\0b", IMAGE).before) == "a\0b"


def test_an_empty_prompt_is_its_bos_or_an_error():
    assert LLAMA.encode_prompt("", IMAGE).before.tolist() == [1]
    with pytest.raises(ShapeError, match="expected some text, got none"):
        Tokenizer(BACKENDS["byte level"]).encode_prompt("", IMAGE)


def test_truncation_and_padding_of_the_file_are_ignored():
    backend = tokenizers.Tokenizer.from_str(BACKENDS["llama"].to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=100)
    ids = Tokenizer(backend).encode_prompt("USER: what is shown", IMAGE).before
    assert ids.tolist() == LLAMA.encode_prompt("USER: what is shown", IMAGE).before.tolist()


@pytest.mark.parametrize("content", [None, "", "{}", "not json", "[1]"])
def test_a_missing_or_broken_file_is_one_error_line(content, tmp_path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(
        BundleError, match=r"tokenizer '.*': expected a .*; export the bundle again"
    ) as caught:
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)


def test_a_saved_tokenizer_is_read(tmp_path):
    BACKENDS["llama"].save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").decode([5]) == LLAMA.decode([5])


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(BACKENDS)), st.data())
def test_streamed_pieces_equal_decoding_all_ids(name, data):
    tokenizer = Tokenizer(BACKENDS[name])
    ids = data.draw(st.lists(st.integers(0, BACKENDS[name].get_vocab_size() - 1), max_size=30))
    stream = DetokenizeStream(tokenizer)
    pieces = [stream.push(token_id) for token_id in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["llama", "byte level"]), st.text(max_size=20))
def test_no_streamed_piece_of_whole_text_holds_half_a_character(name, text):
    backend = BACKENDS[name]
    stream = DetokenizeStream(Tokenizer(backend))
    text = text.replace("\ufffd", "")
    ids = backend.encode(text, add_special_tokens=False).ids
    pieces = [stream.push(token_id) for token_id in ids] + [stream.finish()]
    assert "\ufffd" not in "".join(pieces)


def test_text_streams_token_by_token():
    ids = BACKENDS["llama"].encode("a red circle", add_special_tokens=False).ids
    stream = DetokenizeStream(LLAMA)
    pieces = [stream.push(token_id) for token_id in ids]
    assert sum(bool(piece) for piece in pieces) >= 3
    assert "".join(pieces) == "a red circle"
    assert stream.finish() == ""


def test_a_skipped_token_does_not_end_a_run_of_bytes():
    ids = [BACKENDS["llama"].token_to_id(token) for token in ("<0x00>", "<unk>", "<0x80>")]
    stream = DetokenizeStream(LLAMA)
    assert [stream.push(token_id) for token_id in ids] == ["", "", ""]
    assert stream.finish() == LLAMA.decode(ids)


def test_special_tokens_are_not_streamed():
    stream = DetokenizeStream(LLAMA)
    assert stream.push(2) + stream.finish() == ""
