// One step of decoding on a CPU: read some tokens of one or several sequences, return the logits of the next.
//
// A step's time is that of reading the weights from memory, if nothing else gets in the way. So one call does
// the whole step: embedding, then for each layer attention and experts, then the head. native.py compiles
// this file and calls `decode_step`; decoder.py has the same in PyTorch.
//
// A row is one token. The rows of one call may belong to different sequences, each with a cache of its own,
// or be consecutive tokens of one prompt: keys and values of all rows are stored before any row attends.
// Every weight is read once for all rows. Each sum is computed by one thread, in an order that depends
// neither on the number of threads nor on the other rows.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

struct bf16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return x; }
inline float widen(bf16 x) {  // the upper half of a float
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

// The floats of one vector register, as GCC and Clang know them on every processor.
#ifdef __AVX512F__
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

inline Floats load(const float* p) {
    Floats y;
    std::memcpy(&y, p, sizeof y);
    return y;
}

inline Floats load(const bf16* p) {
    Halves halves;
    std::memcpy(&halves, p, sizeof halves);
    Words words = __builtin_convertvector(halves, Words) << 16;
    Floats y;
    std::memcpy(&y, &words, sizeof y);
    return y;
}

inline Floats load(const int8_t* p) {
#if defined(__AVX512F__)  // what GCC 12 makes of the lines below takes twice as long
    return Floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))));
#elif defined(__AVX2__)
    return Floats(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))));
#else
    Bytes bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    Ints ints = __builtin_convertvector(__builtin_convertvector(bytes, Shorts), Ints);
    return __builtin_convertvector(ints, Floats);
#endif
}

// x * y + z, in one rounding where the processor has that. The compiler is told not to form such products by
// itself (compiling.py): it does so at one place and not at another, so that the logits of a text would
// depend on the other texts of the step.
inline Floats multiply_add(Floats x, Floats y, Floats z) {
#if defined(__AVX512F__)
    return Floats(_mm512_fmadd_ps(__m512(x), __m512(y), __m512(z)));
#elif defined(__AVX2__) && defined(__FMA__)
    return Floats(_mm256_fmadd_ps(__m256(x), __m256(y), __m256(z)));
#elif defined(__aarch64__)
    for (int64_t lane = 0; lane < LANES; ++lane) z[lane] = __builtin_fmaf(x[lane], y[lane], z[lane]);
    return z;
#else
    return x * y + z;
#endif
}

// Keeps x in its register. GCC 12 otherwise loads it anew for each product, at half the speed.
inline void hold(Floats& x) {
#ifdef __AVX2__
    asm("" : "+v"(x));
#endif
}

// Memory that begins where a cache line does: a load across two lines takes twice as long.
template <class T>
struct Aligned {
    static constexpr std::align_val_t LINE{64};
    using value_type = T;
    Aligned() = default;
    template <class U>
    Aligned(const Aligned<U>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), LINE)); }
    void deallocate(T* p, size_t) { ::operator delete(p, LINE); }
    friend bool operator==(const Aligned&, const Aligned&) { return true; }
    friend bool operator!=(const Aligned&, const Aligned&) { return false; }
};
typedef std::vector<float, Aligned<float>> Buffer;

// Loads fewer numbers than a register holds; the other lanes are 0.
template <class T>
inline Floats load_some(const T* p, int64_t count) {
    float lanes[LANES] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = widen(p[i]);
    return load(lanes);
}

typedef float Four __attribute__((vector_size(16)));

// The sums of a register's lanes that lie four apart.
inline Four fold(Floats x) {
    Four parts[LANES / 4];
    std::memcpy(parts, &x, sizeof x);
    if (LANES == 16) parts[0] += parts[LANES / 8], parts[1] += parts[LANES * 3 / 16];
    return parts[0] + parts[1];
}

// Sets y to the total of each of R registers; the order in which lanes are added depends on the lanes alone.
template <int R>
inline void totals(const Floats (&x)[R], float (&y)[R]) {
    int r = 0;
#ifdef __AVX2__
    for (; r + 4 <= R; r += 4) {  // four at a time cost little more than one
        __m128 a = fold(x[r]), b = fold(x[r + 1]), c = fold(x[r + 2]), d = fold(x[r + 3]);
        _MM_TRANSPOSE4_PS(a, b, c, d);
        _mm_storeu_ps(y + r, (a + c) + (b + d));
    }
#endif
    for (; r < R; ++r) {
        Four lanes = fold(x[r]);
        y[r] = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
    }
}

// e to the power of each lane, to 2 units in the last place; beyond what a float holds the largest or least.
// As Cephes computes expf: 2^n times a polynomial of what is left, |r| <= ln(2) / 2 (www.netlib.org/cephes).
inline Floats exp(Floats x) {
    constexpr float ROUND = 12582912;  // 1.5 * 2^23: a sum with it has no digits behind the point
    Floats least = Floats{} - 87.3f, most = Floats{} + 88.0f;
    x = x < least ? least : x;
    x = x > most ? most : x;
    Floats n = multiply_add(x, Floats{} + 1.44269504f, Floats{} + ROUND) - ROUND;
    Floats r = multiply_add(n, Floats{} - 0.693359375f, x);  // ln(2) in two parts
    r = multiply_add(n, Floats{} + 2.12194440e-4f, r);
    Floats y = Floats{} + 1.9875691500e-4f;
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        y = multiply_add(y, r, Floats{} + c);
    y = multiply_add(y * r, r, r) + 1;
    Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
    Floats power;
    std::memcpy(&power, &exponent, sizeof power);
    return y * power;
}

// Replaces each of n numbers by map(number), a register at a time.
template <class Map>
inline void replace(float* x, int64_t n, Map map) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Floats y = map(load(x + i));
        std::memcpy(x + i, &y, sizeof y);
    }
    if (i < n) {
        Floats y = map(load_some(x + i, n - i));
        std::memcpy(x + i, &y, (n - i) * sizeof(float));
    }
}

}  // namespace

// The structures below are those of native.py, field by field.

struct Matrix {  // (out, in), row by row
    const void* data;
    const float* scale;  // (out,), by which a row is multiplied; null: 1
};

struct Layer {
    const float *norm_1, *norm_2;          // (n_embd,)
    Matrix qkv, proj;                      // (query, key and value of all heads, n_embd), (n_embd, query)
    const float *router, *selection_bias;  // (n_expert, n_embd), (n_expert,) or null
    const Matrix *gates, *ups, *downs;     // of each expert, the shared one last: fc_1, fc_2, proj
    int64_t n_expert, top_k, width,
        shared_width;  // a dense layer has 0 experts and its MLP as the shared one
};

struct Model {
    int64_t dtype;  // of the matrices: 0 float, 1 bf16, 2 int8
    int64_t n_layer, n_embd, n_head, n_query_groups, head_size, rope_n_elem, vocab;
    float norm_eps, attention_scale, routed_scale;
    const Layer* layers;
    Matrix embedding, head;
    const float *norm, *cos, *sin;  // (n_embd,), (positions, rope_n_elem)
};

struct Row {
    int64_t token, position;
    float* cache;      // of its sequence: (n_layer, 2, n_query_groups, capacity, head_size), keys then values
    int64_t capacity;  // positions that the cache has room for
    int64_t logits;    // the row of the logits to write, -1: none
};

namespace {

// Rows of x that share the loaded weights: as many sums of four rows of W as there are registers for.
constexpr int TOGETHER = LANES == 16 ? 4 : 2;

// Adds the products of R rows of W and N of x, at the places from i on, to the sums.
template <int R, int N, class T>
inline void add_products(const T* w, int64_t in, const float* const* x, int64_t i, Floats (&sums)[N][R]) {
    Floats weights[R];
    for (int r = 0; r < R; ++r) weights[r] = load(w + r * in + i);
    for (int r = 0; N > 2 && r < R; ++r) hold(weights[r]);
    for (int n = 0; n < N; ++n) {
        Floats values = load(x[n] + i);
        hold(values);
        for (int r = 0; r < R; ++r) sums[n][r] = multiply_add(weights[r], values, sums[n][r]);
    }
}

// Sets y to the products of R rows of W and N of x; the order of a sum depends on neither R nor N.
// The first time that weights are read, those that lie AHEAD bytes later are asked for: the processor by
// itself foresees one stream of addresses, not R of them that end after a row (30 against 22 GB/s on an EPYC
// core).
template <int R, int N, class T>
inline void tile(const T* w, int64_t in, const float* const* x, bool is_first, float (&y)[N][R]) {
    constexpr int64_t AHEAD = 8192, LINE = 64, IN_LINE = LINE / int64_t(sizeof(T));
    const char* next = reinterpret_cast<const char*>(w) + AHEAD;
    Floats sums[N][R] = {};
    int64_t i = 0;
    for (; i + IN_LINE <= in; i += IN_LINE) {
        for (int r = 0; is_first && r < R; ++r, next += LINE) __builtin_prefetch(next);
        for (int64_t k = 0; k < IN_LINE; k += LANES) add_products(w, in, x, i + k, sums);
    }
    for (; i + LANES <= in; i += LANES) add_products(w, in, x, i, sums);
    for (int n = 0; n < N; ++n) {
        for (int r = 0; i < in && r < R; ++r) {
            Floats weights = load_some(w + r * in + i, in - i);
            sums[n][r] = multiply_add(weights, load_some(x[n] + i, in - i), sums[n][r]);
        }
        totals(sums[n], y[n]);
    }
}

// Calls put(row, o, W[o] . x[row]) for R values of o and each of n rows.
template <int R, class T, class Put>
inline void product_of_rows(const Matrix& matrix, int64_t in, int64_t o, const float* const* x, int64_t n,
                            Put put) {
    const T* w = static_cast<const T*>(matrix.data) + o * in;
    auto put_all = [&](int64_t row, const float (&y)[R]) {
        for (int r = 0; r < R; ++r) put(row, o + r, matrix.scale ? y[r] * matrix.scale[o + r] : y[r]);
    };
    int64_t row = 0;
    auto rows_at_once = [&](auto count) {
        constexpr int N = decltype(count)::value;
        for (; row + N <= n; row += N) {
            float y[N][R];
            tile<R, N>(w, in, x + row, row == 0, y);
            for (int k = 0; k < N; ++k) put_all(row + k, y[k]);
        }
    };
    rows_at_once(std::integral_constant<int, TOGETHER>{});
    rows_at_once(std::integral_constant<int, 2>{});
    rows_at_once(std::integral_constant<int, 1>{});
}

// Calls put(row, o, W[o] . x[row]) for each row and each o from `begin` up to `end`.
template <class T, class Put>
void product(const Matrix& matrix, int64_t in, int64_t begin, int64_t end, const float* const* x, int64_t n,
             Put put) {
    int64_t o = begin;
    for (; o + 4 <= end; o += 4) product_of_rows<4, T>(matrix, in, o, x, n, put);
    for (; o < end; ++o) product_of_rows<1, T>(matrix, in, o, x, n, put);
}

float dot(const float* a, const float* b, int64_t n) {
    float y[1][1];
    tile<1, 1>(a, n, &b, false, y);
    return y[0][0];
}

// Root mean square normalisation (arxiv.org/abs/1910.07467).
void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
    float factor = 1 / std::sqrt(dot(x, x, n) / n + eps);
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

// Rotary position embedding of one head (arxiv.org/abs/2104.09864), halves as in litgpt.model.apply_rope.
void rotate(float* x, const Model& m, int64_t position) {
    const float *cos = m.cos + position * m.rope_n_elem, *sin = m.sin + position * m.rope_n_elem;
    for (int64_t i = 0, half = m.rope_n_elem / 2; i < half; ++i) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

// Attention of one head to all positions up to the row's own; `probs` has room for them.
void attend(const Model& m, const Row& row, int64_t layer, int64_t head, const float* q, float* probs,
            float* y) {
    int64_t size = m.head_size, n = row.position + 1, group = head / (m.n_head / m.n_query_groups);
    const float* keys = row.cache + (layer * 2 * m.n_query_groups + group) * row.capacity * size;
    const float* values = keys + m.n_query_groups * row.capacity * size;
    float top = -INFINITY, sum = 0;
    product<float>({keys, nullptr}, size, 0, n, &q, 1, [&](int64_t, int64_t t, float y) {
        top = std::max(top, probs[t] = y * m.attention_scale);
    });
    replace(probs, n, [&](Floats x) { return exp(x - top); });
    for (int64_t t = 0; t < n; ++t) sum += probs[t];
    replace(probs, n, [&](Floats x) { return x / sum; });
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        Floats mean = {};
        for (int64_t t = 0; t < n; ++t)
            mean = multiply_add(Floats{} + probs[t], load(values + t * size + i), mean);
        std::memcpy(y + i, &mean, sizeof mean);
    }
    for (; i < size; ++i) {
        y[i] = 0;
        for (int64_t t = 0; t < n; ++t) y[i] += probs[t] * values[t * size + i];
    }
}

// The K experts with the highest score and the softmax of their logits (Mixtral, arxiv.org/abs/2401.04088).
void choose(const Model& m, const Layer& layer, const float* logits, int64_t* experts, float* weights) {
    float top = -INFINITY, sum = 0;
    for (int64_t k = 0; k < layer.top_k; ++k) {
        int64_t best = -1;
        float best_score = 0;
        for (int64_t e = 0; e < layer.n_expert; ++e) {
            float score = logits[e] + (layer.selection_bias ? layer.selection_bias[e] : 0);
            bool is_taken = std::find(experts, experts + k, e) != experts + k;
            if (!is_taken && (best < 0 || score > best_score)) best = e, best_score = score;
        }
        experts[k] = best;
        top = std::max(top, weights[k] = logits[best]);
    }
    for (int64_t k = 0; k < layer.top_k; ++k) sum += weights[k] = std::exp(weights[k] - top);
    for (int64_t k = 0; k < layer.top_k; ++k) weights[k] *= m.routed_scale / sum;
}

// What one thread does in a step. All threads call the same functions; `barrier` comes where one needs what
// another wrote. Norms and routers are so small that every thread computes them for itself.
template <class T>
struct Worker {
    const Model& m;
    const Row* rows;
    int64_t n, part, parts;
    float *x, *qkv, *attended, *hidden;  // shared by the threads: (n, ...)
    int64_t qkv_width, query_width, hidden_width;
    int64_t most;  // experts of one token, the shared one included: the largest number in any layer
    Buffer normed, scores, weights;  // scores: of each position, of each expert for each row
    std::vector<int64_t> experts, where;  // (n, most); the places k + most * row that go to an expert
    std::vector<const float*> in;

    // this thread's part of n outputs, in fours
    int64_t begin(int64_t n_out) const { return std::min(n_out, (n_out / 4 * part / parts) * 4); }
    int64_t end(int64_t n_out) const {
        return part + 1 == parts ? n_out : std::min(n_out, (n_out / 4 * (part + 1) / parts) * 4);
    }

    template <class Put>
    void multiply(const Matrix& matrix, int64_t n_in, int64_t n_out, int64_t n_rows, Put put) {
        product<T>(matrix, n_in, begin(n_out), end(n_out), in.data(), n_rows, put);
    }

    void normalise(const float* weight) {
        for (int64_t r = 0; r < n; ++r) {
            rms_norm(x + r * m.n_embd, weight, m.n_embd, m.norm_eps, &normed[r * m.n_embd]);
            in[r] = &normed[r * m.n_embd];
        }
    }

    void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
    }

    void attention(int64_t l) {
        const Layer& layer = m.layers[l];
        int64_t size = m.head_size, groups = m.n_query_groups;
        normalise(layer.norm_1);
        multiply(layer.qkv, m.n_embd, qkv_width, n,
                 [&](int64_t r, int64_t o, float y) { qkv[r * qkv_width + o] = y; });
        barrier();
        for (int64_t job = part; job < n * groups; job += parts) {
            const Row& row = rows[job / groups];
            float* key = qkv + job / groups * qkv_width + query_width + job % groups * size;
            float* to = row.cache + ((l * 2 * groups + job % groups) * row.capacity + row.position) * size;
            rotate(key, m, row.position);
            std::copy(key, key + size, to);
            std::copy(key + groups * size, key + (groups + 1) * size, to + groups * row.capacity * size);
        }
        barrier();
        for (int64_t job = part; job < n * m.n_head; job += parts) {
            int64_t r = job / m.n_head, head = job % m.n_head;
            float* query = qkv + r * qkv_width + head * size;
            rotate(query, m, rows[r].position);
            attend(m, rows[r], l, head, query, scores.data(), attended + r * query_width + head * size);
        }
        barrier();
        for (int64_t r = 0; r < n; ++r) in[r] = attended + r * query_width;
        multiply(layer.proj, query_width, m.n_embd, n,
                 [&](int64_t r, int64_t o, float y) { x[r * m.n_embd + o] += y; });
        barrier();
    }

    // Calls run(expert, its width, number of its places) for each expert that has a token.
    template <class Run>
    void each_expert(const Layer& layer, Run run) {
        for (int64_t e = 0; e <= layer.n_expert; ++e) {
            int64_t count = 0, width = e < layer.n_expert ? layer.width : layer.shared_width;
            for (int64_t place = 0; place < n * most && width; ++place)
                if (experts[place] == e) where[count++] = place;
            if (count) run(e, width, count);
        }
    }

    void mlp(const Layer& layer, float* logits_out) {
        int64_t C = m.n_embd;
        normalise(layer.norm_2);
        std::fill(experts.begin(), experts.end(), -1);
        product<float>({layer.router, nullptr}, C, 0, layer.n_expert, in.data(), n,
                       [&](int64_t r, int64_t e, float y) { scores[r * layer.n_expert + e] = y; });
        if (logits_out && part == 0) std::copy_n(scores.data(), n * layer.n_expert, logits_out);
        for (int64_t r = 0; r < n; ++r) {
            choose(m, layer, &scores[r * layer.n_expert], &experts[r * most], &weights[r * most]);
            if (layer.shared_width)
                experts[r * most + layer.top_k] = layer.n_expert, weights[r * most + layer.top_k] = 1;
        }
        auto hidden_of = [&](int64_t place) {
            return hidden + place / most * hidden_width + place % most * layer.width;
        };
        each_expert(layer, [&](int64_t e, int64_t width, int64_t count) {
            for (int64_t j = 0; j < count; ++j) in[j] = &normed[where[j] / most * C];
            multiply(layer.gates[e], C, width, count,
                     [&](int64_t j, int64_t o, float y) { hidden_of(where[j])[o] = y; });
            for (int64_t j = 0; j < count; ++j)
                replace(hidden_of(where[j]) + begin(width), end(width) - begin(width),
                        [](Floats x) { return x / (1 + exp(-x)); });
            multiply(layer.ups[e], C, width, count,
                     [&](int64_t j, int64_t o, float y) { hidden_of(where[j])[o] *= y; });
        });
        barrier();
        each_expert(layer, [&](int64_t e, int64_t width, int64_t count) {
            for (int64_t j = 0; j < count; ++j) in[j] = hidden_of(where[j]);
            multiply(layer.downs[e], width, C, count, [&](int64_t j, int64_t o, float y) {
                x[where[j] / most * C + o] += weights[where[j]] * y;
            });
        });
        barrier();
    }

    void step(float* logits, float* router_logits) {
        for (int64_t l = 0; l < m.n_layer; ++l) {
            attention(l);
            mlp(m.layers[l], router_logits);
            if (router_logits) router_logits += n * m.layers[l].n_expert;
        }
        normalise(m.norm);
        int64_t wanted = 0;
        for (int64_t r = 0; r < n; ++r)
            if (rows[r].logits >= 0) where[wanted] = rows[r].logits, in[wanted++] = in[r];
        multiply(m.head, m.n_embd, m.vocab, wanted,
                 [&](int64_t j, int64_t o, float y) { logits[where[j] * m.vocab + o] = y; });
    }
};

template <class T>
void step(const Model& m, const Row* rows, int64_t n, int64_t n_threads, float* logits,
          float* router_logits) {
    int64_t C = m.n_embd, n_scores = 0, most = 1, hidden_width = 0;
    for (int64_t r = 0; r < n; ++r) n_scores = std::max(n_scores, rows[r].position + 1);
    for (int64_t l = 0; l < m.n_layer; ++l) {
        const Layer& layer = m.layers[l];
        n_scores = std::max(n_scores, n * layer.n_expert);
        most = std::max(most, layer.top_k + 1);
        hidden_width = std::max(hidden_width, layer.top_k * layer.width + layer.shared_width);
    }
    int64_t query_width = m.n_head * m.head_size,
            qkv_width = query_width + 2 * m.n_query_groups * m.head_size;
    Buffer x(n * C), qkv(n * qkv_width), attended(n * query_width), hidden(n * hidden_width);
    for (int64_t r = 0; r < n; ++r) {
        const T* embedding = static_cast<const T*>(m.embedding.data) + rows[r].token * C;
        float scale = m.embedding.scale ? m.embedding.scale[rows[r].token] : 1;
        for (int64_t i = 0; i < C; ++i) x[r * C + i] = widen(embedding[i]) * scale;
    }
    std::vector<Worker<T>> workers;  // allocated here, where an exception can be caught
    for (int64_t part = 0; part < n_threads; ++part)
        workers.push_back({m, rows, n, part, n_threads, x.data(), qkv.data(), attended.data(), hidden.data(),
                           qkv_width, query_width, hidden_width, most, Buffer(n * C), Buffer(n_scores),
                           Buffer(n * most), std::vector<int64_t>(n * most), std::vector<int64_t>(n * most),
                           std::vector<const float*>(n * most)});
#pragma omp parallel num_threads(n_threads)
    {
#ifdef _OPENMP
        Worker<T>& worker = workers[omp_get_thread_num()];
        worker.parts = omp_get_num_threads();  // fewer where the system has no more threads
#else
        Worker<T>& worker = workers[0];
        worker.parts = 1;
#endif
        worker.step(logits, router_logits);
    }
}

}  // namespace

// Reads n rows; returns 0, or 1 if memory is lacking, in which case nothing has been written.
// logits: (rows that want them, vocab). router_logits: null, or (n, n_expert) of each layer with experts.
extern "C" int decode_step(const Model* model, const Row* rows, int64_t n, int64_t n_threads, float* logits,
                           float* router_logits) {
    try {
        if (model->dtype == 0) step<float>(*model, rows, n, n_threads, logits, router_logits);
        if (model->dtype == 1) step<bf16>(*model, rows, n, n_threads, logits, router_logits);
        if (model->dtype == 2) step<int8_t>(*model, rows, n, n_threads, logits, router_logits);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
