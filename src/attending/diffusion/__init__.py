"""Samplers of diffusion models, and what an intervention needs to see of them.

- `attending.diffusion.masked_text`: text from any masked language model, by unmasking step by step.
"""

from attending.diffusion.masked_text import UnmaskingStep as UnmaskingStep
from attending.diffusion.masked_text import sample_masked_text as sample_masked_text

__all__ = ["UnmaskingStep", "sample_masked_text"]
