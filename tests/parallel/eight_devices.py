"""Checks of eight simulated devices against one. Run as a program on eight devices, it prints the
error of each check, or an empty string.
"""

import functools
import json
import re
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer

from tests.helpers import TEXTS, tiny_model_folder, tiny_tokenizer
from tests.parallel.collectives import collectives
from tests.training.toys import (
    CONFIG,
    LENGTH,
    LLAMA,
    NEOX,
    STAGE,
    VOCABULARY,
    source_text,
    toy_params,
    toy_shards,
    unpadded,
)
from tokalign_jax.alignment import methods
from tokalign_jax.config import (
    AlignmentConfig,
    ComputeConfig,
    Config,
    DistillationConfig,
    InitializationConfig,
    MeshConfig,
    TokenDistillationConfig,
)
from tokalign_jax.evaluation import abilities, bits_per_byte
from tokalign_jax.initialization import (
    calibration,
    composition,
    contexts,
    initialization,
    tuning,
)
from tokalign_jax.initialization import start as starts
from tokalign_jax.models import float8, hub, huggingface, quantized
from tokalign_jax.models.config import ClampedSwiGLU, Convolution, DeltaRule, Experts
from tokalign_jax.models.lora import add_lora
from tokalign_jax.models.transformer import generate, init_params
from tokalign_jax.parallel import sharding
from tokalign_jax.text import canonical, corpus
from tokalign_jax.text.tokenizing import TokenShards, end_of_text_id
from tokalign_jax.training import source_teacher, states
from tokalign_jax.training.distillation import Teacher, Teaching, distillation, objective, with_rows
from tokalign_jax.training.loop import load_trained, lora_spec, run_stage, split
from tokalign_jax.training.losses import Head, cross_entropy, token_nll_and_likeliest
from tokalign_jax.training.optimizer import make_optimizer, rules_for, schedule_of
from tokalign_jax.training.step import init_state, make_loss, make_train_step
from tokalign_jax.training.validation import batched, held_out_sequences, make_measure
from tokalign_jax.utils import paths

SHAPES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (4, 1, 2), "all": (2, 2, 2)}
STEP = replace(
    STAGE,
    steps=3,
    checkpoints=replace(STAGE.checkpoints, every=3),
    optimizer=replace(STAGE.optimizer, row_damping=0.3),
).with_batch(size=24, per_device=1)


def mesh_of(shape=(1, 1, 1)):
    return sharding.make_mesh(MeshConfig(*shape), devices=jax.devices()[: np.prod(shape)])


# --- The vocabulary -----------------------------------------------------------------------------


def vocabulary(shape):
    """Look-up, loss and their gradients, with padding rows and with a soft-cap."""
    rng = np.random.default_rng(0)
    rows, _ = sharding.padded_shape("lm_head/kernel", (VOCABULARY, 16), mesh_of(shape))
    table = np.zeros((rows, 16), np.float32)
    table[:VOCABULARY] = rng.normal(size=(VOCABULARY, 16))
    batch = (24, 7)
    tokens = rng.integers(0, VOCABULARY, batch)
    labels = np.where(rng.random(batch) < 0.1, -1, rng.integers(0, VOCABULARY, batch))
    for adjust in (None, lambda x: 3 * jnp.tanh(x / 3)):
        how = Head(VOCABULARY, 5, jnp.float32, adjust)

        def loss(table, head, mesh, how=how):
            with sharding.within(mesh):
                hidden = sharding.look_up(table, tokens, jnp.float32) * 0.5
                total, count = cross_entropy(hidden, head, jnp.asarray(labels), how)
                each = token_nll_and_likeliest(
                    *jax.lax.stop_gradient((hidden, head)), jnp.asarray(labels), how
                )
                return 2.0 * total / count, each

        results = []
        for mesh in (mesh_of(), mesh_of(shape)):
            split = sharding.sharding_of("lm_head/kernel", table.shape, mesh)
            placed = [sharding.put(x, split) for x in (table, table[:, ::-1])]
            step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
            results.append(step(*placed, mesh))
            assert jax.tree.leaves(results[-1])[-1].shape == table.shape
        close(results[1], results[0], 1e-5)
        assert not np.asarray(results[1][1][1])[VOCABULARY:].any()  # no gradient for the filling


def divergence(shape):
    """Distillation loss and its gradients, with padding rows, ids of one model only, a soft-cap."""
    rng = np.random.default_rng(0)
    heads = [np.zeros((sharding.ROWS, width), np.float32) for width in (16, 12)]
    for head in heads:
        head[:VOCABULARY] = rng.normal(size=(VOCABULARY, head.shape[1]))
    states = [rng.normal(size=(8, 7, head.shape[1])).astype(np.float32) for head in heads]
    labels = np.where(rng.random((8, 7)) < 0.1, -1, rng.integers(0, VOCABULARY, (8, 7)))
    student = Head(VOCABULARY, 5, jnp.float32, lambda x: 3 * jnp.tanh(x / 3))
    how = Teaching(student, Head(VOCABULARY - 1, 5, jnp.float32), VOCABULARY - 2, 0.3, 2.0, 0.6)

    def loss(hidden, head, teacher_hidden, teacher_head, mesh):
        with sharding.within(mesh):
            total, count = distillation(
                hidden, head, teacher_hidden, teacher_head, jnp.asarray(labels), how
            )
            return 2.0 * total / count

    results = []
    for mesh in (mesh_of(), mesh_of(shape)):
        rows = sharding.sharding_of("lm_head/kernel", heads[0].shape, mesh)
        sequences = jax.NamedSharding(mesh, jax.P(sharding.BATCH))
        placed = [
            sharding.put(x, where)
            for pair in zip(states, heads)
            for x, where in zip(pair, (sequences, rows))
        ]
        results.append(jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=4)(*placed, mesh))
    close(results[1], results[0], 1e-5)


# --- Training -----------------------------------------------------------------------------------

REFERENCES: dict = {}


def partly_unlearned():
    """Toy text with unlearned spans, so that micro-batches differ in their numbers of labels."""
    edges = np.cumsum(np.random.default_rng(2).integers(1, 40, 2 * 40)).reshape(-1, 2)
    return replace(toy_shards(), unlearned=edges)


def trained(name, model, method, mesh, folder, teacher=None, unroll=0):
    stage = replace(STEP, method=method)
    config = replace(CONFIG, compute=replace(CONFIG.compute, loss_chunk=7, unroll=unroll))
    arguments = (
        name,
        stage,
        config,
        model,
        toy_params(model),
        partly_unlearned(),
        Path(folder),
        0,
        lambda line: None,
        mesh,
    )
    if not teacher:
        return run_stage(*arguments)
    taught = taught_by_source if teacher == SOURCE else taught_by
    return run_stage(*arguments, taught(teacher, model, mesh))


def taught_by_source(source, model, mesh):
    """Distillation from a source model with another tokenizer, whose chunks differ in length."""
    del model
    teacher = source_teacher.Teacher(source, sharding.place(toy_params(source, 1), mesh), "")
    stage = replace(STEP, objective="mixture")
    return source_teacher.objective(stage, teacher, source_text(source.vocab_size))


def taught_by(teacher, model, mesh):
    """Distillation from a teacher whose embedding and head have more rows than the student's."""
    params = sharding.place(toy_params(teacher), mesh)
    params = with_rows(params, model.vocab_size, mesh)
    return objective(
        DistillationConfig(divergence="mixed"), Teacher(teacher, params, model.vocab_size, "")
    )


def training(shape, model, method, teacher=None, unroll=0):
    key = (model, method, teacher)
    with tempfile.TemporaryDirectory() as folder:
        if key not in REFERENCES:
            REFERENCES[key] = trained("stage", model, method, mesh_of(), f"{folder}/one", teacher)
        one = REFERENCES[key]  # with a loop over layers
        many = trained("stage", model, method, mesh_of(shape), f"{folder}/many", teacher, unroll)
        again = load_trained(
            Path(f"{folder}/many"), replace(STEP, method=method), model, mesh_of(shape)
        )
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(
            [r[name] for r in many.history], [r[name] for r in one.history], rtol=2e-5
        )
    without = "layers/attention/k_proj/bias"  # has no gradient but rounding, which Adam makes as large as any other
    trees = (unpadded(result.params, model.vocab_size) for result in (many, one))
    close(*(paths.split(tree, lambda path: path != without)[0] for tree in trees), 1e-4)
    ended_with = paths.flatten(many.params)
    close(paths.unflatten(again), paths.unflatten({path: ended_with[path] for path in again}), 0)
    parts = shape[1] * shape[2]
    for path, leaf in paths.flatten(many.params).items():
        by_rule = sharding.sharding_of(path, leaf.shape, mesh_of(shape))
        assert leaf.sharding.is_equivalent_to(by_rule, leaf.ndim), (path, leaf.sharding, by_rule)
        if parts > 1 and path.endswith(("embedding", "lm_head/kernel")):
            assert leaf.addressable_shards[0].data.size == leaf.size // parts, path
    if parts > 1:
        assert any(
            "_proj/kernel" in p and not x.sharding.is_fully_replicated
            for p, x in paths.flatten(many.params).items()
        )


def checkpoints():
    """A checkpoint loads the same on every mesh, whatever its number of padding rows."""
    with tempfile.TemporaryDirectory() as folder:
        written = trained("stage", LLAMA, "full", mesh_of((1, 3, 1)), folder)
        for shape in ((1, 1, 1), (2, 2, 2), (1, 5, 1)):
            read = load_trained(Path(folder), replace(STEP, method="full"), LLAMA, mesh_of(shape))
            close(unpadded(paths.unflatten(read)), unpadded(written.params), 0)


def validation(shape, method):
    """The validation loss of batches that are padded with ignored sequences."""
    lora = lora_spec(replace(STEP, method=method))
    sequences = held_out_sequences(toy_shards(LENGTH * 11 + 5, 3), LENGTH, 20)
    results = []
    for mesh in (mesh_of(), mesh_of(shape)):
        params = toy_params(LLAMA)
        params = add_lora(params, lora, jax.random.key(1)) if lora else params
        parts = split(replace(STEP, method=method), sharding.place(params, mesh))
        compute = replace(CONFIG.compute, loss_chunk=7)
        measure = make_measure(LLAMA, compute, lora, mesh)
        results.append(measure(parts[0], frozen=parts[1], batches=batched(sequences, 8, mesh)))
    close(results[1], results[0], 1e-6)


def compiled_step(shape, method, dtype="float32", accumulation=2, options=None, matmul="dtype"):
    """A compiled step on a mesh, and the number of trainable elements per device."""
    mesh, compute = mesh_of(shape), ComputeConfig(dtype=dtype, loss_chunk=7, matmul=matmul)
    stage = replace(STEP, method=method)
    lora = lora_spec(stage)
    params = toy_params(LLAMA)
    params = add_lora(params, lora, jax.random.key(1)) if lora else params
    trainable, frozen = split(stage, sharding.place(params, mesh))
    labels = paths.label_tree(rules_for(method), trainable)
    optimizer = make_optimizer(stage, labels, LLAMA.vocab_size)
    state = init_state(trainable, optimizer)
    state = jax.device_put(state, sharding.shardings(state, mesh))
    batch = sharding.global_batch(np.zeros((accumulation, 8, LENGTH + 1), np.int32), mesh)
    step = make_train_step(make_loss(LLAMA, compute, lora), optimizer, jnp.dtype(dtype), mesh)
    lowered = step.lower(state, frozen, batch, jax.random.key(0), schedule_of(stage))
    sizes = (leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(trainable))
    return lowered.compile(compiler_options=options), sum(sizes)


def reductions(method, names, dtype="float32", matmul="dtype"):
    """Replicas all-reduce gradients, loss and token count once per step, outside the loop over
    micro-batches, and nothing else.
    """
    for shape in (SHAPES[name] for name in names):
        step, size = compiled_step(shape, method, dtype, matmul=matmul)
        copy_of = np.indices(shape)[0].ravel()  # by device
        across = [
            collective
            for collective in collectives(step.as_text())
            if any(len({copy_of[device] for device in group}) > 1 for group in collective.groups)
        ]
        assert {collective.kind for collective in across} == {"all-reduce"}, (shape, across)
        assert not any(collective.in_loop for collective in across), (shape, across)
        assert sum(collective.elements for collective in across) == size + 2, (shape, across)


def gradient_types():
    """Gradients of a single micro-batch are all-reduced in their own dtype (for layer matrices the
    compute dtype), sums over micro-batches in float32.
    """
    for accumulation, short in ((1, "bf16"), (2, "f32")):
        # Layers' matrices are reduced layer by layer, or all of them at once.
        layers, transposed = ("", "8,16") if accumulation == 1 else ("2,", "16,8")
        matrices = {f"{layers}{shape}" for shape in (transposed, "16,16", "16,24", "24,16")}
        others = {"256,16", f"{layers}16", "16", ""}  # embedding and head, norms, loss
        with tempfile.TemporaryDirectory() as folder:
            dump = {
                "xla_dump_to": folder,
                "xla_dump_hlo_pass_re": "spmd.*",
                "xla_dump_hlo_as_text": True,
            }
            compiled_step((8, 1, 1), "full", "bfloat16", accumulation, dump)
            # As partitioned, before a CPU rewrites it.
            (program,) = Path(folder).glob("*after_spmd-partitioning*")
            text = program.read_text()
        found = set(re.findall(r"= (\w+)\[([\d,]*)\]\S* all-reduce\(", text))
        # Without sums along axes of one device, which are none, of states and of numbers a token.
        found = {pair for pair in found if pair[1] in matrices | others}
        expected = {(short, shape) for shape in matrices} | {("f32", shape) for shape in others}
        assert found == expected, (accumulation, found)


def float8_products(shape):
    """Scales are those of whole operands, however these are split."""
    random = np.random.default_rng(0)
    x, kernel, gradient = (
        random.normal(size=s).astype(np.float32) for s in ((8, 6, 32), (32, 64), (8, 6, 64))
    )
    for operand in (x, kernel, gradient):
        operand.reshape(-1)[-1] = 100.0  # in the last shard alone
    mesh, results = mesh_of(shape), []
    specs = jax.P(sharding.BATCH), jax.P(sharding.FSDP, sharding.TENSOR), jax.P(sharding.BATCH)
    for place in (lambda x, _: x, lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))):

        @jax.jit
        def products(x, kernel, gradient):
            y, vjp = jax.vjp(float8.product, x, kernel)
            return y, *vjp(gradient)

        results.append(products(*map(place, (x, kernel, gradient), specs)))
    close(results[1], results[0], 1e-5)

    model = replace(LLAMA, hidden_size=32, head_dim=8, intermediate_size=48)
    compute = replace(CONFIG.compute, matmul="float8")
    tokens = toy_shards().tokens[: 8 * (LENGTH + 1)].reshape(1, 8, -1).astype(np.int32)
    gradients = []
    loss, keys = make_loss(model, compute, None), jax.random.split(jax.random.key(0), 8)
    for devices in (mesh_of(), mesh):
        batch = sharding.global_batch(tokens, devices)[0]
        with sharding.within(devices):
            gradient = jax.jit(jax.grad(lambda *inputs: loss(*inputs)[0]))
            placed = sharding.place(toy_params(model), devices)
            gradients.append(unpadded(gradient(placed, {}, batch, keys), VOCABULARY))
    one, many = map(paths.flatten, gradients)
    for path, leaf in one.items():
        # Sums in another order round a few operands to the next float8 number.
        difference = np.linalg.norm(many[path] - leaf) / np.linalg.norm(leaf)
        assert difference < 0.02, (path, difference)


def quantized_kernels(shape, model, kind):
    """Kernels are quantized to the same bits, and a step with them has the same gradients."""
    stage = replace(STEP, method="lora", lora=replace(STEP.lora, frozen=kind))
    spec, results = lora_spec(stage), []
    params = add_lora(init_params(model, jax.random.key(0), std=0.08), spec, jax.random.key(1))
    tokens = toy_shards().tokens[: 8 * (LENGTH + 1)].reshape(1, 8, -1).astype(np.int32)
    loss, keys = make_loss(model, CONFIG.compute, spec), jax.random.split(jax.random.key(0), 8)
    for mesh in (mesh_of(), mesh_of(shape)):
        trainable, frozen = split(stage, sharding.place(params, mesh))
        frozen = quantized.quantize_tree(frozen, kind, mesh)
        kernel = frozen["layers"]["attention"]["q_proj"]["kernel"]
        parts = shape[1] * shape[2] if mesh.size > 1 else 1
        assert kernel.codes.addressable_shards[0].data.size == kernel.codes.size // parts
        with sharding.within(mesh):
            step = jax.jit(jax.value_and_grad(loss, has_aux=True))
            batch = sharding.global_batch(tokens, mesh)[0]
            (value, _), gradients = step(trainable, frozen, batch, keys)
        gradients = unpadded(gradients, VOCABULARY)
        results.append(
            (jax.tree.map(np.asarray, jax.tree.leaves(frozen["layers"])), value, gradients)
        )
    (one, *values), (many, *others) = results
    close(many, one, 0)
    close(others, values, 1e-4)


# --- Files, evaluation, initialisation ----------------------------------------------------------


def files(shape):
    """Sharded safetensors are read and written on the mesh as on the host."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model_folder(Path(folder) / "model", "llama")
        config, raw = hub.load_config(model)
        host, placed = (
            huggingface.load_params(model, config),
            huggingface.load_params(model, config, mesh=mesh_of(shape)),
        )
        close(unpadded(placed, config.vocab_size), host, 0)
        tokenizer = AutoTokenizer.from_pretrained(model)
        for name, params in (("host", host), ("placed", placed)):
            out = Path(folder) / name
            huggingface.save_checkpoint(
                out, params, config, raw, tokenizer, source_folder=model, max_shard_bytes=30_000
            )
        written = [
            sorted((Path(folder) / name).glob("*.safetensors")) for name in ("host", "placed")
        ]
        assert len(written[0]) > 1 and [f.name for f in written[0]] == [f.name for f in written[1]]
        assert all(one.read_bytes() == other.read_bytes() for one, other in zip(*written))


def after_training(shape):
    """A state with adapters is loaded and exported on the mesh as on one device."""
    with tempfile.TemporaryDirectory() as name:
        folder, stage = Path(name), replace(STEP, method="lora")
        (folder / "config.json").write_text('{"model_type": "llama"}')
        exact = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), toy_params(LLAMA))
        huggingface.write_weights(folder, exact, LLAMA, "float32", {}, 10**9)
        trained("stage", LLAMA, "lora", mesh_of(shape), folder / "stage")
        loaded = []
        for mesh in (mesh_of(), mesh_of(shape)):
            load = functools.partial(states.load_changes, LLAMA, [(folder / "stage", stage)], mesh)
            out = folder / f"export-{mesh.size}"
            out.mkdir()
            read = states.reader(folder, LLAMA, load())
            huggingface.write_weights(out, read, LLAMA, "bfloat16", {}, 10**9)
            dtype = states.inference_dtype("bfloat16")
            params = states.assemble(folder, LLAMA, load(), dtype, mesh)
            loaded.append(
                (unpadded(params, LLAMA.vocab_size), (out / "model.safetensors").read_bytes())
            )
        (one, written), (many, written_by_many) = loaded
        close(many, one, 0)
        assert written == written_by_many
        stored = paths.flatten(huggingface.load_params(folder / "export-1", LLAMA, "float32"))
        for path, leaf in paths.flatten(one).items():
            np.testing.assert_array_equal(
                stored[path], leaf.astype("bfloat16").astype("float32"), path
            )


def reading(shape):
    """Bits per byte, abilities, contexts, head calibration, generation and tuning."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model_folder(Path(folder), "llama", vocab_size=320)
        config, _ = hub.load_config(model)
        source, target = AutoTokenizer.from_pretrained(model), tiny_tokenizer(400, TEXTS)
        shards = [shards_of(tokenizer) for tokenizer in (source, target)]
        documents = [corpus.Document(text, "all", len(text.encode())) for text in TEXTS]
        places = contexts.find_places(documents, source, target, 10**6)
        results = []
        for mesh in (mesh_of(), mesh_of(shape)):
            params = huggingface.load_params(model, config, mesh=mesh)
            scores = bits_per_byte.evaluate(
                config,
                params,
                source,
                {"a": TEXTS, "b": TEXTS[:1]},
                sequence_length=32,
                batch=2,
                mesh=mesh,
            )
            questions = abilities.sums(5)
            answered = abilities.score(
                config, params, source, questions, shards[0].index["end_of_text"], mesh=mesh
            )
            sizes = [len(s.counts) for s in shards]
            read = contexts.read(
                config, params, places, *sizes, jnp.float32, mesh, lambda line: None
            )
            moves = calibration.head_moves(config, params, shards[0], jnp.float32, mesh, seed=0)
            prompt = jnp.asarray([shards[0].tokens[:9]])
            rows = {
                path: sharding.to_host(leaf, slice(config.vocab_size))
                for path, leaf in paths.flatten(params).items()
                if sharding.is_vocabulary(path)
            }
            ids = np.arange(sizes[0])
            tokens = composition.Tokens(
                ids, composition.Pieces.of([[i] for i in ids]), shards[0].counts, read.source
            )
            compute, log = ComputeConfig(dtype="float32"), lambda line: None
            tuned, _ = tuning.tune(
                config,
                params,
                rows,
                tokens,
                ids % 2 == 0,
                shards[0],
                1000,
                compute,
                mesh,
                log,
                seed=0,
            )
            results.append(
                (
                    [s.bits_per_byte for s in scores.values()],
                    answered,
                    read,
                    moves,
                    generate(config, params, prompt, 5),
                    [
                        sharding.to_host(leaf, slice(sizes[0]))
                        for path, leaf in paths.flatten(tuned).items()
                        if path in rows
                    ],
                )
            )
        close(results[1], results[0], 2e-4)


def start(shape, trains):
    """A distilled start ends with the same loss and, but for rounding, the same body."""
    settings = InitializationConfig(
        distillation_tokens=3000, generated_tokens=0, corpus_share=1.0, trains=trains
    )
    run = replace(CONFIG, alignment=AlignmentConfig(), initialization=settings)
    tokenizers = tiny_tokenizer(300, TEXTS), tiny_tokenizer(340, TEXTS)
    aligned = methods.from_pieces(*tokenizers)
    documents = [corpus.Document(text, "en", len(text)) for text in TEXTS * 6]
    with tempfile.TemporaryDirectory() as folder:
        folder = tiny_model_folder(Path(folder) / "model", "llama", tokenizer=tokenizers[0])
        config, _ = hub.load_config(folder)
        results = []
        for mesh in (mesh_of(), mesh_of(shape)):
            params = huggingface.load_params(folder, config, mesh=mesh)
            model, new = initialization.initialize(config, params, aligned)
            sides = (
                initialization.Side(config, params, tokenizers[0], None),
                initialization.Side(model, new, tokenizers[1], None),
            )
            made = initialization.distill(run, *sides, aligned, documents, mesh, lambda line: None)
            before, after = (paths.flatten(tree) for tree in (new, made.params))
            changes = {
                path: sharding.to_host(leaf) - sharding.to_host(before[path])
                for path, leaf in after.items()
                if not sharding.is_vocabulary(path)
            }
            kernel = after["layers/mlp/up_proj/kernel"]
            parts = shape[1] * shape[2] if mesh.size > 1 else 1
            assert kernel.addressable_shards[0].data.size == kernel.size // parts
            results.append((made.facts, changes))
    (facts, one), (others, many) = results
    close(others, facts, 1e-4)
    assert facts["loss_after"] < facts["loss_before"]
    for path, change in one.items():
        difference, moved = np.linalg.norm(many[path] - change), np.linalg.norm(change)
        assert difference <= 1e-3 * moved, (path, difference, moved)
        assert moved > 0 or not path.endswith("_proj/kernel"), path


def started(shape, method, tolerance):
    """The start by a method: parameters and measurements."""
    source, target = tiny_tokenizer(300, TEXTS), tiny_tokenizer(340, TEXTS)
    settings = InitializationConfig(
        distillation_tokens=2000,
        generated_tokens=400,
        tokens=2000,
        tuning=1000,
        token_distillation=TokenDistillationConfig(
            snippets=6, snippet_length=24, learning_rate=3e-3, batch_size=4
        ),
    )
    config = Config(
        alignment=AlignmentConfig(method=method),
        initialization=settings,
        compute=ComputeConfig(dtype="float32", loss_chunk=64),
    )
    shards = [shards_of(tokenizer) for tokenizer in (source, target)]
    aligned = methods.from_pieces(source, target)
    documents = [corpus.Document(text, "all", len(text.encode())) for text in TEXTS * 8]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        tiny_model_folder(Path(folder), "llama", tokenizer=source)
        model, _ = hub.load_config(folder)
        params = huggingface.load_params(folder, model)
        for mesh in (mesh_of(), mesh_of(shape)):
            made = starts.make_start(
                config,
                initialization.Side(model, params, source, shards[0]),
                target,
                shards[1],
                aligned,
                lambda tokens: iter(documents),
                mesh,
                lambda line: None,
            )
            rows = made.config.vocab_size
            arrays = {
                path: np.asarray(leaf)[: rows if sharding.is_vocabulary(path) else None]
                for path, leaf in paths.flatten(made.params).items()
            }
            results.append((arrays, dict(made.facts)))
    close(results[1], results[0], tolerance)


def shards_of(tokenizer):
    end = end_of_text_id(tokenizer)
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in TEXTS * 4]
    flat = np.concatenate([np.array(document) for document in ids])
    counts = np.bincount(flat, minlength=canonical.vocabulary_size(tokenizer))
    return TokenShards(
        flat, np.cumsum([len(document) for document in ids]), counts, {"end_of_text": end}
    )


def automatic():
    """The automatic mesh: data parallel while replicas fit, then sharded."""
    assert sharding.axis_sizes(MeshConfig(), 8, 10, 100) == (8, 1, 1)
    assert sharding.axis_sizes(MeshConfig(), 8, 150, 100) == (2, 4, 1)
    assert sharding.axis_sizes(MeshConfig(), 8, 10**6, 100) == (1, 8, 1)
    assert sharding.axis_sizes(MeshConfig(tensor=2), 8, 150, 100) == (2, 2, 2)
    assert sharding.axis_sizes(MeshConfig(data=2), 8, 10, 100) == (2, 4, 1)
    assert sharding.axis_sizes(MeshConfig(fsdp=2), 8, 10, 100) == (4, 2, 1)
    assert [sharding.usable(MeshConfig(), 8, sizes) for sizes in ([4], [64, 32], [6], [1], [])] == [
        4,
        8,
        6,
        1,
        8,
    ]
    assert sharding.usable(MeshConfig(fsdp=2), 8, [4]) == 8
    assert sharding.make_mesh(Config().mesh).shape == {"data": 8, "fsdp": 1, "tensor": 1}


def close(found, expected, tolerance):
    found, expected = (jax.tree_util.tree_leaves_with_path(tree) for tree in (found, expected))
    for (path, one), (_, other) in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            one, other, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path)
        )


ONE_KEY = replace(LLAMA, num_kv_heads=1)
MIXTURE = replace(LLAMA, experts=Experts(count=4, per_token=2, normalized=True))
SPARSE = replace(
    MIXTURE,
    attention_sinks=True,
    experts=Experts(
        4,
        2,
        True,
        shared_size=24,
        bias=True,
        clamped=ClampedSwiGLU(1.5, 1.0),
        computed="sparse",
    ),
)
HYBRID = replace(
    MIXTURE,
    layer_kinds=tuple(
        replace(LLAMA.layer_kinds[0], mixer=mixer, feed_forward="mlp" if i else "dense_mlp")
        for i, mixer in enumerate(
            (("delta", "convolution", "attention") * LLAMA.num_layers)[: LLAMA.num_layers]
        )
    ),
    dense_size=40,
    delta=DeltaRule(2, 4, 8, 8, kernel_size=3),
    convolution=Convolution(3, bias=True),
)
WIDE = replace(LLAMA, hidden_size=128, head_dim=32, intermediate_size=128)
WIDE_SPARSE = replace(SPARSE, hidden_size=128, head_dim=32, intermediate_size=128)
TIED = replace(NEOX, tie_word_embeddings=True)
TEACHER = replace(NEOX, vocab_size=sharding.ROWS + 5)
SOURCE = replace(LLAMA, vocab_size=53, max_positions=64)
CHECKS = {
    "automatic": (automatic,),
    **{f"vocabulary-{name}": (vocabulary, shape) for name, shape in SHAPES.items()},
    "vocabulary-three": (vocabulary, (1, 3, 1)),
    "vocabulary-six": (vocabulary, (1, 2, 3)),
    "divergence-all": (divergence, SHAPES["all"]),
    **{f"training-full-{name}": (training, shape, LLAMA, "full") for name, shape in SHAPES.items()},
    "training-full-three": (training, (1, 3, 1), LLAMA, "full"),
    "training-hybrid-mixture-all": (training, SHAPES["all"], HYBRID, "full"),
    "training-sparse-all": (training, SHAPES["all"], SPARSE, "full"),
    "checkpoints": (checkpoints,),
    "validation-all": (validation, SHAPES["all"], "full"),
    "validation-lora-fsdp": (validation, SHAPES["fsdp"], "lora"),
    "gradient-types": (gradient_types,),
    **{f"float8-{name}": (float8_products, shape) for name, shape in SHAPES.items()},
    "reductions-full": (reductions, "full", ("data", "tensor", "all")),
    "reductions-embedding": (reductions, "embedding", ("tensor",)),
    "reductions-float8": (reductions, "full", ("all",), "float32", "float8"),
    "reductions-lora": (reductions, "lora", ("all",), "bfloat16"),
    "training-embedding-all": (training, SHAPES["all"], LLAMA, "embedding"),
    "training-tied-all": (training, SHAPES["all"], TIED, "full"),
    "training-unrolled-all": (training, SHAPES["all"], LLAMA, "full", None, LLAMA.num_layers),
    "training-taught-one-key-all": (training, SHAPES["all"], ONE_KEY, "full", TEACHER),
    "training-source-all": (training, SHAPES["all"], LLAMA, "full", SOURCE),
    "training-source-sparse-lora-all": (training, SHAPES["all"], SPARSE, "lora", SOURCE),
    **{
        f"quantized-{kind}-{name}": (quantized_kernels, SHAPES[name], model, kind)
        for kind in quantized.KINDS
        for name, model in (("fsdp", WIDE), ("all", WIDE))
    },
    "quantized-nf4-experts-all": (quantized_kernels, SHAPES["all"], WIDE_SPARSE, "nf4"),
    "files": (files, SHAPES["all"]),
    "after-training-all": (after_training, SHAPES["all"]),
    "files-six": (files, (1, 2, 3)),
    "reading-all": (reading, SHAPES["all"]),
    "reading-three": (reading, (1, 3, 1)),
    "start-body-all": (start, SHAPES["all"], "all"),
    "start-lora-all": (start, SHAPES["all"], "lora"),
    "start-distilled-five": (started, (5, 1, 1), "distilled", 1e-4),
    "start-distilled-six": (started, (1, 3, 2), "distilled", 1e-4),
    "start-snippets-three": (started, (3, 1, 1), "token_distillation", 1e-4),
    "start-snippets-seven": (started, (1, 7, 1), "token_distillation", 1e-4),
}


def main(names):
    for name in names or CHECKS:
        check, *arguments = CHECKS[name]
        try:
            check(*arguments)
            print(json.dumps([name, ""]), flush=True)
        except Exception:
            print(json.dumps([name, traceback.format_exc()]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
