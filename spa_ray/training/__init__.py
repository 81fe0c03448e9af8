"""Training: pairs and a model folder in, a trained model folder out.

Inside: losses, log-probs, batch planning, the DeepSpeed step loop, the Ray Train launch, export. Never: vLLM.
Importing this package imports nothing heavy; `losses`, `forward`, `step` and `loop` import torch.
"""

# Raise it when the same config and inputs would give another output than before.
STAGE_VERSION = 2
MERGE_VERSION = 1  # of `merge`
