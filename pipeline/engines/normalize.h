/* Mirror crops, add the colour noise, subtract the mean and multiply by the scale. kernels.c includes this file. */

typedef struct {
    const uint8_t *pixels; /* address of the crop's upper left pixel, RGB */
    int64_t stride;        /* number of bytes from one row to the next */
    const float *mean;     /* first pixel of the subtracted part of the mean image, in the output's layout; or null */
    float shift[3];        /* numbers that are added to R, G, B */
    int32_t flip;          /* 1: the crop is mirrored left to right */
} crop;

/* Split a row of RGB `pixels` into three rows of bytes: R, G, B. */
INLINE void split(const uint8_t *restrict pixels, int64_t side, uint8_t *restrict rows) {
    for (int64_t j = 0; j < side; j++)
        rows[j] = pixels[3 * j], rows[side + j] = pixels[3 * j + 1], rows[2 * side + j] = pixels[3 * j + 2];
}

/* The product is the last operation, so no compiler fuses it with an addition: every compiler gives the same bits. */
INLINE float augment(uint8_t pixel, float shift, float mean, float scale) { return (pixel + shift - mean) * scale; }

/* Write the rows `first` to `end` - 1 of a crop to `out` (3, side, side). `scales` are the factors of R, G and B.
 * In the mean image, rows are mean_side floats apart, and channels are mean_side * mean_side floats apart. */
EACH_CPU void rows_nchw(const crop *cur, int64_t first, int64_t end, int64_t side, int64_t mean_side,
                        const float *scales, float *restrict out) {
    uint8_t rows[3 * side];
    for (int64_t i = first; i < end; i++) {
        split(cur->pixels + (i - first) * cur->stride, side, rows);
        for (int64_t c = 0; c < 3; c++) {
            const uint8_t *restrict row = rows + c * side;
            const float shift = cur->shift[c], scale = scales[c];
            const float *restrict mean = cur->mean + (c * mean_side + i) * mean_side;
            float *restrict line = out + (c * side + i) * side;
            if (cur->mean && cur->flip)
                for (int64_t j = 0; j < side; j++)
                    line[j] = augment(row[side - 1 - j], shift, mean[j], scale);
            else if (cur->mean)
                for (int64_t j = 0; j < side; j++)
                    line[j] = augment(row[j], shift, mean[j], scale);
            else if (cur->flip)
                for (int64_t j = 0; j < side; j++)
                    line[j] = augment(row[side - 1 - j], shift, 0, scale);
            else
                for (int64_t j = 0; j < side; j++)
                    line[j] = augment(row[j], shift, 0, scale);
        }
    }
}

/* Write the rows `first` to `end` - 1 of a crop to `out` (side, side, 3). In the mean image, rows are 3 * mean_side
 * floats apart. */
EACH_CPU void rows_nhwc(const crop *cur, int64_t first, int64_t end, int64_t side, int64_t mean_side,
                        const float *scales, float *restrict out) {
    uint8_t rows[3 * side], mirrored[3 * side];
    float shifts[3 * side], scale[3 * side];
    for (int64_t j = 0; j < 3 * side; j++)
        scale[j] = scales[j % 3], shifts[j] = cur->shift[j % 3];
    for (int64_t i = first; i < end; i++) {
        const uint8_t *restrict row = cur->pixels + (i - first) * cur->stride;
        const float *restrict mean = cur->mean + 3 * i * mean_side;
        float *restrict line = out + 3 * i * side;
        if (cur->flip) { /* Mirroring the three split rows takes half the time of mirroring pixel by pixel. */
            split(row, side, rows);
            for (int64_t j = 0; j < side; j++)
                for (int64_t c = 0; c < 3; c++)
                    mirrored[3 * j + c] = rows[c * side + side - 1 - j];
            row = mirrored;
        }
        if (cur->mean)
            for (int64_t j = 0; j < 3 * side; j++)
                line[j] = augment(row[j], shifts[j], mean[j], scale[j]);
        else
            for (int64_t j = 0; j < 3 * side; j++)
                line[j] = augment(row[j], shifts[j], 0, scale[j]);
    }
}

enum {
    PIXELS = 8, /* number of pixels of a row that are converted together, to three vectors of 8 floats */
    AHEAD = 4   /* number of rows between the row that is converted and the row that the CPU begins to load */
};

/* How to make 8 floats from the 24 bytes of PIXELS pixels. In channels-last order, the floats of vector v have the
 * positions 8 * v to 8 * v + 7 of the 24 floats of these pixels. In channels-first order, they are channel v. */
typedef struct {
    int64_t start[2];  /* the first 4 floats need bytes of the 16 that begin at start[0], the others at start[1] */
    uint8_t order[32]; /* for each float, the position of its byte after `start`; then three times 128, for 0 */
    float shift[8], scale[8];
} vector_plan;

/* How to normalize the rows of an image. If `past_cache` is 0, the vectors are not used. */
typedef struct {
    int32_t past_cache, channels_last;
    const float *scales; /* the factors of R, G and B */
    vector_plan vectors[3];
} image_plan;

static image_plan plan_image(const crop *cur, int64_t side, const float *scales, int channels_last, const float *out) {
    image_plan plan = {.channels_last = channels_last, .scales = scales};
#ifdef AVX2
    /* On an older Intel CPU, writes past the cache took longer than other writes. */
    const int is_faster = __builtin_cpu_supports("avx2") && __builtin_cpu_is("amd");
    plan.past_cache = is_faster && side % PIXELS == 0 && (uintptr_t)out % 32 == 0;
#endif
    for (int64_t v = 0; plan.past_cache && v < 3; v++) {
        vector_plan *vector = plan.vectors + v;
        memset(vector->order, 128, sizeof vector->order); /* VPSHUFB writes a zero byte for 128 */
        for (int64_t half = 0; half < 2; half++) {
            int64_t source[4], last = 0; /* positions among the 24 bytes */
            for (int64_t k = 0; k < 4; k++) {
                const int64_t i = 4 * half + k, value = channels_last ? 8 * v + i : 3 * i + v, channel = value % 3;
                source[k] = cur->flip ? 3 * (PIXELS - 1 - value / 3) + channel : value;
                last = source[k] > last ? source[k] : last;
                vector->shift[i] = cur->shift[channel], vector->scale[i] = scales[channel];
            }
            vector->start[half] = last < 16 ? 0 : 8;
            for (int64_t k = 0; k < 4; k++)
                vector->order[16 * half + 4 * k] = (uint8_t)(source[k] - vector->start[half]);
        }
    }
    return plan;
}

#ifdef AVX2
/* Write 8 floats past the cache. The batch is larger than the cache, so the CPU would read each line of memory before
 * it changes the line, and would remove decoded pixels from the cache. `mean` is the address of 8 floats, or null. */
AVX2_INLINE void write_vector(const uint8_t *pixels, const vector_plan *plan, const float *mean, float *out) {
    const __m128i front = _mm_loadu_si128((const __m128i *)(pixels + plan->start[0]));
    const __m128i back = _mm_loadu_si128((const __m128i *)(pixels + plan->start[1]));
    const __m256i order = _mm256_loadu_si256((const __m256i *)plan->order);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set_m128i(back, front), order);
    __m256 value = _mm256_add_ps(_mm256_cvtepi32_ps(bytes), _mm256_loadu_ps(plan->shift));
    if (mean)
        value = _mm256_sub_ps(value, _mm256_loadu_ps(mean));
    _mm256_stream_ps(out, _mm256_mul_ps(value, _mm256_loadu_ps(plan->scale)));
}

/* Normalize rows, as rows_nchw and rows_nhwc do. `plan` is a copy, which the compiler keeps in registers. Each row of
 * `out` is written from its start to its end, because writes past the cache are slow if they change between distant
 * addresses. */
AVX2_INLINE void write_rows(image_plan plan, const crop *cur, int64_t first, int64_t end, int64_t side,
                            int64_t mean_side, int has_mean, float *restrict out) {
    for (int64_t i = first; i < end; i++) {
        const uint8_t *pixels = cur->pixels + (i - first) * cur->stride + (cur->flip ? 3 * (side - PIXELS) : 0);
        const int64_t step = cur->flip ? -3 : 3;
        for (int64_t j = 0; j < 3 * side; j += 64) /* without effect on addresses that cannot be read */
            __builtin_prefetch(cur->pixels + (i - first + AHEAD) * cur->stride + j);
        if (plan.channels_last) {
            const float *mean = has_mean ? cur->mean + 3 * i * mean_side : 0;
            float *line = out + 3 * i * side;
            for (int64_t j = 0; j < side; j += PIXELS)
                for (int64_t v = 0; v < 3; v++) {
                    const int64_t at = 3 * j + 8 * v;
                    write_vector(pixels + step * j, plan.vectors + v, has_mean ? mean + at : 0, line + at);
                }
        } else
            for (int64_t v = 0; v < 3; v++) {
                const float *mean = has_mean ? cur->mean + (v * mean_side + i) * mean_side : 0;
                float *line = out + (v * side + i) * side;
                for (int64_t j = 0; j < side; j += PIXELS)
                    write_vector(pixels + step * j, plan.vectors + v, has_mean ? mean + j : 0, line + j);
            }
    }
}

AVX2 static void rows_avx2(const image_plan *plan, const crop *cur, int64_t first, int64_t end, int64_t side,
                           int64_t mean_side, float *restrict out) {
    if (cur->mean)
        write_rows(*plan, cur, first, end, side, mean_side, 1, out);
    else
        write_rows(*plan, cur, first, end, side, mean_side, 0, out);
}
#endif

/* Write the rows `first` to `end` - 1 of a crop to `out`. */
static void normalize_rows(const image_plan *plan, const crop *cur, int64_t first, int64_t end, int64_t side,
                           int64_t mean_side, float *out) {
#ifdef AVX2
    if (plan->past_cache) {
        rows_avx2(plan, cur, first, end, side, mean_side, out);
        return;
    }
#endif
    (plan->channels_last ? rows_nhwc : rows_nchw)(cur, first, end, side, mean_side, plan->scales, out);
}

/* Make writes past the cache visible to other threads. */
INLINE void finish_writes(void) {
#ifdef AVX2
    _mm_sfence();
#endif
}

/* Write `count` complete crops to `out`. */
static void normalize_crops(const crop *crops, int64_t count, int64_t side, int64_t mean_side, const float *scales,
                            int channels_last, float *out) {
    for (const crop *cur = crops; cur < crops + count; cur++, out += 3 * side * side) {
        const image_plan plan = plan_image(cur, side, scales, channels_last, out);
        normalize_rows(&plan, cur, 0, side, side, mean_side, out);
    }
    finish_writes();
}

void crop_nchw(const crop *crops, int64_t count, int64_t side, int64_t mean_side, const float *scales, float *out) {
    normalize_crops(crops, count, side, mean_side, scales, 0, out);
}

void crop_nhwc(const crop *crops, int64_t count, int64_t side, int64_t mean_side, const float *scales, float *out) {
    normalize_crops(crops, count, side, mean_side, scales, 1, out);
}
