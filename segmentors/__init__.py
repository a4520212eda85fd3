"""What consumes the activations of `diffusion_features` to label pixels."""
