"""Texts that a page, a terminal or a file may trip over, and a diagnosis that says nothing else."""

from hypothesis import strategies as st

from attending.diagnosis.record import (
    Diagnosis,
    Evidence,
    Finding,
    HiddenRecord,
    LayerRecord,
    TopKey,
)

TEXTS = [
    "<script>window.__pwned=1</script>",
    "</script><script>window.__pwned=2</script>",
    "<!--<script>",
    "<img src=x onerror=window.__pwned=3>",
    '"><svg onload=window.__pwned=4>',
    "'><b>",
    "&lt;script&gt;",
    "javascript:window.__pwned=5",
    "]]>",
    "{{ 7 * 7 }}{% raw %}",
    "%{x}<br><a href='javascript:window.__pwned=6'>x</a>",
    "$\\frac{1}{2}$",
    "[red]x[/red]",
    "[link=file:///etc/passwd]x[/link]",
    "[/]",
    "\x1b[31mred\x1b]0;title\x07",
    "\u202egnp.exe\u202c\u200f",
    "\ud800",
    "a\udfffb",
    "\u2028\u2029\x85",
    "\x00\x08\r\n\t",
    "\U000e0001\ufeff\ue000",
    "__proto__",
    "model.layers.3.attn#1/2?x=%zz",
    "",
    "猫" * 40,
    "x" * 300,
]

# Any text at all, lone surrogates among it, and the ones above.
texts = st.one_of(
    st.sampled_from(TEXTS),
    st.text(st.characters(exclude_categories=()), max_size=12),
    st.text(st.sampled_from("<>&\"'/!-[]{}%$\\script\u2028\ud800\x1b\u202e"), max_size=16),
)


def saying(
    name: str, token: str | None = None, words: str | None = None, block: str | None = None
) -> Diagnosis:
    """One layer, one block, one finding, with these texts wherever a text may stand."""
    token = name if token is None else token
    words = name if words is None else words
    block = name if block is None else block
    return Diagnosis(
        model=words,
        model_class=words,
        parameters=10,
        attention_implementation=words,
        sequences=1,
        tokens=4,
        preview=[token, token],
        layers=[
            LayerRecord(
                name=name,
                layer=None,
                kind="self",
                is_causal=False,
                head_dim=4,
                statistics={"entropy": [0.5, 1.0], "sink": [0.25, 0.5], words + "!": [1.0, 2.0]},
                class_mass={words: [0.1, 0.2]},
                top_keys=[[TopKey(token, 0, 0, 0.5)], [TopKey(token, 1, 0, 0.25)]],
                pooled=[[[0.5, 0.5], [0.25, 0.75]]] * 2,
                similarity=[[1.0, 0.5], [0.5, 1.0]],
            )
        ],
        hidden=[HiddenRecord(block, 0, 0.5, 2.0, 10.0, 1.0, 1.5, token, 1, 2)],
        findings=[
            Finding(
                kind=words,
                title=words,
                severity="warning",
                summary=words,
                threshold=words,
                source=words + "!",
                evidence=(
                    Evidence(name, 1, 0.5, words),
                    Evidence("no " + name, 0, 0.5, words),
                    Evidence(name, None, 0.5, words),
                ),
                methods=(words,),
            )
        ],
        thresholds={words: 0.5},
        version=words,
    )
