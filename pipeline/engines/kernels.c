/* Decode, crop or resize, flip and normalize images on the CPU, by the formula of pipeline/augment.py. Other functions
 * of this file copy or resize crops without flip and normalization, for a GPU or for the service. kernels.py is the
 * Python interface. */

#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef CLONES /* Compile each EACH_CPU function in two versions; the dynamic linker chooses one. */
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))
#ifdef __x86_64__
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#define AVX2_INLINE AVX2 INLINE
#endif

#include "effects.h"
#include "normalize.h"
#include "resample.h"
#include "resample_avx2.h"
#include "regions.h"

/* The part of libjpeg's programming interface that this file uses (API version 6.2, which libjpeg-turbo has). Pillow's
 * wheels contain the library but not its header. jpeg_CreateDecompress fails if the API version or the size of
 * jpeg_decoder is not that of the library. */
enum { JPEG_API_VERSION = 62, COLOUR_RGB = 2, DCT_SLOW = 0 };

typedef struct {
    void (*error_exit)(void *decoder);
    void (*emit_message)(void *decoder, int level); /* level -1: the file is damaged, but decoding can continue */
    void *rest[32];
    jmp_buf on_error; /* this field is not part of libjpeg */
} jpeg_errors;

typedef struct {
    void *errors, *memory, *progress, *client_data;
    int is_decompressor, global_state;
    void *source;
    unsigned image_width, image_height;
    int num_components, jpeg_color_space, out_color_space;
    unsigned scale_num, scale_denom;
    double output_gamma;
    int buffered_image, raw_data_out, dct_method, do_fancy_upsampling, do_block_smoothing, quantize_colors, dither_mode;
    int two_pass_quantize, desired_number_of_colors, enable_1pass_quant, enable_external_quant, enable_2pass_quant;
    unsigned output_width, output_height;
    char rest[632 - 144];
} jpeg_decoder;

/* Addresses of libjpeg's functions; kernels.py fills this struct. */
typedef struct {
    void *(*std_error)(void *errors);
    void (*create)(jpeg_decoder *, int version, size_t bytes);
    void (*mem_src)(jpeg_decoder *, const uint8_t *, unsigned long bytes);
    int (*read_header)(jpeg_decoder *, int require_image);
    int (*start)(jpeg_decoder *);
    void (*crop)(jpeg_decoder *, unsigned *first_column, unsigned *width);
    unsigned (*skip)(jpeg_decoder *, unsigned rows);
    unsigned (*read)(jpeg_decoder *, uint8_t **rows, unsigned count);
    void (*abort)(jpeg_decoder *);
    void (*destroy)(jpeg_decoder *);
} jpeg_library;

/* Memory that grows when it is too small. */
typedef struct {
    uint8_t *at;
    int64_t bytes;
} memory;

/* Provide at least `bytes` bytes. The old contents may be lost. Returns 0 if malloc fails. */
static int reserve(memory *self, int64_t bytes) {
    if (self->bytes >= bytes)
        return 1;
    free(self->at);
    self->at = malloc(bytes);
    self->bytes = self->at ? bytes : 0;
    return self->at != 0;
}

/* Decoder of one thread, and memory of this thread for decoded pixels, one window, resizing and effects. */
typedef struct {
    const jpeg_library *jpeg;
    jpeg_errors errors;
    jpeg_decoder decoder;
    memory pixels, window, resizing, effects;
    int64_t is_created;
} worker;

static void fail(void *decoder) { longjmp(((jpeg_errors *)((jpeg_decoder *)decoder)->errors)->on_error, 1); }

static void fail_if_damaged(void *decoder, int level) {
    if (level < 0)
        fail(decoder);
}

/* Decode the rectangle of rows top..bottom - 1 and columns left..right - 1. Returns the address of the rectangle's
 * upper left pixel, RGB, and sets *stride. Returns null if the file is damaged or the rectangle is not within the
 * image. The pixels have the same values as if the complete image were decoded. Rows below the rectangle are not
 * decoded. */
static const uint8_t *decode(worker *self, const uint8_t *file, int64_t bytes, int64_t top, int64_t bottom, int64_t left,
                             int64_t right, int64_t *stride) {
    const jpeg_library *jpeg = self->jpeg;
    jpeg_decoder *decoder = &self->decoder;
    if (setjmp(self->errors.on_error)) {
        if (self->is_created)
            jpeg->abort(decoder);
        return 0;
    }
    if (!self->is_created) {
        decoder->errors = jpeg->std_error(&self->errors);
        self->errors.error_exit = fail, self->errors.emit_message = fail_if_damaged;
        jpeg->create(decoder, JPEG_API_VERSION, sizeof *decoder);
        self->is_created = 1;
    }
    jpeg->mem_src(decoder, file, bytes);
    jpeg->read_header(decoder, 1);
    decoder->out_color_space = COLOUR_RGB, decoder->dct_method = DCT_SLOW, decoder->do_fancy_upsampling = 1;
    jpeg->start(decoder);
    if (top < 0 || left < 0 || bottom > decoder->output_height || right > decoder->output_width)
        fail(decoder);
    /* The colours of a pixel also depend on the column to its left or right: decode one more column on each side. */
    unsigned first = left > 0 ? left - 1 : 0, width = (right < decoder->output_width ? right + 1 : right) - first;
    if (width < decoder->output_width)
        jpeg->crop(decoder, &first, &width); /* moves `first` to the left, to a multiple of the block size */
    if (top > 0)
        jpeg->skip(decoder, top);
    const int64_t rows = bottom - top, row_bytes = 3 * (int64_t)width;
    if (!reserve(&self->pixels, rows * row_bytes))
        fail(decoder);
    uint8_t *row[rows];
    for (int64_t i = 0; i < rows; i++)
        row[i] = self->pixels.at + i * row_bytes;
    for (int64_t i = 0; i < rows;)
        i += jpeg->read(decoder, row + i, rows - i);
    jpeg->abort(decoder);
    *stride = row_bytes;
    return self->pixels.at + 3 * (left - first);
}

/* A batch: N records and V crops of each record. Several threads work on one batch at the same time. */
typedef struct {
    int64_t next;   /* index of the first record that no thread has begun; 0 at the start */
    int64_t failed; /* lowest index of a record that cannot be decoded; N if no such record was found */
    int64_t records, views, side, mean_side;
    const jpeg_library *jpeg;      /* null if the records are raw */
    const uint8_t *const *payload; /* (N): address of a JPEG file, or of the upper left pixel of a raw image, RGB */
    const int64_t *payload_bytes;  /* (N) */
    const int32_t *size;           /* (N, 2): height and width */
    const int32_t *position;       /* (N, V, 2): row and column of each crop in its image */
    const int32_t *extent;         /* (N, V, 2): height and width of crops to resize; null: all are side * side */
    const int32_t *flip;           /* (N, V) */
    const float *shift;            /* (N, 3) */
    const float *const *mean;      /* (N, V): addresses in the mean image, as crop.mean; null: no mean */
    float *out;                    /* (N, V, ...): the images; null: the records are only decoded */
    int32_t channels_last;
    float scale[3];               /* R, G, B */
    const effects *effects;       /* (N, V); null: no jitter, no grey and no blur */
    const uint16_t *blur_weights; /* (N, V, weights) */
    int64_t weights;              /* number of blur weights of each crop */
    const int32_t *box;           /* (N, V, 4): row, column, height and width of the erased box; null: no box */
} batch;

INLINE int64_t height_of(const batch *b, int64_t n) { return b->extent ? b->extent[2 * n] : b->side; }
INLINE int64_t width_of(const batch *b, int64_t n) { return b->extent ? b->extent[2 * n + 1] : b->side; }

/* Decode the part of record k that its crops need. Sets *top, *left and *stride. Returns the address of the pixel at
 * row *top and column *left of the image; null if the record cannot be decoded. Raw pixels are not copied. */
static const uint8_t *find_pixels(worker *self, const batch *b, int64_t k, int64_t *top, int64_t *left, int64_t *stride) {
    const int32_t *position = b->position + 2 * b->views * k;
    *stride = 3 * (int64_t)b->size[2 * k + 1], *top = 0, *left = 0;
    if (!b->jpeg)
        return b->payload[k];
    int64_t bottom = *top = position[0], right = *left = position[1];
    for (int64_t v = 0, n = k * b->views; v < b->views; v++, n++) {
        const int64_t y = position[2 * v], x = position[2 * v + 1];
        *top = y < *top ? y : *top, bottom = y + height_of(b, n) > bottom ? y + height_of(b, n) : bottom;
        *left = x < *left ? x : *left, right = x + width_of(b, n) > right ? x + width_of(b, n) : right;
    }
    return decode(self, b->payload[k], b->payload_bytes[k], *top, bottom, *left, right, stride);
}

/* Resize the rows of crop n, whose upper left pixel is at `pixels`. Returns 0 if malloc fails. */
static int start_resize(worker *self, const batch *b, int64_t n, const uint8_t *pixels, int64_t stride,
                        resized_rows *out) {
    const int64_t height = height_of(b, n), width = width_of(b, n);
    if (!reserve(&self->resizing, resize_bytes(height, width, b->side)))
        return 0;
    *out = resize_rows(pixels, stride, height, width, b->side, self->resizing.at);
    return 1;
}

/* Apply the effects of image n to `window`. Returns 0 if malloc fails. */
static int add_effects(worker *self, const batch *b, int64_t n, crop *window) {
    if (!reserve(&self->effects, effect_bytes(b->side)))
        return 0;
    window->pixels = apply_effects(window->pixels, window->stride, b->side, b->effects + n,
                                   b->blur_weights + b->weights * n, self->effects.at);
    window->stride = 3 * b->side;
    return 1;
}

enum { LINES = 8 }; /* number of lines that are resized and then normalized while they are in the L1 cache */

/* Write image n. `window` is its crop of the record's pixels. The crop is resized first if b->extent is not null.
 * Returns 0 if malloc fails. */
static int make_image(worker *self, const batch *b, int64_t n, crop window) {
    const int64_t step = b->extent && !b->effects ? LINES : b->side; /* effects need a complete window */
    float *image = b->out + 3 * b->side * b->side * n;
    const image_plan plan = plan_image(&window, b->side, b->scale, b->channels_last, image);
    resized_rows rows;
    if (b->extent) {
        if (!reserve(&self->window, 3 * b->side * step) ||
            !start_resize(self, b, n, window.pixels, window.stride, &rows))
            return 0;
        window.pixels = self->window.at, window.stride = 3 * b->side;
    }
    for (int64_t first = 0; first < b->side; first += step) {
        const int64_t end = first + step < b->side ? first + step : b->side;
        if (b->extent)
            resize_columns(&rows, b->side, first, end, self->window.at);
        if (b->effects && !add_effects(self, b, n, &window))
            return 0;
        normalize_rows(&plan, &window, first, end, b->side, b->mean_side, image);
    }
    if (b->box)
        erase_box(image, b->side, b->channels_last, b->box + 4 * n);
    return 1;
}

/* Make the images of record k. Returns 0 if the record cannot be decoded. */
static int make_record(worker *self, const batch *b, int64_t k) {
    const int32_t *position = b->position + 2 * b->views * k;
    int64_t stride, top, left;
    const uint8_t *pixels = find_pixels(self, b, k, &top, &left, &stride);
    if (!pixels)
        return 0;
    for (int64_t v = 0, n = k * b->views; b->out && v < b->views; v++, n++) {
        const float *shift = b->shift + 3 * k;
        const crop window = {
            .pixels = pixels + (position[2 * v] - top) * stride + 3 * (position[2 * v + 1] - left),
            .stride = stride,
            .mean = b->mean ? b->mean[n] : 0,
            .shift = {shift[0], shift[1], shift[2]},
            .flip = b->flip[n],
        };
        if (!make_image(self, b, n, window))
            return 0;
    }
    return 1;
}

/* Copy or resize the crops of record k to `out`, as bytes (V, side, side, 3). Returns 0 if the record cannot be decoded. */
static int copy_record(worker *self, const batch *b, int64_t k) {
    const int64_t row_bytes = 3 * b->side;
    int64_t stride, top, left;
    const uint8_t *image = find_pixels(self, b, k, &top, &left, &stride);
    if (!image)
        return 0;
    for (int64_t n = k * b->views; n < (k + 1) * b->views; n++) {
        const uint8_t *pixels = image + (b->position[2 * n] - top) * stride + 3 * (b->position[2 * n + 1] - left);
        uint8_t *square = (uint8_t *)b->out + n * b->side * row_bytes;
        if (b->extent) {
            resized_rows rows;
            if (!start_resize(self, b, n, pixels, stride, &rows))
                return 0;
            resize_columns(&rows, b->side, 0, b->side, square);
            continue;
        }
        for (int64_t i = 0; i < b->side; i++)
            memcpy(square + i * row_bytes, pixels + i * stride, row_bytes);
    }
    return 1;
}

/* Call `make` for records of a batch, in order, until no record is left. As soon as a record cannot be decoded, no
 * thread begins another record. */
static void work(batch *b, int (*make)(worker *, const batch *, int64_t)) {
    worker self = {.jpeg = b->jpeg};
    int64_t k;
    while ((k = __atomic_fetch_add(&b->next, 1, __ATOMIC_RELAXED)) < b->records)
        if (!make(&self, b, k)) {
            __atomic_store_n(&b->next, b->records, __ATOMIC_RELAXED);
            int64_t failed = __atomic_load_n(&b->failed, __ATOMIC_RELAXED);
            while (k < failed &&
                   !__atomic_compare_exchange_n(&b->failed, &failed, k, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
            }
        }
    finish_writes();
    if (self.is_created)
        b->jpeg->destroy(&self.decoder);
    free(self.pixels.at), free(self.window.at), free(self.resizing.at), free(self.effects.at);
}

/* Make the images of a batch. The threads of a batch each call this function once. */
void make_images(batch *b) { work(b, make_record); }

/* Copy or resize the crops of a batch to `out`, as bytes (N, V, side, side, 3). The threads of a batch each call this
 * function once. */
void copy_squares(batch *b) { work(b, copy_record); }
