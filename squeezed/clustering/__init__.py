"""Clustering the keys of all KV heads of a layer, and laying them out cluster by cluster (paper section 3.1, 3.3)."""

from squeezed.clustering.batched_kmeans import inertia, kmeans
from squeezed.clustering.layout import COARSENING, assemble, cluster_layer

__all__ = ["COARSENING", "assemble", "cluster_layer", "inertia", "kmeans"]
