"""Executing updates on devices and processes. Only this package imports torch.distributed and DeepSpeed."""
