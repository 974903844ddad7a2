"""`16-mixed`, `bf16-mixed`: compute in 16 bits, float32 master weights (Micikevicius et al., 2018, arXiv:1710.03740)."""
