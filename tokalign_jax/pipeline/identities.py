"""Digests of outside files, which identify runs and results of stages."""

from pathlib import Path
from typing import Any

from tokalign_jax.config import Config
from tokalign_jax.evaluation import abilities, chat_questions
from tokalign_jax.parallel import distributed
from tokalign_jax.pipeline import held_out
from tokalign_jax.pipeline.context import Context
from tokalign_jax.pipeline.inputs import model_files, tokenizer_files
from tokalign_jax.text import corpus as documents


def run_identity(context: Context) -> dict[str, str]:
    """Return the values that all runs of one workdir must share."""
    return {
        "source_model": str(context.inputs.source_folder),
        "target_tokenizer": context.config.target_tokenizer
        if context.inputs.derives
        else str(context.inputs.target_folder),
    }


def identities(context: Context) -> dict[str, Any]:
    """Return digests of the outside files that stages depend on; process 0 reads them."""
    return distributed.on_first(lambda: _identities(context))


def _identities(context: Context) -> dict[str, Any]:
    config, inputs, digests = context.config, context.inputs, context.digests
    questions, chats = held_out.questions(config), held_out.chats(config)
    other = held_out.other_config(config)

    def of_file(name: str) -> str:
        return digests.of([Path(name)]) if name else ""

    def of_model(folder: Path | None) -> str:
        return digests.of(model_files(folder)) if folder else ""

    def of_corpus(config: Config) -> list[str]:
        """Return digests of files, names of hub datasets, and the weights of a mixture."""
        names = documents.names(config)
        contents = zip(names, digests.each([Path(name) for name in names]))
        return [*(digest[:16] or name for name, digest in contents), *documents.mixture(config)]

    return {
        "corpus": of_corpus(config),
        "source_model": of_model(inputs.source_folder),
        "source_tokenizer": digests.of(tokenizer_files(inputs.source_folder)),
        # A derived tokenizer is determined by the fingerprint of its stage.
        "target_tokenizer": config.target_tokenizer
        if inputs.derives
        else digests.of(tokenizer_files(inputs.target_folder)),
        "alignment": of_file(config.alignment.file),
        "vectors": {
            side: of_file(getattr(config.alignment, side))
            for side in ("source_vectors", "target_vectors")
        },
        "questions": abilities.digest(questions) if questions else "",
        "chat_questions": chat_questions.digest(chats) if chats else "",
        "other_text": of_corpus(other) if other else "",
        "teacher": of_model(inputs.teacher_folder),
        "donor": of_model(inputs.donor_folder),
    }
