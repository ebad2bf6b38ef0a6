"""What to leave out: planners that choose which tokens a model sees, and which blocks of a map.

Pure functions of features, attention and grids; what acts on their choice lives on the floor above.

- `attending.sparse.visual_tokens`: which image tokens to keep, by attention, by diversity, or by
  both as AgilePruner does.
- `attending.sparse.merged_tokens`: fewer image tokens in which the others are merged.
- `attending.sparse.language_tokens`: which image tokens to keep inside the language model.
- `attending.sparse.window`: blocks near the diagonal, the plan that every other has to beat.
- `attending.sparse.sparsed`: blocks by mean probability, for prompt and answer apart (SparseD);
  `block_scores` has the block sums of maps that it goes by.
- `attending.sparse.rectified`: block-sparse attention with the rest estimated from pooled blocks;
  its parts are `pooled`, `implicit_attention` and `curve_order` (a space-filling curve).
- `attending.sparse.circular_window`: image tokens see a circle around them and all text (CLEAR);
  `square_tiles` has the plan of blocks for that, `image_tokens` where the tokens of a model lie,
  `halo_exchange` the same with the rows of an image over several devices.
- `attending.sparse.paro`: an order of the tokens for each head, and fixed blocks (PAROAttention);
  made by `paro_calibration` from `axis_order`, `order_scores` and `static_mask`.
- `attending.sparse.quantised_attention`: INT8 and INT4 attention, simulated.
"""
