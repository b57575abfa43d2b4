"""Resolving model and tokenizer names: local folders, downloads, pushes, errors."""

import base64
import json
import shutil
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file
from transformers import AutoTokenizer, GenerationConfig

from tests.helpers import KINDS, TEXTS, tiny_tokenizer, tokenizer_of_kind
from tokalign_jax.errors import UserError
from tokalign_jax.models import hub
from tokalign_jax.text import tokenizing

TOKEN = "hf_secretsecretsecret"


def _write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def _edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Hub:
    """Stands in for huggingface_hub: repositories are folders `NAME@REVISION`."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.fetched, self.calls = root, [], []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)

    def _folder(self, name: str, revision: str | None) -> Path:
        return self.root / "remote" / f"{name.replace('/', '--')}@{revision or 'main'}"

    def repository(self, name: str, revision: str | None = None, **files: str) -> Path:
        return _write(self._folder(name, revision), **files)

    def list_repo_files(self, name: str, revision: str | None = None) -> list[str]:
        folder = self._folder(name, revision)
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def snapshot_download(self, name, *, revision, allow_patterns, ignore_patterns):
        wanted = filter_repo_objects(
            self.list_repo_files(name, revision),
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        )
        cached = self.root / "cache" / f"{name.replace('/', '--')}@{revision}"
        cached.mkdir(parents=True, exist_ok=True)
        for file in wanted:
            self.fetched.append(file)
            shutil.copyfile(self._folder(name, revision) / file, cached / file)
        return str(cached)

    def create_repo(self, *arguments, **options):
        self.calls.append(("create_repo", arguments, options))

    def create_branch(self, *arguments, **options):
        self.calls.append(("create_branch", arguments, options))

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", (), options))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return Hub(tmp_path, monkeypatch)


# --- Downloads ----------------------------------------------------------------------------------


def test_only_data_files_and_indexed_weights_are_downloaded(fake):
    index = json.dumps(
        {
            "weight_map": {
                "a": "model-00001-of-00002.safetensors",
                "b": "model-00002-of-00002.safetensors",
            }
        }
    )
    data = (
        "config.json",
        "tokenizer.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "README.md",
        "LICENSE",
    )
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    others = (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "modeling_x.py",
        "training_args.bin",
        "x.gguf",
        "x.msgpack",
    )
    folder = fake.repository(
        "me/large", **{name.replace(".", "__"): "x" for name in (*data, *shards, *others)}
    )
    (folder / hub.INDEX_FILE).write_text(index)
    _write(folder / "original", **{"params__json": "{}", "consolidated__safetensors": "x"})
    found = hub.resolve("me/large", what="source model")
    assert {path.name for path in found.iterdir()} == {*data, *shards, hub.INDEX_FILE}
    assert not set(fake.fetched) & {*others, "original/params.json"}


def test_tokenizer_is_downloaded_without_weights(fake):
    fake.repository("me/small", **{"tokenizer__json": "{}", "model__safetensors": "x"})
    assert [p.name for p in hub.resolve("me/small", what="tokenizer", weights=False).iterdir()] == [
        "tokenizer.json"
    ]
    assert {p.name for p in hub.resolve("me/small", what="source model").iterdir()} == {
        "tokenizer.json",
        hub.WEIGHTS_FILE,
    }


def test_revision_after_an_at_sign_is_pinned(fake):
    for revision in (None, "v2", "0123abc"):
        fake.repository(
            "me/model", revision, config__json=json.dumps({"of": revision}), model__safetensors="x"
        )
    for name, revision in (
        ("me/model", None),
        ("me/model@v2", "v2"),
        ("me/model@0123abc", "0123abc"),
    ):
        assert hub.read_json(hub.resolve(name, what="source model") / "config.json") == {
            "of": revision
        }


def test_index_cannot_name_files_outside_the_folder(fake):
    for file in ("../../secret.safetensors", "sub/model.safetensors", "model.bin", "/etc/passwd"):
        fake.repository("me/odd", **{"config__json": "{}"})
        (fake._folder("me/odd", None) / hub.INDEX_FILE).write_text(
            json.dumps({"weight_map": {"a": file}})
        )
        with pytest.raises(UserError, match="not a safetensors file in the same folder"):
            hub.resolve("me/odd", what="source model")


# --- Refused repositories -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, message",
    [
        ("pytorch_model.bin", r"'pytorch_model\.bin'.*can run any code.*AutoModelForCausalLM"),
        ("consolidated.00.pth", r"'consolidated\.00\.pth'.*can run any code"),
        ("model-q4.gguf", r"'model-q4\.gguf' \(GGUF format\).*gguf_file='model-q4\.gguf'"),
        ("tf_model.h5", r"'tf_model\.h5' \(TensorFlow format\)"),
        ("consolidated.safetensors", r"'consolidated\.safetensors' \(other format\)"),
        ("adapter_config.json", r"is an adapter.*merge_and_unload"),
        ("nothing.md", r"has neither model\.safetensors nor"),
    ],
)
def test_other_formats_are_refused_with_a_remedy(file, message, fake, tmp_path):
    local = _write(tmp_path / "local", **{"config__json": "{}", file.replace(".", "__"): "x"})
    fake.repository("me/old", "v1", **{"config__json": "{}", file.replace(".", "__"): "x"})
    for name in (str(local), "me/old@v1"):
        with pytest.raises(UserError, match=message) as raised:
            hub.resolve(name, what="source model")
        if "from_pretrained" in str(raised.value):
            assert f"from_pretrained('{local}'" in str(
                raised.value
            ) or "'me/old', revision='v1'" in str(raised.value)
        hub.resolve(name, what="tokenizer", weights=False)


def test_adapter_beside_the_weights_is_not_silently_ignored(tmp_path):
    folder = _write(
        tmp_path / "local", config__json="{}", model__safetensors="x", adapter_config__json="{}"
    )
    with pytest.raises(UserError, match=r"has an adapter beside its weights.*merge it"):
        hub.resolve(str(folder), what="source model")


def test_suggested_conversion_command_is_valid_python():
    for name in ("/models/x", "me/old@v1"):
        text = hub._explain_missing_safetensors(name, ["pytorch_model.bin"])
        program = text.split('python -c "')[1].split('"`')[0]
        compile(program, "command", "exec")
        assert (
            program.count("-safetensors') ".strip()) == 2 and "/models/x-safetensors" not in program
        )


def test_models_with_remote_code_are_refused_by_name(tmp_path):
    own = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    folder = _write(tmp_path, config__json=json.dumps({"model_type": "own", **own}))
    with pytest.raises(UserError, match=r"model_type 'own', auto_map.*never run.*llama"):
        hub.load_config(folder)
    # A family that is known needs no such code; what its config lacks is told as ever.
    _write(tmp_path, config__json=json.dumps({"model_type": "llama", **own}))
    with pytest.raises(UserError, match="has no '"):
        hub.load_config(folder)


def _http_error(kind):
    error = kind.__new__(kind)  # the library makes it of an HTTP response
    error.args = (f"{kind.__name__} for token {TOKEN}",)
    return error


@pytest.mark.parametrize(
    "kind, message",
    [
        (
            errors.GatedRepoError,
            r"accept its terms on https://huggingface\.co/me/model and set HF_TOKEN",
        ),
        (errors.RepositoryNotFoundError, r"if it is private, set HF_TOKEN"),
        (errors.RevisionNotFoundError, r"there is no revision 'v9'"),
    ],
)
def test_hub_errors_name_a_remedy_and_never_the_access_token(kind, message, fake, monkeypatch):
    def refuse(*arguments, **options):
        raise _http_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=message) as raised:
        hub.resolve("me/model@v9", what="source model")
    assert TOKEN not in str(raised.value) and "***" in str(raised.value)


def test_offline_mode_is_honoured_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    offline = r"HF_HUB_OFFLINE is set.*hf download EleutherAI/pythia-1b --revision main.*local Hugging Face folder.*embedded"
    with pytest.raises(UserError, match=rf"source model 'EleutherAI/pythia-1b@main' .*{offline}"):
        hub.resolve("EleutherAI/pythia-1b@main", what="source model")
    with pytest.raises(UserError, match=r"tokenizer 'Qwen/Qwen2-1\.5B'"):
        hub.load_tokenizer("Qwen/Qwen2-1.5B")
    with pytest.raises(UserError, match="there is no such folder"):
        hub.resolve("./nowhere", what="source model")
    assert time.monotonic() - start < 20
    # What the cache has is used: its layout is the hub library's own.
    snapshot = tmp_path / "models--me--model" / "snapshots" / "abc"
    _write(snapshot, config__json="{}", model__safetensors="x")
    _write(tmp_path / "models--me--model" / "refs", main="abc")
    assert hub.resolve("me/model", what="source model") == snapshot


def test_local_folder_is_used_as_it_is(tmp_path):
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / hub.WEIGHTS_FILE)
    assert hub.resolve(str(tmp_path), what="source model") == tmp_path


# --- Tokenizers ---------------------------------------------------------------------------------


def _saved(folder: Path, kind: str = "llama3", **settings) -> Path:
    tokenizer_of_kind(kind, TEXTS).save_pretrained(folder)
    _edit(folder / "tokenizer_config.json", **settings)
    return folder


def test_tokenizers_with_remote_code_are_read_from_their_files(tmp_path):
    own = {
        "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]},
        "tokenizer_class": "OwnTokenizer",
    }
    folder = _saved(tmp_path, **own)
    (folder / "own.py").write_text("raise SystemExit('was run')")
    tokenizer = hub.load_tokenizer(folder)
    assert tokenizer.get_vocab() == tokenizer_of_kind("llama3", TEXTS).get_vocab()
    assert tokenizer.eos_token == "<|end_of_text|>"
    hub.save_config_and_tokenizer(
        _write(tmp_path / "out"), {"model_type": "llama", **own}, tokenizer
    )
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="never run, and has no tokenizer"):
        hub.load_tokenizer(folder)


@pytest.mark.parametrize(
    "kind, tokenizer_class",
    [(kind, None) for kind in KINDS if kind != "gpt1"]
    + [
        ("llama3", "LlamaTokenizerFast"),
        ("llama2", "LlamaTokenizer"),
        ("gemma", "GemmaTokenizer"),
        ("qwen", "GPT2Tokenizer"),
    ],
)
def test_saved_tokenizer_equals_the_loaded_one(kind, tokenizer_class, tmp_path):
    """Classes of transformers may make another tokenizer of tokenizer.json than it says; what is
    written stays as read.
    """
    folder = _saved(
        tmp_path / "in", kind, **({"tokenizer_class": tokenizer_class} if tokenizer_class else {})
    )
    tokenizer = hub.load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    hub.save_config_and_tokenizer(_write(tmp_path / "out"), {"model_type": "llama"}, tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.chat_template == tokenizer.chat_template
    texts = [*TEXTS, "  a  b\n", "<s> x </s>"]
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]


@pytest.mark.parametrize(("key", "value"), [("chat_template", 5), ("model_max_length", "512")])
def test_settings_of_a_wrong_type_are_refused(tmp_path, key, value):
    tiny_tokenizer(300, TEXTS).save_pretrained(tmp_path)
    settings = hub.read_json(tmp_path / "tokenizer_config.json") or {}
    hub.write_json(tmp_path / "tokenizer_config.json", {**settings, key: value})
    with pytest.raises(UserError, match=rf"{key} '?{value}'? of type .*tokenizer_config\.json'"):
        hub.load_tokenizer(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 5}}])
def test_damaged_index_is_refused(tmp_path, index):
    assert hub.shard_names(tmp_path) == []
    hub.write_json(tmp_path / hub.INDEX_FILE, index)
    with pytest.raises(UserError, match=r"index\.json' has no weight_map"):
        hub.shard_names(tmp_path)


@pytest.mark.parametrize("role", ["pad_token", "eos_token"])
def test_id_of_two_tokens_is_refused(tmp_path, role):
    """A document would end in the middle, where the other of the two occurs in its text."""
    tiny_tokenizer(300, TEXTS).save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] += 1  # a gap, into which the number of tokens does not fall
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    settings = hub.read_json(tmp_path / "tokenizer_config.json") or {}
    hub.write_json(tmp_path / "tokenizer_config.json", {**settings, role: "<new>"})
    with pytest.raises(UserError, match=rf"the id {vocabulary[last]} to both '<new>' and '{last}'"):
        hub.load_tokenizer(tmp_path)


def test_random_merges_are_switched_off(tmp_path):
    """BPE-dropout is for the training of a model; a run would compare random tokens."""
    tiny_tokenizer(300, TEXTS).save_pretrained(tmp_path)
    expected = hub.load_tokenizer(tmp_path)(list(TEXTS))["input_ids"]
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = hub.load_tokenizer(tmp_path)
    hub.save_tokenizer(tokenizer, _write(tmp_path / "out"))
    for opened in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "out")):
        assert opened(list(TEXTS))["input_ids"] == expected


def test_maximum_length_is_the_source_models(tmp_path):
    """Else a call with truncation=True, and a server, would apply that of the target's model."""
    target, source = tiny_tokenizer(300, TEXTS), tiny_tokenizer(300, TEXTS)
    target.model_max_length = 512
    for name, limit, expected in (("unlimited", None, 2048), ("limited", 8192, 8192)):
        if limit:
            source.model_max_length = limit
        source.save_pretrained(tmp_path / name)
        out = _write(tmp_path / f"{name}-out")
        config = {"model_type": "llama", "max_position_embeddings": 2048}
        hub.save_config_and_tokenizer(out, config, target, tmp_path / name)
        assert AutoTokenizer.from_pretrained(out).model_max_length == expected
    assert target.model_max_length == 512


def test_end_tokens_are_kept_where_the_new_vocabulary_has_them(tmp_path):
    """A chat model's turns end with another token than its documents; without it generation would
    not stop.
    """
    source, target = (tokenizer_of_kind(kind, TEXTS) for kind in ("llama3", "qwen"))
    source.add_special_tokens({"extra_special_tokens": ["<|gone|>", "<|eot_id|>"]})
    target.add_special_tokens({"extra_special_tokens": ["<|eot_id|>"]})
    source.save_pretrained(tmp_path)
    ends = [source.eos_token_id, *source.convert_tokens_to_ids(["<|gone|>", "<|eot_id|>"])]
    hub.write_json(tmp_path / "generation_config.json", {"eos_token_id": ends, "top_p": 0.9})
    config = {"model_type": "llama", "eos_token_id": ends[0]}
    single = _write(tmp_path / "single")
    source.save_pretrained(single)
    hub.write_json(single / "generation_config.json", {"eos_token_id": ends[2]})
    out = _write(tmp_path / "of_single")
    hub.save_config_and_tokenizer(out, config, target, single)
    turn, separator = target.convert_tokens_to_ids(["<|eot_id|>", "<|endoftext|>"])
    assert (hub.read_json(out / "generation_config.json") or {})["eos_token_id"] == [
        target.eos_token_id, turn, separator,
    ]  # fmt: skip
    assert (hub.read_json(out / "config.json") or {})["eos_token_id"] == target.eos_token_id
    for tokenizer, expected in ((source, ends), (target, [target.eos_token_id, turn, separator])):
        out = _write(tmp_path / type(tokenizer).__name__ / str(len(tokenizer)))
        hub.save_config_and_tokenizer(out, config, tokenizer, tmp_path)
        assert (hub.read_json(out / "generation_config.json") or {})["eos_token_id"] == expected
        assert (hub.read_json(out / "config.json") or {})["eos_token_id"] == tokenizer.eos_token_id


def test_generation_values_out_of_range_are_reported_and_dropped(tmp_path):
    tokenizer = tiny_tokenizer(300, TEXTS)
    source = _write(tmp_path / "source")
    tokenizer.save_pretrained(source)
    good = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 0,
        "max_new_tokens": 100,
        "num_beams": 1,
    }
    bad = {"temperature": 0.0, "top_p": 1.5, "top_k": -1, "max_new_tokens": 0, "num_beams": True, "max_length": "20",
           "repetition_penalty": -1, "typical_p": 0, "prefill_chunk_size": 0, "min_p": None, "early_stopping": "always"}  # fmt: skip
    ids = {"eos_token_id": [0, 99_999, "2", None, -1], "pad_token_id": -1, "bos_token_id": [[0]]}
    config = {"model_type": "llama", "eos_token_id": -1, "pad_token_id": 2.0, "vocab_size": 300}
    hub.write_json(
        source / "generation_config.json",
        good | bad | ids | {"mask_token_id": 7, "image_token_index": 8},
    )
    lines: list[str] = []
    hub.warn_dropped_values(source, config, 300, lines.append)
    assert len(lines) == 1 and lines[0].startswith(
        "warning: the export drops values of the source model"
    )
    for key, value in (bad | ids).items():
        assert (f"{key}={value!r} (generation_config.json)" in lines[0]) == (value is not None)
    assert (
        "eos_token_id=-1 (config.json), pad_token_id=2.0 (config.json)" in lines[0]
        and "do_sample" not in lines[0]
    )
    out = _write(tmp_path / "out")
    hub.save_config_and_tokenizer(out, config, tokenizer, source)
    own = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    assert hub.read_json(out / "generation_config.json") == {
        "do_sample": True,
        "min_p": None,
        **own,
    }
    assert hub.read_json(out / "config.json") == {"model_type": "llama", "vocab_size": 300, **own}
    GenerationConfig.from_pretrained(out).validate(strict=True)
    hub.write_json(source / "generation_config.json", good)
    lines.clear()
    hub.warn_dropped_values(source, {"eos_token_id": [0, 299]}, 300, lines.append)
    assert not lines
    (source / "generation_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"generation_config\.json' holds no JSON object but list"):
        hub.warn_dropped_values(source, {}, 300, lines.append)


def test_sentencepiece_model_alone_needs_the_library(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0a\x0a\x05<unk>")
    monkeypatch.setattr(hub, "_is_installed", lambda module: False)
    with pytest.raises(
        UserError,
        match=r"only 'tokenizer\.model'.*sentencepiece must be.*tokalign_jax\[convert\]",
    ):
        hub.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(base64.b64encode(b"!") + b" 0\n")
    with pytest.raises(UserError, match="tiktoken must be installed"):
        hub.load_tokenizer(tmp_path)
    monkeypatch.setattr(hub, "_is_installed", lambda module: True)
    with pytest.raises(UserError, match="name its tokenizer_class"):
        hub.load_tokenizer(tmp_path)


def test_unsupported_tokenizer_files_are_reported(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer .* has no vocabulary and cannot be read"):
        hub.load_tokenizer(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(UserError, match="has only tekken"):
        hub.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "kind", ["GemmaTokenizer", "BertTokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer", "T5Tokenizer"]
)
def test_missing_vocabulary_file_is_reported(kind, tmp_path):
    """transformers makes a tokenizer of special tokens alone."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(
        UserError,
        match=r"has no vocabulary.*the folder contains tokenizer_config.json: copy the missing",
    ):
        hub.load_tokenizer(tmp_path)


def test_empty_vocabulary_is_reported(tmp_path):
    tiny_tokenizer(300, TEXTS).save_pretrained(tmp_path)
    _edit(tmp_path / "tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []})
    with pytest.raises(UserError, match="empty vocabulary"):
        hub.load_tokenizer(tmp_path)


def test_end_of_text_can_be_chosen_or_added(tmp_path):
    tiny_tokenizer(300, TEXTS).save_pretrained(tmp_path)
    before = hub.load_tokenizer(tmp_path)
    named = hub.load_tokenizer(tmp_path, "<|endoftext|>")
    assert named.eos_token_id == before.get_vocab()["<|endoftext|>"] and len(named) == len(before)
    added = hub.load_tokenizer(tmp_path, "<|done|>")
    assert tokenizing.end_of_text_id(added) == added.eos_token_id == len(before) == len(added) - 1
    hub.save_config_and_tokenizer(_write(tmp_path / "out"), {"model_type": "llama"}, added)
    assert hub.read_json(tmp_path / "out" / "config.json") == {
        "model_type": "llama", "bos_token_id": 0, "eos_token_id": len(before), "pad_token_id": None,
    }  # fmt: skip
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == len(before)


def test_no_token_is_added_to_ids_with_gaps(tmp_path):
    tiny_tokenizer(300, TEXTS).save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    last = max(state["model"]["vocab"], key=state["model"]["vocab"].get)
    state["model"]["vocab"][last] += 50
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="have gaps"):
        hub.load_tokenizer(tmp_path, "<|done|>")


# --- Pushing ------------------------------------------------------------------------------------


def test_licence_files_are_copied(tmp_path):
    source = _write(
        tmp_path / "source", LICENSE="l", NOTICE__txt="n", USE_POLICY__md="u", config__json="{}"
    )
    (tmp_path / "out").mkdir()
    assert hub.copy_license_files(source, tmp_path / "out") == [
        "LICENSE",
        "NOTICE.txt",
        "USE_POLICY.md",
    ]
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == {
        "LICENSE": "l", "NOTICE.txt": "n", "USE_POLICY.md": "u",
    }  # fmt: skip


def test_folder_is_pushed_to_the_hub(fake, tmp_path):
    assert hub.push_to_hub(tmp_path, "me/new") == "https://huggingface.co/me/new"
    assert [call[0] for call in fake.calls] == ["create_repo", "upload_folder"]
    assert fake.calls[0][2] == {"private": True, "exist_ok": True}
    fake.calls.clear()
    address = hub.push_to_hub(tmp_path, "me/new", private=False, revision="v1")
    assert address == "https://huggingface.co/me/new/tree/v1"
    assert [call[0] for call in fake.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert fake.calls[0][2]["private"] is False and fake.calls[1][2] == {
        "branch": "v1",
        "exist_ok": True,
    }
    sent = fake.calls[2][2]
    assert (sent["repo_id"], sent["folder_path"], sent["revision"]) == ("me/new", tmp_path, "v1")


def test_failed_push_states_the_reason(fake, tmp_path, monkeypatch):
    def refuse(**options):
        raise _http_error(errors.HfHubHTTPError)

    monkeypatch.setattr(fake, "upload_folder", refuse)
    with pytest.raises(UserError, match=r"hf upload me/new") as raised:
        hub.push_to_hub(tmp_path, "me/new")
    assert TOKEN not in str(raised.value)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="set HF_TOKEN"):
        hub.push_to_hub(tmp_path, "me/new")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        hub.push_to_hub(tmp_path, "me/new")
