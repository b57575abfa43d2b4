"""Config files: Python with `get_config()`, which returns a `ConfigDict`, and overrides of fields.

A recipe of the package is the module `tokalign_jax.configs.NAME`. Any other file is loaded from its
path, with its folder on the import path, so that it can import the config that it builds on.
"""

import difflib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from tokalign_jax.config import is_removed, new_name, rename_keys
from tokalign_jax.errors import UserError

RECIPES = Path(__file__).parent / "configs"


def load(name: str, overrides: Sequence[str] = ()) -> config_dict.ConfigDict:
    """Load a config file and override fields.

    Args:
      name: a file, or the name of a recipe of the package, such as `configs/best.py`; an argument
        for `get_config` may follow after a colon.
      overrides: flags such as `--config.seed=1`.

    Raises:
      UserError: the file does not exist or fails, or an override does not fit a field.
    """
    return override(get_config(name), overrides)


def get_config(name: str) -> config_dict.ConfigDict:
    """Call `get_config()` of a config file.

    Raises:
      UserError: the file does not exist, has no function `get_config`, or fails.
    """
    file, _, argument = name.partition(":")
    path = find(file)
    try:
        values = load_module(path).get_config(*([argument] if argument else []))
        if not isinstance(values, config_dict.ConfigDict):
            raise TypeError(f"get_config() returns {type(values).__name__}")
        return rename_keys(values)
    except Exception as error:
        raise UserError(_failure(path, error)) from error


def find(file: str) -> Path:
    """Return the path of a config file or, if there is none, of the package's recipe of that name.

    Raises:
      UserError: there is neither.
    """
    for path in (Path(file), RECIPES / Path(file).name):
        if path.is_file():
            return path
    recipes = ", ".join(f"configs/{path.name}" for path in sorted(RECIPES.glob("[!_]*.py")))
    raise UserError(
        f"config file '{file}' does not exist; those that ship with the package: {recipes}"
    )


def load_module(path: Path) -> ModuleType:
    """Import a config file."""
    if path.resolve().parent == RECIPES.resolve():
        return importlib.import_module(f"tokalign_jax.configs.{path.stem}")
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    with _importable(path.parent):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def override(values: config_dict.ConfigDict, overrides: Sequence[str]) -> config_dict.ConfigDict:
    """Set fields by flags such as `--config.stage1.steps=7` or `--config.stage1.steps 7`.

    Raises:
      UserError: a flag of an unknown field, with the most similar one, or of a group of fields, or
        a value of another type.
    """
    fields = dict(_flat(values))
    overrides = [_with_new_name(flag) for flag in _without_removed(overrides)]
    for key in filter(None, map(_key_of, overrides)):
        if key not in fields:
            raise UserError(_unknown_field(key, list(fields)))
        # Even a dict would not do: it would replace the group, with the fields that it leaves out.
        if isinstance(fields[key], config_dict.ConfigDict):
            raise UserError(_is_group(key, fields[key]))
    argv = ["tokalign", *overrides]
    parsed = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", values, flag_values=parsed, sys_argv=argv)
        rest = parsed(argv)
    except Exception as error:  # whatever the parsers of values raise
        raise UserError(str(error)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument '{rest[1]}': flags are written --name=value")
    given = {_key_of(flag) for flag in overrides}
    for key, value in _flat(parsed.config):
        if value == "None" and key in given:
            raise UserError(
                f"--config.{key}=None is the text 'None', not an empty field: --config.{key}= is"
                " empty"
            )
    return parsed.config


def _key_of(flag: str) -> str:
    """Return the field that a flag overrides; "" if it is no override."""
    match = re.match(r"--(?:no)?config\.([^=]*)", flag)
    return match[1] if match else ""


def _without_removed(overrides: Sequence[str]) -> Iterator[str]:
    """Yield the flags, and their values, of fields that still exist."""
    skips_value = False
    for flag in overrides:
        if skips_value and not flag.startswith("--"):
            skips_value = False
            continue
        key = _key_of(flag)
        is_skipped = bool(key) and is_removed(key)
        skips_value = is_skipped and "=" not in flag
        if not is_skipped:
            yield flag


def _with_new_name(flag: str) -> str:
    key = _key_of(flag)
    return flag.replace(key, new_name(key), 1) if key else flag


def _unknown_field(key: str, fields: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
    return f"unknown config key '{key}'; the nearest is '{nearest}' (--config.{nearest}=...)"


def _is_group(key: str, group: config_dict.ConfigDict) -> str:
    groups = config_dict.ConfigDict
    single = [name for name, value in group.items() if not isinstance(value, groups)]
    return (
        f"config key '{key}' is a group of fields and cannot be set as a whole: set its fields,"
        f" such as --config.{key}.{[*single, 'FIELD'][0]}=... (all: {', '.join(group)})"
    )


def _flat(values: config_dict.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield prefix + key, value
        if isinstance(value, config_dict.ConfigDict):
            yield from _flat(value, f"{prefix}{key}.")


def _failure(path: Path, error: Exception) -> str:
    """Return the message of a config file that failed."""
    file = str(path)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    where = f"line {lines[-1]}: " if lines else ""
    return (
        f"config file '{file}' cannot be used ({where}{type(error).__name__}: {error}): it must "
        "be Python with a function get_config() that returns a ConfigDict, see configs/optimal.py"
    )
