"""Settings of the images that a stream serves: the class Augmentation and its presets."""
