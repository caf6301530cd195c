#ifdef AVX2
/* Sums of 8 channels: high * 2^11 + low. */
typedef struct {
    __m256i high, low;
} sums8;

AVX2_INLINE sums8 no_sums(void) { return (sums8){_mm256_setzero_si256(), _mm256_set1_epi32(ROUND_HALF)}; }

/* Add 8 pairs of 16-bit numbers, each multiplied by its weight. */
AVX2_INLINE sums8 add_pairs(sums8 sums, __m256i pairs, const weight_pair *weights) {
    int32_t high, low;
    memcpy(&high, weights->high, 4), memcpy(&low, weights->low, 4);
    sums.high = _mm256_add_epi32(sums.high, _mm256_madd_epi16(pairs, _mm256_set1_epi32(high)));
    sums.low = _mm256_add_epi32(sums.low, _mm256_madd_epi16(pairs, _mm256_set1_epi32(low)));
    return sums;
}

/* Round 8 sums to levels, as 32-bit integers. */
AVX2_INLINE __m256i levels(sums8 sums) {
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_slli_epi32(sums.high, LOW_BITS), sums.low), WEIGHT_BITS);
}

/* As resize_row, for ROWS rows. Each half of a vector belongs to one row. `pairs` is self.pairs. */
AVX2_INLINE void resize_some(const uint8_t *in, int64_t stride, int64_t side, resize_weights self, int64_t pairs,
                             uint8_t *restrict out, int64_t bytes) {
    const __m256i split = _mm256_broadcastsi128_si256( /* two pixels become pairs of 16 bits: RR, GG, BB, 00 */
        _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    const __m256i join = _mm256_broadcastsi128_si256( /* four RGB0 become four RGB */
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    for (int64_t i = 0; i < side; i += 4) {
        __m256i pixels[ROWS / 2][4];
        for (int64_t k = 0; k < 4; k++) {
            sums8 sums[ROWS / 2];
            for (int64_t r = 0; r < ROWS / 2; r++)
                sums[r] = no_sums();
            for (int64_t p = 0; p < pairs; p++)
                for (int64_t r = 0; r < ROWS / 2; r++) {
                    const uint8_t *pixel = in + 3 * (self.first[i + k] + 2 * p) + 2 * r * stride;
                    const __m128i a = _mm_loadu_si128((const __m128i *)pixel);
                    const __m128i b = _mm_loadu_si128((const __m128i *)(pixel + stride));
                    sums[r] = add_pairs(sums[r], _mm256_shuffle_epi8(_mm256_set_m128i(b, a), split),
                                        self.weights + self.most_pairs * (i + k) + p);
                }
            for (int64_t r = 0; r < ROWS / 2; r++)
                pixels[r][k] = levels(sums[r]);
        }
        for (int64_t r = 0; r < ROWS / 2; r++) {
            const __m256i two = _mm256_packus_epi32(pixels[r][0], pixels[r][1]);
            const __m256i four = _mm256_packus_epi16(two, _mm256_packus_epi32(pixels[r][2], pixels[r][3]));
            const __m256i rgb = _mm256_shuffle_epi8(four, join);
            _mm_storeu_si128((__m128i *)(out + 2 * r * bytes + 3 * i), _mm256_castsi256_si128(rgb));
            _mm_storeu_si128((__m128i *)(out + (2 * r + 1) * bytes + 3 * i), _mm256_extracti128_si256(rgb, 1));
        }
    }
}

AVX2 static void resize_some_avx2(const uint8_t *in, int64_t stride, int64_t side, const resize_weights *self,
                                  uint8_t *restrict out, int64_t bytes) {
    if (self->pairs == 2) /* with a constant number of pairs, the compiler unrolls the loops */
        resize_some(in, stride, side, *self, 2, out, bytes);
    else
        resize_some(in, stride, side, *self, self->pairs, out, bytes);
}

/* As resize_line. `bytes` is a multiple of VECTOR, and `pairs` is self.pairs. */
AVX2_INLINE void add_rows(const uint8_t *rows, int64_t bytes, int64_t height, resize_weights self, int64_t pairs,
                          int64_t i, uint8_t *restrict out) {
    const __m256i zero = _mm256_setzero_si256();
    for (int64_t j = 0; j < bytes; j += VECTOR) {
        sums8 sums[4] = {no_sums(), no_sums(), no_sums(), no_sums()};
        for (int64_t p = 0; p < pairs; p++) {
            const int64_t last = height - 1, first = self.first[i] + 2 * p < last ? self.first[i] + 2 * p : last;
            const weight_pair *weights = self.weights + self.most_pairs * i + p;
            const uint8_t *row = rows + first * bytes + j;
            const __m256i a = _mm256_loadu_si256((const __m256i *)row);
            const __m256i b = _mm256_loadu_si256((const __m256i *)(row + (first < last ? bytes : 0)));
            const __m256i front = _mm256_unpacklo_epi8(a, b), back = _mm256_unpackhi_epi8(a, b);
            sums[0] = add_pairs(sums[0], _mm256_unpacklo_epi8(front, zero), weights);
            sums[1] = add_pairs(sums[1], _mm256_unpackhi_epi8(front, zero), weights);
            sums[2] = add_pairs(sums[2], _mm256_unpacklo_epi8(back, zero), weights);
            sums[3] = add_pairs(sums[3], _mm256_unpackhi_epi8(back, zero), weights);
        }
        const __m256i front = _mm256_packus_epi32(levels(sums[0]), levels(sums[1]));
        const __m256i back = _mm256_packus_epi32(levels(sums[2]), levels(sums[3]));
        _mm256_storeu_si256((__m256i *)(out + j), _mm256_packus_epi16(front, back));
    }
}

AVX2 static void resize_line_avx2(const uint8_t *rows, int64_t bytes, int64_t height, const resize_weights *self,
                                  int64_t i, uint8_t *restrict out) {
    if (self->pairs == 2)
        add_rows(rows, bytes, height, *self, 2, i, out);
    else
        add_rows(rows, bytes, height, *self, self->pairs, i, out);
}

/* If a row or column does not become shorter, each output pixel is a mean of two input pixels: the nearer pixel n and the
 * other pixel f. With the weight w <= 2^21 of f, the sum is 2^22 n - w (n - f). -w is stored as high * 2^6 + low, with
 * 0 <= low < 64. */
typedef struct {
    int16_t high, low;
    int32_t is_second; /* 1: the nearer pixel is the second of the two */
} blend_weight;

INLINE blend_weight blend_at(const resize_weights *self, int64_t i) {
    const int32_t first = weight_at(self, i, 0), second = weight_at(self, i, 1);
    const int32_t smaller = first < second ? first : second;
    return (blend_weight){(int16_t)(-smaller >> 6), (int16_t)(-smaller & 63), first < second};
}

/* Return (2^22 near + (high * 2^6 + low) * change + 2^21) >> 22 for 16 channels, as 16-bit integers. `change` is the
 * level of the nearer pixel minus the level of the other. */
AVX2_INLINE __m256i blend16(__m256i near, __m256i change, __m256i high, __m256i low) {
    /* change * high has 32 bits: upper * 2^16 + lower. The rest of the sum, in multiples of 2^6, has 16 bits. */
    const __m256i upper = _mm256_mulhi_epi16(change, high), lower = _mm256_mullo_epi16(change, high);
    const __m256i rest = _mm256_srai_epi16(_mm256_mullo_epi16(change, low), 6);
    /* Add 1 if lower + rest + 2^15 >= 2^16, with lower from 0 to 2^16 - 1. adds_epi16 does not change the sign. */
    const __m256i excess = _mm256_adds_epi16(_mm256_xor_si256(lower, _mm256_set1_epi16(INT16_MIN)), rest);
    return _mm256_sub_epi16(_mm256_add_epi16(near, upper), _mm256_cmpgt_epi16(excess, _mm256_set1_epi16(-1)));
}

/* As resize_line, if weights->is_blend. */
AVX2 static void blend_line_avx2(const uint8_t *rows, int64_t bytes, int64_t height, const resize_weights *weights,
                                 int64_t i, uint8_t *restrict out) {
    const blend_weight weight = blend_at(weights, i);
    const uint8_t *first = rows + weights->first[i] * bytes;
    const uint8_t *second = weights->first[i] + 1 < height ? first + bytes : first;
    const uint8_t *near_row = weight.is_second ? second : first, *far_row = weight.is_second ? first : second;
    const __m256i high = _mm256_set1_epi16(weight.high), low = _mm256_set1_epi16(weight.low);
    const __m256i zero = _mm256_setzero_si256();
    for (int64_t j = 0; j < bytes; j += VECTOR) {
        const __m256i near = _mm256_loadu_si256((const __m256i *)(near_row + j));
        const __m256i far = _mm256_loadu_si256((const __m256i *)(far_row + j));
        const __m256i front = _mm256_unpacklo_epi8(near, zero), back = _mm256_unpackhi_epi8(near, zero);
        const __m256i front_change = _mm256_sub_epi16(front, _mm256_unpacklo_epi8(far, zero));
        const __m256i back_change = _mm256_sub_epi16(back, _mm256_unpackhi_epi8(far, zero));
        _mm256_storeu_si256((__m256i *)(out + j), _mm256_packus_epi16(blend16(front, front_change, high, low),
                                                                       blend16(back, back_change, high, low)));
    }
}

/* How to blend the bytes of a resized row. `first` has the position in the input row of the first byte that a group of
 * 8 bytes needs. For each byte, `pair` has the positions of the nearer and the other byte after `first`. */
typedef struct {
    int32_t *first;
    uint8_t *pair;
    int16_t *high, *low;
} blend_table;

/* Return the table of a row of `side` pixels and `bytes` bytes. It uses the table_bytes(bytes) bytes at `memory`. */
static blend_table fill_table(const resize_weights *weights, int64_t side, int64_t bytes, uint8_t *memory) {
    blend_table table = {.first = (int32_t *)memory};
    table.high = (int16_t *)(table.first + bytes / 8), table.low = table.high + bytes;
    table.pair = (uint8_t *)(table.low + bytes);
    for (int64_t group = 0; group < bytes / 8; group++)
        table.first[group] = 8 * group < 3 * side ? 3 * weights->first[8 * group / 3] : 0;
    for (int64_t i = 0; i < side; i++) {
        const blend_weight weight = blend_at(weights, i);
        for (int64_t j = 3 * i; j < 3 * i + 3; j++) {
            const int64_t first = 3 * weights->first[i] + j - 3 * i - table.first[j / 8];
            table.pair[2 * j] = (uint8_t)(first + 3 * weight.is_second);
            table.pair[2 * j + 1] = (uint8_t)(first + 3 - 3 * weight.is_second);
            table.high[j] = weight.high, table.low[j] = weight.low;
        }
    }
    memset(table.pair + 6 * side, 128, 2 * (bytes - 3 * side)); /* the bytes after the pixels become 0 */
    memset(table.high + 3 * side, 0, 2 * (bytes - 3 * side)), memset(table.low + 3 * side, 0, 2 * (bytes - 3 * side));
    return table;
}

/* Return 16 bytes from `front` and 16 bytes from `back`. */
AVX2_INLINE __m256i two_parts(const void *front, const void *back) {
    return _mm256_set_m128i(_mm_loadu_si128((const __m128i *)back), _mm_loadu_si128((const __m128i *)front));
}

/* As resize_row, for ROWS rows, if the weights have `is_blend`. VECTOR bytes are four groups. The first vector has
 * groups 0 and 2, and the second vector has groups 1 and 3, because packus_epi16 then writes the groups in order. */
AVX2 static void blend_some_avx2(const uint8_t *in, int64_t stride, blend_table table, uint8_t *restrict out,
                                 int64_t bytes) {
    const __m256i difference = _mm256_set1_epi16((int16_t)0xff01); /* the first byte of a pair minus the second */
    const __m256i first_byte = _mm256_set1_epi16(0xff);
    for (int64_t j = 0; j < bytes; j += VECTOR) {
        __m256i pair[2], high[2], low[2], blended[2];
        for (int64_t v = 0; v < 2; v++) {
            const int64_t front = j + 8 * v, back = front + 16;
            pair[v] = two_parts(table.pair + 2 * front, table.pair + 2 * back);
            high[v] = two_parts(table.high + front, table.high + back);
            low[v] = two_parts(table.low + front, table.low + back);
        }
        for (int64_t r = 0; r < ROWS; r++) {
            for (int64_t v = 0; v < 2; v++) {
                const int32_t *first = table.first + j / 8 + v;
                const __m256i pixels = two_parts(in + r * stride + first[0], in + r * stride + first[2]);
                const __m256i pairs = _mm256_shuffle_epi8(pixels, pair[v]);
                blended[v] = blend16(_mm256_and_si256(pairs, first_byte), _mm256_maddubs_epi16(pairs, difference),
                                     high[v], low[v]);
            }
            _mm256_storeu_si256((__m256i *)(out + r * bytes + j), _mm256_packus_epi16(blended[0], blended[1]));
        }
    }
}
#endif
