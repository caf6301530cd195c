"""Operations on images: decode, rescale, crop to the central square, encode, and compute colour statistics."""
