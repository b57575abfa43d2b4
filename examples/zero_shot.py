"""Give a model a new vocabulary without training: FVT (Gee et al. 2022), on the embedded demo data.

    python examples/zero_shot.py

Tokens that both vocabularies have keep their rows; a new token's row is the mean of the rows of the
source tokens that spell it.
"""

from collections import Counter

import tokalign_jax as ta

source = ta.load_model("embedded")  # English and code
tokenizer = ta.load_tokenizer("embedded")  # eight languages
alignment = ta.align(source.tokenizer, tokenizer, method="pieces")
model = ta.initialize(source, tokenizer, alignment)

print(f"{source.config.vocab_size:,} rows became {model.config.vocab_size:,}, of which")
for rule, count in Counter(alignment.rules.tolist()).items():
    print(f"  {count:6,} {ta.Rule(rule).name.lower()}")
print(ta.explain(alignment, source.tokenizer, tokenizer, " Datei")["embedding"])

texts = {language: [group[0][:2000]] for language, group in ta.load_texts("embedded").items()}
before, after = ta.evaluate(source, texts), ta.evaluate(model, texts)
for language in before:
    print(f"{language:4}{before[language]:6.2f} -> {after[language]:.2f} bits per byte")
ta.save(model, "adapted")
