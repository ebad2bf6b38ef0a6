"""Measurements of whole models: what they look at, depend on and suffer from.

Each probe is a module; import the one you need.

- `attending.probes.rollout`: which input tokens an output token comes from, through all layers.
- `attending.probes.head_importance`: which heads the loss depends on.
- `attending.probes.map_indicators`: spread, sink, locality and head diversity of given maps.
- `attending.probes.entropy_curve`: entropy against the number of keys, layer by layer.
- `attending.probes.source_attention`: how attention to the source fades as a decoder generates.
- `attending.probes.hidden`: the hidden states from block to block.
- `attending.probes.outliers`: systematic outliers of activations, weights and attention.
- `attending.probes.dependency_tree`: trees of parts from the maps of reversed attention.
- `attending.probes.quantization`: what rounding to few bits costs a model.
- `attending.probes.cls_attention`: the patches that a vision tower's class token looks at, and the
  outliers among them; `attending.probes.patch_watch`: the same from a model while it runs.
- `attending.probes.visual_tokens`: effective rank and attention entropy of image tokens.
- `attending.probes.set_targets`: functions on sets of keys, to see what a model learns.
- `attending.probes.hallucination`: POPE and CHAIR, whether a model sees what is not there.
- `attending.probes.block_profile`: which blocks of a denoiser attend to the foreground;
  `attending.probes.foreground`: masks in tokens.
- `attending.probes.text`: repetition and diversity of texts.
- `attending.probes.continuations`: coherence and greedy ratio of what a model wrote.
- `attending.probes.anomaly`: AUROC and AUPRO of anomaly maps.
- `attending.probes.image_quality`: PSNR and SSIM of restored images.
- `attending.probes.mauve`: how far texts of a model are from texts of people.
"""
