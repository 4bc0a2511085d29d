"""What several ops on the CPU share: how C++ is called, products, samples of latents, noise."""
