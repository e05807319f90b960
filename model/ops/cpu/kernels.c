/* Loops over memory that torch has no operation for, for one dtype: NUMBER is uint16_t for the bit patterns of bfloat16,
   or float. Everything is computed in fp32. What comes out for a token does not depend on the other tokens of a batch.

   A function takes one job. Threads that are given the same job share it: they draw its tasks from a counter. */

#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Numbers of a vector: as many as a register of this processor has, because gcc keeps wider ones in memory. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

enum { BLOCK = 16, TILE = 64, PART = 512, LINE = 32, SIDE = 16, PAIR = 4 / sizeof(NUMBER) };

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef NUMBER numbers __attribute__((vector_size(LANES * sizeof(NUMBER)), aligned(sizeof(NUMBER)), may_alias));

static const int is_float = sizeof(NUMBER) == 4;

static inline lanes all(float x) { return x - (lanes){}; }

static inline lanes pick(ints which, lanes yes, lanes no) { return (lanes)((which & (ints)yes) | (~which & (ints)no)); }

static inline float wide(NUMBER x)
{
    union { uint32_t bits; float number; } u;
    if (is_float) memcpy(&u, &x, sizeof(NUMBER));
    else u.bits = (uint32_t)x << 16;
    return u.number;
}

static inline NUMBER narrow(float x)
{
    union { uint32_t bits; float number; NUMBER itself; } u = { .number = x };
    if (is_float) return u.itself;
    return (u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16; /* to the nearest, of two to the even one */
}

static inline lanes load(const NUMBER *at)
{
    if (is_float) return *(const lanes *)at;
#ifdef __AVX512F__ /* of which gcc makes four instructions by itself */
    return (lanes)((words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)at)) << 16);
#else
    return (lanes)(__builtin_convertvector(*(const numbers *)at, words) << 16);
#endif
}

static inline void store(NUMBER *at, lanes x)
{
    words bits = (words)x;
    if (is_float) *(lanes *)at = x;
    else *(numbers *)at = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, numbers);
}

static inline lanes get(const float *at) { return *(const lanes *)at; }

static inline void put(float *at, lanes x) { *(lanes *)at = x; }

static inline float sum(lanes x)
{
    float total = 0;
    for (int i = 0; i < LANES / 2; i++) x[i] += x[i + LANES / 2];
    for (int i = 0; i < LANES / 2; i++) total += x[i];
    return total;
}

/* e to numbers that are not positive, to 2e-7 of it: 2^n 2^f with a polynomial in f (Cody & Waite 1980, ch. 6). */
static inline lanes exponential(lanes x)
{
    lanes low = all(-87.0f), t = pick(x > low, x, low) * 1.44269504f;
    ints n = __builtin_convertvector(t, ints);
    n += (__builtin_convertvector(n, lanes) > t); /* a comparison that holds is -1 */
    lanes f = t - __builtin_convertvector(n, lanes);
    lanes p = all(1.8775767e-3f);
    p = p * f + 8.9893397e-3f;
    p = p * f + 5.5826318e-2f;
    p = p * f + 2.4015361e-1f;
    p = p * f + 6.9315308e-1f;
    p = p * f + 9.9999994e-1f;
    return p * (lanes)((n + 127) << 23);
}

static inline int64_t next(int64_t *counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

/* Another thread is about to be done, unless it has been put off its core: then this one makes room for it. */
static inline void wait_until(int64_t *counter, int64_t value)
{
    for (int64_t spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < value; spins++)
        if (spins > 4000) sched_yield();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
}

/* Attention of one token of each of some sequences to keys and values in blocks, after the tokens' own are put there. */
struct attention {
    int64_t written, kept, taken, done, joined;      /* counters, 0 at first */
    int64_t writes, rows, parts;                     /* tokens to keep; tokens that attend; parts of their sequences */
    int64_t heads, groups, width, table_width;       /* query heads, key-value heads, of one the width */
    int64_t q_stride, k_stride, v_stride;            /* from token to token */
    int64_t tiled;                                   /* whether tiles may be used */
    const NUMBER *q, *k, *v;
    NUMBER *keys, *values;                           /* [blocks, groups, width / PAIR, BLOCK, PAIR], the same with
                                                        BLOCK and width exchanged */
    const int32_t *blocks, *offsets;                 /* of each token to keep its place */
    const int32_t *tokens;                           /* of each row its token, from the first of q */
    const int32_t *sequences, *firsts, *lasts;       /* of each row its table, and the positions that it sees */
    const int32_t *tables;                           /* [sequences, table_width] */
    const int32_t *part_rows, *part_starts;          /* of each part its row, and the first position */
    const int32_t *row_parts;                        /* the first part of each row, and one more at the end */
    float *partial;                                  /* [parts, heads, width + 2] */
    NUMBER *out;                                     /* [tokens, heads, width] */
    float scale, cap;
};

static void keep(struct attention *job, int64_t token)
{
    int64_t size = job->groups * job->width, block = job->blocks[token], offset = job->offsets[token];
    const NUMBER *k = job->k + token * job->k_stride, *v = job->v + token * job->v_stride;
    NUMBER *keys = job->keys + block * size * BLOCK + offset * PAIR;
    for (int64_t i = 0; i < size; i++) keys[i / PAIR * BLOCK * PAIR + i % PAIR] = k[i];
    for (int64_t g = 0; g < job->groups; g++) {
        NUMBER *values = job->values + ((block * job->groups + g) * BLOCK + offset / PAIR * PAIR) * job->width;
        for (int64_t e = 0; e < job->width; e++) values[e * PAIR + offset % PAIR] = v[g * job->width + e];
    }
}

/* The numbers of two rows at LANES columns; where rows lie in pairs, one is beside the other. */
static inline void both(const NUMBER *rows, int64_t columns, int64_t column, lanes *first, lanes *second)
{
    if (is_float) {
        *first = load(rows + column);
        *second = load(rows + columns + column);
    } else {
        words pairs = (words)*(const lanes *)(rows + column * PAIR);
        *first = (lanes)(pairs << 16);
        *second = (lanes)(pairs & 0xffff0000);
    }
}

/* Scores of n heads with the keys of a block. */
static inline __attribute__((always_inline)) void
score(int n, const float *q, int64_t width, const NUMBER *held, float (*scores)[TILE])
{
    for (int64_t key = 0; key < BLOCK; key += LANES) {
        lanes even[4] = {}, odd[4] = {}, first, second;
        for (int64_t e = 0; e < width; e += 2) {
            both(held + e * BLOCK, BLOCK, key, &first, &second);
            for (int r = 0; r < n; r++) {
                even[r] += q[r * width + e] * first;
                odd[r] += q[r * width + e + 1] * second;
            }
        }
        for (int r = 0; r < n; r++) put(scores[r] + key, even[r] + odd[r]);
    }
}

/* Adds to the sums of n heads the values of a block, as much of each as its weight says. */
static inline __attribute__((always_inline)) void
mix(int n, float (*weights)[TILE], int64_t width, const NUMBER *held, float *sums)
{
    int64_t e = 0;
    for (; e + LANES <= width; e += LANES) {
        lanes even[4], odd[4] = {}, first, second;
        for (int r = 0; r < n; r++) even[r] = get(sums + r * (width + 2) + e);
        for (int64_t j = 0; j < BLOCK; j += 2) {
            both(held + j * width, width, e, &first, &second);
            for (int r = 0; r < n; r++) {
                even[r] += weights[r][j] * first;
                odd[r] += weights[r][j + 1] * second;
            }
        }
        for (int r = 0; r < n; r++) put(sums + r * (width + 2) + e, even[r] + odd[r]);
    }
    for (; e < width; e++)
        for (int r = 0; r < n; r++)
            for (int64_t j = 0; j < BLOCK; j++)
                sums[r * (width + 2) + e] += weights[r][j] * wide(held[j / PAIR * PAIR * width + e * PAIR + j % PAIR]);
}

/* Four heads at a time, so that a key or value is read, and made wide, once for all of them. */
#define FOUR_AT_A_TIME(shared, call)                                                                  \
    for (int64_t r = 0; r < (shared); r += 4)                                                         \
        switch ((shared) - r) {                                                                       \
        case 1: { enum { n = 1 }; call; break; }                                                      \
        case 2: { enum { n = 2 }; call; break; }                                                      \
        case 3: { enum { n = 3 }; call; break; }                                                      \
        default: { enum { n = 4 }; call; }                                                            \
        }

/* Scores from `from` on of a tile become weights, relative to the largest so far; what was summed up follows suit. */
static void weigh(float *line, int64_t from, int64_t to, float *sums, int64_t width, float cap)
{
    float *total = sums + width, *top = total + 1;
    if (cap > 0)
        for (int64_t j = from; j < to; j++) line[j] = cap * tanhf(line[j] / cap);
    lanes mask = all(-INFINITY), high = all(*top), added = {};
    for (int64_t j = 0; j < TILE; j += LANES) {
        for (int64_t i = j; i < j + LANES; i++)
            if (i < from || i >= to) line[i] = -INFINITY;
        high = pick(get(line + j) > high, get(line + j), high);
    }
    float most = high[0];
    for (int i = 1; i < LANES; i++) most = high[i] > most ? high[i] : most;
    for (int64_t j = 0; j < TILE; j += LANES) {
        lanes x = get(line + j), weight = pick(x > mask, exponential(x - most), all(0));
        put(line + j, weight);
        added += weight;
    }
    float kept = expf(*top - most);
    *total = *total * kept + sum(added);
    *top = most;
    if (kept < 1)
        for (int64_t e = 0; e < width; e++) sums[e] *= kept;
}

/* What a part of a sequence sees of a key-value head: positions first to last, in the blocks of a table. */
struct view {
    int64_t first, last, stride;                     /* from block to block of keys, or of values */
    const NUMBER *keys, *values;
    const int32_t *table;
};

static struct view seen(const struct attention *job, int64_t task)
{
    int64_t part = task / job->groups, row = job->part_rows[part], start = job->part_starts[part], end = start + PART - 1;
    int64_t size = job->width * BLOCK, before = task % job->groups * size;
    struct view view = {
        job->firsts[row], job->lasts[row], job->groups * size, job->keys + before, job->values + before,
        job->tables + job->sequences[row] * job->table_width,
    };
    if (view.first < start) view.first = start;
    if (view.last > end) view.last = end;
    return view;
}

/* Starts to bring blocks of a view's keys, or values, into the cache, of the tile at a position: the block of a number,
   and then every so many. */
static inline void
fetch(const struct view *view, const NUMBER *held, int64_t width, int64_t tile, int64_t number, int64_t step)
{
    for (int64_t at = tile + number * BLOCK; at < tile + TILE && at <= view->last; at += step * BLOCK) {
        if (at + BLOCK <= view->first) continue;
        const NUMBER *block = held + view->table[at / BLOCK] * view->stride;
        for (int64_t i = 0; i < width * BLOCK; i += 64 / sizeof(NUMBER)) __builtin_prefetch(block + i, 0, 2);
    }
}

/* The weighted sum of values that the heads of one key-value head give to a part of their sequence. What comes next, of
   this part or of the task that is likely to follow, is fetched meanwhile: blocks lie anywhere, so no processor foresees
   them. */
static void attend(struct attention *job, int64_t task)
{
    int64_t width = job->width, shared = job->heads / job->groups;
    int64_t part = task / job->groups, group = task % job->groups, guess = __atomic_load_n(&job->taken, __ATOMIC_RELAXED);
    struct view view = seen(job, task), next = seen(job, guess < job->parts * job->groups ? guess : task);
    const NUMBER *q = job->q + job->tokens[job->part_rows[part]] * job->q_stride + group * shared * width;
    float own[shared * width], scores[shared][TILE];
    for (int64_t i = 0; i < shared * width; i++) own[i] = wide(q[i]) * job->scale;
    float *sums = job->partial + (part * job->heads + group * shared) * (width + 2);
    for (int64_t r = 0; r < shared; r++) {
        memset(sums + r * (width + 2), 0, (width + 1) * sizeof(float));
        sums[r * (width + 2) + width + 1] = -INFINITY;
    }
    for (int64_t begin = view.first / TILE * TILE; begin <= view.last; begin += TILE) {
        int64_t from = view.first > begin ? view.first - begin : 0, to = view.last - begin < TILE ? view.last - begin + 1 : TILE;
        int64_t low = from / BLOCK, count = (to - 1) / BLOCK - low + 1, ends = begin + TILE > view.last;
        const struct view *coming = ends ? &next : &view;
        int64_t tile = ends ? next.first / TILE * TILE : begin + TILE;
        for (int64_t b = low; b * BLOCK < to; b++) {
            const NUMBER *held = view.keys + view.table[begin / BLOCK + b] * view.stride;
            fetch(coming, coming->keys, width, tile, b - low, count);
            FOUR_AT_A_TIME(shared, score(n, own + r * width, width, held, (float(*)[TILE])(scores[r] + b * BLOCK)))
        }
        for (int64_t r = 0; r < shared; r++) weigh(scores[r], from, to, sums + r * (width + 2), width, job->cap);
        for (int64_t b = low; b * BLOCK < to; b++) {
            const NUMBER *held = view.values + view.table[begin / BLOCK + b] * view.stride;
            fetch(coming, coming->values, width, tile, b - low, count);
            FOUR_AT_A_TIME(shared, mix(n, (float(*)[TILE])(scores[r] + b * BLOCK), width, held, sums + r * (width + 2)))
        }
    }
}

#ifdef __AMX_BF16__
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((packed)) tiles;

static int fits_tiles(const struct attention *job)
{
    return job->tiled && !is_float && job->width % 64 == 0 && job->heads <= SIDE * job->groups;
}

/* A tile of sums for each of the first four numbers, then the rows of what is multiplied and of what it meets. */
static void prepare(int rows, int columns, int held)
{
    tiles all __attribute__((aligned(64))) = { .palette = 1 };
    for (int t = 0; t < 6; t++) {
        all.bytes[t] = t == 4 ? columns : 64;
        all.rows[t] = t == 5 ? held : rows;
    }
    _tile_loadconfig(&all);
}

/* Weights of a head relative to its largest score, in place of its scores, of which from … to−1 are seen. */
static void spread(float *line, NUMBER *out, int64_t from, int64_t to, float *total, float *top, float scale, float cap)
{
    lanes high = all(-INFINITY), added = {};
    int64_t end = (to + LANES - 1) / LANES * LANES;
    for (int64_t j = 0; j < to; j++) line[j] = cap > 0 ? cap * tanhf(line[j] * scale / cap) : line[j] * scale;
    for (int64_t j = 0; j < from; j++) line[j] = -INFINITY;
    for (int64_t j = to; j < end; j++) line[j] = -INFINITY;
    for (int64_t j = 0; j < end; j += LANES) { lanes x = get(line + j); high = pick(x > high, x, high); }
    float most = high[0];
    for (int i = 1; i < LANES; i++) most = high[i] > most ? high[i] : most;
    for (int64_t j = 0; j < end; j += LANES) {
        lanes x = get(line + j) - most;
        store(out + j, pick(x > all(-87.0f), exponential(x), all(0)));
        added += load(out + j);
    }
    *total = sum(added);
    *top = most;
}

/* As `attend`, by products of the processor's tiles; weights are rounded to the dtype of the values. */
static void attend_in_tiles(struct attention *job, int64_t task)
{
    int64_t width = job->width, shared = job->heads / job->groups;
    int64_t part = task / job->groups, group = task % job->groups;
    struct view view = seen(job, task);
    int64_t first = view.first / BLOCK, count = view.last / BLOCK - first + 1;
    const NUMBER *q = job->q + job->tokens[job->part_rows[part]] * job->q_stride + group * shared * width;
    float scores[shared][PART];
    NUMBER weights[shared][PART];
    prepare(shared, 64, SIDE);
    for (int64_t b = 0; b < count; b += 2) {
        const NUMBER *held = view.keys + view.table[first + b] * view.stride, *after = held;
        if (b + 1 < count) after = view.keys + view.table[first + b + 1] * view.stride;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t e = 0; e < width; e += LINE) {
            _tile_loadd(4, q + e, width * sizeof(NUMBER));
            _tile_loadd(5, held + e * BLOCK, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(5, after + e * BLOCK, 64);
            _tile_dpbf16ps(1, 4, 5);
        }
        _tile_stored(0, scores[0] + b * BLOCK, sizeof scores[0]);
        if (b + 1 < count) _tile_stored(1, scores[0] + (b + 1) * BLOCK, sizeof scores[0]);
    }
    float *sums = job->partial + (part * job->heads + group * shared) * (width + 2);
    for (int64_t r = 0; r < shared; r++) {
        float *own = sums + r * (width + 2) + width;
        spread(scores[r], weights[r], view.first - first * BLOCK, view.last + 1 - first * BLOCK, own, own + 1, job->scale, job->cap);
    }
    prepare(shared, 32, BLOCK / 2);
    for (int64_t e = 0; e < width; e += 4 * SIDE) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t b = 0; b < count; b++) {
            const NUMBER *held = view.values + view.table[first + b] * view.stride + e * PAIR;
            int64_t row = width * PAIR * sizeof(NUMBER);
            _tile_loadd(4, weights[0] + b * BLOCK, sizeof weights[0]);
            _tile_loadd(5, held, row);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(5, held + SIDE * PAIR, row);
            _tile_dpbf16ps(1, 4, 5);
            _tile_loadd(5, held + 2 * SIDE * PAIR, row);
            _tile_dpbf16ps(2, 4, 5);
            _tile_loadd(5, held + 3 * SIDE * PAIR, row);
            _tile_dpbf16ps(3, 4, 5);
        }
        int64_t row = (width + 2) * sizeof(float);
        _tile_stored(0, sums + e, row);
        _tile_stored(1, sums + e + SIDE, row);
        _tile_stored(2, sums + e + 2 * SIDE, row);
        _tile_stored(3, sums + e + 3 * SIDE, row);
    }
    _tile_release();
}
#else
static int fits_tiles(const struct attention *job) { return 0; }
static void attend_in_tiles(struct attention *job, int64_t task) {}
#endif

/* The parts of a row together, in order. */
static void join(struct attention *job, int64_t row)
{
    int64_t width = job->width, from = job->row_parts[row], to = job->row_parts[row + 1];
    for (int64_t head = 0; head < job->heads; head++) {
        NUMBER *out = job->out + (job->tokens[row] * job->heads + head) * width;
        float top = -INFINITY, total = 0, sums[width];
        memset(sums, 0, sizeof sums);
        for (int64_t part = from; part < to; part++) {
            const float *found = job->partial + (part * job->heads + head) * (width + 2);
            top = found[width + 1] > top ? found[width + 1] : top;
        }
        for (int64_t part = from; part < to; part++) {
            const float *found = job->partial + (part * job->heads + head) * (width + 2);
            float share = expf(found[width + 1] - top);
            total += share * found[width];
            for (int64_t e = 0; e < width; e++) sums[e] += share * found[e];
        }
        for (int64_t e = 0; e < width; e++) out[e] = narrow(sums[e] / total);
    }
}

void attention(struct attention *job)
{
    int64_t task, groups = job->groups;
    while ((task = next(&job->written)) < job->writes) {
        keep(job, task);
        __atomic_fetch_add(&job->kept, 1, __ATOMIC_RELEASE);
    }
    if (!job->rows) return;
    wait_until(&job->kept, job->writes);
    while ((task = next(&job->taken)) < job->parts * groups) {
        if (fits_tiles(job)) attend_in_tiles(job, task);
        else attend(job, task);
        __atomic_fetch_add(&job->done, 1, __ATOMIC_RELEASE);
    }
    wait_until(&job->done, job->parts * groups);
    while ((task = next(&job->joined)) < job->rows) join(job, task);
}

/* x / rms(x) * weight over rows; the quotient is rounded before it is multiplied. */
struct norm {
    int64_t taken, rows, width;
    const NUMBER *x, *weight;
    NUMBER *out;
    float eps;
};

void norm(struct norm *job)
{
    int64_t row, width = job->width;
    while ((row = next(&job->taken)) < job->rows) {
        const NUMBER *x = job->x + row * width;
        NUMBER *out = job->out + row * width;
        lanes squares = {};
        float rest = 0;
        int64_t e = 0;
        for (; e + LANES <= width; e += LANES) { lanes part = load(x + e); squares += part * part; }
        for (; e < width; e++) rest += wide(x[e]) * wide(x[e]);
        float scale = 1 / sqrtf((sum(squares) + rest) / width + job->eps);
        for (e = 0; e + LANES <= width; e += LANES) {
            NUMBER rounded[LANES];
            store(rounded, load(x + e) * scale);
            store(out + e, load(rounded) * load(job->weight + e));
        }
        for (; e < width; e++) out[e] = narrow(wide(narrow(wide(x[e]) * scale)) * wide(job->weight[e]));
    }
}

/* Gradients of `norm`. Those of the weight are added up over ROWS_OF_A_PART rows at a time, whatever threads there are. */
enum { ROWS_OF_A_PART = 32 };

struct norm_gradient {
    int64_t taken, rows, width;
    const NUMBER *x, *weight, *gradient;             /* [rows, width]; [width] */
    NUMBER *out;                                     /* of x, [rows, width] */
    float *of_weight;                                /* [rows / ROWS_OF_A_PART, rounded up, width] */
    float eps;
};

static void norm_gradient_of(const struct norm_gradient *job, int64_t row, float *of_weight)
{
    int64_t width = job->width, e = 0;
    const NUMBER *x = job->x + row * width, *d = job->gradient + row * width, *w = job->weight;
    NUMBER *out = job->out + row * width;
    lanes squares = {}, along = {};
    float more_squares = 0, more_along = 0;
    for (; e + LANES <= width; e += LANES) {
        lanes part = load(x + e);
        squares += part * part;
        along += part * load(d + e) * load(w + e);
    }
    for (; e < width; e++) {
        more_squares += wide(x[e]) * wide(x[e]);
        more_along += wide(x[e]) * wide(d[e]) * wide(w[e]);
    }
    float scale = 1 / sqrtf((sum(squares) + more_squares) / width + job->eps);
    float mean = (sum(along) + more_along) * scale / width;
    for (e = 0; e + LANES <= width; e += LANES) {
        lanes normed = load(x + e) * scale, gradient = load(d + e);
        put(of_weight + e, get(of_weight + e) + gradient * normed);
        store(out + e, (gradient * load(w + e) - normed * mean) * scale);
    }
    for (; e < width; e++) {
        float normed = wide(x[e]) * scale;
        of_weight[e] += wide(d[e]) * normed;
        out[e] = narrow((wide(d[e]) * wide(w[e]) - normed * mean) * scale);
    }
}

void norm_gradient(struct norm_gradient *job)
{
    int64_t part, width = job->width;
    while ((part = next(&job->taken)) * ROWS_OF_A_PART < job->rows) {
        float *of_weight = job->of_weight + part * width;
        memset(of_weight, 0, width * sizeof(float));
        for (int64_t row = part * ROWS_OF_A_PART; row < (part + 1) * ROWS_OF_A_PART && row < job->rows; row++)
            norm_gradient_of(job, row, of_weight);
    }
}

/* silu(gate) * up, where gate and up are the halves of rows; silu(gate) is rounded before it is multiplied. */
struct gate {
    int64_t taken, rows, width;                      /* of a half */
    const NUMBER *x;
    NUMBER *out;
};

void gate(struct gate *job)
{
    int64_t row, width = job->width;
    while ((row = next(&job->taken)) < job->rows) {
        const NUMBER *x = job->x + row * 2 * width;
        NUMBER *out = job->out + row * width;
        int64_t e = 0;
        for (; e + LANES <= width; e += LANES) {
            lanes g = load(x + e), small = exponential(pick(g < 0, g, -g));
            lanes silu = pick(g < 0, g * small, g) / (1 + small);
            NUMBER rounded[LANES];
            store(rounded, silu);
            store(out + e, load(rounded) * load(x + width + e));
        }
        for (; e < width; e++) {
            float g = wide(x[e]);
            out[e] = narrow(wide(narrow(g / (1 + expf(-g)))) * wide(x[width + e]));
        }
    }
}

/* Gradients of `gate`. */
struct gate_gradient {
    int64_t taken, rows, width;                      /* of a half */
    const NUMBER *x, *gradient;                      /* [rows, 2 width]; [rows, width] */
    NUMBER *out;                                     /* [rows, 2 width] */
};

void gate_gradient(struct gate_gradient *job)
{
    int64_t row, width = job->width;
    while ((row = next(&job->taken)) < job->rows) {
        const NUMBER *x = job->x + row * 2 * width, *d = job->gradient + row * width;
        NUMBER *out = job->out + row * 2 * width;
        int64_t e = 0;
        for (; e + LANES <= width; e += LANES) {
            lanes g = load(x + e), small = exponential(pick(g < 0, g, -g)), gradient = load(d + e);
            lanes share = pick(g < 0, small, all(1)) / (1 + small), silu = g * share;
            store(out + e, gradient * load(x + width + e) * (share + silu * (1 - share)));
            store(out + width + e, gradient * silu);
        }
        for (; e < width; e++) {
            float g = wide(x[e]), share = 1 / (1 + expf(-g)), silu = g * share, gradient = wide(d[e]);
            out[e] = narrow(gradient * wide(x[width + e]) * (share + silu * (1 - share)));
            out[width + e] = narrow(gradient * silu);
        }
    }
}

/* Heads turned by their positions; the first half of a head pairs with the second. */
struct turn {
    int64_t taken, rows, heads, width, stride, out_stride; /* from token to token of x, and of out */
    const NUMBER *x, *cosines, *sines;               /* [rows, heads, width]; [rows, width] */
    NUMBER *out;                                     /* [rows, heads, width]; may be x itself */
};

void turn(struct turn *job)
{
    int64_t row, width = job->width, half = width / 2;
    while ((row = next(&job->taken)) < job->rows) {
        const NUMBER *c = job->cosines + row * width, *s = job->sines + row * width;
        for (int64_t head = 0; head < job->heads; head++) {
            const NUMBER *x = job->x + row * job->stride + head * width;
            NUMBER *out = job->out + row * job->out_stride + head * width;
            int64_t e = 0;
            for (; e + LANES <= half; e += LANES) {
                lanes a = load(x + e), b = load(x + e + half);
                NUMBER first[LANES], second[LANES];
                store(first, a * load(c + e));
                store(second, b * load(c + e + half));
                store(out + e, load(first) - b * load(s + e));
                store(out + e + half, load(second) + a * load(s + e + half));
            }
            for (; e < half; e++) {
                float a = wide(x[e]), b = wide(x[e + half]);
                out[e] = narrow(wide(narrow(a * wide(c[e]))) - b * wide(s[e]));
                out[e + half] = narrow(wide(narrow(b * wide(c[e + half]))) + a * wide(s[e + half]));
            }
        }
    }
}

/* The first token of each row whose cumulative weight exceeds a share of the total; weights are e^(logit * scale). */
struct draw {
    int64_t taken, rows, size, stride;               /* from row to row */
    const NUMBER *logits;
    const int64_t *places;                           /* of each row */
    const float *scales;
    const double *shares;
    int64_t *tokens;
};

static lanes weights(const NUMBER *logits, int64_t left, float scale, float most)
{
    lanes x = all(-INFINITY);
    if (left >= LANES) x = load(logits);
    else for (int64_t i = 0; i < left; i++) x[i] = wide(logits[i]);
    x = (x - most) * scale;
    return pick(x > all(-87.0f), exponential(x), all(0));
}

static float largest(const NUMBER *logits, int64_t size)
{
    lanes high = all(-INFINITY);
    ints none = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        lanes x = load(logits + i);
        high = pick(x > high, x, high);
        none |= x != x;
    }
    float most = high[0];
    for (int l = 1; l < LANES; l++) most = high[l] > most ? high[l] : most;
    for (int l = 0; l < LANES; l++) if (none[l]) return NAN;
    for (; i < size; i++) {
        float x = wide(logits[i]);
        if (x != x) return NAN;
        most = x > most ? x : most;
    }
    return most;
}

enum { STRETCH = 256 };

/* The weights of a stretch of tokens, added up. */
static double stretch(const NUMBER *logits, int64_t size, int64_t s, float scale, float most)
{
    lanes added = {};
    for (int64_t i = s * STRETCH; i < (s + 1) * STRETCH && i < size; i += LANES)
        added += weights(logits + i, size - i, scale, most);
    return sum(added);
}

void draw(struct draw *job)
{
    int64_t row, size = job->size, stretches = (size + STRETCH - 1) / STRETCH;
    while ((row = next(&job->taken)) < job->rows) {
        const NUMBER *logits = job->logits + job->places[row] * job->stride;
        float most = largest(logits, size), scale = job->scales[row];
        if (!isfinite(most)) {
            job->tokens[row] = -1;
            continue;
        }
        double sums[stretches], total = 0;
        int64_t i, found = -1;
        for (int64_t s = 0; s < stretches; s++) sums[s] = total += stretch(logits, size, s, scale, most);
        double wanted = job->shares[row] * total;
        int64_t s = 0;
        while (s < stretches - 1 && sums[s] <= wanted) s++;
        double before = s ? sums[s - 1] : 0;
        for (i = s * STRETCH; i < (s + 1) * STRETCH && i < size && before <= wanted; i += LANES) {
            lanes part = weights(logits + i, size - i, scale, most);
            for (int l = 0; l < LANES && before <= wanted; l++)
                if (part[l] > 0) { before += part[l]; found = i + l; } /* rounding may end behind the last: that one */
        }
        job->tokens[row] = found;
    }
}

/* e^(logit * scale - log_sum); 0 for a logit that is impossible, and no number where one of both is none. */
static inline lanes probability(lanes logits, float scale, float log_sum)
{
    lanes x = logits * scale - log_sum, found = exponential(pick(x < 0, x, all(0)));
    return pick(x == x, pick(x > all(-87.0f), found, all(0)), x);
}

/* The logarithm of the sum of e^(logit * scale) over each row. */
struct log_sums {
    int64_t taken, rows, size, stride;               /* from row to row */
    const NUMBER *logits;
    float *out;
    float scale;
};

void log_sums(struct log_sums *job)
{
    int64_t row, size = job->size, stretches = (size + STRETCH - 1) / STRETCH;
    while ((row = next(&job->taken)) < job->rows) {
        const NUMBER *logits = job->logits + row * job->stride;
        float most = largest(logits, size);
        double total = 0;
        for (int64_t s = 0; s < stretches && most > -INFINITY; s++) total += stretch(logits, size, s, job->scale, most);
        job->out[row] = most > -INFINITY ? most * job->scale + log(total) : most;
    }
}

/* The gradient of each row's logits from those of its target's log-probability and of its log-sum: with p the softmax of
   logits * scale, (at_target * [target] + spread * p) * scale. */
struct logits_gradient {
    int64_t taken, rows, size, stride;               /* from row to row */
    const NUMBER *logits;
    const int64_t *targets;                          /* outside of 0 … size−1 where another rank has it */
    const float *log_sums, *at_target, *spread;
    NUMBER *out;                                     /* [rows, size] */
    float scale;
};

void logits_gradient(struct logits_gradient *job)
{
    int64_t row, size = job->size;
    while ((row = next(&job->taken)) < job->rows) {
        const NUMBER *logits = job->logits + row * job->stride;
        NUMBER *out = job->out + row * size;
        float log_sum = job->log_sums[row], factor = job->spread[row] * job->scale;
        int64_t i = 0, target = job->targets[row];
        for (; i + LANES <= size; i += LANES) store(out + i, probability(load(logits + i), job->scale, log_sum) * factor);
        for (; i < size; i++) out[i] = narrow(probability(all(wide(logits[i])), job->scale, log_sum)[0] * factor);
        if (target < 0 || target >= size) continue;
        float of_target = probability(all(wide(logits[target])), job->scale, log_sum)[0] * factor;
        out[target] = narrow(of_target + job->at_target[row] * job->scale);
    }
}

/* A matrix with rows and columns exchanged. */
struct transposed {
    int64_t taken, rows, columns, stride;            /* from row to row of x */
    const NUMBER *x;                                 /* [rows, columns] */
    NUMBER *out;                                     /* [columns, rows] */
};

enum { WIDE = 4 * LANES / sizeof(NUMBER), BAND = 128 };

typedef __typeof__(__builtin_choose_expr(sizeof(NUMBER) == 4, (uint32_t)0, (uint16_t)0)) bits_of;
typedef bits_of row_of __attribute__((vector_size(4 * LANES), aligned(sizeof(NUMBER)), may_alias));

/* WIDE rows of WIDE columns, exchanged by halves, quarters and so on: so many times, pairs of rows swap what is not theirs. */
static inline void turn_block(const NUMBER *x, int64_t stride, NUMBER *out, int64_t out_stride)
{
    row_of rows[WIDE];
    for (int r = 0; r < WIDE; r++) rows[r] = *(const row_of *)(x + r * stride);
#pragma GCC unroll 8
    for (int step = WIDE / 2; step > 0; step /= 2) {
        row_of low, high;
        for (int i = 0; i < WIDE; i++) {
            low[i] = i & step ? WIDE + i - step : i;
            high[i] = i & step ? WIDE + i : i + step;
        }
#pragma GCC unroll 32
        for (int r = 0; r < WIDE; r++)
            if (!(r & step)) {
                row_of first = rows[r], second = rows[r + step];
                rows[r] = __builtin_shuffle(first, second, low);
                rows[r + step] = __builtin_shuffle(first, second, high);
            }
    }
    for (int r = 0; r < WIDE; r++) *(row_of *)(out + r * out_stride) = rows[r];
}

void transposed(struct transposed *job)
{
    int64_t band, bands = (job->columns + BAND - 1) / BAND, stride = job->stride, rows = job->rows;
    while ((band = next(&job->taken)) < bands) {
        int64_t first = band * BAND, last = first + BAND < job->columns ? first + BAND : job->columns, r = 0;
        for (; r + WIDE <= rows; r += WIDE) {
            int64_t c = first;
            for (; c + WIDE <= last; c += WIDE) turn_block(job->x + r * stride + c, stride, job->out + c * rows + r, rows);
            for (; c < last; c++)
                for (int64_t i = r; i < r + WIDE; i++) job->out[c * rows + i] = job->x[i * stride + c];
        }
        for (; r < rows; r++)
            for (int64_t c = first; c < last; c++) job->out[c * rows + r] = job->x[r * stride + c];
    }
}

/* x · weightᵀ, plus a bias, plus what is to be added; rounded after each. A weight that is packed lies as tiles want it,
   for 16 outputs and 32 inputs at a time, with outputs of zeros up to a multiple of 32: [outputs / 16, inputs / PAIR,
   16 outputs, PAIR]. Each row is summed up in the same order, whatever rows and threads there are. */
struct product {
    int64_t taken, rows, inputs, outputs;            /* inputs are a multiple of 32 */
    int64_t tiled, packed;                           /* whether tiles may be used; whether the weight is packed */
    const NUMBER *x, *weight, *bias, *add;           /* [rows, inputs]; [outputs]; [rows, outputs] */
    NUMBER *out;                                     /* [rows, outputs]; may be what is added */
};

/* LANES outputs of a row, or as many as there are. */
static void finish(const struct product *job, lanes sums, int64_t row, int64_t first)
{
    int64_t at = row * job->outputs + first, count = job->outputs - first;
    NUMBER rounded[LANES];
    store(rounded, sums);
    if (count >= LANES) {
        if (job->bias) store(rounded, load(rounded) + load(job->bias + first));
        if (job->add) store(rounded, load(rounded) + load(job->add + at));
        memcpy(job->out + at, rounded, sizeof rounded);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        if (job->bias) rounded[i] = narrow(wide(rounded[i]) + wide(job->bias[first + i]));
        if (job->add) rounded[i] = narrow(wide(rounded[i]) + wide(job->add[at + i]));
        job->out[at + i] = rounded[i];
    }
}

typedef uint32_t word __attribute__((may_alias));

/* The packed weights of 32 outputs, put together in a room where they do not lie so. */
static const NUMBER *line_of(const struct product *job, int64_t first, NUMBER *room)
{
    int64_t inputs = job->inputs, size = inputs / PAIR;
    if (job->packed) return job->weight + first * inputs;
    for (int64_t o = 0; o < LINE; o++) {
        const word *from = (const word *)(job->weight + (first + o) * inputs);
        word *to = (word *)room + o / SIDE * SIDE * size + o % SIDE;
        for (int64_t p = 0; p < size; p++) to[p * SIDE] = first + o < job->outputs ? from[p] : 0;
    }
    return room;
}

/* sums + weights · x for two inputs, whose weights for 16 outputs follow one another. */
static inline lanes with_two(lanes sums, const NUMBER *weights, const NUMBER *x)
{
    if (is_float) return sums + load(weights) * wide(x[0]) + load(weights + SIDE) * wide(x[1]);
    uint32_t pair = *(const word *)x;
#ifdef __AVX512BF16__
    return (lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_loadu_si512(weights), (__m512bh)_mm512_set1_epi32(pair));
#else
    words w = (words)*(const lanes *)weights, twice = pair - (words){};
    return sums + (lanes)(w << 16) * (lanes)(twice << 16) + (lanes)(w & 0xffff0000) * (lanes)(twice & 0xffff0000);
#endif
}

/* Rows whose sums fit into the registers, and fewer that are left. */
#ifdef __AVX512F__
enum { MOST = 8, FEW = 4 };
#else
enum { MOST = 3, FEW = 2 };
#endif

enum { DEPTH = 256, STRIDE = 8, VECTORS = LINE / LANES };

/* Starts to bring the weights of 32 outputs, for some inputs, into the cache. */
static inline void fetch_weights(const NUMBER *line, int64_t inputs)
{
    for (int64_t i = 0; i < STRIDE * SIDE; i += 64 / sizeof(NUMBER)) {
        __builtin_prefetch(line + i, 0, 2);
        __builtin_prefetch(line + SIDE * inputs + i, 0, 2);
    }
}

/* n rows of 32 outputs, whose weights are read once for all of them; so many inputs at a time, whose sums are added up:
   rounding errors grow with the length of a chain. Weights that come next, if any, are fetched meanwhile. */
static inline __attribute__((always_inline)) void
multiply_rows(int n, const struct product *job, const NUMBER *line, int64_t first, int64_t row, const NUMBER *ahead)
{
    int64_t inputs = job->inputs;
    const NUMBER *x = job->x + row * inputs;
    lanes sums[MOST][VECTORS];
    for (int r = 0; r < n; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = (lanes){};
    for (int64_t begin = 0; begin < inputs; begin += DEPTH) {
        int64_t end = begin + DEPTH < inputs ? begin + DEPTH : inputs;
        lanes part[MOST][VECTORS];
        for (int r = 0; r < n; r++)
            for (int v = 0; v < VECTORS; v++) part[r][v] = (lanes){};
        for (int64_t i = begin; i < end; i += STRIDE) {
            if (ahead) fetch_weights(ahead + i * SIDE, inputs);
            for (int64_t j = i; j < i + STRIDE; j += 2)
#pragma GCC unroll 8
                for (int r = 0; r < n; r++)
#pragma GCC unroll 8
                    for (int v = 0; v < VECTORS; v++) {
                        int64_t output = v * LANES;
                        const NUMBER *at = line + output / SIDE * SIDE * inputs + j * SIDE + output % SIDE * PAIR;
                        part[r][v] = with_two(part[r][v], at, x + r * inputs + j);
                    }
        }
        for (int r = 0; r < n; r++)
            for (int v = 0; v < VECTORS; v++) sums[r][v] += part[r][v];
    }
    for (int r = 0; r < n; r++)
        for (int v = 0; v < VECTORS; v++) finish(job, sums[r][v], row + r, first + v * LANES);
}

static void multiply(const struct product *job, const NUMBER *line, int64_t first, const NUMBER *ahead)
{
    int64_t row = 0, rows = job->rows;
    for (; row + MOST <= rows; row += MOST)
        multiply_rows(MOST, job, line, first, row, row + 2 * MOST <= rows ? NULL : ahead);
    for (; row + FEW <= rows; row += FEW) multiply_rows(FEW, job, line, first, row, NULL);
    for (; row < rows; row++) multiply_rows(1, job, line, first, row, NULL);
}

#ifdef __AMX_BF16__
/* Sums in tiles 0 to 3, two of rows by two of outputs; the rows' inputs in 4 and 5, the outputs' weights in 6 and 7. */
static void shape(int upper, int lower)
{
    tiles all __attribute__((aligned(64))) = { .palette = 1 };
    for (int t = 0; t < 8; t++) {
        all.bytes[t] = 64;
        all.rows[t] = t == 2 || t == 3 || t == 5 ? (lower ? lower : 1) : t == 6 || t == 7 ? SIDE : upper;
    }
    _tile_loadconfig(&all);
}

/* Up to 32 rows of 32 outputs, whose weights are read while those at `ahead`, which come next, are fetched. */
static void multiply_in_tiles(
    const struct product *job, const NUMBER *v, int64_t first, int64_t row, int64_t count, const NUMBER *ahead)
{
    int64_t inputs = job->inputs, upper = count < SIDE ? count : SIDE, lower = count - upper;
    const NUMBER *x = job->x + row * inputs, *y = x + SIDE * inputs, *w = v + SIDE * inputs;
    float sums[4][SIDE * SIDE] __attribute__((aligned(64)));
    shape(upper, lower);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < inputs; i += LINE) {
        if (lower)
            for (int64_t p = i * SIDE; p < (i + LINE) * SIDE; p += LINE) {
                _mm_prefetch((const char *)(ahead + p), _MM_HINT_T1);
                _mm_prefetch((const char *)(ahead + SIDE * inputs + p), _MM_HINT_T1);
            }
        _tile_loadd(4, x + i, inputs * sizeof(NUMBER));
        _tile_loadd(6, v + i * SIDE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + i * SIDE, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (!lower) continue;
        _tile_loadd(5, y + i, inputs * sizeof(NUMBER));
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    for (int t = 0; t < 4; t++)
        for (int64_t r = 0; r < (t < 2 ? upper : lower); r++)
            finish(job, get(sums[t] + r * SIDE), row + t / 2 * SIDE + r, first + t % 2 * SIDE);
}

static void rows_in_tiles(const struct product *job, const NUMBER *line, int64_t first, const NUMBER *ahead)
{
    for (int64_t row = 0; row < job->rows; row += LINE) {
        int64_t left = job->rows - row;
        multiply_in_tiles(job, line, first, row, left < LINE ? left : LINE, left <= LINE && ahead ? ahead : line);
    }
}

/* Whether the kernel lets this process use tiles. */
int may_use_tiles(void)
{
    enum { ASK = 0x1023, TILES = 18 }; /* ARCH_REQ_XCOMP_PERM of arch_prctl(2), XFEATURE_XTILEDATA */
    return !syscall(SYS_arch_prctl, ASK, TILES);
}
#else
static void rows_in_tiles(const struct product *job, const NUMBER *line, int64_t first, const NUMBER *ahead) {}
static void _tile_release(void) {}
#endif

void product(struct product *job)
{
    NUMBER *room = job->packed ? NULL : aligned_alloc(64, LINE * job->inputs * sizeof(NUMBER));
    int64_t first = next(&job->taken) * LINE, after;
    for (; first < job->outputs; first = after) {
        const NUMBER *line = line_of(job, first, room);
        after = next(&job->taken) * LINE;
        int fetches = job->packed && !is_float && after < job->outputs; /* in fp32 weights come as fast as they can */
        const NUMBER *ahead = fetches ? job->weight + after * job->inputs : NULL;
        (job->tiled ? rows_in_tiles : multiply)(job, line, first, ahead);
    }
    if (job->tiled) _tile_release();
    free(room);
}

/* Jobs that follow one another: threads that are given the same list share each job, and wait for each other behind it.
   OpenMP may grant fewer threads than were asked for (OMP_THREAD_LIMIT, OMP_DYNAMIC), so the list asks how many came. */
struct step {
    void (*work)(void *);
    int64_t *job;                                    /* begins with a counter and a number of rows, but for attention */
    const struct attention *same;                    /* what the attention of all layers of a kind has in common */
};

struct list {
    int64_t arrived, count, rows;
    const struct step *steps;
    int (*threads)(void);                            /* how many share this list: omp_get_num_threads, or none */
};

void begin(struct list *list)
{
    list->arrived = 0;
    for (const struct step *step = list->steps; step < list->steps + list->count; step++) {
        if (!step->same) {
            step->job[0] = 0;
            step->job[1] = list->rows;
            continue;
        }
        struct attention *job = (struct attention *)step->job, own = *job;
        *job = *step->same;
        job->keys = own.keys, job->values = own.values, job->scale = own.scale, job->cap = own.cap;
        job->q = own.q, job->k = own.k, job->v = own.v, job->out = own.out;
        job->q_stride = own.q_stride, job->k_stride = own.k_stride, job->v_stride = own.v_stride;
        job->heads = own.heads;
    }
}

void list(struct list *list)
{
    int64_t threads = list->threads ? list->threads() : 1;
    for (int64_t i = 0; i < list->count; i++) {
        list->steps[i].work(list->steps[i].job);
        __atomic_fetch_add(&list->arrived, 1, __ATOMIC_RELEASE);
        wait_until(&list->arrived, (i + 1) * threads);
    }
}
