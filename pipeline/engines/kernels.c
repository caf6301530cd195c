/* Windows cut out of pictures on the CPU: the formula of augment.py, in one pass. Called by kernels.py. */

#include <stdint.h>

#ifdef CLONES /* each function twice, the better one for this CPU chosen when the library is loaded */
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const uint8_t *pixels; /* the crop's upper left, RGB */
    int64_t stride;        /* bytes from one row to the next */
    const float *mean;     /* to be subtracted, its upper left; in the layout of the output, or null */
    float shift[3];        /* to be added to R, G, B */
    int32_t flip;
} crop;

/* Row of RGB `pixels` to three rows of bytes, one after the other. */
INLINE void split(const uint8_t *restrict pixels, int64_t side, uint8_t *restrict rows) {
    for (int64_t j = 0; j < side; j++)
        rows[j] = pixels[3 * j], rows[side + j] = pixels[3 * j + 1], rows[2 * side + j] = pixels[3 * j + 2];
}

/* No product is added to: every compiler gives the same bits. */
INLINE float augment(uint8_t pixel, float shift, float mean, float scale) { return (pixel + shift - mean) * scale; }

/* `count` crops of side * side pixels to `out` (count, 3, side, side); of the mean, rows are mean_side and channels
 * mean_side * mean_side numbers apart. */
EACH_CPU void crop_nchw(const crop *crops, int64_t count, int64_t side, int64_t mean_side, float scale,
                         float *restrict out) {
    uint8_t rows[3 * side];
    for (const crop *w = crops; w < crops + count; w++, out += 3 * side * side)
        for (int64_t i = 0; i < side; i++) {
            split(w->pixels + i * w->stride, side, rows);
            for (int64_t c = 0; c < 3; c++) {
                const uint8_t *restrict row = rows + c * side;
                const float shift = w->shift[c], *restrict mean = w->mean + (c * mean_side + i) * mean_side;
                float *restrict line = out + (c * side + i) * side;
                if (w->mean && w->flip)
                    for (int64_t j = 0; j < side; j++)
                        line[j] = augment(row[side - 1 - j], shift, mean[j], scale);
                else if (w->mean)
                    for (int64_t j = 0; j < side; j++)
                        line[j] = augment(row[j], shift, mean[j], scale);
                else if (w->flip)
                    for (int64_t j = 0; j < side; j++)
                        line[j] = augment(row[side - 1 - j], shift, 0, scale);
                else
                    for (int64_t j = 0; j < side; j++)
                        line[j] = augment(row[j], shift, 0, scale);
            }
        }
}

/* The same to `out` (count, side, side, 3); rows of the mean are 3 * mean_side numbers apart. */
EACH_CPU void crop_nhwc(const crop *crops, int64_t count, int64_t side, int64_t mean_side, float scale,
                         float *restrict out) {
    uint8_t rows[3 * side], mirrored[3 * side];
    float shifts[3 * side];
    for (const crop *w = crops; w < crops + count; w++) {
        for (int64_t j = 0; j < 3 * side; j++)
            shifts[j] = w->shift[j % 3];
        for (int64_t i = 0; i < side; i++, out += 3 * side) {
            const uint8_t *restrict row = w->pixels + i * w->stride;
            const float *restrict mean = w->mean + 3 * i * mean_side;
            if (w->flip) { /* by way of planes, which takes half as long as pixel by pixel */
                split(row, side, rows);
                for (int64_t j = 0; j < side; j++)
                    for (int64_t c = 0; c < 3; c++)
                        mirrored[3 * j + c] = rows[c * side + side - 1 - j];
                row = mirrored;
            }
            if (w->mean)
                for (int64_t j = 0; j < 3 * side; j++)
                    out[j] = augment(row[j], shifts[j], mean[j], scale);
            else
                for (int64_t j = 0; j < 3 * side; j++)
                    out[j] = augment(row[j], shifts[j], 0, scale);
        }
    }
}
