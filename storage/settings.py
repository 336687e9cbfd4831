"""The immutable settings of a run (`.run/run.json`) and what the first worker adds to them (`.run/model.json`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from storage.computation import QUESTION, AnswerState, Computation, SpecialTokens
from storage.errors import DamagedError, UserError
from storage.fields import widths
from storage.naming import MAX_DIGITS, MAX_SLUG
from storage.stores.location import is_url

FORMAT_VERSION = 1

Order = Literal["image", "csv"]

# Where the token vectors are taken. The published scripts' vision position is a token in the middle of the prompt.
LAST_POSITIONS = "last_image_token,last_prompt_token"
LAST_BLOCK = "last_block"  # of the vision tower: the mean over all that it puts out for an image

# Options that a model's record repeats as they are: what is left to the checkpoint is in it too, resolved.
AS_ASKED = ("prompt", "system_prompt", "special_tokens", "exact", "vision_encoder", "exif_rotation", "answer_states", "blind")

# run.json, model.json and summary.json are read again and again, in directories that strangers may write to.
MAX_SETTINGS = 1 << 20  # bytes

# What a second `enqueue` of the same run may differ in: who made it and when, not what it computes. How a prompt is read
# follows from the prompt.
_NOT_COMPARED = {
    "run_id",
    "created_at",
    "software_version",
    "dataset",
    "staged_identity",
    "prompt_columns",
    "model_files",
    "relocated",
    "part_digits",  # of the table and the interval; a table that has grown may have had more
}

# Options that every version has written: where one is not there, its default is not what the run began with.
ALWAYS_WRITTEN = {"dtype", "layers", "max_new_tokens", "min_pixels", "max_pixels"}


def _absolute(place: str) -> str:
    if "\0" in place or not (place.startswith("/") or is_url(place)):
        raise ValueError("neither an absolute path nor a URL")
    return place


Place = Annotated[str, Field(max_length=4096), AfterValidator(_absolute)]


class ImagePlaces(BaseModel):
    """Where a run's images lie."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images_dir: Place
    image_roots: tuple[Place, ...]


class Member(BaseModel):
    """A run that a merged one is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    location: str  # where it lay then
    shard: str | None
    limit: int | None
    test: bool


class RunSettings(Computation):
    """What a run computes. Every worker and the collector read it and never the command line.

    Written once, but for `relocated`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = Field(FORMAT_VERSION, ge=1, le=FORMAT_VERSION)
    run_id: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    created_at: str
    software_version: str
    staged_identity: bool = False  # staged files that do not say whose they are were written by another version

    model: str
    revision: str
    model_digest: str = Field(
        pattern=r"^[0-9a-f]{1,64}$"
    )  # what the queue's name carries: of the revision, or of the local checkpoint's content
    # Of a local checkpoint: each file's own digest.
    model_files: dict[str, str] = Field(default_factory=dict)
    model_slug: str = Field(pattern=rf"^[a-z0-9_][a-z0-9_.]{{0,{MAX_SLUG - 1}}}$")
    prompt_columns: bool = False  # {name} is a column and {{ a brace; a run from before that knows {question} alone

    dataset: str
    dataset_sha256: str
    embedded_images: bool = False  # they lay in the table, and are in the run now: the next two say nothing then
    images_dir: Place
    image_roots: tuple[Place, ...]
    # Where the same images lie since the run was moved. What was staged before stays this run's: it is known by the first ones.
    relocated: ImagePlaces | None = None
    columns: dict[str, str] = Field(default_factory=dict)  # of the table: role to column, where the user said so
    strip_placeholders: bool = False  # from its questions
    order: Order
    limit: int | None
    test: bool
    shard: str | None = Field(None, pattern=r"^[1-9]\d*/[1-9]\d*$")  # of the table, after the two before
    checkpoint_interval: int = Field(ge=1)
    part_digits: int = Field(ge=1, le=MAX_DIGITS)
    merged: tuple[Member, ...] = ()  # the runs whose parts these are; nothing is computed here

    @classmethod
    def decode(cls, data: bytes, address: str) -> RunSettings:
        """Return the settings in a run.json. Raises UserError that names the file."""
        try:
            settings = cls.model_validate_json(data)
            what = ", ".join(sorted(ALWAYS_WRITTEN - settings.model_fields_set)) + ": Field required"
        except ValidationError as error:
            what = faults(error)
        else:
            if settings.model_fields_set >= ALWAYS_WRITTEN:
                return settings
        raise UserError(f"{address} is damaged, or was written by another version of this software: {what}")

    @property
    def images(self) -> ImagePlaces:
        """Where the run's images lie now."""
        return self.relocated or ImagePlaces(images_dir=self.images_dir, image_roots=self.image_roots)

    def differences(self, other: RunSettings) -> dict[str, tuple[Any, Any]]:
        """Return the settings in which two runs compute something else: name to (ours, the other's)."""
        ours, theirs = (s.model_dump(exclude=_NOT_COMPARED) | s.images.model_dump() for s in (self, other))
        return {name: (value, theirs[name]) for name, value in ours.items() if value != theirs[name]}


class ModelFacts(BaseModel):
    """What the loaded checkpoint is and how it is read; two workers of one run must agree in all of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: str
    revision: str
    config_sha256: str
    template_sha256: str
    num_hidden_layers: int
    hidden_size: int
    vision_hidden_size: int
    layers: tuple[int, ...] = Field(max_length=10_000)
    min_pixels: int | None  # None: the model's processor sizes images
    max_pixels: int | None
    repetition_penalty: float
    prompt: str = QUESTION
    system_prompt: str | None = None
    chat_template_sha256: str | None = None  # of the run's own template; None: the checkpoint's
    special_tokens: SpecialTokens = "text"
    exact: bool = False
    vision_encoder: bool = True
    exif_rotation: bool = False
    answer_states: tuple[AnswerState, ...] = ()
    blind: bool = False
    positions: str = LAST_POSITIONS
    layer_definition: str = "output"  # what of a layer its vectors are
    vision_only_definition: str = "merged"  # another one: the published features
    vision_only_size: int | None = None  # None: it follows from the definition
    vision_encoder_definition: str = LAST_BLOCK

    @classmethod
    def decode(cls, data: bytes, address: str) -> ModelFacts:
        """Return the facts in a model.json. Raises DamagedError that names the file."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise DamagedError(f"{address} is damaged: {faults(error)}") from None

    def field_widths(self, *, images: bool = True) -> dict[str, int]:
        """Return the vectors that a question has, about images or about none: HALP field to width."""
        published = self.vision_only_definition != "merged"
        return widths(
            self.hidden_size,
            self.vision_hidden_size if self.vision_encoder and not published else None,
            self.layers,
            vision_only=(self.vision_only_size or self.vision_hidden_size) if published else self.hidden_size,
            answer_states=self.answer_states,
            images=images and not self.blind,
        )


def faults(error: ValidationError) -> str:
    """Return what pydantic found, in a line that repeats nothing of the input: that may be long, or be meant for a terminal."""
    found = [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors(include_url=False, include_input=False)]
    shown = "; ".join(f"{ascii(where)[1:-1][:80]}: {what[:200]}" if where else what[:200] for where, what in found[:3])
    return shown + (f" and {len(found) - 3} more" if len(found) > 3 else "")
