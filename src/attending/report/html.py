"""A diagnosis as one HTML page that works offline, and as a fragment for notebooks."""

import base64
import functools
import hashlib
import json
import zlib
from urllib.parse import quote

from attending.diagnosis.record import Diagnosis, Evidence, Finding
from attending.report.inline import render_inline as render_inline
from attending.report.page import environment, policy, template_text
from attending.report.page_data import page_data
from attending.report.stacks import (
    SEVERITY_WORDS,
    by_severity,
    places,
    severities_in_words,
    shape_in_words,
)
from attending.report.text import printable

FEW = 4  # pieces of evidence that are open at once
MANY = 400  # and those that are in the page at all: to_json has them all


def render(diagnosis: Diagnosis) -> str:
    """One self-contained page: no server, no network, nothing but the file.

    The page may run two scripts, its own and Plotly, by their hashes: a token that looks like a
    script could not run even if it found a way out of the data that it is quoted in.
    """
    script = template_text("page.js")
    plotly, plotly_hash = _plotly()
    layers = {layer.name: layer.num_heads for layer in diagnosis.layers}
    place = places(diagnosis)
    text = (
        environment()
        .get_template("page.html.j2")
        .render(
            policy=policy(_sha256(script), plotly_hash),
            css=template_text("page.css"),
            script=script,
            plotly=plotly,
            data=embed_json(page_data(diagnosis)),
            d=diagnosis,
            shape=shape_in_words(diagnosis) if diagnosis.layers else "none",
            has_heads=any(layers.values()),
            severities=severities_in_words(diagnosis.findings),
            findings=[
                {
                    "finding": finding,
                    "word": SEVERITY_WORDS[finding.severity],
                    "shown": [_evidence(e, layers, place(e.where)) for e in _shown(finding)],
                    "folded": [_evidence(e, layers, place(e.where)) for e in _folded(finding)],
                    "left_out": max(0, len(finding.evidence) - MANY),
                }
                for finding in by_severity(diagnosis.findings)
            ],
        )
    )
    # A lone surrogate in a name could be held by a str, but not be written to a file.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def embed_json(data: object) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or a line."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def link(name: str, head: int) -> str:
    """The fragment of the page's address that selects a head.

    It has the name as it is printed: what cannot be written in UTF-8 cannot stand in an address.
    """
    return f"#{quote(printable(name), safe='')}/{head}"


def _shown(finding: Finding) -> tuple[Evidence, ...]:
    # To fold a single entry would save no room.
    return finding.evidence[: FEW if len(finding.evidence) > FEW + 1 else FEW + 1]


def _folded(finding: Finding) -> tuple[Evidence, ...]:
    return finding.evidence[len(_shown(finding)) : MANY]


def _evidence(evidence: Evidence, layers: dict[str, int], place: str) -> dict[str, str | None]:
    head = evidence.head
    known = head is not None and 0 <= head < layers.get(evidence.where, 0)
    return {
        "place": place if head is None else f"{place}, head {head}",
        "name": printable(evidence.where),
        "link": link(evidence.where, head) if known and head is not None else None,
        "text": printable(evidence.text),
    }


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@functools.cache
def _plotly() -> tuple[str, str]:
    """Plotly's whole library, deflated to a third, and the hash of what it inflates to.

    The Python package carries no smaller bundle. Deflated it also costs no time to parse until the
    first chart is drawn.
    """
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs()
    deflated = zlib.compress(source.encode(), 9)
    return base64.b64encode(deflated).decode("ascii"), _sha256(source)
