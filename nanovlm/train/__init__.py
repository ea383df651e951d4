"""Training: ``loop`` goes through the steps, the other files do one thing each for it.

optimizer: what learns, how fast. distributed: several processes. checkpoints: the run's folder. metrics: what is
told. curve: the loss as a picture. flops: how well a GPU is used.
"""

from nanovlm.train.loop import Result, train

__all__ = ["Result", "train"]
