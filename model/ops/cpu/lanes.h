/* Vectors of LANES numbers, e to such, products of pairs, and counters that threads share: what the kernels here have in
   common. NUMBER is uint16_t for the bit patterns of bfloat16, or float. */

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

enum { LINE = 32, SIDE = 16, PAIR = 4 / sizeof(NUMBER), VECTORS = LINE / LANES };

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint32_t word __attribute__((may_alias));
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

#ifdef __AMX_BF16__
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((packed)) tiles;
#endif
