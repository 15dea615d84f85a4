"""Flash attention written for the accelerator: one module a platform, chosen in `aether.kernels.flash`."""
