"""The templates of HTML pages: whatever is put into one is escaped."""

from __future__ import annotations

from functools import cache

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template


@cache
def template(name: str, package: str = "storage") -> Template:
    """Return a template of a package's data. It may include those of storage: the style, the samples."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(place, "data") for place in dict.fromkeys([package, "storage"])]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
