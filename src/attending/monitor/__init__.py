"""Watch the attention of a model while it trains, in a bare loop, transformers or Lightning.

>>> import attending as at
>>> monitor = at.AttentionMonitor(model, probe)                   # doctest: +SKIP
>>> monitor.step()                     # after each optimizer.step()  # doctest: +SKIP
>>> monitor.attach(trainer)            # or: transformers             # doctest: +SKIP
>>> monitor.lightning_callback()       # or: Lightning                # doctest: +SKIP
>>> monitor.to_frame()                                            # doctest: +SKIP
"""

from attending.monitor.attention_monitor import AttentionMonitor
from attending.monitor.limits import Alarm, AttentionWarning, Limits
from attending.monitor.records import LayerMeasurement, Measurement, WeightMeasurement

__all__ = [
    "AttentionMonitor",
    "AttentionWarning",
    "Limits",
    "Measurement",
    "LayerMeasurement",
    "WeightMeasurement",
    "Alarm",
]
