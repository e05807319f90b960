/* Loops over memory that torch has no operation for, for one dtype: NUMBER is uint16_t for the bit patterns of bfloat16,
   or float. Everything is computed in fp32. What comes out for a token does not depend on the other tokens of a batch.

   A function takes one job. Threads that are given the same job share it: they draw its tasks from a counter. */

#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { LANES = 16, BLOCK = 16, TILE = 64, PART = 512 };

typedef float lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
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
    const NUMBER *q, *k, *v;
    NUMBER *keys, *values;                           /* [blocks, groups, width, BLOCK], [blocks, groups, BLOCK, width] */
    const int32_t *blocks, *offsets;                 /* of each token to keep its place */
    const int32_t *tokens;                           /* of each row its token, from the first of q */
    const int32_t *tables, *firsts, *lasts;          /* [rows, table_width]; the positions that a row sees */
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
    NUMBER *keys = job->keys + block * size * BLOCK + offset;
    for (int64_t i = 0; i < size; i++) keys[i * BLOCK] = k[i];
    for (int64_t g = 0; g < job->groups; g++)
        memcpy(job->values + ((block * job->groups + g) * BLOCK + offset) * job->width, v + g * job->width,
               job->width * sizeof(NUMBER));
}

/* Scores of n heads with the keys of a block. */
static inline __attribute__((always_inline)) void
score(int n, const float *q, int64_t width, const NUMBER *held, const NUMBER *ahead, float (*scores)[TILE])
{
    lanes even[4] = {}, odd[4] = {};
    for (int64_t e = 0; e < width; e += 2) {
        lanes first = load(held + e * BLOCK), second = load(held + (e + 1) * BLOCK);
        __builtin_prefetch(ahead + e * BLOCK);
        if (is_float) __builtin_prefetch(ahead + (e + 1) * BLOCK);
        for (int r = 0; r < n; r++) {
            even[r] += q[r * width + e] * first;
            odd[r] += q[r * width + e + 1] * second;
        }
    }
    for (int r = 0; r < n; r++) put(scores[r], even[r] + odd[r]);
}

/* Adds to the sums of n heads the values of a block, as much of each as its weight says. */
static inline __attribute__((always_inline)) void
mix(int n, float (*weights)[TILE], int64_t width, const NUMBER *held, const NUMBER *ahead, float *sums)
{
    int64_t e = 0;
    for (int64_t i = 0; i < width * BLOCK; i += 64 / sizeof(NUMBER)) __builtin_prefetch(ahead + i);
    for (; e + LANES <= width; e += LANES) {
        lanes even[4], odd[4] = {};
        for (int r = 0; r < n; r++) even[r] = get(sums + r * (width + 2) + e);
        for (int64_t j = 0; j < BLOCK; j += 2) {
            lanes first = load(held + j * width + e), second = load(held + (j + 1) * width + e);
            for (int r = 0; r < n; r++) {
                even[r] += weights[r][j] * first;
                odd[r] += weights[r][j + 1] * second;
            }
        }
        for (int r = 0; r < n; r++) put(sums + r * (width + 2) + e, even[r] + odd[r]);
    }
    for (; e < width; e++)
        for (int r = 0; r < n; r++)
            for (int64_t j = 0; j < BLOCK; j++) sums[r * (width + 2) + e] += weights[r][j] * wide(held[j * width + e]);
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

/* The weighted sum of values that the heads of one key-value head give to a part of their sequence. */
static void attend(struct attention *job, int64_t part, int64_t group)
{
    int64_t width = job->width, shared = job->heads / job->groups, row = job->part_rows[part];
    int64_t start = job->part_starts[part], size = width * BLOCK;
    int64_t first = job->firsts[row] > start ? job->firsts[row] : start;
    int64_t last = job->lasts[row] < start + PART - 1 ? job->lasts[row] : start + PART - 1;
    const int32_t *table = job->tables + row * job->table_width;
    const NUMBER *q = job->q + job->tokens[row] * job->q_stride + group * shared * width;
    const NUMBER *keys = job->keys + group * size, *values = job->values + group * size;
    int64_t stride = job->groups * size;
    float own[shared * width], scores[shared][TILE];
    for (int64_t i = 0; i < shared * width; i++) own[i] = wide(q[i]) * job->scale;
    float *sums = job->partial + (part * job->heads + group * shared) * (width + 2);
    for (int64_t r = 0; r < shared; r++) {
        memset(sums + r * (width + 2), 0, (width + 1) * sizeof(float));
        sums[r * (width + 2) + width + 1] = -INFINITY;
    }
    for (int64_t begin = first / TILE * TILE; begin <= last; begin += TILE) {
        int64_t from = first > begin ? first - begin : 0, to = last - begin < TILE ? last - begin + 1 : TILE;
        for (int64_t b = from / BLOCK; b * BLOCK < to; b++) {
            int64_t place = begin / BLOCK + b, after = place < last / BLOCK ? place + 1 : place;
            const NUMBER *held = keys + table[place] * stride, *ahead = keys + table[after] * stride;
            FOUR_AT_A_TIME(shared, score(n, own + r * width, width, held, r ? held : ahead, (float(*)[TILE])(scores[r] + b * BLOCK)))
        }
        for (int64_t r = 0; r < shared; r++) weigh(scores[r], from, to, sums + r * (width + 2), width, job->cap);
        for (int64_t b = from / BLOCK; b * BLOCK < to; b++) {
            int64_t place = begin / BLOCK + b, after = place < last / BLOCK ? place + 1 : place;
            const NUMBER *held = values + table[place] * stride, *ahead = values + table[after] * stride;
            FOUR_AT_A_TIME(shared, mix(n, (float(*)[TILE])(scores[r] + b * BLOCK), width, held, r ? held : ahead, sums + r * (width + 2)))
        }
    }
}

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
        attend(job, task / groups, task % groups);
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

/* Heads turned by their positions; the first half of a head pairs with the second. */
struct turn {
    int64_t taken, rows, heads, width, stride;       /* from token to token of x */
    const NUMBER *x, *cosines, *sines;               /* [rows, heads, width]; [rows, width] */
    NUMBER *out;                                     /* [rows, heads, width] */
};

void turn(struct turn *job)
{
    int64_t row, width = job->width, half = width / 2;
    while ((row = next(&job->taken)) < job->rows) {
        const NUMBER *c = job->cosines + row * width, *s = job->sines + row * width;
        for (int64_t head = 0; head < job->heads; head++) {
            const NUMBER *x = job->x + row * job->stride + head * width;
            NUMBER *out = job->out + (row * job->heads + head) * width;
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

void draw(struct draw *job)
{
    enum { STRETCH = 256 };
    int64_t row, size = job->size, stretches = (size + STRETCH - 1) / STRETCH;
    while ((row = next(&job->taken)) < job->rows) {
        const NUMBER *logits = job->logits + job->places[row] * job->stride;
        double sums[stretches], total = 0;
        lanes high = all(-INFINITY);
        int64_t i = 0, found = -1;
        for (; i + LANES <= size; i += LANES) { lanes x = load(logits + i); high = pick(x > high, x, high); }
        float most = high[0], scale = job->scales[row];
        for (int l = 1; l < LANES; l++) most = high[l] > most ? high[l] : most;
        for (; i < size; i++) most = wide(logits[i]) > most ? wide(logits[i]) : most;
        for (int64_t s = 0; s < stretches; s++) {
            lanes added = {};
            for (i = s * STRETCH; i < (s + 1) * STRETCH && i < size; i += LANES)
                added += weights(logits + i, size - i, scale, most);
            total += sum(added);
            sums[s] = total;
        }
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
