"""Model cards: valid metadata and complete content."""

import re

import yaml

from tokalign_jax.reporting.model_card import CardFacts, front_matter, main_settings, model_card

BASE_CARD = """---
license: other
license_name: 'tongyi: "research"'
license_link: https://example.org/LICENSE
tags: [chat]
language: [en]
---
# A model
---
"""

FULL = CardFacts(
    base_model="me/base-1b@v1.0",
    target_tokenizer="you/tokenizer",
    name="me/new",
    base_card=BASE_CARD,
    terms=("LICENSE", "NOTICE"),
    model_type="llama",
    source_tokens=16_384,
    target_tokens=151_669,
    rows=151_680,
    settings={"alignment.method": "composed", "stage1.learning_rate": 6.4e-4},
    rules={"exact": {"rows": 40_000, "frequency": 0.5}, "mean": {"rows": 0, "frequency": 0.0}},
    corpus=("corpus.jsonl",),
    corpus_bytes={"de": 2_500_000, "en": 10_000_000, "code": 500_000, "no": 1_000_000},
    bits_per_byte={"source": {"en": 1.0784, "de": 1.5}, "export": {"en": 1.1, "all": 1.25}},
    bytes_per_token={"source": {"en": 4.0}, "target": {"en": 4.5}},
    loses=("capitals",),
    special=[
        {
            "token": "<|im_end|>",
            "id": 7,
            "source": "</s>",
            "why": "eos of the source",
            "in_chat_template": True,
        },
        {"token": "<|x|>", "id": 8, "source": "", "why": "its text", "in_chat_template": False},
    ],
    versions={"jax": "0.10.2"},
)


def test_front_matter_is_valid_yaml():
    assert front_matter(model_card(FULL)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "me/base-1b",
        "base_model_relation": "finetune",
        "license": "other",
        "license_name": 'tongyi: "research"',
        "license_link": "https://example.org/LICENSE",
        "language": ["de", "en", "no"],  # Norwegian, not a truth value
        "tags": ["tokalign-jax", "vocabulary-transfer", "llama"],
    }


def test_model_card_states_every_known_fact():
    card = model_card(FULL)
    for line in (
        "# me/base-1b with the vocabulary of you/tokenizer",
        "[me/base-1b](https://huggingface.co/me/base-1b) (revision `v1.0`)",
        "16,384 to 151,669 tokens",
        "151,680 rows",
        "AutoModelForCausalLM.from_pretrained('me/new'",
        "| total | 14.0 MB |",
        "Read from: `corpus.jsonl`.",
        "| language | source | export |",
        "| en | 1.078 | 1.100 |",
        "| de | 1.500 |  |",
        "does not keep capitals",
        "| exact | 40,000 | 50.00% |",
        r"| `<\|im_end\|>` | 7 | `</s>` | eos of the source | yes |",
        r"| `<\|x\|>` | 8 |  | its text |  |",
        "| `alignment.method` | `composed` |",
        "[LICENSE](LICENSE), [NOTICE](NOTICE)",
        "| jax | 0.10.2 |",
    ):
        assert re.sub(" +", " ", line) in re.sub(" +", " ", card), line
    assert "| mean" not in card
    # Every row of a table has as many cells as its header.
    body = card.split("---\n", 2)[2]
    for table in "".join(
        f"{line}\n" if line.startswith("|") else "\f" for line in body.splitlines()
    ).split("\f"):
        cells = {line.replace(r"\|", "").count("|") for line in table.splitlines()}
        assert len(cells) <= 1, table


def test_local_source_is_no_base_model_on_the_hub(tmp_path):
    card = model_card(CardFacts(base_model=str(tmp_path / "my-model"), target_tokenizer="embedded"))
    found = front_matter(card)
    assert found == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tokalign-jax", "vocabulary-transfer"],
    }
    assert str(tmp_path) not in card and "my-model with the vocabulary of embedded" in card
    assert "states no licence" in card
    for title in ("Data", "Bits per byte", "Special tokens", "Settings", "Versions"):
        assert f"## {title}" not in card


def test_missing_or_invalid_front_matter_is_empty():
    for card in (
        "",
        "# title",
        "---\nlicense: [broken\n---\n",
        "---\njust text\n---\n",
        "text\n---\na: 1\n---\n",
    ):
        assert front_matter(card) == {}
    assert front_matter("\ufeff---\r\nlicense: mit\r\n---\r\ntext") == {"license": "mit"}
    assert front_matter("---\nlicense: mit\n---") == {"license": "mit"}


def test_listed_settings_exist_in_the_config():
    config = {
        "seed": 0,
        "alignment": {"method": "composed", "window": 15, "file": ""},
        "stage1": {"steps": 5},
        "stage3": {"steps": 0},
    }
    assert main_settings(config) == {"alignment.method": "composed", "stage1.steps": 5, "seed": 0}
    assert yaml.safe_load(yaml.safe_dump(main_settings(config))) == main_settings(config)
