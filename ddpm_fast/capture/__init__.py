"""Steps of a Sampler captured in graphs, CUDA's, and played again."""
