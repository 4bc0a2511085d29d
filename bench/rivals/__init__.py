"""PyTorch at its best: what a competent user of ``torch.compile`` would write in place of our kernels."""
