"""Compare methods on a model: quality, drift from plain, speed and memory, side by side.

>>> import attending as at
>>> llama = at.zoo.load("llama-stdlib")
>>> ids = llama.tokenizer("def attention(query, key):", return_tensors="pt")
>>> trial = at.trial(llama.model, ids, {"none": None, "mine": method})   # doctest: +SKIP
>>> print(trial)                                                         # doctest: +SKIP
>>> trial.to_html("trial.html")                                          # doctest: +SKIP
"""

from attending.trials.contenders import Method, Methods
from attending.trials.record import Trial, TrialRow
from attending.trials.run import trial
from attending.trials.samples import Estimate, Measure, Samples
from attending.trials.tasks import ShapesPope, Task

__all__ = [
    "trial",
    "Trial",
    "TrialRow",
    "Measure",
    "Samples",
    "Estimate",
    "Method",
    "Methods",
    "Task",
    "ShapesPope",
]
