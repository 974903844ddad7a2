"""`32-true`, `64-true`, `16-true`, `bf16-true`: weights, gradients and compute in one dtype."""
