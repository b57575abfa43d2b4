"""Roles of special tokens: document separators, ends of turns, counterparts in other
vocabularies.
"""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from tests.alignment.test_rules import byte_level
from tokalign_jax.alignment import methods
from tokalign_jax.errors import UserError
from tokalign_jax.evaluation.bits_per_byte import first_context
from tokalign_jax.models import hub
from tokalign_jax.text import special_tokens, tokenizing
from tokalign_jax.text.special_tokens import SEPARATOR, counterparts, end_of_text_id


def special(*tokens: str, template: str = "", **roles: str) -> PreTrainedTokenizerFast:
    made = byte_level(first=tokens, **{f"{role}_token": token for role, token in roles.items()})
    if template:
        made.chat_template = template
    return made


def smollm2() -> PreTrainedTokenizerFast:
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return special(
        *names, bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>", unk="<|endoftext|>"
    )


def qwen3() -> PreTrainedTokenizerFast:
    return special(
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", eos="<|im_end|>", pad="<|endoftext|>"
    )


def gemma3() -> PreTrainedTokenizerFast:
    names = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    return special(*names, bos="<bos>", eos="<eos>", pad="<pad>", unk="<unk>")


def gemma3_for_chats() -> PreTrainedTokenizerFast:
    names = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    return special(*names, bos="<bos>", eos="<end_of_turn>", pad="<pad>", unk="<unk>")


def llama3_for_chats() -> PreTrainedTokenizerFast:
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>")
    return special(*names, bos="<|begin_of_text|>", eos="<|eot_id|>")


def named(tokenizer, index: int | None) -> str:
    return str(tokenizer.convert_ids_to_tokens(index))


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (smollm2(), "<|endoftext|>"),
        (qwen3(), "<|endoftext|>"),
        (gemma3(), "<eos>"),
        (gemma3_for_chats(), "<eos>"),
        (llama3_for_chats(), "<|end_of_text|>"),
        (special("<｜end▁of▁sentence｜>", "<|EOT|>", eos="<|EOT|>"), "<｜end▁of▁sentence｜>"),
        (
            special("<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", eos="<|END_OF_TURN_TOKEN|>"),
            "<EOS_TOKEN>",
        ),
        # Its name says nothing, but chats are written with it.
        (special("</s>", "<|stop|>", eos="<|stop|>", template="{{ messages[0] }}<|stop|>"), "</s>"),
        (
            special(
                "</s>", "<|stop|>", eos="<|stop|>", template="{{ messages[0] }}{{ eos_token }}"
            ),
            "</s>",
        ),
        (special("</s>", "<|stop|>", eos="<|stop|>"), "<|stop|>"),
        # LLaMA 2 for chats: the end of text also ends answers.
        (
            special(
                "<s>",
                "</s>",
                eos="</s>",
                template="{{ bos_token }}{{ messages[0] }}{{ eos_token }}",
            ),
            "</s>",
        ),
        (special("<|endoftext|>", "</s>", eos="</s>"), "</s>"),
        (
            special("<|im_start|>", "<|im_end|>", eos="<|im_end|>"),
            "<|im_end|>",
        ),  # there is no other
    ],
)
def test_separator_is_end_of_text_not_end_of_turn(tokenizer, expected):
    assert named(tokenizer, end_of_text_id(tokenizer)) == expected


def test_opening_token_is_no_start_of_turn():
    assert named(smollm2(), first_context(smollm2())) == "<|endoftext|>"
    assert named(gemma3(), first_context(gemma3())) == "<bos>"
    assert named(qwen3(), first_context(qwen3())) == "<|endoftext|>"


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (
            smollm2(),
            qwen3(),
            {
                "<|endoftext|>": "<|endoftext|>",
                "<|im_start|>": "<|im_start|>",
                "<|im_end|>": "<|im_end|>",
            },
        ),
        (
            gemma3(),
            qwen3(),
            {
                "<|endoftext|>": "<eos>",
                "<|im_start|>": "<start_of_turn>",
                "<|im_end|>": "<end_of_turn>",
            },
        ),
        (
            smollm2(),
            gemma3_for_chats(),
            {
                "<eos>": "<|endoftext|>",
                "<end_of_turn>": "<|im_end|>",
                "<start_of_turn>": "<|im_start|>",
                "<bos>": "<|endoftext|>",  # the source's bos begins turns
                "<pad>": "<|endoftext|>",  # and its pad ends them
                "<unk>": "<|endoftext|>",
            },
        ),
        (
            special("<|endoftext|>", "a", eos="<|endoftext|>"),  # a model without chats
            llama3_for_chats(),
            {
                "<|end_of_text|>": "<|endoftext|>",
                "<|eot_id|>": "<|endoftext|>",
                "<|begin_of_text|>": "<|endoftext|>",
            },
        ),
        (
            special(
                "<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", eos="<|endoftext|>"
            ),
            special("</s>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", eos="</s>"),
            {
                "<｜fim▁begin｜>": "<fim_prefix>",
                "<｜fim▁hole｜>": "<fim_suffix>",
                "<｜fim▁end｜>": "<fim_middle>",
            },
        ),
        # By text before role: the first is the source's mask and the target's pad.
        (
            special("</s>", "<x>", "<pad>", eos="</s>", mask="<x>", pad="<pad>"),
            special("</s>", "<x>", eos="</s>", pad="<x>"),
            {"<x>": "<x>"},
        ),
    ],
)
def test_rows_of_special_tokens_come_from_the_same_text_or_use_before_the_same_role(
    source, target, expected
):
    found = methods.special_matches(source, target)
    assert {
        named(target, i): named(source, match.token) for i, match in found.items()
    }.items() >= expected.items()


def test_counterparts_are_symmetric():
    source, target = gemma3(), qwen3()
    for one, other in (("<end_of_turn>", "<|im_end|>"), ("<eos>", "<|endoftext|>")):
        (there,) = counterparts([source.convert_tokens_to_ids(one)], source, target).values()
        (back,) = counterparts([target.convert_tokens_to_ids(other)], target, source).values()
        assert named(target, there.token) == other
        assert named(source, back.token) == one
    assert not counterparts([source.convert_tokens_to_ids("<pad>")], source, target)


def test_eos_of_any_name_that_ends_turns_has_a_counterpart():
    stop = special("</s>", "<|stop|>", eos="<|stop|>", template="{{ messages[0] }}<|stop|>")
    for other in (qwen3(), llama3_for_chats(), gemma3_for_chats()):
        for one, two in ((stop, other), (other, stop)):
            (found,) = counterparts([one.eos_token_id], one, two).values()
            assert named(two, found.token) == two.eos_token
            assert found.why == f"same use as {two.eos_token}"


def test_special_tokens_are_not_listed_once_per_special_token(monkeypatch):
    """Gemma 3 has 6,400 of them, so that would take minutes."""
    listed = []
    special_ids = special_tokens.special_ids
    monkeypatch.setattr(
        special_tokens, "special_ids", lambda tokenizer: listed.append(1) or special_ids(tokenizer)
    )
    one, two = (special("</s>", *(f"<{n}{i}>" for i in range(50)), eos="</s>") for n in "ab")
    assert len(methods.special_matches(one, two)) == 1
    assert len(listed) < 10


def test_separator_is_logged_and_can_be_overridden(tmp_path):
    lines = [tokenizing._separator_line("target", tokenizer) for tokenizer in (qwen3(), gemma3())]
    assert lines == [
        "'<|endoftext|>' separates documents in the target tokenizer; its eos, '<|im_end|>', ends turns of a chat",
        "'<eos>' separates documents in the target tokenizer",
    ]
    alone = special("<|im_start|>", "<|im_end|>", eos="<|im_end|>")
    line = tokenizing._separator_line("target", alone)
    assert line.startswith("warning: '<|im_end|>' separates") and "--config.end_of_text" in line

    qwen3().save_pretrained(tmp_path / "chat")
    for name in ("<|im_end|>", "<|endoftext|>", "<|document|>"):
        chosen = hub.load_tokenizer(tmp_path / "chat", name)
        assert named(chosen, end_of_text_id(chosen)) == name and chosen.eos_token == "<|im_end|>"
        chosen.save_pretrained(tmp_path / name.strip("<|>"))
        again = hub.load_tokenizer(tmp_path / name.strip("<|>"))
        assert named(again, end_of_text_id(again)) == name and again.eos_token == "<|im_end|>"
    settings = json.loads((tmp_path / "chat" / "tokenizer_config.json").read_text()) | {
        SEPARATOR: "<gone>"
    }
    (tmp_path / "chat" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no token '<gone>', which document_separator"):
        end_of_text_id(hub.load_tokenizer(tmp_path / "chat"))


def exported_ends(tmp_path, source, target, eos, generation_eos) -> tuple:
    source.save_pretrained(tmp_path / "source")
    hub.write_json(
        tmp_path / "source" / "generation_config.json",
        {"eos_token_id": generation_eos, "top_p": 0.9},
    )
    (tmp_path / "out").mkdir()
    config = {"model_type": "llama", "eos_token_id": eos, "vocab_size": len(target)}
    hub.save_config_and_tokenizer(tmp_path / "out", config, target, tmp_path / "source")
    written = [
        hub.read_json(tmp_path / "out" / f"{kind}config.json") or {} for kind in ("", "generation_")
    ]
    names = [target.convert_ids_to_tokens(config["eos_token_id"]) for config in written]
    return (*names, hub.load_tokenizer(tmp_path / "out").eos_token)


@pytest.mark.parametrize(
    ("source", "target", "eos", "expected"),
    [
        (gemma3(), qwen3(), ["<eos>", "<end_of_turn>"], ["<|im_end|>", "<|endoftext|>"]),
        (
            gemma3(),
            special("<|endoftext|>", "<|im_end|>", eos="<|endoftext|>"),
            ["<eos>", "<end_of_turn>"],
            ["<|endoftext|>", "<|im_end|>"],
        ),
        (qwen3(), gemma3(), ["<|im_end|>", "<|endoftext|>"], ["<eos>", "<end_of_turn>"]),
        (smollm2(), qwen3(), "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
        (smollm2(), gemma3(), "<|im_end|>", ["<eos>", "<end_of_turn>"]),
        (
            gemma3(),
            special("<|endoftext|>", "a", eos="<|endoftext|>"),
            ["<eos>", "<end_of_turn>"],
            "<|endoftext|>",
        ),
        # GLM's turns end where the user's begins.
        (
            special("<|endoftext|>", "<|user|>", "<|observation|>", eos="<|endoftext|>"),
            special("<eos>", "<end_of_turn>", eos="<eos>"),
            ["<|endoftext|>", "<|user|>", "<|observation|>"],
            ["<eos>", "<end_of_turn>"],
        ),
        # Text at which the source stops.
        (
            special("<|endoftext|>", eos="<|endoftext|>"),
            special("</s>", eos="</s>"),
            ["<|endoftext|>", "Ċ"],
            ["</s>", "Ċ"],
        ),
    ],
)
def test_export_stops_at_the_sources_stop_tokens_and_end_of_document(
    tmp_path, source, target, eos, expected
):
    ids = source.convert_tokens_to_ids(eos)
    config, generation, tokenizer = exported_ends(
        tmp_path, source, target, source.eos_token_id, ids
    )
    assert generation == expected
    assert config == tokenizer == target.eos_token


def test_export_stops_at_the_eos_of_the_sources_tokenizer_without_ids_in_its_configs(tmp_path):
    config, generation, _ = exported_ends(tmp_path, qwen3(), gemma3(), None, None)
    assert (config, generation) == ("<eos>", ["<eos>", "<end_of_turn>"])


def test_token_of_the_same_text_that_is_not_special_stops(tmp_path):
    target = special("<|endoftext|>", eos="<|endoftext|>")
    target.add_tokens(["<|im_end|>"], special_tokens=False)
    ids = qwen3().convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    _, generation, _ = exported_ends(tmp_path, qwen3(), target, ids[0], ids)
    assert generation == ["<|endoftext|>", "<|im_end|>"]


@pytest.mark.parametrize("token", ["the", " ", "\n", "None", "Ċ"])
def test_text_cannot_separate_documents(tmp_path, token):
    """As a special token it would be cut out of every text that the exported tokenizer reads."""
    special("<|endoftext|>", "EOS", eos="EOS").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"end_of_text .* can occur in text"):
        hub.load_tokenizer(tmp_path, token)
    for allowed in ("EOS", "<|endoftext|>", "<new>", "[END]"):
        tokenizer = hub.load_tokenizer(tmp_path, allowed)
        assert tokenizer.convert_ids_to_tokens(end_of_text_id(tokenizer)) == allowed


def test_stop_tokens_without_a_counterpart_are_listed():
    source = special("<|endoftext|>", "<|user|>", eos="<|endoftext|>")
    target = special("</s>", eos="</s>")
    ids, missing = hub.stop_tokens([{"eos_token_id": [0, 1]}], source, target)
    assert (ids, missing) == ([target.eos_token_id], ["<|user|>"])


def test_text_token_as_the_only_eos_of_a_config_is_a_default(tmp_path):
    """Configs of models trained from scratch often keep the eos of their class, 2."""
    source = special("<|endoftext|>", eos="<|endoftext|>")
    _, generation, _ = exported_ends(tmp_path, source, gemma3(), 2, 2)
    assert generation == "<eos>"
