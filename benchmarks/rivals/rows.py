"""Replace a model's embedding by rows for another tokenizer, in PyTorch; shared by the rivals.

It imports nothing of this project, since each rival runs in a separate environment.
"""

import resource
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

MakeRows = Callable[[PreTrainedTokenizerBase, PreTrainedTokenizerBase, torch.Tensor], torch.Tensor]
"""(source tokenizer, target tokenizer, float32 rows of the source) -> float32 rows of the
target."""


def replace(source: str, target: str, output: Path, make: MakeRows) -> None:
    """Writes the model `source` with the tokenizer `target` and the rows that `make` gives it.

    An untied head gets rows of its own, made in the same way from the head of the source.
    """
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, target)]
    model = AutoModelForCausalLM.from_pretrained(source)
    tied = model.config.tie_word_embeddings
    layers = [model.get_input_embeddings()] + ([] if tied else [model.get_output_embeddings()])
    made = [make(*tokenizers, layer.weight.detach().float()) for layer in layers]
    kind = layers[0].weight.dtype
    model.resize_token_embeddings(len(made[0]))
    layers = [model.get_input_embeddings()] + ([] if tied else [model.get_output_embeddings()])
    with torch.no_grad():
        for layer, rows in zip(layers, made):
            layer.weight.copy_(rows.to(kind))
    model.config.bos_token_id = tokenizers[1].bos_token_id
    model.config.eos_token_id = tokenizers[1].eos_token_id
    model.config.pad_token_id = tokenizers[1].pad_token_id
    model.generation_config.eos_token_id = tokenizers[1].eos_token_id
    model.save_pretrained(output)
    tokenizers[1].save_pretrained(output)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{len(made[0]):,} rows; {peak / 1e6:.2f} GB of host memory at most")
