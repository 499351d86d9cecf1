"""The four operations: score centroids, select clusters, attend to what is selected, merge."""
