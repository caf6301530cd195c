"""Operations on one image: decode, rescale, crop to the central square, encode, and sum its colours."""
