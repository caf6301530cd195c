/* Crop, flip and normalize on the CPU in one pass: the formula of pipeline/augment.py. Called by kernels.py. */

#include <stdint.h>

#ifdef CLONES /* Compile two versions of each function; the dynamic linker chooses one for this CPU. */
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const uint8_t *pixels; /* upper left of the crop, RGB */
    int64_t stride;        /* bytes from one row to the next */
    const float *mean;     /* upper left of the mean to subtract, in the layout of the output; null: no mean */
    float shift[3];        /* added to R, G, B */
    int32_t flip;          /* 1: mirror left and right */
} crop;

/* Split a row of RGB `pixels` into three rows of bytes: R, G, B. */
INLINE void split(const uint8_t *restrict pixels, int64_t side, uint8_t *restrict rows) {
    for (int64_t j = 0; j < side; j++)
        rows[j] = pixels[3 * j], rows[side + j] = pixels[3 * j + 1], rows[2 * side + j] = pixels[3 * j + 2];
}

/* The product is the last operation, so there is no multiply-add to fuse: every compiler gives the same bits. */
INLINE float augment(uint8_t pixel, float shift, float mean, float scale) { return (pixel + shift - mean) * scale; }

/* Write `count` crops of side * side pixels to `out` (count, 3, side, side). In the mean image, rows are mean_side
 * floats apart and channels mean_side * mean_side. */
EACH_CPU void crop_nchw(const crop *crops, int64_t count, int64_t side, int64_t mean_side, float scale,
                        float *restrict out) {
    uint8_t rows[3 * side];
    for (const crop *cur = crops; cur < crops + count; cur++, out += 3 * side * side)
        for (int64_t i = 0; i < side; i++) {
            split(cur->pixels + i * cur->stride, side, rows);
            for (int64_t c = 0; c < 3; c++) {
                const uint8_t *restrict row = rows + c * side;
                const float shift = cur->shift[c], *restrict mean = cur->mean + (c * mean_side + i) * mean_side;
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

/* Write `count` crops to `out` (count, side, side, 3). In the mean image, rows are 3 * mean_side floats apart. */
EACH_CPU void crop_nhwc(const crop *crops, int64_t count, int64_t side, int64_t mean_side, float scale,
                        float *restrict out) {
    uint8_t rows[3 * side], mirrored[3 * side];
    float shifts[3 * side];
    for (const crop *cur = crops; cur < crops + count; cur++) {
        for (int64_t j = 0; j < 3 * side; j++)
            shifts[j] = cur->shift[j % 3];
        for (int64_t i = 0; i < side; i++, out += 3 * side) {
            const uint8_t *restrict row = cur->pixels + i * cur->stride;
            const float *restrict mean = cur->mean + 3 * i * mean_side;
            if (cur->flip) { /* Splitting the row into channels first takes half the time of mirroring it pixel by pixel. */
                split(row, side, rows);
                for (int64_t j = 0; j < side; j++)
                    for (int64_t c = 0; c < 3; c++)
                        mirrored[3 * j + c] = rows[c * side + side - 1 - j];
                row = mirrored;
            }
            if (cur->mean)
                for (int64_t j = 0; j < 3 * side; j++)
                    out[j] = augment(row[j], shifts[j], mean[j], scale);
            else
                for (int64_t j = 0; j < 3 * side; j++)
                    out[j] = augment(row[j], shifts[j], 0, scale);
        }
    }
}
