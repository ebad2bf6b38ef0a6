"""What all pages of a report are made with: templates, and the policy that keeps them closed."""

import functools
from importlib import resources
from typing import TYPE_CHECKING

from attending.report.text import count, number, plural, printable, visible

if TYPE_CHECKING:
    from jinja2 import Environment


def policy(*scripts: str) -> str:
    """What a page may do: run the scripts of these hashes, show what is in it, and no more."""
    allowed = " ".join(f"'{script}'" for script in scripts) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def template_text(name: str) -> str:
    """A file of the templates, as it is."""
    return (resources.files("attending.report") / "templates" / name).read_text(encoding="utf-8")


@functools.cache
def environment() -> "Environment":
    """Jinja, with escaping and with words and numbers as filters."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("attending.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count,
        "number": number,
        "plural": plural,
        "printable": printable,
        "visible": visible,
    }
    return environment
