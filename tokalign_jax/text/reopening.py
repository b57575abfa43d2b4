"""Read a tokenizer folder with AutoTokenizer, as users do, and compare its behaviour on texts.

transformers selects the class by `model_type` and `tokenizer_class`, and some classes rebuild
normaliser and pre-tokenizer in code, so that the same tokenizer.json gives other ids. As a script
(`python reopening.py FOLDER`) this prints the reading as JSON; it imports only transformers.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reading = Mapping[str, Any]
"""Behaviour of a tokenizer on `TEXTS`, as returned by `read`."""

TEXTS = (
    (
        "The quick brown fox jumps over the lazy dog. It's 7:05 p.m., and they'll say we've don'ted"
        " I'M."
    ),
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich; Straße, ÄÖÜ.",
    "Portez ce vieux whisky au juge blond qui fume : l'été dernier, « ça » coûtait 12,50 €.",
    "El pingüino Wenceslao hizo kilómetros. ¿Qué tal? ¡Año 2023!",
    "À noite, vovô Kowalsky vê o ímã cair no pé do pinguim queixoso. Ações, coração.",
    "Quel vituperabile xenofobo zelante assaggia il whisky ed esclama: «alleluja!», perché no?",
    "Pchnąć w tę łódź jeża lub ośm skrzyń fig.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Flygande bäckasiner söka hwila på mjuka tuvor; Høj bly gom vandt fræk sexquiz på wc.",
    "Árvíztűrő tükörfúrógép. Pijamalı hasta yağız şoföre çabucak güvendi: İstanbul, ılık.",
    "Do bạch kim rất quý nên sẽ dùng để lắp vô xương. Tiếng Việt.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Ґанок, їжак, ёлка.",
    "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία. Καλημέρα, κόσμε!",
    "נא להיזהר משועל חום מהיר. שָׁלוֹם",
    "نص حكيم له سر قاطع وذو شأن عظيم، السَّلامُ ١٢٣ — فارسی: می‌خواهم.",
    "ऋषियों को सताने वाले दुष्ट राक्षसों का राजा। १२३ हिन्दी",
    "আমার সোনার বাংলা। தமிழ் மொழி. తెలుగు భాష. ಕನ್ನಡ. മലയാളം.",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ๑๒๓ ພາສາລາວ ភាសាខ្មែរ မြန်မာ",
    "我能吞下玻璃而不伤身体。二〇二三年，繁體中文：臺灣。",
    "いろはにほへと ちりぬるを。カタカナ、漢字とｶﾅ。２０２３年",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. ㄱㄴㄷ",
    "ქართული ენა. Հայերեն լեզու. አማርኛ ቋንቋ. བོད་སྐད། ᏣᎳᎩ ꙮ",
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 0x7fff 1e-05 ½ ² ① Ⅳ 20% $9.99",
    (
        "def f(x: int = 0) -> dict[str, list]:\n    if x >= 10 and x != 3:\n\t\treturn {'a':"
        " [x**2]}  # note\n"
    ),
    '#include <stdio.h>\nint main(void) { printf("%d\\n", a[i]->b & 0xFF); /* c */ return 0; }\r\n',
    (
        '<div class="a-b_c">&amp; &lt;</div> https://example.org/a?b=c&d=e#f me@example.org'
        " C:\\dir\\file"
    ),
    "\\frac{1}{2} $x_{i}^{2}$ ∑∞√≤ α→β {{ x }} snake_case camelCase CONSTANT_CASE kebab-case",
    " one space  two   three\t\ttabs \n\n\n lines \r\n   trailing   ",
    "    four\n        eight\n\u00a0no break\u2003em\u3000wide\u200bzero",
    "can't I'LL YOU'RE we’re ‘quoted’ “words” … – — ... !!! ??? a.b , c . d ! ' s n't",
    "👍🏽 👩‍👩‍👧‍👦 🇩🇪 ☕️ 🤷‍♀️ ❤️ 🧿 \U00012031",
    "e\u0301 n\u0303 A\u030a \u1100\u1161 ﬁ ﬀ Å Ω ｆｕｌｌ ＷＩＤＴＨ \ufeffx \x00 \x07 \x7f",
    "",
    " ",
    "\n",
)
"""Short texts in many scripts, numbers, code, white space, contractions, emoji and rare characters.
"""


AROUND_ADDED = "a {0} b{0}c\n{0}"
"""Surroundings of an added token that show whether it is found in text and takes spaces with it."""


def read(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return ids of every text with and without added special tokens, decodings, and roles.

    Also the ids of texts that contain the tokenizer's added tokens.
    """
    added = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    around_added = [AROUND_ADDED.format(token) for token in added]
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    roles = ("bos", "eos", "pad")
    return {
        "class": type(tokenizer).__name__,
        "size": len(tokenizer),
        "ids": ids,
        "bare": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS],
        "added": [
            [text, tokenizer(text, add_special_tokens=False)["input_ids"]] for text in around_added
        ],
        "decoded": [tokenizer.decode(text_ids) for text_ids in ids],
        "stripped": [tokenizer.decode(text_ids, skip_special_tokens=True) for text_ids in ids],
        "roles": {role: getattr(tokenizer, f"{role}_token_id") for role in roles},
        "template": tokenizer.chat_template,
    }


def difference(expected: Reading, actual: Reading) -> str:
    """Describe the first difference between two readings; "" if they are equal."""
    if text_difference := cut_difference(expected, actual):
        return text_difference
    for key, name in (
        ("size", "tokens"),
        ("roles", "bos, eos and pad"),
        ("template", "the template"),
    ):
        if expected[key] != actual[key]:
            return f"{name}: {actual[key]!r:.80} instead of {expected[key]!r:.80}"
    return ""


def cut_difference(expected: Reading, actual: Reading) -> str:
    """Describe the first text that two tokenizers encode or decode differently, or ""."""
    for key, verb in (
        ("ids", "tokenized to"),
        ("bare", "tokenized to"),
        ("decoded", "decoded to"),
        ("stripped", "decoded to"),
    ):
        for text, one, other in zip(TEXTS, expected[key], actual[key]):
            if one != other:
                return _described(text, verb, one, other)
    # Tokens that only one of them has are reported by their number.
    others = dict(actual["added"])
    for text, ids in expected["added"]:
        if others.get(text, ids) != ids:
            return _described(text, "tokenized to", ids, others[text])
    return ""


def _described(text: str, verb: str, expected: Sequence[Any], actual: Sequence[Any]) -> str:
    place = next((i for i, pair in enumerate(zip(expected, actual)) if pair[0] != pair[1]), 0)
    shown = (f"{x[place : place + 8]!r}" for x in (actual, expected))
    return f"{text[:40]!r} is {verb} {' instead of '.join(shown)} (from place {place} on)"


def read_afresh(folder: Path, python: str = sys.executable) -> Reading:
    """Return the reading of a folder by a new Python process, without network and PyTorch.

    Args:
      folder: the tokenizer's.
      python: the interpreter.

    Raises:
      RuntimeError: it cannot be opened; the message is the last line of its output.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONUTF8": "1",
    }
    command = [python, "-P", __file__, str(folder)]
    process = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, check=False
    )
    if process.returncode:
        raise RuntimeError(
            (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        )
    return json.loads(process.stdout.splitlines()[-1])


if __name__ == "__main__":
    # Without PyTorch, whose import takes seconds.
    sys.modules["torch"] = None  # type: ignore[assignment]
    from transformers import AutoTokenizer

    print(json.dumps(read(AutoTokenizer.from_pretrained(sys.argv[1]))))
