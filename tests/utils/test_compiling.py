import os

import jax
import pytest

from tokalign_jax.utils import compiling


@pytest.fixture
def kept(monkeypatch, tmp_path):
    jax.devices()  # which reads XLA's flags, before they are others
    settings = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: settings.append((name, value)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")
    for name in compiling._MEMORY_NAMES:
        monkeypatch.setenv(name, "")  # so that it is as it was in the end, whatever comes
        monkeypatch.delenv(name)
    return settings


def test_compiled_programs_are_kept_on_accelerators_only(monkeypatch, tmp_path, kept):
    compiling.prepare()
    started = []
    monkeypatch.setattr(jax, "default_backend", lambda: started.append(True) or "gpu")
    compiling.prepare()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    compiling.prepare()
    assert len(started) == 2  # each time, or processes would wait for each other later
    assert kept == [("jax_compilation_cache_dir", str(tmp_path / "tokalign_jax" / "jax"))]


@pytest.mark.parametrize(
    ("plugin", "given", "then"),
    [
        ("", "", ""),
        ("xla_cuda12", "", "--xla_gpu_enable_triton_gemm=false"),
        ("xla_cuda13", "--xla_a=1", "--xla_a=1 --xla_gpu_enable_triton_gemm=false"),
        ("xla_cuda12", "--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm=true"),
        ("xla_rocm60", "", ""),
    ],
)
def test_cublas_products_are_the_default_with_cuda(
    monkeypatch, tmp_path, kept, plugin, given, then
):
    _install(plugin, tmp_path, monkeypatch)
    monkeypatch.setenv("XLA_FLAGS", given)
    compiling.prepare()
    assert os.environ["XLA_FLAGS"] == then


@pytest.mark.parametrize(
    ("plugin", "given", "then"),
    [
        ("", {}, (None, None)),
        ("xla_cuda13", {}, ("0.92", None)),
        ("xla_cuda13", {"XLA_CLIENT_MEM_FRACTION": "0.5"}, ("0.5", None)),
        (
            "xla_cuda12",
            {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"},
            (None, "0.5"),
        ),  # with both JAX would refuse
    ],
)
def test_most_gpu_memory_is_preallocated_by_default(
    monkeypatch, tmp_path, kept, plugin, given, then
):
    _install(plugin, tmp_path, monkeypatch)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    compiling.prepare(alone=False)
    assert tuple(map(os.environ.get, compiling._MEMORY_NAMES)) == tuple(
        map(given.get, compiling._MEMORY_NAMES)
    )
    compiling.prepare()
    assert tuple(map(os.environ.get, compiling._MEMORY_NAMES)) == then


def _install(plugin, tmp_path, monkeypatch):
    """An environment as JAX's plugin leaves it; without a name, none is installed."""
    package = tmp_path / "site" / "jax_plugins"
    package.mkdir(parents=True)
    if plugin:
        (package / plugin).mkdir()
        (package / plugin / "__init__.py").touch()
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: _Found(package))


class _Found:
    def __init__(self, package):
        self.submodule_search_locations = [str(package)]
