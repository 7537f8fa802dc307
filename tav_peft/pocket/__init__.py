"""The embedded base `pocket`: a small drawn world, a diffusion model trained on it, and sample clips of it."""
