"""What makes two runs, or two results of a stage, the same: digests of the files from outside."""

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
    """What makes this another run than the one of a workdir with other values."""
    return {
        "source_model": str(context.inputs.source_folder),
        "target_tokenizer": context.config.target_tokenizer
        if context.inputs.derives
        else str(context.inputs.target_folder),
    }


def identities(context: Context) -> dict[str, Any]:
    """Digests of the outside files that stages depend on; the first process alone reads them."""
    return distributed.on_first(lambda: _identities(context))


def _identities(context: Context) -> dict[str, Any]:
    digests, file = context.digests, context.config.alignment.file
    given = {
        side: getattr(context.config.alignment, side)
        for side in ("source_vectors", "target_vectors")
    }

    questions = held_out.questions(context.config)
    asked = held_out.chats(context.config)
    other = held_out.other_config(context.config)

    def texts_of(config: Config) -> list[str]:
        """By file, of a hub dataset the name; and how the parts are mixed."""
        names = documents.names(config)
        contents = zip(names, digests.each([Path(name) for name in names]))
        return [*(digest[:16] or name for name, digest in contents), *documents.mixture(config)]

    return {
        "corpus": texts_of(context.config),
        "source_model": digests.of(model_files(context.inputs.source_folder)),
        "source_tokenizer": digests.of(tokenizer_files(context.inputs.source_folder)),
        # One that is made in the run follows from the stage that does it.
        "target_tokenizer": context.config.target_tokenizer
        if context.inputs.derives
        else digests.of(tokenizer_files(context.inputs.target_folder)),
        "alignment": digests.of([Path(file)]) if file else "",
        "vectors": {side: digests.of([Path(name)]) if name else "" for side, name in given.items()},
        "questions": abilities.digest(questions) if questions else "",
        "chat_questions": chat_questions.digest(asked) if asked else "",
        "other_text": texts_of(other) if other else "",
        "teacher": digests.of(model_files(context.inputs.teacher_folder))
        if context.inputs.teacher_folder
        else "",
        "donor": digests.of(model_files(context.inputs.donor_folder))
        if context.inputs.donor_folder
        else "",
    }
