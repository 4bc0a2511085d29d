"""What several kernels share: products, gates, samples, tiles and the phases of the recurrence."""
