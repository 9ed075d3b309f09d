"""Image-text retrieval: contrast over the global batch (ITC), matching on hard negatives (ITM), re-ranking.

Li et al., ALBEF (NeurIPS 2021), sections 3.2 and 4, with one backbone for images, texts and pairs.
"""

from eve_ds.tasks.retrieval.task import Retrieval

__all__ = ["Retrieval"]
