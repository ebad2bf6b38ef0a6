"""See what attention does in a model: statistics of every layer and head, and findings.

>>> import attending as at
>>> llama = at.zoo.load("llama-stdlib")
>>> inputs = llama.tokenizer("def attention(query, key, value):", return_tensors="pt")
>>> diagnosis = at.diagnose(llama.model, inputs, tokenizer=llama.tokenizer)
>>> print(diagnosis)                     # findings with thresholds and sources  # doctest: +SKIP
>>> diagnosis.to_html("llama.html")      # one page that works offline           # doctest: +SKIP
"""

from attending.diagnosis.record import (
    STATISTICS,
    Diagnosis,
    Evidence,
    Finding,
    HiddenRecord,
    LayerRecord,
    TopKey,
)
from attending.diagnosis.run import diagnose
from attending.diagnosis.thresholds import Thresholds

__all__ = [
    "diagnose",
    "Diagnosis",
    "Thresholds",
    "Finding",
    "Evidence",
    "LayerRecord",
    "HiddenRecord",
    "TopKey",
    "STATISTICS",
]
