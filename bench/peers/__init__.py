"""What fastast is compared with: plain PyTorch, written from the papers' descriptions.

The models here own no parameters: they run one of ours another way, so that outputs and gradients
can be compared one to one.
"""
