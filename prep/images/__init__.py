"""Operations on one picture: decode, rescale, encode, and colour statistics."""
