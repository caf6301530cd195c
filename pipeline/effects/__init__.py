"""Effects of training images: colour jitter, grey, blur and erase, as torchvision defines them.

pipeline.settings.effects has the settings. `parameters` turns random numbers into the parameters of each image, and
`batch` computes the effects of a batch with PyTorch. pipeline/engines/effects.h computes the same bits in C.
"""
