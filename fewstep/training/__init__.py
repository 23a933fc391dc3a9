"""Training: the consistency maths, one training loop, distillation."""
