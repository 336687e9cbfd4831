"""Configuration by environment, prefix `HALP_`. The README's table documents each variable."""

from __future__ import annotations

import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from storage.computation import Dtype
from storage.errors import UserError
from storage.stores.location import resolve_location, split_roots
from workers.broker_url import parse_broker_url, read_broker_url

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"

# On paper, not measured: a decoding step waits for launches and weights, 128 rows or 32, and answers of mixed
# lengths leave few rows at the end of a batch. max_batch_tokens bounds what a batch takes of the memory.
_GPU_BATCH_SIZE = 128
_CPU_BATCH_SIZE = 32
_NOWHERE = "redis://see-halp-broker-url-file:6379/0"  # in messages, until there is one
_GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # Linux's driver; Windows' for Linux


def _runtime_dir() -> Path:
    given = os.environ.get("XDG_RUNTIME_DIR")  # a batch job may have it from a login node, where alone that directory is
    return Path(given) / "halp" if given and Path(given).is_dir() else Path(tempfile.gettempdir()) / f"halp-{os.getuid()}"


class WorkerSettings(BaseSettings):
    """What a process on this machine needs to know besides the run."""

    model_config = SettingsConfigDict(env_prefix="HALP_", frozen=True, hide_input_in_errors=True)

    broker_url: str = Field("redis://localhost:6379/0", description="Redis that holds the queues.")
    broker_url_file: Path | None = Field(
        None, description="File with that URL in place of it, read again at each connection; it may come later, or change."
    )
    broker_ca: Path | None = Field(None, description="Certificates (PEM) that a `rediss://` server must be signed by.")
    runtime_dir: Path = Field(
        default_factory=_runtime_dir,
        description="Private directory where processes here note that they live.",
    )
    visibility_timeout: int = Field(
        600,
        ge=1,
        description="Seconds after which an unacknowledged question is given to another worker; one value per Redis.",
    )
    queue_limit: int = Field(2000, ge=0, description="Questions of one run in the queue at once; 0 is no bound.")
    staging_limit: int = Field(
        20, ge=0, description="Parts of one run that are computed ahead of the first unpublished one; 0 is no bound."
    )
    data_roots: Annotated[tuple[str, ...], NoDecode] = Field(
        (".",),
        description="Directories and URLs that runs may lie in, separated by `:` or as JSON; the collector scans them.",
    )
    sweep_interval: float = Field(5.0, gt=0, description="Seconds between two sweeps of the collector.")

    model: str = Field(DEFAULT_MODEL, description="Model that a worker preloads: a hub name or a local directory.")
    revision: str = Field("main", description="Revision of a hub model.")
    dtype: Dtype = Field("bfloat16", description="Dtype that the model computes in.")
    cache_dir: Path | None = Field(None, description="Where a hub model is kept.")
    engine: str = Field(
        "model",
        pattern=r"^(model|qwen|fake(:\d+(\.\d+)?)?)$",  # the second is what the first was called before
        description="`fake:S` computes hashes in place of a model and takes S seconds a batch: for development.",
    )
    cudnn_attention: bool = Field(False, description="Let attention on a GPU run in cuDNN's kernel too.")
    engine_timeout: float = Field(
        300.0, gt=0, description="Seconds after which a batch counts as hung and the engine is restarted."
    )
    load_timeout: float = Field(3600.0, gt=0, description="Seconds that loading a model may take.")
    max_batch_size: int = Field(0, ge=0, description="Questions in one batch; 0 is 128 on a GPU and 32 on a CPU.")
    max_batch_tokens: int = Field(
        0, ge=0, description="Tokens in one batch, its questions times the longest prompt's; 0 follows the memory that is free."
    )
    max_queue_delay: float = Field(0.05, ge=0, description="Seconds that a question waits for others to fill its batch.")
    max_retries: int = Field(5, ge=0, description="Retries of a question after transient errors.")

    metrics_port: int = Field(0, ge=0, le=65535, description="Port of Prometheus' /metrics; 0 serves none.")
    metrics_address: str = Field("127.0.0.1", description="Address that /metrics is served on.")

    @property
    def broker(self) -> str:
        """The URL of the broker, as far as it is known yet."""
        if self.broker_url_file is None:
            return self.broker_url
        try:
            return read_broker_url(self.broker_url_file)
        except (OSError, ValueError):
            return _NOWHERE

    @property
    def batch_size(self) -> int:
        """Questions in one batch at most."""
        return self.max_batch_size or (_GPU_BATCH_SIZE if sees_gpu() else _CPU_BATCH_SIZE)

    @field_validator("broker_url")
    @classmethod
    def _parse_broker_url(cls, value: str) -> str:
        return parse_broker_url(value)

    @field_validator("data_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: object) -> object:
        return tuple(split_roots(value)) if isinstance(value, str) else value

    @field_validator("data_roots")
    @classmethod
    def _resolve_roots(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(resolve_location, value))


def sees_gpu() -> bool:
    """Tell whether this machine shows a GPU to this process, without loading CUDA."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}
    return not hidden and any(device.exists() for device in _GPU_DEVICES)


@lru_cache(maxsize=1)
def settings() -> WorkerSettings:
    """Return this process's configuration. Raises UserError that names each faulty variable."""
    try:
        return WorkerSettings()
    except ValidationError as error:
        raise UserError("\n".join(map(_fault, error.errors()))) from None


def _fault(error: ErrorDetails) -> str:
    """Say what is wrong with a variable. A broker's URL holds a password: it is not repeated."""
    name, message = str(error["loc"][0]), error["msg"].removeprefix("Value error, ")
    shown = "" if name == "broker_url" else f"={error['input']}"
    return f"HALP_{name.upper()}{shown}: {message}"
