"""Samplers of diffusion models, and what an intervention needs to see of them.

- `attending.diffusion.flow_matching`: videos from a flow matching model, by Euler's steps.
- `attending.diffusion.masked_text`: text from any masked language model, by unmasking step by step.
"""

from attending.diffusion.flow_matching import FlowStep as FlowStep
from attending.diffusion.flow_matching import noise_levels as noise_levels
from attending.diffusion.flow_matching import sample_flow as sample_flow
from attending.diffusion.masked_text import UnmaskingStep as UnmaskingStep
from attending.diffusion.masked_text import sample_masked_text as sample_masked_text

__all__ = ["FlowStep", "UnmaskingStep", "noise_levels", "sample_flow", "sample_masked_text"]
