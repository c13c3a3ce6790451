"""The embedded teacher: a tiny world, and a real diffusion model of it with the anatomy of Stable Diffusion 1.5."""
