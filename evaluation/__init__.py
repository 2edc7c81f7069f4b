"""Programs that measure what a model knows: C-Eval, and lm-evaluation-harness."""
