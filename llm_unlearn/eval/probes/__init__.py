"""Numbers from a model's insides: gradients, local complexity, features, curvature, weights. `table.PROBES` lists them.

Everything here reads `model(batch.inputs, batch.index_N, layer)` and nothing else of a model, so that language models
and image classifiers are measured by one code.
"""
