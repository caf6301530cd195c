/* Look up many records in the memory maps of LMDB shards, check the records, and continue if a page cannot be read.
 * kernels.py calls these functions and explains the formats. Stores are not trusted: every offset and every size is
 * compared with the size of the map or of the page before it is used. */

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

typedef struct {
    const uint8_t *map; /* the mapped file data.mdb */
    int64_t bytes;      /* size of the map */
    int64_t page_bytes;
    int64_t root; /* number of the page at the root of the B+ tree; less than 0 if the shard cannot be searched */
} shard;

typedef struct {
    const uint8_t *image; /* the JPEG or PPM file in the map; null if the record was not found or has another format */
    int64_t bytes;        /* size of this image file */
    int64_t height, width, label;
} record;

enum { PAGE_HEADER = 16, NODE_HEADER = 8, KEY = 8, MAX_DEPTH = 32, BRANCH = 1, LEAF = 2, PAGE_TYPES = 0x6f, IN_PAGES = 1 };
enum { CRC_FIELD = 6, ANY = 0, JPEG = 1, PPM = 2, MAX_SEGMENTS = 10000, MAX_SCANS = 100 };

static int64_t u16(const uint8_t *p) { return p[0] | p[1] << 8; }
static int64_t u32(const uint8_t *p) { return u16(p) | u16(p + 2) << 16; }
static int64_t u64(const uint8_t *p) { return (int64_t)((uint64_t)u32(p) | (uint64_t)u32(p + 4) << 32); }

/* Return node `index` of a page; null if the node is not within the page. */
static const uint8_t *node(const shard *s, const uint8_t *page, int64_t index) {
    const int64_t offset = u16(page + PAGE_HEADER + 2 * index);
    if (offset + NODE_HEADER > s->page_bytes || offset + NODE_HEADER + u16(page + offset + 6) > s->page_bytes)
        return 0;
    return page + offset;
}

/* Compare the key of a node with `key` as LMDB does: bytes first, then the length. */
static int compare(const uint8_t *at, const uint8_t *key) {
    const int64_t length = u16(at + 6);
    const int order = memcmp(at + NODE_HEADER, key, length < KEY ? length : KEY);
    return order ? order : (length > KEY) - (length < KEY);
}

/* Return the value of `key`, and set *size to its size. Returns null if the key is missing or a page is damaged. */
static const uint8_t *find(const shard *s, const uint8_t *key, int64_t *size) {
    int64_t number = s->root;
    for (int depth = 0; depth < MAX_DEPTH; depth++) {
        if (number < 0 || number >= s->bytes / s->page_bytes)
            return 0;
        const uint8_t *page = s->map + number * s->page_bytes, *at;
        const int64_t type = u16(page + 10) & PAGE_TYPES, nodes = (u16(page + 12) - PAGE_HEADER) / 2;
        if (type != BRANCH && type != LEAF)
            return 0;
        if (nodes < 1 || PAGE_HEADER + 2 * nodes > s->page_bytes)
            return 0;
        int64_t first = 0, end = nodes; /* the last node that is not after `key` is in first..end - 1 */
        while (end - first > 1) {       /* the key of node 0 of a branch page is empty and is not compared */
            const int64_t middle = (first + end) / 2;
            if (!(at = node(s, page, middle)))
                return 0;
            if (compare(at, key) > 0)
                end = middle;
            else
                first = middle;
        }
        if (!(at = node(s, page, first)))
            return 0;
        if (type == BRANCH) {
            number = u32(at) | u16(at + 4) << 32;
            continue;
        }
        if (compare(at, key) != 0)
            return 0;
        const uint8_t *value = at + NODE_HEADER + KEY;
        const int64_t flags = u16(at + 4);
        *size = u32(at);
        if (flags == 0) /* a short value is in this page */
            return value - page + *size <= s->page_bytes ? value : 0;
        if (flags != IN_PAGES || value - page + 8 > s->page_bytes)
            return 0;
        number = u64(value); /* a long value is in its own pages, after a page header */
        if (number < 0 || number >= s->bytes / s->page_bytes)
            return 0;
        value = s->map + number * s->page_bytes + PAGE_HEADER;
        return *size <= s->map + s->bytes - value ? value : 0;
    }
    return 0;
}

/* Read a varint of at most 9 bytes at *at, and move *at to the byte after it. Returns -1 if the varint does not end. */
static int64_t varint(const uint8_t **at, const uint8_t *end) {
    uint64_t number = 0;
    for (int shift = 0; shift < 63 && *at < end; shift += 7) {
        const uint8_t byte = *(*at)++;
        number |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80)
            return (int64_t)number;
    }
    return -1;
}

/* Find the image in a record, as locate_image in datum.py does. Returns 0 if the record does not begin with the Datum
 * fields channels (3), height, width, data and label. */
static int parse(const uint8_t *value, int64_t size, record *out) {
    const uint8_t *at = value, *end = value + size;
    if (size < 4 || memcmp(at, "\x08\x03\x10", 3) != 0)
        return 0;
    at += 3;
    if ((out->height = varint(&at, end)) < 0 || at == end || *at++ != 0x18)
        return 0;
    if ((out->width = varint(&at, end)) < 0 || at == end || *at++ != 0x22)
        return 0;
    if ((out->bytes = varint(&at, end)) < 0 || out->bytes >= end - at)
        return 0;
    out->image = at;
    at += out->bytes;
    return *at++ == 0x28 && (out->label = varint(&at, end)) >= 0;
}

/* CRC-32 as in zlib and PNG. The bits of a message are the coefficients of a polynomial M over GF(2). The lowest bit of
 * the first byte is the coefficient of the highest power. Without its inversions, the CRC is M * x^32 modulo P.
 * POLYNOMIAL holds the coefficients of x^31 to x^0 of P, with the coefficient of x^31 in bit 0. */
#define POLYNOMIAL 0xedb88320u
static uint32_t crc_of_byte[8][256]; /* [k][b]: CRC, without inversions, of the byte b and k zero bytes after it */

__attribute__((constructor)) static void fill_crc_table(void) {
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t crc = b;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
        crc_of_byte[0][b] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (int b = 0; b < 256; b++)
            crc_of_byte[k][b] = crc_of_byte[k - 1][b] >> 8 ^ crc_of_byte[0][crc_of_byte[k - 1][b] & 0xff];
}

/* Return the CRC of a message that ends with the `size` bytes at p. `crc` is the CRC of the bytes before p. The caller
 * inverts the CRC at the beginning and at the end of the message. */
static uint32_t crc_by_table(uint32_t crc, const uint8_t *p, int64_t size) {
    for (; size >= 8; p += 8, size -= 8) {
        uint32_t next = 0;
        for (int k = 0; k < 4; k++)
            next ^= crc_of_byte[7 - k][p[k] ^ (crc >> 8 * k & 0xff)] ^ crc_of_byte[3 - k][p[4 + k]];
        crc = next;
    }
    for (; size > 0; p++, size--)
        crc = crc >> 8 ^ crc_of_byte[0][(crc ^ *p) & 0xff];
    return crc;
}

#ifdef __x86_64__
/* `bits` stands n bits before `next` in a message. Return 128 bits that can replace `next` if `bits` becomes zero: the
 * CRC stays the same. Each half of `bits` is multiplied by a factor and added to `next`. The low half of `factors` is
 * x^(n+32) mod P, the high half is x^(n-32) mod P, both in the bit order of POLYNOMIAL. */
__attribute__((target("pclmul,sse4.1"))) static inline __m128i fold(__m128i bits, __m128i factors, __m128i next) {
    const __m128i low = _mm_clmulepi64_si128(bits, factors, 0x00), high = _mm_clmulepi64_si128(bits, factors, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

/* Return the same value as crc_by_table. All complete blocks of 64 bytes are reduced to the 16 bytes of `rest`, which
 * have the same CRC as these blocks. */
__attribute__((target("pclmul,sse4.1"))) static uint32_t crc_by_multiplication(uint32_t crc, const uint8_t *p,
                                                                               int64_t size) {
    if (size < 64)
        return crc_by_table(crc, p, size);
    const __m128i by_512 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4), by_128 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    __m128i part[4];
    for (int k = 0; k < 4; k++)
        part[k] = _mm_loadu_si128((const __m128i *)p + k);
    part[0] = _mm_xor_si128(part[0], _mm_cvtsi32_si128((int)crc));
    for (p += 64, size -= 64; size >= 64; p += 64, size -= 64)
        for (int k = 0; k < 4; k++)
            part[k] = fold(part[k], by_512, _mm_loadu_si128((const __m128i *)p + k));
    for (int k = 1; k < 4; k++)
        part[0] = fold(part[0], by_128, part[k]);
    uint8_t rest[16];
    _mm_storeu_si128((__m128i *)rest, part[0]);
    return crc_by_table(crc_by_table(0, rest, sizeof rest), p, size);
}
#endif

/* The CRC-32 of `size` bytes, as zlib.crc32 computes it. */
uint32_t crc32_of(const uint8_t *p, int64_t size) {
#ifdef __x86_64__
    if (__builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"))
        return ~crc_by_multiplication(~0u, p, size);
#endif
    return ~crc_by_table(~0u, p, size);
}

/* Return 1 if a record ends with the checksum of the bytes before it, as verify_checksum in datum.py requires. */
static int has_checksum(const uint8_t *value, int64_t size) {
    if (size < CRC_FIELD || memcmp(value + size - CRC_FIELD, "\xd5\x3e", 2) != 0)
        return 0;
    return (uint32_t)u32(value + size - 4) == crc32_of(value, size - CRC_FIELD);
}

/* Return 1 if a file begins as a JPEG file of height * width pixels, 3 channels and 8 bits, with at most MAX_SCANS
 * scans: the same rule as check_jpeg in prep/images/jpeg.py. The pixels are not decoded. */
static int is_jpeg_of(const uint8_t *file, int64_t size, int64_t height, int64_t width) {
    int frame = 0; /* the marker of the frame header; 0 until a frame header is found */
    if (size < 4 || file[0] != 0xff || file[1] != 0xd8)
        return 0;
    for (int64_t at = 2, segments = 0; at + 4 <= size && segments < MAX_SEGMENTS; segments++) {
        const uint8_t *segment = file + at; /* FF, marker, length (2 bytes, includes itself), content */
        const int64_t length = segment[2] << 8 | segment[3];
        if (segment[0] != 0xff || length < 2 || at + 2 + length > size)
            return 0;
        if (segment[1] == 0xda) { /* the first scan */
            if (!frame || length < 3)
                return 0;
            if (frame != 0xc2 && segment[4] == 3)
                return 1; /* in a file that is not progressive, a first scan with all channels is the only scan */
            int64_t scans = 0;
            for (const uint8_t *p = segment; (p = memchr(p, 0xff, (size_t)(file + size - 1 - p))); p++)
                if (p[1] == 0xda && ++scans > MAX_SCANS)
                    return 0;
            return 1;
        }
        if (segment[1] >= 0xc0 && segment[1] <= 0xcf && segment[1] != 0xc4 && segment[1] != 0xc8 && segment[1] != 0xcc) {
            if (frame || segment[1] > 0xc2 || length < 8 || segment[4] != 8 || segment[9] != 3)
                return 0;
            if ((segment[5] << 8 | segment[6]) != height || (segment[7] << 8 | segment[8]) != width)
                return 0;
            frame = segment[1];
        }
        at += 2 + length;
    }
    return 0;
}

/* Return 1 if a file begins with a PPM header of 3 * width bytes, as codec.ppm_header writes it. */
static int is_ppm_of(const uint8_t *file, int64_t size, int64_t width) {
    if (width < 1 || width > size / 3 || size < 9)
        return 0;
    return 3 * width >= 9 && memcmp(file, "P6\n#", 4) == 0 && memcmp(file + 3 * width - 5, "\n255\n", 5) == 0;
}

/* Look up `count` records. Record k is in shards[shard_of[k]], and its key is keys[k] with 8 digits. `format` says what
 * the images must be: ANY, JPEG or PPM. If `check` is not 0, a record with a wrong checksum counts as not found. */
void find_records(const shard *shards, const int64_t *shard_of, const int64_t *keys, int64_t count, int64_t format,
                  int64_t check, record *out) {
    for (int64_t k = 0; k < count; k++) {
        uint8_t key[KEY];
        int64_t digits = keys[k], size = 0;
        for (int i = KEY - 1; i >= 0; i--, digits /= 10)
            key[i] = '0' + digits % 10;
        const shard *s = shards + shard_of[k];
        const uint8_t *value = keys[k] >= 0 && digits == 0 && s->root >= 0 ? find(s, key, &size) : 0;
        record *r = out + k;
        if (!value || !parse(value, size, r) || (check && !has_checksum(value, size)) ||
            (format == JPEG && !is_jpeg_of(r->image, r->bytes, r->height, r->width)) ||
            (format == PPM && !is_ppm_of(r->image, r->bytes, r->width)))
            r->image = 0;
    }
}

/* Protection of memory maps against SIGBUS. Linux sends SIGBUS if a page of a map cannot be read, because the file was
 * truncated while it was mapped or because the disk has an error. The handler puts a page of zeros in place of such a
 * page, and marks the map. The reader continues with zeros. Callers must call map_is_broken before they use bytes that
 * were read from a map. */
typedef struct {
    uintptr_t address;
    uint64_t bytes; /* size of the map; 0 if this entry is free */
    int64_t is_broken;
} guarded_map;

enum { FIRST_MAPS = 64, MAP_LISTS = 40 };
static guarded_map first_maps[FIRST_MAPS], *map_lists[MAP_LISTS] = {first_maps}; /* list k has FIRST_MAPS << k entries */
static int64_t list_count = 1, page_bytes;
static struct sigaction action_before;
static int is_passed_on; /* 1 if a fault was passed on to action_before since the handler was installed */
int64_t broken_pages;    /* number of pages that the handler has replaced in this process */

static void on_sigbus(int number, siginfo_t *info, void *context) {
    const int error = errno;
    const uintptr_t address = (uintptr_t)info->si_addr;
    (void)context;
    for (int64_t list = 0; info->si_code > 0 && list < __atomic_load_n(&list_count, __ATOMIC_ACQUIRE); list++)
        for (guarded_map *map = map_lists[list]; map < map_lists[list] + (FIRST_MAPS << list); map++)
            if (address - map->address < __atomic_load_n(&map->bytes, __ATOMIC_ACQUIRE)) {
                void *page = (void *)(address & ~(uintptr_t)(page_bytes - 1));
                __atomic_store_n(&map->is_broken, 1, __ATOMIC_RELEASE);
                __atomic_fetch_add(&broken_pages, 1, __ATOMIC_RELEASE);
                if (mmap(page, page_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == page) {
                    errno = error;
                    return;
                }
            }
    /* The fault is not in a protected map: install the action that was active before this handler. The program then
     * repeats the access, and the earlier action handles the fault. If the earlier action passes the fault back to this
     * handler, is_passed_on is 1 already. The handler then installs the default action, which ends the process. */
    const struct sigaction end = {.sa_handler = SIG_DFL};
    sigaction(number, __atomic_exchange_n(&is_passed_on, 1, __ATOMIC_RELAXED) ? &end : &action_before, 0);
    if (info->si_code <= 0)
        raise(number); /* the signal was sent by a program */
    errno = error;
}

/* Make on_sigbus the handler of SIGBUS. Returns 0 on failure. Call this function before each use of the maps, because
 * other code can replace the handler at any time, as faulthandler.enable() and ray.init() do. */
int64_t install_handler(void) {
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK}, now;
    if (sigaction(SIGBUS, 0, &now) != 0)
        return 0;
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_sigbus)
        return 1;
    if (!page_bytes)
        page_bytes = sysconf(_SC_PAGESIZE);
    action_before = now; /* two threads that install the handler at the same time both write the same action */
    __atomic_store_n(&is_passed_on, 0, __ATOMIC_RELAXED);
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, 0) == 0;
}

/* Protect a map. Returns its entry in map_lists, which release_map and map_is_broken take. Returns null if the handler
 * cannot be installed or if there is no memory. Only one thread at a time may call this function. */
guarded_map *guard_map(uintptr_t address, uint64_t bytes) {
    if (!install_handler())
        return 0;
    for (int64_t list = 0; list < MAP_LISTS; list++) {
        if (list == list_count) {
            if (!(map_lists[list] = calloc(FIRST_MAPS << list, sizeof(guarded_map))))
                return 0;
            __atomic_store_n(&list_count, list + 1, __ATOMIC_RELEASE);
        }
        for (guarded_map *map = map_lists[list]; map < map_lists[list] + (FIRST_MAPS << list); map++)
            if (!map->bytes) {
                map->address = address, map->is_broken = 0;
                __atomic_store_n(&map->bytes, bytes, __ATOMIC_RELEASE);
                return map;
            }
    }
    return 0;
}

/* End the protection of a map. Call this function before the file is unmapped. */
void release_map(guarded_map *map) { __atomic_store_n(&map->bytes, 0, __ATOMIC_RELEASE); }

/* Return 1 if a page of the map could not be read. */
int64_t map_is_broken(const guarded_map *map) { return __atomic_load_n(&map->is_broken, __ATOMIC_ACQUIRE); }
