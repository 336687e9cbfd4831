"""Stand-ins for packages that a machine with torch and transformers alone lacks, for benchmarks of the bare engine there.

Import it before the engine. Where the packages are installed it does nothing; the engine's own code is what it is.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class BaseModel:
    """A frozen record by its class's annotations; nothing is checked."""

    def __init__(self, **values: Any) -> None:
        for owner in reversed(type(self).__mro__):
            for name in vars(owner).get("__annotations__", {}):
                if name != "model_config" and (name in values or hasattr(type(self), name)):
                    self.__dict__[name] = values.get(name, getattr(type(self), name, None))

    def model_copy(self, *, update: dict[str, Any]) -> Any:
        """Return a copy with other values."""
        return type(self)(**self.__dict__ | update)


def _field(default: Any = None, **_: Any) -> Any:
    return default


def _as_it_is(*_: Any, **__: Any) -> Any:
    return lambda function: function


def stand_in() -> None:
    """Put a stand-in where a package is missing."""
    if find_spec("pydantic") is None:
        names = {"BaseModel": BaseModel, "Field": _field, "ConfigDict": dict, "ValidationError": ValueError}
        _install("pydantic", **names, AfterValidator=_as_it_is, TypeAdapter=_field)
    if find_spec("ml_dtypes") is None:  # NumPy's bfloat16: vectors then reach the host in float32, which holds the same values
        import numpy as np

        _install("ml_dtypes", bfloat16=np.float32)
        from workers.engine import hooks

        hooks.as_array = lambda joined: joined.float().numpy()


def _install(name: str, **members: Any) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


stand_in()
