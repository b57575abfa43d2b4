"""Load exported folders with vLLM's own model classes: config and all weights.

    python benchmarks/vllm_loading.py runs/mine/export ...

Needs vLLM, but not its GPU build: the model is declared on the CPU and its `load_weights` reads the
folder. Nothing is computed. A folder passes if vLLM recognizes its architecture, accepts every
tensor, and assigns a tensor to every parameter of its model. Each folder is checked in a separate
process.
"""

import os
import subprocess
import sys
from pathlib import Path

ONE = "--one"


def main() -> None:
    folders = sys.argv[1:]
    if folders[:1] == [ONE]:
        print(f"result: {load(folders[1])}")
        return
    for folder in folders:
        done = subprocess.run(
            [sys.executable, __file__, ONE, folder], capture_output=True, text=True
        )
        results = [line for line in done.stdout.splitlines() if line.startswith("result: ")]
        print(
            f"{Path(folder).name}: {results[-1][8:] if results else _reason(done.stderr)}",
            flush=True,
        )


def _reason(errors: str) -> str:
    lines = [
        line for line in errors.splitlines() if "Error" in line and "Failed to import" not in line
    ]
    return f"failed: {lines[-1].strip()[:300]}" if lines else "failed"


def load(folder: str) -> str:
    """Loads a folder with vLLM; returns a line about it.

    Raises what vLLM raises about a config or a tensor that it does not accept.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model

    arguments = EngineArgs(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        skip_tokenizer_init=True,
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29511", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        model = initialize_model(vllm_config=config)
        weights = get_model_loader(config.load_config).get_all_weights(config.model_config, model)
        loaded = model.load_weights(weights)
    parameters = {name for name, _ in model.named_parameters()}
    missing = sorted(parameters - set(loaded or ()))
    found = f"{type(model).__name__}, {len(parameters)} parameters, "
    return found + (f"WITHOUT A TENSOR: {', '.join(missing)}" if missing else "all loaded")


if __name__ == "__main__":
    main()
