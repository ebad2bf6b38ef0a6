"""Generation strategies for transformers' `generate`: one file per method.

Each comes as a `LogitsProcessor`, as a callable for `generate(custom_generate=...)`, or as a
dataclass that works like an intervention: within `with method(model):`, `model.generate` decodes
by the method, and afterwards the model is what it was. Import the module that you need.

- `attending.decoding.contrastive`: one model against a second look at the prompt, with adaptive
  plausibility; what VCD, ICD, M3ID, context-aware decoding and DAMRO have in common.
- `attending.decoding.momentum`: greedy search that resists walking in circles.
- `attending.decoding.contrastive_search`: the likely token that is unlike the text so far.
- `attending.decoding.walk`: the circular depth, how long a circle the next token would close.
- `attending.decoding.damro`: LLaVA against the image tokens that everything looks at.
- `attending.decoding.image_prompts`: a prompt with only some of the tokens of its images.
"""
