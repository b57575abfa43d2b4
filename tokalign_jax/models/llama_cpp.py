"""Tokenizer tables of llama.cpp (release of November 2026, convert_hf_to_gguf.py).

llama.cpp identifies a BPE vocabulary by a hash of the ids of one text, and stores only the name of
its pre-tokenizer, which its own code implements.
"""

TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple "
    "emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333"
    " 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天"
    "～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!"
    "!!!?????? I've been 'told he's there, 'RE you sure? 'M not s"
    "ure I'll make it, 'D you like some tea? We'Ve a'lL"
)
"""The text whose ids are hashed."""

VOCABULARIES = {
    "a.x-4.0": "b0a6b1c0bd59",
    "afmoe": "49fc0303c9e0",
    "bailingmoe": "96a5f08be625",
    "bailingmoe2": "9b1be57e70d2",
    "bert-bge": "0876d13b5074",
    "bert-bge-large": "8e6229583275",
    "bloom": "3c30d3ad1d6b",
    "chameleon": "60824e3c0d94",
    "chatglm-bpe": "b6e8e1518dc4 81d72c7348a9",
    "codeshell": "7b3e7548e430",
    "cohere2moe": "52df12b4c8d4",
    "command-r": "9c2227e4dd92",
    "dbrx": "a8594e3edff7",
    "deepseek-coder": "347715f54460",
    "deepseek-llm": "049ecf762987",
    "deepseek-r1-qwen": "b3f499bb4255",
    "deepseek-v3": "877081d19cf6",
    "exaone": "4e2b24cc4770",
    "exaone-moe": "6c81ce329e08",
    "exaone4": "2085e1638f6c",
    "f2llmv2": "862f827721df",
    "falcon": "8aeee3860c56",
    "falcon-h1": "a6b57017d60e 60476e124377 3eda48b4c4dc 48f8e02c0359",
    "falcon3": "9d032fcbd550",
    "gemma4": "846deafc5b0f",
    "gigachat": "ad851be1dba6",
    "glm4": "a1336059768a 9ca2dd618e8a cdf5f3532578",
    "gpt-2": "0fe1cf6eda06 3ce83efda565",
    "gpt-4o": "ccc2ef013c10",
    "gpt3-finnish": "bc01ce58980e",
    "granite-docling": "53e325976a6e",
    "granite-embed-multi-311m": "789696f5946c",
    "granite-embed-multi-97m": "f24107214567",
    "grok-2": "66b8d4e19ab1",
    "hunyuan": "7e57df22b1fe",
    "hunyuan-dense": "bba3b3366b64",
    "hy_v4": "e6ddf9c66867",
    "jais": "b53802fb28e2",
    "jais-2": "bc5108ee1eb6",
    "jina-v1-en": "c7699093ba42",
    "jina-v2-code": "7967bfa498ad",
    "jina-v2-de": "b3d1dd861f1d 27949a2493fc",
    "jina-v2-en": "0876d13b5074",
    "jina-v2-es": "171aeeedd6fb",
    "jina-v5-nano": "a023e9fdc5a1",
    "joyai-llm": "b4b8ca1f9769",
    "kanana2": "e4d54df1ebc1",
    "kimi-k2": "81212dc7cdb7",
    "kormo": "4a2e2abae11c",
    "laguna": "972da7b59cec",
    "lfm2": "9e454714343b 169bf0296a13",
    "llama-bpe": "0ef9807a4087",
    "llama4": "d353350c764d",
    "megrez": "d4c8f286ea6b",
    "mellum": "a1e163ecab2e",
    "mellum2": "9dcf830ee999",
    "midm-2.0": "f6791d196f87",
    "minerva-7b": "1431a23e583c",
    "minicpm5": "36f3066e97b7",
    "minimax-m2": "f4f37b6c8eb9",
    "modern-bert": "a0b64b4385f1",
    "mpt": "b6dc8df998e1",
    "olmo": "b6dc8df998e1",
    "phi-2": "fcace8b9cac3",
    "pixtral": "0e9433cbbb16",
    "poro-chat": "c7ea5862a53e",
    "qwen2": "d4540891389e e636dc30a262",
    "qwen35": "1444df51289c d30d75d9059f",
    "refact": "6221ad2852e8",
    "roberta-bpe": "8b5a93ed7040",
    "sarvam-moe": "62f6fb0a6fd5",
    "seed-coder": "d5f1dd6f980f",
    "smaug-bpe": "c136ed14d01c",
    "smollm": "855059429035",
    "solar-open": "16389f0a1f51",
    "spark2_5": "0a766d034107",
    "stablelm2": "32d85c31273f",
    "starcoder": "35d91631860c",
    "superbpe": "7dec86086fcc",
    "talkie": "f728162c1315",
    "tekken": "63b97e425335",
    "tiny_aya": "d772b220ace2",
    "trillion": "1994ffd01900",
    "ufakzeka": "653660222fb7",
    "viking": "7fc505bd3104",
    "youtu": "9d70134b369a",
}
"""Names of pre-tokenizers -> the first 12 digits of the SHA-256 of ids, of each vocabulary."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"

PRE_TOKENIZERS = {
    (_WORDS + r"|\p{N}{1,3}" + _REST,): "llama-bpe",
    (_WORDS + r"|\p{N}" + _REST,): "qwen2",
    (
        _CONTRACTIONS
        + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        + r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "qwen35",
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
}
"""Steps of a byte-level pre-tokenizer (`serving.pre_tokenizer_steps`) -> llama.cpp's name."""
