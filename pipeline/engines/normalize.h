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

/* Write `count` complete crops to `out`. */
void crop_nchw(const crop *crops, int64_t count, int64_t side, int64_t mean_side, const float *scales, float *out) {
    for (int64_t k = 0; k < count; k++)
        rows_nchw(crops + k, 0, side, side, mean_side, scales, out + 3 * side * side * k);
}

void crop_nhwc(const crop *crops, int64_t count, int64_t side, int64_t mean_side, const float *scales, float *out) {
    for (int64_t k = 0; k < count; k++)
        rows_nhwc(crops + k, 0, side, side, mean_side, scales, out + 3 * side * side * k);
}
