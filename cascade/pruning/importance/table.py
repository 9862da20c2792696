"""The importance scores by the names that a recipe has for them: a new score is a function and a line here.

A score returns float32, one number for each unit, higher = keep. Its parameters say what it needs: `statistics`, or
`model` and `blocks` (which cost forward passes), and `num_removed` where it depends on how many layers go. Imports no
torch: a recipe is checked against these names.
"""

LAYER_SCORES = {
    "block_influence": "cascade.pruning.importance.layers:block_influence",
    "norm_ratio": "cascade.pruning.importance.layers:norm_ratio",
    "removal_loss": "cascade.pruning.importance.layers:removal_loss",
    "removal_logits": "cascade.pruning.importance.layers:removal_logits",
    "contiguous_angle": "cascade.pruning.importance.layers:contiguous_angle",
    "contiguous_loss": "cascade.pruning.importance.layers:contiguous_loss",
}
HEAD_SCORES = {
    "activation_norm": "cascade.pruning.importance.scores:head_norms",
    "contribution": "cascade.pruning.importance.scores:head_contributions",
}
NEURON_SCORES = {
    "activation_norm": "cascade.pruning.importance.scores:neuron_norms",
    "contribution": "cascade.pruning.importance.scores:neuron_contributions",
    "taylor": "cascade.pruning.importance.gradients:taylor",
    "hessian": "cascade.pruning.importance.gradients:hessian",
}
HIDDEN_SCORES = {
    "activation_norm": "cascade.pruning.importance.scores:hidden_norms",
    "pca": "cascade.pruning.importance.scores:pca",
}
